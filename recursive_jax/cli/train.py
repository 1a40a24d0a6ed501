"""recursive-jax train: only the first model of a config."""

from __future__ import annotations

import argparse

from recursive_jax.cli.common import config_arguments
from recursive_jax.cli.run import run_config
from recursive_jax.errors import InputError

HELP = "train only the first model of a config (its round 0) and evaluate it"
EXAMPLE = "recursive-jax train configs/wikitext.yaml data.path=corpus.txt --workdir runs/teacher"
arguments = config_arguments


def run(args: argparse.Namespace) -> int:
    from recursive_jax.recipes import load_config

    config = load_config(args.config, args.overrides)
    if not hasattr(config, "rounds"):
        raise InputError(
            f"`train` trains the first model before rounds begin, and recipe={config.recipe} has none; use `run`"
        )
    return run_config(config.model_copy(update={"rounds": config.rounds.model_copy(update={"count": 0})}), args)
