"""recursive-jax recipes: what there is to run."""

from __future__ import annotations

import argparse

from recursive_jax.cli.common import set_up

HELP = "list the recipes, or print the options, the paper and an example of one"
EXAMPLE = "recursive-jax recipes collapse"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", nargs="?", metavar="NAME", help="a name of the list, or package.module:name")


def run(args: argparse.Namespace) -> int:
    set_up()
    from recursive_jax.recipes import RECIPES, find_recipe

    if args.recipe is None:
        width = max(map(len, RECIPES)) + 1
        for name in RECIPES:
            print(f"{name:<{width}} {find_recipe(name).summary}")
        print("\none of your own: recipe: package.module:name in its config (docs/examples/own_recipe.py)")
        return 0
    recipe = find_recipe(args.recipe)
    print(f"{recipe.name}: {recipe.summary}")
    if recipe.paper:
        print(f"paper: {recipe.paper}")
    if recipe.example:
        print(f"example: {recipe.example}")
    print("\noptions:")
    for line in option_lines(recipe.Config):
        print(f"  {line}")
    return 0


def option_lines(kind: type, prefix: str = "") -> list[str]:
    """Each dotted key of a section with its default and what it says of itself."""
    from recursive_jax.config.loader import section_of

    lines = []
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        many = str(field.annotation).startswith("dict")
        if inner is not None:
            lines += option_lines(inner, f"{prefix}{name}.<name>." if many else f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        lines.append(f"{prefix}{name + '=' + default:<34} {field.description or ''}".rstrip())
    return lines
