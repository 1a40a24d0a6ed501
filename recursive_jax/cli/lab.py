"""`recursive-jax lab`: the laboratory on the command line."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recursive_jax.cli.common import set_up
from recursive_jax.errors import InputError

HELP = "run a closed-form collapse experiment: thousands of chains in seconds, beside what theory expects"
EXAMPLE = (
    "recursive-jax lab gaussian samples=20 rounds=50 regime=fresh fraction=0.1 replicates=20000\n"
    "  recursive-jax lab categorical zipf=1.2 categories=5000 samples=10000 replicates=200 --json\n"
    "  recursive-jax lab kde samples=30 rounds=100 --sweep bandwidth=0.1,0.2,0.4"
)


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "family",
        metavar="FAMILY",
        help="gaussian, categorical, mixture, poisson, kde, regression, classifier, ngram, vae, transformer; or a YAML "
        "of configs/lab",
    )
    p.add_argument("overrides", nargs="*", metavar="key=value", help="options; docs/lab.md has them all")
    p.add_argument("--sweep", action="append", default=[], metavar="KEY=V,V", help="run every value; repeat for a grid")
    p.add_argument("--json", action="store_true", help="print JSON: one object, with --sweep a list")
    p.add_argument("--out", metavar="FOLDER", help="write lab.json, lab.csv and a figure (SVG, PNG)")


def run(args: argparse.Namespace) -> int:
    options, sweep = (
        _experiment(args.family) if args.family.endswith((".yaml", ".yml")) else ({"family": args.family}, {})
    )
    options |= dict(_pair(word) for word in args.overrides)
    sweep = {key: values for key, values in sweep.items() if key not in options}
    asked = {key: values.split(",") for key, values in map(_pair, args.sweep)}
    options, sweep = {k: v for k, v in options.items() if k not in asked}, sweep | asked
    set_up()
    from recursive_jax.collapse.lab.lab import lab

    found = lab(options.pop("family"), sweep=sweep, **options)
    results = found if sweep else [found]
    if args.json:
        print(json.dumps([x.to_dict() for x in found] if sweep else found.to_dict()))
    else:
        for result in results:
            if sweep:
                print("\n" + "  ".join(f"{key}={result.config[key]}" for key in sweep))
            print(table(result))
    if args.out:
        for path in write(results, list(sweep), Path(args.out)):
            print(path, file=sys.stderr)
    return 0


def _experiment(path: str) -> tuple[dict[str, Any], dict[str, list]]:
    """A YAML file: `family`, its options, and `sweep` with lists of values."""
    from recursive_jax.config.yaml_text import read_yaml

    raw = read_yaml(path, "lab: the experiment")
    if "family" not in raw:
        raise InputError(f"lab: {path} is not an experiment: it needs a key `family`, for example family: gaussian")
    sweep = raw.pop("sweep", None) or {}
    if not isinstance(sweep, dict) or not all(isinstance(v, list) for v in sweep.values()):
        raise InputError(f"lab: {path}: sweep is a mapping of options to lists of values")
    return raw, sweep


def write(results: Sequence[Any], swept: Sequence[str], folder: Path) -> list[Path]:
    """lab.json, lab.csv and, where matplotlib is installed, lab.svg and lab.png."""
    from recursive_jax.collapse import figures
    from recursive_jax.csv_text import csv_text

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "lab.json", folder / "lab.csv"]
    paths[0].write_text(json.dumps([r.to_dict() for r in results]), encoding="utf-8")
    rows: list[list[Any]] = [[*swept, "round", "statistic", "mean", "stderr", "expected"]]
    for r in results:
        for record in r.to_dict()["rounds"]:
            for name, v in record["statistics"].items():
                point = [r.config[key] for key in swept]
                rows.append([*point, record["round"], name, v["mean"], v["stderr"], v.get("expected")])
    paths[1].write_text(csv_text(rows), encoding="utf-8")
    if figures.available():
        paths += figures.save(figures.curves(_panels(results, swept)), folder, "lab")
    return paths


def _panels(results: Sequence[Any], swept: Sequence[str]) -> list[tuple[str, dict]]:
    panels = []
    for name in results[0].values:
        lines = {}
        for r in results:
            mean, stderr = r.mean[name], r.stderr[name]
            line = {"x": list(range(len(mean))), "y": mean, "low": mean - stderr, "high": mean + stderr}
            line["expected"] = r.expected.get(name)
            lines[", ".join(f"{key}={r.config[key]}" for key in swept) or r.family] = line
        panels.append((name.replace("_", " "), lines))
    return panels


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key or not value:
        raise InputError(f"lab: {word!r} is not of the form key=value, for example samples=20")
    return key, value


def table(result) -> str:
    """Some rounds of every statistic: mean, standard error, and what theory expects."""
    last, mean, stderr = result.config["rounds"], result.mean, result.stderr
    rounds = sorted({k for k in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500) if k < last} | {last})
    lines = [f"{'statistic':<20}" + "".join(f"{f'round {k}':>13}" for k in rounds)]
    for name in result.values:
        lines.append(f"{name:<20}" + _cells(mean[name], rounds))
        lines.append(f"{'  standard error':<20}" + _cells(stderr[name], rounds))
        if name in result.expected:
            lines.append(f"{'  expected':<20}" + _cells(result.expected[name], rounds))
    if sys.stdout.isatty():
        lines = [x if x.startswith("  ") else f"\033[1m{x}\033[0m" for x in lines]
    return "\n".join(lines)


def _cells(values: Any, rounds: Sequence[int]) -> str:
    return "".join(f"{values[k]:>13.5g}" if math.isfinite(values[k]) else f"{'-':>13}" for k in rounds)
