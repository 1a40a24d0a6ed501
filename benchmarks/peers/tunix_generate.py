"""New tokens per second of google/tunix's Sampler on its Llama 3 at --size, prefill counted, temperature 1."""

import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import flags, report

args = flags(batch=64, prompt=64, new=192, repeat=2)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama

END = args.vocab + 5  # never drawn


class Numbers:
    """Texts of numbers, as the sampler takes texts."""

    def encode(self, text, **_):
        return [int(x) for x in text.split()]

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return 1

    def eos_id(self):
        return END

    def pad_id(self):
        return 0

    def dedup_bos_ids(self, ids):
        return ids


width = args.width // args.heads
config = llama.ModelConfig(
    num_layers=args.layers,
    vocab_size=args.vocab,
    embed_dim=args.width,
    hidden_dim=args.hidden,
    num_heads=args.heads,
    head_dim=width,
    num_kv_heads=args.heads,
    rope_theta=10000,
    norm_eps=1e-6,
    weight_tying=True,
)
rng = np.random.default_rng(0)
prompts = [" ".join(map(str, rng.integers(3, args.vocab, args.prompt - 1))) for _ in range(args.batch)]
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with mesh:
    model = llama.Llama3(config, rngs=nnx.Rngs(0))
    cache = CacheConfig(
        cache_size=args.prompt + args.new, num_layers=args.layers, num_kv_heads=args.heads, head_dim=width
    )
    sampler = Sampler(model, Numbers(), cache)

    def generate():
        begin = time.perf_counter()
        sampler(
            prompts,
            max_generation_steps=args.new,
            max_prompt_length=args.prompt,
            temperature=1.0,
            top_p=1.0,
            seed=0,
            eos_tokens=[END],
        )
        return time.perf_counter() - begin

    first = generate()
    rates = [args.batch * args.new / generate() for _ in range(args.repeat)]
report("tunix Sampler", tokens_per_s=round(statistics.median(rates), 1), first_s=round(first, 2))
