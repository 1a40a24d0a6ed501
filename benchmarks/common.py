"""Sizes, flags and the interleaved runner of the benchmarks. Needs nothing but Python: peers import it too."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

#: Llama-like: RMSNorm, RoPE, SwiGLU, no bias, tied embeddings.
SIZES = {
    "tiny": dict(width=64, layers=2, heads=2, hidden=176, vocab=512),
    "small": dict(width=256, layers=4, heads=4, hidden=688, vocab=4096),
    "135m": dict(width=576, layers=30, heads=9, hidden=1536, vocab=49152),  # SmolLM2's, with a key head for every head
    "1b": dict(width=2048, layers=16, heads=32, hidden=8192, vocab=128256),  # Llama 3.2's, likewise
}


def flags(**defaults) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="small", choices=SIZES)
    for name, value in {"batch": 16, "length": 256, "steps": 10, "warmup": 2, "threads": 2, **defaults}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    for key, value in SIZES[args.size].items():
        setattr(args, key, value)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(args.threads))
    return args


def report(name: str, **fields) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"name": name, **fields, "peak_rss_mb": round(peak)}), flush=True)


def step_times(step, warmup: int, steps: int) -> tuple[float, list[float]]:
    """(seconds of the first call, seconds of each counted step); `step(i)` must wait for its result."""
    begin = time.perf_counter()
    step(0)
    first = time.perf_counter() - begin
    for i in range(1, warmup):
        step(i)
    times = []
    for i in range(steps):
        begin = time.perf_counter()
        step(warmup + i)
        times.append(time.perf_counter() - begin)
    return first, times


def interleaved(commands: dict[str, tuple[list[str], dict]], rounds: int, key: str, reference: str) -> dict:
    """Runs every command once per round, in turn, and prints medians and the ratio of `reference` to each, pair by
    pair.

    Each command prints one JSON line; `key` is the figure compared (larger is better). Returns, for each command, its
    last line with the median of `key`."""
    found: dict[str, list[dict]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, (command, env) in commands.items():
            done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
            lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
            if done.returncode or not lines:
                print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            found[name].append(json.loads(lines[-1]))
            print(f"round {number + 1}  {name:<28} {found[name][-1]}", flush=True)
    print(
        f"\n{'':<30}{key + ', median':>26}{'min':>10}{'max':>10}{reference + ' / it':>22}"
        f"{'first call s':>14}{'RSS MB':>8}"
    )
    ours = [x[key] for x in found[reference]]
    for name, results in found.items():
        if not results:
            continue
        values = [x[key] for x in results]
        ratios = [a / b for a, b in zip(ours, values, strict=False)]
        first = statistics.median(x.get("first_s", float("nan")) for x in results)
        rss = statistics.median(x["peak_rss_mb"] for x in results)
        print(
            f"{name:<30}{statistics.median(values):>26,.1f}{min(values):>10,.1f}{max(values):>10,.1f}{statistics.median(ratios):>22.2f}{first:>14.1f}{rss:>8,.0f}"
        )
    return {n: x[-1] | {key: statistics.median(r[key] for r in x)} for n, x in found.items() if x}
