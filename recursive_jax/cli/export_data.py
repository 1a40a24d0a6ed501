"""recursive-jax export-data: rows for other tools."""

from __future__ import annotations

import argparse
import os

from recursive_jax.errors import InputError

HELP = "write the rows of a run, or of a file, as a folder that datasets.load_dataset opens, with a card"
EXAMPLE = "recursive-jax export-data runs/quickstart exported/rows --license cc0-1.0"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="RUN|FILE", help="a run folder; or a .parquet, .jsonl or .csv file")
    p.add_argument("out", metavar="DIR", help="a new folder")
    p.add_argument("--rows", metavar="NAME", help="the result, as `status` names it; default: the last training set")
    p.add_argument("--license", default="other", help="of the rows, as the hub names it: cc0-1.0, cc-by-4.0, ...")
    p.add_argument("--name", help="the card's title; default: the folder's name")


def run(args: argparse.Namespace) -> int:
    from recursive_jax.recipes import find_recipe
    from recursive_jax.rounds.export_rows import export_rows, recipe_name

    if not os.path.exists(args.source):
        raise InputError(f"{args.source}: there is no such run or file")
    name = recipe_name(args.source)
    try:
        paper = find_recipe(name).paper if name else ""
    except InputError:
        paper = ""  # a recipe of the user's that is not on the path
    chosen, data = export_rows(args.source, args.out, args.rows, args.license, paper, args.name)
    print(f"{len(data):,} rows of {chosen} written to {args.out}; datasets.load_dataset({args.out!r}) opens them")
    return 0
