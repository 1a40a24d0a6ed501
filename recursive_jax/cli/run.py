"""recursive-jax run: a whole experiment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recursive_jax.cli.common import config_arguments, set_up
from recursive_jax.errors import InputError

HELP = "run a whole experiment, whatever its recipe: data, models, evaluation, report"
EXAMPLE = "recursive-jax run configs/quickstart.yaml rounds.count=3 --workdir runs/three"
arguments = config_arguments


def run(args: argparse.Namespace) -> int:
    from recursive_jax.recipes import load_config

    return run_config(load_config(args.config, args.overrides), args)


def run_config(config: Any, args: argparse.Namespace) -> int:
    """Runs a config, or prices it."""
    set_up(config.mesh)
    from recursive_jax.environment import require_same
    from recursive_jax.mesh import is_main
    from recursive_jax.recipes import preflight, recipe_of
    from recursive_jax.recipes import run as run_recipe
    from recursive_jax.rounds.status import status_text

    recipe = recipe_of(config)
    require_same(args.same_environment)
    if args.dry_run or args.preview is not None:
        preflight(config)
        print(dry_run(config, recipe) if args.dry_run else preview(config, recipe, args.preview))
        return 0
    run_recipe(config, args.workdir, fork=args.fork, quiet=args.quiet)
    if is_main():
        print(status_text(args.workdir, short=True))
        print(f"report: {Path(args.workdir) / 'report.html'}")
    return 0


def preview(config: Any, recipe: Any, rows: int) -> str:
    """Some rows as the recipe asks them. Raises InputError for a recipe that asks none."""
    if rows < 1:
        raise InputError(f"--preview={rows}: at least one row is wanted")
    if recipe.preview is None:
        raise InputError(
            f"--preview: recipe {recipe.name} asks nothing through a template; --dry-run says what it costs"
        )
    return recipe.preview(config, rows)


def dry_run(config: Any, recipe: Any) -> str:
    """The resolved config as YAML, and what it takes."""
    import yaml

    from recursive_jax.rounds.work import cost_lines

    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip()
    return "\n".join([resolved, "---", *cost_lines(recipe.cost(config), config.mesh)])
