"""A whole round (train, generate as many tokens, evaluate) beside the Hugging Face Trainer and generate, interleaved.

python benchmarks/round.py --torch VENV/bin/python --pairs 5
"""

import argparse
import sys
from pathlib import Path

from common import interleaved

from recursive_jax.allocator import TUNABLES

here = Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--torch", help="a Python with torch and transformers")
parser.add_argument("--pairs", type=int, default=5)
args, rest = parser.parse_known_args()
ours = [sys.executable, str(here / "ours_round.py"), *rest]
commands = {"recursive_jax": (ours, {"GLIBC_TUNABLES": TUNABLES})}
if args.torch:
    commands["HF Trainer + generate"] = ([args.torch, str(here / "peers/torch_round.py"), *rest], {})
interleaved(commands, args.pairs, "rounds_per_hour", "recursive_jax")
