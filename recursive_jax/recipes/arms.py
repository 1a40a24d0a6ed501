"""Arms and replicates of any recipe: the same program with some keys changed, and with other random numbers, in one
run and one report; and the collapse profile of what its students learnt from.

    arms: {main: {}, hot: {sampling: {temperature: 1.3}}}
    replicates: 3
    profile: true"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recursive_jax import mesh as meshes
from recursive_jax.config.loader import parse_section
from recursive_jax.errors import InputError
from recursive_jax.recipes.recipe import Recipe, RecipeConfig
from recursive_jax.rounds.place import Place, placed
from recursive_jax.rounds.report import lacking, write_report

FIXED = ("recipe", "name", "seed", "mesh", "arms", "replicates", "profile")  # of the whole run
TAKEN = ("rounds", "profiles")  # folders of a run


def configs_of(recipe: Recipe, config: RecipeConfig) -> dict[str, RecipeConfig]:
    """arm -> its config. Raises one InputError with what is wrong with each."""
    whole = config.model_dump(exclude_unset=True, mode="json")
    found, wrong = {}, []
    for name, changes in (config.arms or {"main": {}}).items():
        if name in TAKEN or not name.replace("-", "").replace("_", "").isalnum() or len(name.encode()) > 100:
            wrong.append(f"arms.{name}: an arm is a folder: letters, digits, '-', '_', and not {' or '.join(TAKEN)}")
        wrong += [f"arms.{name}.{key} is of the whole run, not of an arm" for key in changes if key in FIXED]
        own = {key: value for key, value in whole.items() if key not in ("arms", "replicates", "profile")}
        try:
            found[name] = parse_section(recipe.Config, _merged(own, changes), where=f"arms.{name}")
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("\n".join(wrong))
    return found


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`other` laid over `one`, sections key by key."""
    both = lambda key: isinstance(one.get(key), Mapping) and isinstance(other[key], Mapping)
    return {**one, **{key: _merged(one[key], other[key]) if both(key) else other[key] for key in other}}


def run_arms(
    recipe: Recipe, config: RecipeConfig, workdir: Any, *, fork: Any = None, quiet: bool = False
) -> list[dict]:
    """Runs (or goes on with) all arms and replicates; the metrics records of all of them."""
    if recipe.own_arms or not (config.arms or config.replicates > 1):
        records = recipe.run(config, workdir, fork=fork, quiet=quiet)
    else:
        for number, (arm, own) in enumerate(configs_of(recipe, config).items()):
            for replicate in range(config.replicates):
                where = Place(config, arm, replicate, config.replicates, not number and not replicate)
                with placed(where):
                    records = recipe.run(own, workdir, fork=fork, quiet=quiet)
    if config.profile:
        meshes.on_main(lambda: lacking.save(workdir))
        meshes.on_main(lambda: write_report(workdir, recipe.layout))
    return records
