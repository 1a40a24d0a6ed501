"""recursive-jax profile: what anyone's samples lost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recursive_jax.cli.common import set_up

HELP = "say what anyone's samples lost, round by round, against real data; no run is needed"
EXAMPLE = "recursive-jax profile round1.parquet round2.parquet --reference real.parquet --out profile"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("samples", nargs="+", metavar="FILE", help="one for each round: .parquet, .jsonl or .txt with texts")
    p.add_argument("--reference", required=True, metavar="FILE", help="real texts")
    p.add_argument(
        "--encoder",
        metavar="MODEL",
        help="embed the texts with this model, minilm for one: adds the metrics of vectors",
    )
    p.add_argument("--out", metavar="FOLDER", help="write profile.html, .jsonl, .csv and figures")
    p.add_argument("--json", action="store_true", help="print one JSON object for each round")


def run(args: argparse.Namespace) -> int:
    from recursive_jax.collapse.profile import collapse_profile

    names = [Path(s).stem for s in args.samples]
    named = dict(zip(names, args.samples, strict=True))
    encoder = None
    if args.encoder:
        from recursive_jax.rounds.opening import load_model

        set_up()
        encoder = load_model(args.encoder)
    profile = collapse_profile(named if len(named) == len(names) else args.samples, args.reference, encoder=encoder)
    print(profile.jsonl() if args.json else profile, end="" if args.json else "\n")
    if args.out:
        print(profile.save(args.out), file=sys.stderr)
    return 0
