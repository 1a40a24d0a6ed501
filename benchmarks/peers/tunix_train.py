"""google/tunix: PeftTrainer, full fine-tune of its Llama 3 at the same sizes, tied embeddings."""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import flags, report

args = flags()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TQDM_DISABLE"] = "1"

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.sft import peft_trainer, utils

config = llama.ModelConfig(
    num_layers=args.layers,
    vocab_size=args.vocab,
    embed_dim=args.width,
    hidden_dim=args.hidden,
    num_heads=args.heads,
    head_dim=args.width // args.heads,
    num_kv_heads=args.heads,
    rope_theta=10000,
    norm_eps=1e-6,
    weight_tying=True,
)
rng, stamps = np.random.default_rng(1), []


class Rows:
    def __iter__(self):
        for _ in range(args.steps + args.warmup + 1):
            stamps.append(time.perf_counter())
            tokens = rng.integers(1, args.vocab, (args.batch, args.length), dtype=np.int32)
            yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones(tokens.shape, bool))


def model_input(x):
    return {
        "input_tokens": x.input_tokens,
        "input_mask": x.input_mask,
        "positions": utils.build_positions_from_mask(x.input_mask),
        "attention_mask": utils.make_causal_attn_mask(x.input_mask),
    }


with jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2):
    settings = peft_trainer.TrainingConfig(
        eval_every_n_steps=10**9, max_steps=args.steps + args.warmup, max_inflight_computations=1
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.1))
    run = peft_trainer.PeftTrainer(llama.Llama3(config, rngs=nnx.Rngs(0)), tx, settings).with_gen_model_input_fn(
        model_input
    )
    run.train(Rows(), None)
    end = time.perf_counter()
seconds = (end - stamps[args.warmup]) / args.steps  # begin to begin; its loader runs at most one step ahead
report("tunix", tokens_per_second=round(args.batch * args.length / seconds, 1), first_s=round(stamps[2] - stamps[0], 2))
