"""google-deepmind/nanodo: its model, loss, optimizer and Trainer step on stubbed data. NANODO=DIR names a checkout.

Its MLP is not gated, so it gets 1.5 times the width: equal matrix FLOPs.
"""

import os
import sys
import types

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import flags, report, step_times

args = flags()
sys.path.insert(0, os.environ["NANODO"])
for name in (
    "tensorflow_datasets",
    "sentencepiece",
    "clu",
    "clu.metric_writers",
    "clu.periodic_actions",
    "nanodo.data",
    "nanodo.evaluate",
):
    sys.modules[name] = types.ModuleType(name)  # only its data pipeline and writers need them
sys.modules["sentencepiece"].SentencePieceProcessor = object
sys.modules["clu"].metric_writers, sys.modules["clu"].periodic_actions = (
    sys.modules["clu.metric_writers"],
    sys.modules["clu.periodic_actions"],
)

import jax
import jax.numpy as jnp
import ml_collections
import nanodo
import numpy as np


def get_in_out(tokens, pad_id=0):
    labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=pad_id)
    return tokens, labels, jnp.where(labels != pad_id, 1, 0).astype(jnp.float32)


nanodo.data, nanodo.evaluate = sys.modules["nanodo.data"], sys.modules["nanodo.evaluate"]
nanodo.data.get_in_out = get_in_out
from jax.experimental import mesh_utils
from jax.sharding import Mesh
from nanodo import model_factory
from nanodo import train as nanodo_train

config = ml_collections.ConfigDict(
    {
        "seed": 0,
        "batch_size": args.batch,
        "log_internal_metrics": False,
        "checkpoint": False,
        "model": {
            "D": args.width,
            "H": args.heads,
            "L": args.length,
            "N": args.layers,
            "F": int(args.hidden * 1.5),
            "dtype": "float32",
            "fsdp_enabled": True,
            "remat": False,
        },
        "opt": {
            "num_train_steps": 100000,
            "peak_learning_rate": 3e-4,
            "init_learning_rate": 3e-4,
            "final_learning_rate": 3e-4,
            "warmup_steps": 1000,
            "decay_type": "cosine",
            "weight_decay": 0.1,
            "clip_by_global_norm": 1.0,
            "optimizer": "adamw",
        },
    }
)
mesh = Mesh(mesh_utils.create_device_mesh((jax.device_count(),)), ("data",))
model, loss_fn = model_factory.get_model_and_loss(config, args.vocab)
shardings, state = nanodo_train._init_train_state(config, model, rng=jax.random.PRNGKey(0), mesh=mesh)
run = nanodo_train.Trainer(c=config, state=state, mesh=mesh, shardings=shardings, get_loss_fn=loss_fn)
rng = np.random.default_rng(1)
first, times = step_times(
    lambda i: jax.device_get(run.do_step(i, rng.integers(1, args.vocab, (args.batch, args.length), dtype=np.int32))),
    args.warmup,
    args.steps,
)
report(
    "nanodo", tokens_per_second=round(args.batch * args.length / float(np.median(times)), 1), first_s=round(first, 2)
)
