"""Training tokens per second of recursive_jax: packed rows read through Grain, the product's own step."""

from common import flags, report, step_times

args = flags(dtype="float32", remat="none", scan=0)

import jax
import numpy as np

from recursive_jax.config import MeshConfig, ModelConfig, TrainConfig
from recursive_jax.data.packing import batches, pack
from recursive_jax.mesh import make_mesh, put_batch, put_replicated
from recursive_jax.models.flops import peak_flops
from recursive_jax.models.network import transformer_network
from recursive_jax.objectives.causal import causal
from recursive_jax.train.optimizer import Hyper
from recursive_jax.train.step import init_program, step_program

config = ModelConfig(
    vocab=args.vocab,
    layers=args.layers,
    d_model=args.width,
    heads=args.heads,
    d_ff=args.hidden,
    max_length=args.length,
    remat=args.remat,
    scan=bool(args.scan),
)
network = transformer_network(config)
rng = np.random.default_rng(1)
rows = pack(
    [rng.integers(2, args.vocab, args.length).astype(np.int32) for _ in range(args.batch * 8)],
    args.length,
    bos=1,
    pad=0,
)
mesh = make_mesh(MeshConfig())
with jax.set_mesh(mesh):
    hyper = put_replicated(mesh, Hyper.of(TrainConfig(steps=1000, learning_rate=3e-4)))
    state = init_program(network)(jax.random.key(0), {}, {}, hyper)
    step_fn, stream = step_program(network, causal, 1, args.dtype), batches(rows, args.batch, 0)

    def step(i):
        global state, loss
        state, metrics = step_fn(state, put_batch(mesh, next(stream)), {}, {})
        loss = float(metrics["loss"])

    first, times = step_times(step, args.warmup, args.steps)
rate = args.batch * args.length / float(np.median(times))
peak = peak_flops(args.dtype)
report(
    "recursive_jax",
    tokens_per_second=round(rate, 1),
    mfu=round(rate * network.train_flops_per_token(args.length) / (peak * mesh.size), 4) if peak else None,
    device_peak_bytes=(jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    first_s=round(first, 2),
    loss=round(loss, 3),
)
