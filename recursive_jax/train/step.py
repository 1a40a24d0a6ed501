"""The train state and the jitted, sharded, donated train step: one for every objective."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from recursive_jax import mesh as meshes
from recursive_jax.errors import InputError
from recursive_jax.mesh import TRACES
from recursive_jax.models.network import Network
from recursive_jax.objectives.base import Context, Loss, Objective, Params, WholeBatch
from recursive_jax.train.optimizer import Hyper, learning_rate, transformation

Held = tuple[tuple[str, Network], ...]  # the frozen models of an objective, by name


@struct.dataclass
class TrainState:
    """Everything a checkpoint needs: `step` also addresses the data."""

    step: jax.Array  # int32: steps done
    params: Params
    optimizer: Any
    hyper: Hyper
    state: Any  # of the objective


def split(network: Network, params: Any) -> tuple[Any, Any]:
    """(what trains, what stays): the whole params and nothing, or an adapter and its frozen base."""
    if not network.frozen:
        return params, {}
    frozen = {k: params[k] for k in network.frozen}
    return {k: v for k, v in params.items() if k not in frozen}, frozen


def join(network: Network, trained: Any, frozen: Any) -> Any:
    return {**trained, **frozen} if network.frozen else trained


def new_state(params: Params, state: Any, hyper: Hyper) -> TrainState:
    step = jnp.int32(0)
    return TrainState(step, params, transformation(hyper, step).init(params), hyper, state)


@functools.cache
def init_program(network: Network) -> Callable[..., TrainState]:
    """(key, extra params, objective's state, hyper) -> the first state of fresh params."""

    def init(key, extra, state, hyper):
        TRACES["train_init"] += 1
        return new_state(Params(network.init(key), extra), state, hyper)

    return jax.jit(init)


@functools.cache
def start_program() -> Callable[..., TrainState]:
    """(params, extra params, objective's state, hyper) -> a fresh optimizer around them (copied: the step donates its
    state)."""

    def start(params, extra, state, hyper):
        TRACES["train_start"] += 1
        params, extra, state = jax.tree.map(jnp.copy, (params, extra, state))
        return new_state(Params(params, extra), state, hyper)

    return jax.jit(start)


@functools.cache
def step_program(network: Network, objective: Objective, accumulate: int, dtype: str, held: Held = ()) -> Callable:
    """(state, batch, frozen, params of the held models by name) -> (state, metrics). The state is donated. Compiled
    once for all rounds."""
    bound = network.bind(dtype)
    others = {name: other.bind(dtype) for name, other in held}

    def context(state: TrainState, frozen: Any, held_params: Mapping[str, Any], micro: Any, own: Any) -> Context:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.hyper.seed, impl=meshes.KEYS), state.step)
        key = jax.random.fold_in(key, micro)

        def apply(params, *inputs, **keywords):
            dropout = {"key": key} if network.has_dropout else {}
            return bound(join(network, params.model, frozen), *inputs, **{**dropout, **keywords})

        def frozen_apply(name):
            def run(_, *inputs, **keywords):
                return jax.lax.stop_gradient(others[name](held_params[name], *inputs, **keywords))

            return run

        frozen_ones = {name: frozen_apply(name) for name in others}
        draws = jax.random.fold_in(key, 1)  # dropout and the objective's own draws share no random numbers
        progress = state.step.astype(jnp.float32) / jnp.maximum(state.hyper.horizon, 1.0)
        return Context(apply, frozen_ones, draws, state.step, own, network, dict(held), progress)

    def step(state: TrainState, batch, frozen, held_params):
        TRACES["train_step"] += 1
        make_context = functools.partial(context, state, frozen, held_params)
        loss, grads = loss_and_gradients(objective, make_context, state.params, batch, state.state, accumulate)
        tx = transformation(state.hyper, state.step)
        updates, optimizer = tx.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            **_metrics(loss),
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate(state.hyper, state.step),
        }
        own = state.state if loss.state is None else loss.state
        return TrainState(state.step + 1, params, optimizer, state.hyper, own), metrics

    return jax.jit(step, donate_argnums=0)


def _metrics(loss: Loss) -> dict[str, jax.Array]:
    """What is logged of a loss that is summed over the whole batch. `targets`: the count of its first term."""
    values = {name: term.sum / jnp.maximum(term.count, 1.0) for name, term in loss.terms.items()}
    first, *rest = loss.terms
    found = {"loss": sum(loss.terms[n].weight * values[n] for n in loss.terms)}
    if rest:
        found |= {f"loss/{name}": value for name, value in values.items()}
    found |= {name: total / jnp.maximum(count, 1e-9) for name, (total, count) in loss.metrics.items()}
    return {**found, "targets": jnp.maximum(loss.terms[first].count, 1.0)}


def loss_and_gradients(
    objective: Objective,
    make_context: Callable[[Any, Any], Context],
    params: Params,
    batch: Any,
    own: Any,
    accumulate: int,
) -> tuple[Loss, Params]:
    """(the loss summed over the batch, the gradient of its value) in `accumulate` micro-batches. make_context(micro,
    own): what the loss may use in a micro-batch; own: the objective's state."""
    gradients = _whole_batch_gradients if isinstance(objective, WholeBatch) and accumulate > 1 else _gradients
    return gradients(objective, make_context, params, batch, own, accumulate)


