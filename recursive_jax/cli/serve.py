"""recursive-jax serve: a stored model behind an OpenAI-compatible API."""

from __future__ import annotations

import argparse
import os
import sys

from recursive_jax.cli.common import MODEL, override_arguments, set_up
from recursive_jax.errors import InputError

HELP = "serve a stored model to anything that speaks OpenAI's API (extra [serve])"
EXAMPLE = (
    "recursive-jax serve smollm2 --port 8000\n"
    "  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
    '-d \'{"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}\''
)


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL)
    override_arguments(p, "mesh.* keys")
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves the network: then set --token-env too")
    p.add_argument("--port", type=int, default=8000, help="0: one that is free, which is printed")
    p.add_argument("--name", help="what clients call the model; default: MODEL as it stands here")
    p.add_argument("--token-env", metavar="NAME", help="an environment variable: clients must send its value as key")
    p.add_argument("--slots", type=int, default=16, help="rows decoded together")
    p.add_argument("--waiting", type=int, default=1024, help="rows in work or waiting, beyond which the answer is 429")
    p.add_argument("--rows", type=int, default=128, help="choices of one request, at most")
    p.add_argument("--body", type=int, default=4, metavar="MIB", help="size of one request, at most")
    p.add_argument("--grace", type=int, default=30, help="seconds for what is in work when a signal stops the server")


def run(args: argparse.Namespace) -> int:
    from recursive_jax.config.loader import parse_section
    from recursive_jax.rounds.options import ServeOptions

    for name in ("slots", "waiting", "rows", "body"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}={getattr(args, name)}: at least 1 is wanted")
    if not 0 <= args.port < 65536:
        raise InputError(f"--port={args.port}: 0 to 65535 are wanted")
    token = os.environ.get(args.token_env) if args.token_env else None
    if args.token_env and not token:
        raise InputError(f"--token-env={args.token_env}: this variable is not set")
    options = parse_section(ServeOptions, {}, args.overrides, "serve")
    set_up(options.mesh)
    try:
        from recursive_jax.serve.server import serve
    except ImportError as error:
        raise InputError(f"serving needs the extra [serve]: pip install 'recursive-jax[serve]' ({error})") from None
    from recursive_jax.mesh import make_mesh
    from recursive_jax.rounds.opening import chosen_name, load_model
    from recursive_jax.serve.app import Limits

    model = load_model(args.model, make_mesh(options.mesh))
    chosen = chosen_name(args.model)
    if chosen:
        print(chosen, file=sys.stderr)
    limits = Limits(args.slots, args.waiting, args.rows, args.body * 2**20, token)
    serve(model, args.name or args.model, args.host, args.port, limits, args.grace)
    return 0
