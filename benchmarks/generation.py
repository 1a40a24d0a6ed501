"""Generation beside `transformers`, in turn, and beside what the memory of this machine allows.

python benchmarks/generation.py --torch VENV/bin/python --pairs 5                 # 4M params: batch 64, batch 1, beam 5, score
python benchmarks/generation.py --torch ... --model FOLDER --pairs 5              # a Hugging Face folder: batch 1 and 32
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from common import interleaved

from recursive_jax.allocator import TUNABLES

here = Path(__file__).parent
CASES = {
    "batch 64": ["--batch", "64"],
    "batch 1": ["--batch", "1"],
    "beam 5, blocks of 64": ["--batch", "16", "--beams", "5", "--new", "64"],
}
REAL = {"batch 1": ["--batch", "1"], "batch 32": ["--batch", "32", "--new", "64"]}


def bandwidth() -> float:
    """Bytes per second read from memory by one NumPy sum over 1 GiB (one thread: a lower bound of the machine's)."""
    x = np.ones(2**27, np.float64)
    x.sum()
    begin = time.perf_counter()
    x.sum()
    return x.nbytes / (time.perf_counter() - begin)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--torch", help="a Python with torch and transformers")
parser.add_argument("--pairs", type=int, default=5)
parser.add_argument("--model", default="", help="a Hugging Face folder, in place of the 4M params")
parser.add_argument("--only", default="", help="cases whose name contains this")
args, rest = parser.parse_known_args()
print(f"memory, one thread: {bandwidth() / 1e9:.1f} GB/s", flush=True)
rest += ["--model", args.model] if args.model else []
quick = {"GLIBC_TUNABLES": TUNABLES}
for name, options in (REAL if args.model else CASES).items():
    if args.only not in name:
        continue
    print(f"\n## {name}")
    commands = {"recursive_jax": ([sys.executable, str(here / "ours_generation.py"), *options, *rest], quick)}
    if args.torch:
        commands["transformers"] = ([args.torch, str(here / "peers/hf_generate.py"), *options, *rest], {})
    interleaved(commands, args.pairs, "tokens_per_s", "recursive_jax")
if not args.model and args.only in "score and embed":
    print("\n## score and embed, 256 texts of 256 tokens")
    ours = [sys.executable, str(here / "ours_generation.py"), "--batch", "256", "--what"]
    interleaved(
        {w: ([*ours, w, *rest], quick) for w in ("score", "embed", "forward")}, args.pairs, "tokens_per_s", "score"
    )
