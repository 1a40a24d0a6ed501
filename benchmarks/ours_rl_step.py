"""A whole GRPO step: 8 prompts, 8 answers of up to 64 tokens to each, LoRA of rank 16, in float32. Tokens per second of
generation, reward and update together; both counted alike: tokens that were written."""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import flags, report

args = flags(prompts=8, each=8, new=64, steps=3, model="")

import recursive_jax as rj
from recursive_jax.curate.rollouts import Rollouts

STORIES = [
    {"problem": f"Write a story about {x}."} for x in "a cat,a dog,rain,a ship,snow,a king,bread,the sea".split(",")
]
written: list[tuple[float, int]] = []  # when a writing was rewarded, how many tokens it has


def short_words(data):
    written.append((time.perf_counter(), sum(map(len, data.tokens()))))
    return [-sum(map(len, text.split())) / max(1, len(text.split())) for text in data.column("text")]


base = rj.load_model(args.model or "smollm2")
lora = rj.LoraConfig(rank=16, alpha=32, targets=("attention/*",))
model = rj.adapted_model(base, lora)
objective = rj.objectives.PolicyGradient(loss_type="dapo")
rollouts = Rollouts(
    model, STORIES[: args.prompts], rj.Template("{problem}", chat=True), short_words, objective,
    num_generations=args.each, max_tokens=args.new,
)  # fmt: skip
config = {"steps": args.warmup + args.steps + 1, "batch": args.prompts * args.each, "length": 128, "log_every": 1}
begun = time.perf_counter()
trained = rj.train(model, rollouts, objective, {**config, "learning_rate": 1e-5}, quiet=True)
first = written[0][0] - begun
spans = [(b - a, n) for (a, n), (b, _) in zip(written[args.warmup :], written[args.warmup + 1 :], strict=False)]
seconds = statistics.median(s for s, _ in spans)
report(
    "recursive_jax GRPO step", tokens_per_s=statistics.median(n / s for s, n in spans), seconds=seconds, first_s=first
)
