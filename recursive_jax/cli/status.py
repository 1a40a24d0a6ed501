"""recursive-jax status: what a run holds."""

from __future__ import annotations

import argparse
import json

HELP = "print the chain of results of a run, and what each round lost"
EXAMPLE = "recursive-jax status runs/quickstart"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="DIR")
    p.add_argument(
        "--row",
        metavar="ID",
        help="print the ancestors of a generated row, e.g. replace/2/rows/7: the id column of rows-*.parquet",
    )
    p.add_argument("--json", action="store_true", help="print the metrics records as JSON lines")


def run(args: argparse.Namespace) -> int:
    from recursive_jax.rounds.lineage import ancestors, evaluations
    from recursive_jax.rounds.status import ancestors_text, status_text

    if args.row:
        print(ancestors_text(ancestors(args.run, args.row)))
    elif args.json:
        for record in evaluations(args.run):
            print(json.dumps(record))
    else:
        print(status_text(args.run))
    return 0
