"""The recipes, each a short program over the durable verbs. A new one is a file here and a line in this table."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recursive_jax.config.loader import parse_section, split_override
from recursive_jax.config.yaml_text import read_yaml
from recursive_jax.errors import InputError
from recursive_jax.recipes.arms import configs_of, run_arms
from recursive_jax.recipes.recipe import Recipe, RecipeConfig

#: Where each recipe is, imported when it is asked for.
RECIPES = {
    "collapse": "recursive_jax.recipes.collapse:recipe",
    "broad_to_narrow": "recursive_jax.recipes.broad_to_narrow:recipe",
    "finetune": "recursive_jax.recipes.finetune:recipe",
    "llm2llm": "recursive_jax.recipes.llm2llm:recipe",
    "self_instruct": "recursive_jax.recipes.self_instruct:recipe",
    "alpaca": "recursive_jax.recipes.alpaca:recipe",
    "evol_instruct": "recursive_jax.recipes.evol_instruct:recipe",
    "baize": "recursive_jax.recipes.baize:recipe",
    "backtranslation": "recursive_jax.recipes.backtranslation:recipe",
    "star": "recursive_jax.recipes.star:recipe",
    "rft": "recursive_jax.recipes.rft:recipe",
    "rest_em": "recursive_jax.recipes.rest_em:recipe",
    "spin": "recursive_jax.recipes.spin:recipe",
    "iterative_dpo": "recursive_jax.recipes.iterative_dpo:recipe",
    "self_rewarding": "recursive_jax.recipes.self_rewarding:recipe",
    "grpo": "recursive_jax.recipes.grpo:recipe",
    "rlaif": "recursive_jax.recipes.rlaif:recipe",
    "wizardmath": "recursive_jax.recipes.wizardmath:recipe",
    "distill": "recursive_jax.recipes.distill:recipe",
    "on_policy_distillation": "recursive_jax.recipes.on_policy_distillation:recipe",
    "sdft": "recursive_jax.recipes.sdft:recipe",
    "best_of_n": "recursive_jax.recipes.best_of_n:recipe",
    "self_consistency": "recursive_jax.recipes.self_consistency:recipe",
    "step_beam": "recursive_jax.recipes.step_beam:recipe",
    "self_refine": "recursive_jax.recipes.self_refine:recipe",
    "debate": "recursive_jax.recipes.debate:recipe",
    "shepherd": "recursive_jax.recipes.shepherd:recipe",
    "grit": "recursive_jax.recipes.grit:recipe",
    "raft": "recursive_jax.recipes.raft:recipe",
    "linkbert": "recursive_jax.recipes.linkbert:recipe",
    "infilling": "recursive_jax.recipes.infilling:recipe",
    "symbol_tuning": "recursive_jax.recipes.symbol_tuning:recipe",
}


def find_recipe(name: Any) -> Recipe:
    """The recipe of a name in the table, or of `package.module:name`. Raises InputError, naming what there is."""
    if not isinstance(name, str):
        raise InputError(f"recipe={name!r}: a name is wanted; there are: {', '.join(RECIPES)}")
    where = RECIPES.get(name, name)
    if ":" not in where:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}" if near else f"there are: {', '.join(RECIPES)}"
        raise InputError(
            f"recipe={name}: there is none of that name; {hint}. One of your own is given as package.module:name"
        )
    module, _, attribute = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise InputError(
            f"recipe={name}: the module {error.name} cannot be imported; is its folder on PYTHONPATH?"
        ) from None
    except AttributeError:
        raise InputError(f"recipe={name}: {module} has no {attribute}") from None
    if not isinstance(found, Recipe):
        raise InputError(f"recipe={name}: {attribute} is a {type(found).__name__}, a recursive_jax Recipe is wanted")
    return found


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), recipe: Recipe | None = None) -> Any:
    """Reads a YAML file and applies `key=value` overrides (dotted keys, YAML values); what keys there are, its recipe
    says.

    Raises `InputError` with every problem at once: unknown and unused keys (with the nearest known one), wrong types,
    values out of range.
    """
    raw = {} if path is None else read_yaml(path)
    if recipe is None:
        chosen = [split_override(o)[1] for o in overrides if o.partition("=")[0] == "recipe"]
        recipe = find_recipe((chosen or [raw.get("recipe", "collapse")])[-1])
    return parse_section(recipe.Config, raw, overrides, str(path) if path else "config", _use_elsewhere)


def _use_elsewhere(key: str) -> str | None:
    """Of a key that this recipe does not have, which recipes do."""
    found = [name for name in RECIPES if key in find_recipe(name).Config.model_fields]
    more = f" and {len(found) - 3} others" if len(found) > 3 else ""
    return f"it is for recipe={', '.join(found[:3])}{more}" if found else None


def recipe_of(config: RecipeConfig) -> Recipe:
    return find_recipe(config.recipe)


def run(config: RecipeConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) what a config describes; returns the metrics records, one per evaluation."""
    preflight(config)
    return run_arms(recipe_of(config), config, workdir, fork=fork, quiet=quiet)


def preflight(config: RecipeConfig) -> None:
    """Raises one InputError with all that is wrong with a config, or with one of its arms."""
    recipe = recipe_of(config)
    configs = [config] if recipe.own_arms or not config.arms else configs_of(recipe, config).values()
    for own in configs:
        recipe.preflight(own)
