"""Training tokens per second beside the peers, interleaved. Peers run in environments of their own; leave one out and
it is skipped.

    python benchmarks/training.py --torch VENV/bin/python --tunix VENV312/bin/python --nanodo CHECKOUT --pairs 5
"""

import argparse
import os
import sys
from pathlib import Path

from common import interleaved

from recursive_jax.allocator import TUNABLES

here = Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--torch", help="a Python with torch and transformers")
parser.add_argument("--tunix", help="a Python with google-tunix")
parser.add_argument(
    "--nanodo", help="a checkout of google-deepmind/nanodo (needs ml_collections beside jax and flax here)"
)
parser.add_argument("--pairs", type=int, default=5)
args, rest = parser.parse_known_args()

ours = [sys.executable, str(here / "ours_train.py"), *rest]
commands = {"recursive_jax": (ours, {"GLIBC_TUNABLES": TUNABLES}), "recursive_jax, 4 KiB pages": (ours, {})}
if args.torch:
    torch = [args.torch, str(here / "peers/torch_train.py"), *rest]
    for mode in ("compile", "eager", "trainer"):
        commands[f"torch {mode}"] = ([*torch, "--mode", mode], {})
    commands["torch compile, huge pages"] = ([*torch, "--mode", "compile"], {"GLIBC_TUNABLES": TUNABLES})
if args.nanodo:
    commands["nanodo"] = (
        [sys.executable, str(here / "peers/nanodo_train.py"), *rest],
        {"NANODO": os.path.abspath(args.nanodo)},
    )
if args.tunix:
    commands["tunix"] = ([args.tunix, str(here / "peers/tunix_train.py"), *rest], {})
interleaved(commands, args.pairs, "tokens_per_second", "recursive_jax")
