"""recursive-jax export: a model for other tools."""

from __future__ import annotations

import argparse
import sys

from recursive_jax.cli.common import MODEL, set_up
from recursive_jax.errors import InputError

HELP = "write a model as a Hugging Face folder, which transformers, vLLM and llama.cpp's converter read"
EXAMPLE = "recursive-jax export runs/snips exported/snips"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("out", metavar="DIR", help="a new folder")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the tensors")
    p.add_argument("--adapter", action="store_true", help="write only the adapter, in the format of peft")
    p.add_argument("--base", metavar="NAME", help="with --adapter: the folder or hub name that it gives as its base")


def run(args: argparse.Namespace) -> int:
    if args.base and not args.adapter:
        raise InputError("--base is for --adapter: what the adapter says its base is")
    set_up()
    from recursive_jax.models.peft import save_adapter
    from recursive_jax.rounds.opening import chosen_name, load_model
    from recursive_jax.rounds.writing import describe_model, save_huggingface

    chosen = chosen_name(args.model)
    if chosen:
        print(chosen, file=sys.stderr)
    model = load_model(args.model)
    print(describe_model(model))
    if args.adapter:
        print(f"adapter written to {save_adapter(model, args.out, args.base)}")
    else:
        print(f"written to {save_huggingface(model, args.out, args.dtype)}")
    return 0
