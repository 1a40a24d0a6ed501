"""Single measurements for accelerator.py: `decode` (and prefill), `memory`, `grpo`; one JSON line each."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import SIZES

from recursive_jax.config import MeshConfig, ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.curate.rollouts import Rollouts
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.generate.engine import Engine
from recursive_jax.generate.request import Request
from recursive_jax.mesh import make_mesh, resolve_dtype, use_compilation_cache
from recursive_jax.models.flops import decode_cost_per_token, peak_flops
from recursive_jax.models.model import Model, transformer
from recursive_jax.objectives import PolicyGradient
from recursive_jax.plan.figures import figures
from recursive_jax.plan.programs import programs_of
from recursive_jax.plan.topology import topology
from recursive_jax.rounds.work import Training
from recursive_jax.train.loop import train


def config_of(args: argparse.Namespace) -> ModelConfig:
    s = SIZES[args.size]
    return ModelConfig(
        vocab=s["vocab"], layers=s["layers"], d_model=s["width"], heads=s["heads"], d_ff=s["hidden"],
        max_length=max(args.length, 2048 if args.size != "tiny" else 256), scan=True,
    )  # fmt: skip


def model_of(args: argparse.Namespace) -> Model:
    return transformer(config_of(args), ByteTokenizer(), make_mesh(MeshConfig())).initialized(0)


def say(**fields) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}
    print(json.dumps(rounded), flush=True)


def decode(args: argparse.Namespace) -> None:
    """Tokens per second of decoding at batch 1 and 64 after prompts of 128 tokens, and of reading 64 prompts of 512."""
    model, bandwidth = model_of(args), topology("here").chip.bandwidth
    width = np.dtype(resolve_dtype("auto", model.mesh)).itemsize
    prompt, rng = 128 if args.size != "tiny" else 16, np.random.default_rng(0)
    for batch in (1, 64):
        sampling = SamplingConfig(batch=batch, max_tokens=args.new, min_tokens=args.new, temperature=1.0)
        prompts = [rng.integers(0, 256, prompt).astype(np.int32) for _ in range(batch)]

        def run(sampling=sampling, prompts=prompts):
            engine = Engine(model, sampling)
            begin = time.perf_counter()
            rows = list(engine.run(Request(i, p, opened=True) for i, p in enumerate(prompts)))
            return time.perf_counter() - begin, sum(len(r.tokens) for r in rows)

        run()
        seconds, tokens = min((run() for _ in range(3)), key=lambda r: r[0])
        _, moved = decode_cost_per_token(model.network.config, batch, prompt, args.new, width)
        share = tokens / seconds * moved / bandwidth if math.isfinite(bandwidth) else None
        say(name="decode", batch=batch, new=args.new, tokens_per_second=tokens / seconds, bandwidth_share=share)
    long = 512 if args.size != "tiny" else 64
    prompts = [rng.integers(0, 256, long).astype(np.int32) for _ in range(64)]
    one = SamplingConfig(batch=64, max_tokens=1)

    def read():
        engine = Engine(model, one)
        begin = time.perf_counter()
        list(engine.run(Request(i, p, opened=True) for i, p in enumerate(prompts)))
        return time.perf_counter() - begin

    read()
    seconds = min(read() for _ in range(3))
    flops = model.network.train_flops_per_token(long) / 3 * 64 * long
    peak = peak_flops("bfloat16" if width == 2 else "float32")
    say(name="prefill", prompts=64, length=long, tokens_per_second=64 * long / seconds,
        mfu=flops / seconds / peak if peak else None)  # fmt: skip


def memory(args: argparse.Namespace) -> None:
    """Peak memory of a training beside what `plan` says of its step."""
    settings = TrainConfig(steps=3, batch=args.batch, length=args.length, warmup=0.0)
    place = topology("here")
    mesh = place.mesh(MeshConfig())
    blank = transformer(config_of(args), ByteTokenizer(), mesh)
    (program,) = programs_of([Training("", blank.network, settings)], mesh, place.chip.memory)
    found = figures(program, mesh, place)
    text = ["some text to learn from " * 200] * 64
    train(blank, text, config=settings, quiet=True)
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    say(name="memory", planned_bytes=int(found.total), peak_bytes=peak, ratio=peak / found.total if peak else None)


_TIMES: list[float] = []  # when a writing was rewarded


def varied(data) -> list[float]:
    _TIMES.append(time.perf_counter())
    return [float(len(set(text))) for text in data.column("text")]


def grpo(args: argparse.Namespace) -> None:
    """Seconds of a whole GRPO step: 8 problems, 8 answers to each, a reward that looks at their texts, and the step."""
    model = model_of(args)
    problems = [{"problem": f"Count from {n}: "} for n in range(8)]
    objective = PolicyGradient(loss_type="dapo")
    rollouts = Rollouts(model, problems, Template("{problem}"), varied, objective, num_generations=8,
                        max_tokens=args.new)  # fmt: skip
    settings = {"steps": 6, "batch": 64, "length": 16 + args.new, "log_every": 1, "learning_rate": 1e-6}
    train(model, rollouts, objective, settings, quiet=True)
    spans = np.diff(_TIMES)[1:]
    say(name="grpo", seconds=statistics.median(spans), tokens_per_second=64 * args.new / statistics.median(spans))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("decode", "memory", "grpo"))
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    args = parser.parse_args()
    use_compilation_cache()
    jnp.zeros(1).block_until_ready()  # the device is there before anything is timed
    {"decode": decode, "memory": memory, "grpo": grpo}[args.what](args)


if __name__ == "__main__":
    main()
