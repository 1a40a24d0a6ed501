"""Generation beside its peers, in turn, and beside what this machine's memory and arithmetic allow.

python benchmarks/generation.py --torch PYTHON --llamacpp PYTHON --tunix PYTHON     # 4M params: batch 64, batch 1, beam
5, score python benchmarks/generation.py ... --model FOLDER --gguf FILE                      # a Hugging Face folder:
batch 1 and 32"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import interleaved

from recursive_jax.allocator import TUNABLES

here = Path(__file__).parent
CASES = {
    "batch 64": ["--batch", "64"],
    "batch 1": ["--batch", "1"],
    "beam 5, blocks of 64": ["--batch", "16", "--beams", "5", "--new", "64"],
}
REAL = {"batch 1": ["--batch", "1"], "batch 32": ["--batch", "32"]}


def bound(memory: float, flops: float, ours: dict) -> str:
    """The most new tokens per second that `ours` could reach: bytes at the speed of memory, or arithmetic, if that is
    more. The weights are read once for all rows of a step, the cache once for each; what fits the processor's caches
    may beat this."""
    seconds = {
        "memory": ours["bytes_per_token"] / memory,
        "arithmetic": ours["flops_per_token"] / flops,
    }
    what = max(seconds, key=seconds.get)
    most = 1 / seconds[what]
    return f"bound by {what}: {most:,.0f} tokens/s; achieved {ours['tokens_per_s'] / most:.0%}"


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--torch", help="a Python with torch and transformers")
parser.add_argument("--llamacpp", help="a Python with llama-cpp-python and gguf")
parser.add_argument("--tunix", help="a Python with google-tunix")
parser.add_argument("--pairs", type=int, default=5)
parser.add_argument("--model", default="", help="a Hugging Face folder, in place of the 4M params")
parser.add_argument("--gguf", default="", help="the same weights as a .gguf file, for llama.cpp")
parser.add_argument("--only", default="", help="cases whose name contains this")
args, rest = parser.parse_known_args()
rest += ["--model", args.model] if args.model else []
quick = {"GLIBC_TUNABLES": TUNABLES}


def peers(options: list[str], beams: bool) -> dict:
    """The commands of the peers given on the command line that can do the case."""
    found = {}
    if args.torch:
        found["transformers"] = ([args.torch, str(here / "peers/hf_generate.py"), *options, *rest], {})
    if args.llamacpp and not beams:
        model = ["--model", args.gguf] if args.model else []
        found["llama.cpp"] = ([args.llamacpp, str(here / "peers/llamacpp_generate.py"), *options, *model], {})
    if args.tunix and not beams and not args.model:
        found["tunix"] = ([args.tunix, str(here / "peers/tunix_generate.py"), *options], {})
    return found


machine = subprocess.run(
    [sys.executable, str(here / "ours_generation.py"), "--what", "machine"],
    env=os.environ | quick,
    check=True,
    text=True,
    stdout=subprocess.PIPE,
)
machine = json.loads(machine.stdout.splitlines()[-1])
memory, flops = machine["bytes_per_s"], machine["flops_per_s"]
print(f"memory {memory / 1e9:.1f} GB/s, matrix products {flops / 1e9:.0f} GFLOP/s", flush=True)
for name, options in (REAL if args.model else CASES).items():
    if args.only not in name:
        continue
    print(f"\n## {name}")
    ours = [sys.executable, str(here / "ours_generation.py"), *options, *rest]
    commands, best = {"recursive_jax": (ours, quick)}, "recursive_jax"
    if name != "batch 1" and not args.model:  # a larger model would be read twice
        best = "recursive_jax mesh.data=2"
        commands[best] = ([*ours, "--data", "2"], quick)
    commands |= peers(options, "--beams" in options)
    results = interleaved(commands, args.pairs, "tokens_per_s", best)
    print(bound(memory, flops, results[best]))
if not args.model and args.only in "score and embed":
    print("\n## score and embed, 256 texts of 256 tokens")
    ours = [sys.executable, str(here / "ours_generation.py"), "--batch", "256", "--what"]
    interleaved(
        {w: ([*ours, w, *rest], quick) for w in ("score", "embed", "forward")}, args.pairs, "tokens_per_s", "score"
    )
