"""Seconds of a whole round in one process: train, generate as many tokens, evaluate. The second and later rounds."""

import time

from common import flags, report

args = flags(rounds=3, generate_batch=64, evaluate_rows=64)

import jax
import numpy as np

from recursive_jax.collapse.likelihood import cross_entropy, token_losses
from recursive_jax.config import ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import unconditional
from recursive_jax.models.model import transformer
from recursive_jax.train.loop import train


class Ids(ByteTokenizer):
    """Plain ids: the texts do not matter here."""

    vocab, bos, eos, pad = args.vocab, 0, 2, 1

    def decode(self, tokens):
        return ""


config = ModelConfig(layers=args.layers, d_model=args.width, heads=args.heads, d_ff=args.hidden, max_length=args.length)
model = transformer(config, Ids())
rng = np.random.default_rng(1)
count = args.steps * args.batch
make = lambda n: [rng.integers(3, args.vocab, args.length).astype(np.int32) for _ in range(n)]
data, held_out = real_rows(make(count), [""] * count), make(args.evaluate_rows)
settings = TrainConfig(steps=args.steps, batch=args.batch, learning_rate=3e-4)
rounds = []
for k in range(args.rounds):
    t0 = time.perf_counter()
    model = train(model, data, config=settings, seed=k, quiet=True).model
    t1 = time.perf_counter()
    rows = generate(model, unconditional(count), SamplingConfig(batch=args.generate_batch), seed=k)
    t2 = time.perf_counter()
    cross_entropy(token_losses(model, held_out))
    t3 = time.perf_counter()
    rounds.append((t1 - t0, t2 - t1, t3 - t2, rows.token_count))
    data = rows
later = np.median(np.array(rounds[1:]), axis=0)
seconds = later[:3].sum()
report(
    "recursive_jax",
    rounds_per_hour=round(3600 / seconds, 2),
    seconds=round(seconds, 2),
    train_s=round(later[0], 2),
    generate_s=round(later[1], 2),
    evaluate_s=round(later[2], 2),
    generated_tokens=int(later[3]),
    first_s=round(sum(rounds[0][:3]), 2),
    devices=jax.device_count(),
)
