"""recursive-jax import: another tool's model as one of this project's."""

from __future__ import annotations

import argparse
from pathlib import Path

from recursive_jax.cli.common import set_up
from recursive_jax.errors import InputError

HELP = "store a Hugging Face folder or a GGUF as a model of this project"
EXAMPLE = "recursive-jax import ~/models/SmolLM2-135M models/smollm2"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SOURCE", help="a folder with config.json and safetensors, a .gguf, or smollm2")
    p.add_argument("out", metavar="DIR", help="a new folder")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the stored params")


def run(args: argparse.Namespace) -> int:
    set_up()
    from recursive_jax.rounds.opening import foreign_path, import_model
    from recursive_jax.rounds.writing import describe_model, save_imported

    path = foreign_path(args.source)
    if path is None:
        raise InputError(f"{args.source} is not a Hugging Face folder (no config.json in it) or a .gguf file")
    model = import_model(path, dtype=args.dtype)
    save_imported(model, Path(args.out))
    print(f"{describe_model(model)}\nstored in {args.out}")
    return 0
