"""GRPO on SmolLM2-135M with LoRA beside trl's GRPOTrainer, in turn: tokens written per second of the whole step.

    python benchmarks/rl_step.py --trl PYTHON --model FOLDER [--pairs 3]

FOLDER: SmolLM2-135M-Instruct as a Hugging Face folder (`recursive-jax export smollm2 FOLDER` writes one).
"""

import argparse
import sys
from pathlib import Path

from common import interleaved

from recursive_jax.allocator import TUNABLES

here = Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trl", required=True, help="a Python with trl and peft")
parser.add_argument("--model", required=True)
parser.add_argument("--pairs", type=int, default=3)
args, rest = parser.parse_known_args()
rest += ["--model", args.model]
commands = {
    "recursive_jax": ([sys.executable, str(here / "ours_rl_step.py"), *rest], {"GLIBC_TUNABLES": TUNABLES}),
    "trl": ([args.trl, str(here / "peers/trl_rl_step.py"), *rest], {}),
}
interleaved(commands, args.pairs, "tokens_per_s", "recursive_jax")
