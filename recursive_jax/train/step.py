"""The train state and the jitted, sharded, donated train step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from recursive_jax.mesh import TRACES
from recursive_jax.models.model import Architecture, bound
from recursive_jax.objectives.causal import Objective
from recursive_jax.train.optimizer import Hyper, learning_rate, transformation


@struct.dataclass
class TrainState:
    """Everything a checkpoint needs: `step` also addresses the data."""

    step: jax.Array  # int32: steps done
    params: Any
    optimizer: Any
    hyper: Hyper


def split(architecture: Architecture, params: Any) -> tuple[Any, Any]:
    """(what trains, what stays): the whole params and nothing, or an adapter and its frozen base."""
    if not architecture.frozen:
        return params, {}
    frozen = {k: params[k] for k in architecture.frozen}
    return {k: v for k, v in params.items() if k not in frozen}, frozen


def join(architecture: Architecture, trained: Any, frozen: Any) -> Any:
    return {**trained, **frozen} if architecture.frozen else trained


def new_state(params: Any, hyper: Hyper) -> TrainState:
    step = jnp.int32(0)
    return TrainState(step, params, transformation(hyper, step).init(params), hyper)


@functools.cache
def init_program(architecture: Architecture) -> Callable[[jax.Array, Hyper], TrainState]:
    def init(key, hyper):
        TRACES["train_init"] += 1
        return new_state(architecture.init(key), hyper)

    return jax.jit(init)


@functools.cache
def start_program() -> Callable[[Any, Hyper], TrainState]:
    """A fresh optimizer around given params (copied: the step donates its state)."""

    def start(params, hyper):
        TRACES["train_start"] += 1
        return new_state(jax.tree.map(jnp.copy, params), hyper)

    return jax.jit(start)


@functools.cache
def step_program(architecture: Architecture, objective: Objective, accumulate: int, dtype: str):
    """(state, batch, frozen) -> (state, metrics). The state is donated. Compiled once for all rounds."""
    apply = bound(architecture, dtype)
    drops = architecture.lora is not None and architecture.lora.dropout > 0

    def step(state: TrainState, batch, frozen):
        TRACES["train_step"] += 1
        key = jax.random.fold_in(jax.random.key(state.hyper.seed), state.step) if drops else None

        def loss(trained, rows, micro):
            run = functools.partial(apply, key=jax.random.fold_in(key, micro)) if drops else apply
            return objective(run, join(architecture, trained, frozen), rows)

        (total, count), grads = _gradients(loss, state.params, batch, accumulate)
        count = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        tx = transformation(state.hyper, state.step)
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": total / count,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.hyper, state.step),
            "targets": count,
        }
        return TrainState(state.step + 1, params, optimizer, state.hyper), metrics

    return jax.jit(step, donate_argnums=0)


def _gradients(loss, params, batch, accumulate: int):
    """Summed loss, target count and summed gradients; micro-batches run one after the other in a scan."""
    grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        return grad(params, batch, 0)
    # Rows are dealt out round-robin: reshaping [B] -> [B/n, n] keeps the split axis whole on every mesh.
    micro = jax.tree.map(lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(carry, rows):
        return jax.tree.map(jnp.add, carry, grad(params, *rows)), None

    first = grad(params, jax.tree.map(lambda x: x[0], micro), 0)
    rest = (jax.tree.map(lambda x: x[1:], micro), jnp.arange(1, accumulate))
    total, _ = jax.lax.scan(body, first, rest)
    return total


def resolve_dtype(asked: str) -> str:
    """auto: bfloat16 where the hardware multiplies it fast (TPU, GPU), float32 on CPU."""
    if asked != "auto":
        return asked
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
