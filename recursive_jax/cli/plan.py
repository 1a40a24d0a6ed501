"""recursive-jax plan: what a run takes on hardware that is not here."""

from __future__ import annotations

import argparse
import json
import os
import sys

HELP = "compile a run for hardware that is not here: memory, collectives, hours, and what would make it fit"
EXAMPLE = "recursive-jax plan configs/scale/llama-3.2-1b.yaml --topology v5e:4x4"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", help="a config file, as `run` takes it")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the config")
    p.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5e:4x4, v5e-16, v5p:2x2x4, v6e:8x8, tpu7x:4x4x4: compiled for, with pip install 'recursive-jax[plan]'; "
        "gpu-h100:8, gpu-h200:8x4 (GPUs x machines): estimated; here: this machine's own devices",
    )
    p.add_argument("--search", action="store_true", help="rank the meshes of the topology; the best are compiled")
    p.add_argument("--no-remedy", action="store_true", help="do not look for what would make it fit")
    p.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    here = args.topology.strip().lower() == "here"
    if not here:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on what this machine has
    from recursive_jax.mesh import split_cpu
    from recursive_jax.plan.plan import plan
    from recursive_jax.plan.show import table_of, text_of
    from recursive_jax.recipes import load_config

    config = load_config(args.config, args.overrides)
    if here:
        split_cpu(config.mesh)
    say = lambda line: print(f"compiling: {line}", file=sys.stderr, flush=True)
    if args.search:
        from recursive_jax.plan.search import search

        found = search(config, args.topology, progress=say)
        if args.json:
            rows = [{"mesh": c.mesh.model_dump(), "hours": c.hours, "fits": c.fits,
                     "compiled": c.compiled is not None} for c in found]  # fmt: skip
            print(json.dumps(rows))
        else:
            print(table_of(found))
        return 0
    made = plan(config, args.topology, remedy=not args.no_remedy, progress=say)
    print(json.dumps(made.to_json()) if args.json else text_of(made))
    return 0
