"""recursive-jax evaluate: one stored model on real text."""

from __future__ import annotations

import argparse
import json
import sys

from recursive_jax.cli.common import MODEL, override_arguments, set_up

HELP = "score a stored model on real text, and its samples; prints JSON"
EXAMPLE = "recursive-jax evaluate runs/wikitext --data corpus.txt"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL)
    override_arguments(p, "evaluate.*, sampling.*, data.* and mesh.* keys, and seed")
    p.add_argument(
        "--data", metavar="PATH", help="real text; default: the embedded language, for a model trained on it"
    )
    p.add_argument(
        "--judge", "--base", metavar="MODEL", help="the model that judges the samples; default: the model itself"
    )


def run(args: argparse.Namespace) -> int:
    from recursive_jax.config.loader import parse_section
    from recursive_jax.rounds.options import EvaluateOptions

    overrides = list(args.overrides) + ([f"data.path={args.data}"] if args.data else [])
    options = parse_section(EvaluateOptions, {}, overrides, "evaluate")
    set_up(options.mesh)
    from recursive_jax.rounds.opening import chosen_name
    from recursive_jax.rounds.standalone import evaluate_model

    chosen = chosen_name(args.model)
    if chosen:
        print(chosen, file=sys.stderr)
    metrics = evaluate_model(args.model, options, judge=args.judge)
    print("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in metrics.items()) + "\n}")
    return 0
