"""One pass of a model over packed groups, outside of a training step: what a reference, an earlier policy or a value
head says of the learnt tokens.

Shapes: N groups, G members of a group, T positions; packed rows have T + 1."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.data.packing import Columns
from recursive_jax.mesh import TRACES
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.models.read import Read, read_tokens
from recursive_jax.objectives.causal import targets

Change = Callable[[jax.Array], jax.Array]
AT_ONCE = 4096  # positions of one dispatch, on each shard of the batch


def learnt_logprobs(model: Model, columns: Columns, change: Change | None = None, dtype: str = "float32") -> np.ndarray:
    """The log-probability that a model gives every learnt token, float32 `[N, G, T + 1]`, 0 elsewhere. change: made of
    the logits before, a hashable function."""
    return _over(model, columns, _logprob_program(model.network, dtype, change))


def token_values(model: Model, columns: Columns, value: Any, dtype: str = "float32") -> np.ndarray:
    """What a value head expects before every learnt token, float32 `[N, G, T + 1]`, 0 elsewhere. value: as in
    `values_of`."""
    return _over(model, columns, _value_program(model.network, dtype), value)


def values_of(read: Read, value: Any) -> jax.Array:
    """`[B, T]` from the states: value: {"weight" [D], "bias" []}."""
    states_BTD = read.states_BTD.astype(jnp.float32)
    return jnp.einsum("btd,d->bt", states_BTD, value["weight"], precision=jax.lax.Precision.HIGHEST) + value["bias"]


def _over(model: Model, columns: Columns, program: Callable, *more: Any) -> np.ndarray:
    model = model.on(model.mesh or meshes.make_mesh())
    columns = {name: columns[name] for name in ("tokens", "segments", "loss")}
    N, G, width = columns["tokens"].shape
    rows = {name: column.reshape(N * G, width) for name, column in columns.items()}
    divisor = meshes.batch_divisor(model.mesh)
    B = max(1, AT_ONCE // width) * divisor
    found = []
    with jax.set_mesh(model.mesh):
        for begin in range(0, N * G, B):
            part = {name: column[begin : begin + B] for name, column in rows.items()}
            fill = -len(part["tokens"]) % (B if N * G > B else divisor)
            part = {name: np.pad(column, ((0, fill), (0, 0))) for name, column in part.items()}
            found.append(meshes.fetch(program(model.params, meshes.put_batch(model.mesh, part), *more)))
    found_NGT = np.concatenate(found)[: N * G].reshape(N, G, width - 1)
    return np.pad(found_NGT, ((0, 0), (0, 0), (1, 0))).astype(np.float32)


@functools.cache
def _logprob_program(network: Network, dtype: str, change: Change | None) -> Callable:
    apply = network.bind(dtype)

    def logprobs(params, rows):
        TRACES["learnt_logprobs"] += 1
        inputs, segments, labels, weight_BT = targets(rows)
        found = read_tokens(network, apply, params, inputs, segments, labels, change=change)
        return jnp.where(weight_BT > 0, found.logprobs_BT, 0.0)

    return jax.jit(logprobs)


@functools.cache
def _value_program(network: Network, dtype: str) -> Callable:
    apply = network.bind(dtype)

    def values(params, rows, value):
        TRACES["values"] += 1
        inputs, segments, labels, weight_BT = targets(rows)
        return jnp.where(
            weight_BT > 0, values_of(read_tokens(network, apply, params, inputs, segments, labels), value), 0.0
        )

    return jax.jit(values)
