"""New tokens per second of `generate`, prefill counted, after one warm-up; or tokens per second of scoring and
embedding beside the training forward pass."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from common import flags, report

args = flags(batch=64, prompt=64, new=192, beams=1, repeat=2, what="generate", model="", data=1, tensor=1)

import jax
import numpy as np

from recursive_jax.config import MeshConfig, ModelConfig, SamplingConfig
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import Request
from recursive_jax.generate.score import embed, token_logprobs
from recursive_jax.mesh import make_mesh, split_cpu
from recursive_jax.models.flops import decode_cost_per_token
from recursive_jax.models.model import transformer
from recursive_jax.objectives.causal import token_nll
from recursive_jax.rounds.opening import load_model


class Ids(ByteTokenizer):
    """Plain ids: the texts do not matter here."""

    vocab, bos, eos, pad = args.vocab, 0, 2, 1

    def decode(self, tokens):
        return ""


def machine() -> dict[str, float]:
    """Bytes per second that two threads read from memory together, and FLOP/s of a large float32 matrix product."""
    blocks = [np.ones(2**26, np.float32) for _ in range(args.threads * 2)]
    with ThreadPoolExecutor(args.threads) as pool:
        memory = best(lambda: list(pool.map(lambda x: np.dot(x, x), blocks)))
    product, x = jax.jit(lambda x: x @ x), jax.numpy.ones((2048, 2048))
    arithmetic = best(lambda: product(x).block_until_ready())
    return {"bytes_per_s": sum(x.nbytes for x in blocks) / memory, "flops_per_s": 2 * 2048**3 / arithmetic}


def best(call, times: int = 8) -> float:
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found)


rng = np.random.default_rng(0)
if args.what == "machine":
    report("machine", **machine())
    raise SystemExit
layout = MeshConfig(data=args.data, tensor=args.tensor)
split_cpu(layout)
mesh = make_mesh(layout)
if args.model:
    model = load_model(args.model, mesh)
else:
    config = ModelConfig(layers=args.layers, d_model=args.width, heads=args.heads, d_ff=args.hidden, max_length=1024)
    model = transformer(config, Ids(), mesh).initialized(0)


def generation(seed):
    requests = [Request(i, rng.integers(3, 4096, args.prompt).astype(np.int32), opened=True) for i in range(args.batch)]
    sampling = SamplingConfig(batch=args.batch * args.beams, beams=args.beams, max_tokens=args.new, min_tokens=args.new)
    return generate(model, requests, sampling, seed=seed).token_count


texts = [rng.integers(3, 4096, 256).astype(np.int32) for _ in range(args.batch)]


def forward(_):
    """The loss of plain full rows in batches of 16, as training computes it, without the backward pass."""
    for begin in range(0, len(texts), 16):
        rows = np.stack(texts[begin : begin + 16])
        jax.block_until_ready(_loss(model.params, rows))
    return len(texts) * 256


_loss = jax.jit(lambda params, rows: token_nll(model.network.bind()(params, rows[:, :-1], None), rows[:, 1:]))
runs = {
    "generate": generation,
    "forward": forward,
    "score": lambda _: sum(map(len, token_logprobs(model, texts))),
    "embed": lambda _: len(embed(model, texts)) * 256,
}[args.what]
with jax.set_mesh(model.mesh):
    begin = time.perf_counter()
    runs(0)
    first, rates = time.perf_counter() - begin, []
    for seed in range(1, args.repeat + 1):
        begin = time.perf_counter()
        tokens = runs(seed)
        rates.append(tokens / (time.perf_counter() - begin))
flops, read = decode_cost_per_token(model.network.config, args.batch * args.beams, args.prompt, args.new, 4)
report(
    f"recursive_jax {args.what}",
    tokens_per_s=round(statistics.median(rates), 1),
    first_s=round(first, 2),
    flops_per_token=round(flops * args.beams),
    bytes_per_token=round(read * args.beams),
)