def _gradients(objective: Objective, make_context, params: Params, batch, own, accumulate: int) -> tuple[Loss, Params]:
    """(the loss summed over the batch, its gradient); micro-batches run one after the other in a scan.

    One term: its gradients are summed, then divided by the count. Several: each has a denominator of its own, so the
    counts come first, from a pass that has no gradient (and of which XLA leaves out all that the counts do not need).
    """
    micro = _dealt(batch, accumulate)
    parts = lambda params, rows, i, own: objective.loss(make_context(i, own), params, rows)
    first = jax.tree.map(lambda x: x[0], micro)
    like = jax.eval_shape(parts, params, first, 0, own)
    if not isinstance(like, Loss):
        raise InputError(f"{type(objective).__name__}.loss gave a {type(like).__name__}, a Loss of terms is wanted")
    several = len(like.terms) > 1
    counts = _counts(parts, params, micro, own, accumulate) if several else None

    def summed(params, rows, i, own):
        loss = parts(params, rows, i, own)
        if not several:
            (term,) = loss.terms.values()
            plain = isinstance(term.weight, float) and term.weight == 1.0
            return term.sum if plain else term.weight * term.sum, loss
        return sum(t.weight * t.sum / counts[name] for name, t in loss.terms.items()), loss

    loss, grads = _over_micro_batches(jax.grad(summed, has_aux=True), params, micro, own, accumulate)
    if not several:
        (term,) = loss.terms.values()
        count = jnp.maximum(term.count, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
    return loss, grads


def _dealt(batch: Any, accumulate: int) -> Any:
    """Rows dealt out round-robin to micro-batches `[n, B / n, ...]`: `[B] -> [B / n, n]` keeps the split axis whole on
    every mesh."""
    if accumulate == 1:
        return jax.tree.map(lambda x: x[None], batch)

    def deal(x: jax.Array) -> jax.Array:
        shape = (x.shape[0] // accumulate, accumulate, *x.shape[1:])
        return meshes.reshape(x, shape, "batch", *(None,) * x.ndim).swapaxes(0, 1)

    return jax.tree.map(deal, batch)


def _counts(parts, params, micro, own, accumulate: int) -> dict[str, jax.Array]:
    """The denominator of each term over all micro-batches."""

    def body(carry, rows):
        counts, own = carry
        loss = parts(params, *rows, own)
        added = {name: counts[name] + term.count for name, term in loss.terms.items()}
        return (added, own if loss.state is None else loss.state), None

    like = jax.eval_shape(parts, params, jax.tree.map(lambda x: x[0], micro), 0, own)
    zero = {name: jnp.zeros((), term.count.dtype) for name, term in like.terms.items()}
    (counts, _), _ = jax.lax.scan(body, (zero, own), (micro, jnp.arange(accumulate)))
    return {name: jnp.maximum(count, 1.0) for name, count in counts.items()}


def _over_micro_batches(grad, params, micro, own, accumulate: int) -> tuple[Loss, Params]:
    grads, loss = grad(params, jax.tree.map(lambda x: x[0], micro), 0, own)
    if accumulate == 1:
        return loss, grads

    def body(carry, rows):
        before, summed = carry
        more, loss = grad(params, *rows, own if before.state is None else before.state)
        return (_added(before, loss), jax.tree.map(jnp.add, summed, more)), None

    rest = (jax.tree.map(lambda x: x[1:], micro), jnp.arange(1, accumulate))
    (loss, grads), _ = jax.lax.scan(body, (loss, grads), rest)
    return loss, grads


def _added(a: Loss, b: Loss) -> Loss:
    """Two losses over different rows; weights and state are the later one's."""
    terms = {n: t.replace(sum=a.terms[n].sum + t.sum, count=a.terms[n].count + t.count) for n, t in b.terms.items()}
    metrics = {n: (a.metrics[n][0] + total, a.metrics[n][1] + count) for n, (total, count) in b.metrics.items()}
    return Loss(terms, metrics, b.state)


def _whole_batch_gradients(objective: WholeBatch, make_context, params: Params, batch, own, accumulate: int):
    """GradCache (see `WholeBatch`): (the loss of the whole batch, its gradient), in the memory of one micro-batch."""
    micro = _dealt(batch, accumulate)
    indices = jnp.arange(accumulate)
    represent = lambda params, rows, i: objective.represent(make_context(i, own), params, rows)
    _, cached = jax.lax.scan(lambda _, rows: (None, represent(params, *rows)), None, (micro, indices))

    def total(params, cached):
        whole = jax.tree.map(lambda x: _gathered(x), cached)
        loss = objective.loss_of(make_context(0, own), params, whole, batch)
        value = sum(t.weight * t.sum / jax.lax.stop_gradient(jnp.maximum(t.count, 1.0)) for t in loss.terms.values())
        return value, loss

    (grads, cotangents), loss = jax.grad(total, argnums=(0, 1), has_aux=True)(params, cached)

    def body(summed, item):
        rows, i, cotangent = item
        _, pull = jax.vjp(lambda params: represent(params, rows, i), params)
        return jax.tree.map(jnp.add, summed, pull(cotangent)[0]), None

    grads, _ = jax.lax.scan(body, grads, (micro, indices, cotangents))
    return loss, grads


def _gathered(x: jax.Array) -> jax.Array:
    """`[n, B / n, ...]` back to `[B, ...]`, in the order before the rows were dealt out."""
    x = x.swapaxes(0, 1)
    return meshes.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))
