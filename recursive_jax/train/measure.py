"""What an objective says of a model on given rows, without training on them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax import mesh as meshes
from recursive_jax.config import row_length
from recursive_jax.errors import InputError
from recursive_jax.mesh import TRACES
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.objectives.base import Context, Extra, Objective, Params


def objective_metrics(
    model: Model,
    data: Any,
    objective: Objective,
    *,
    extra: Extra | None = None,
    steps: int = 8,
    batch: int = 16,
    length: int | None = None,
    seed: int = 1,
    dtype: str = "float32",
) -> dict[str, float]:
    """The terms and metrics of `steps` batches, each divided by its count over all of them. data: as of `rj.train`.
    extra: what the training gave beside the model (`Trained.extra`); default: fresh. Raises InputError for a model
    without params, and for objectives with frozen models."""
    if model.params is None:
        raise InputError("this model has no params: train it, load one, or call .initialized(seed)")
    objective = objective.resolved(model)
    if objective.models(model):
        raise InputError(f"{type(objective).__name__} compares with frozen models: it is measured as it trains")
    if batch % meshes.batch_divisor(model.mesh):
        raise InputError(
            f"batch={batch} is not divisible by {meshes.batch_divisor(model.mesh)}, the mesh's data x fsdp"
        )
    length = row_length(length, model.max_length)
    batches = objective.pack(objective.rows(data, model.tokenizer), model, length)
    batches.begin(batch, seed)
    program = _program(model.network, objective.static(), meshes.resolve_dtype(dtype, model.mesh))
    totals: dict[str, Any] = {}
    with jax.set_mesh(model.mesh):
        extra = objective.init(meshes.random_key(seed), model) if extra is None else extra
        for step in range(steps):
            rows = meshes.put_batch(model.mesh, batches.next(step))
            found = meshes.fetch(
                program(model.params, extra.params, extra.state, rows, jnp.int32(step), meshes.seed_words(seed))
            )
            for name, (total, count) in found.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + float(total), before[1] + float(count))
    return {name: total / max(count, 1e-9) for name, (total, count) in totals.items()}


@functools.cache
def _program(network: Network, objective: Objective, dtype: str):
    bound = network.bind(dtype)

    def measure(params, own, state, batch, step, seed):
        TRACES["objective_metrics"] += 1
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl=meshes.KEYS), step)
        apply = lambda p, *inputs, **keywords: bound(p.model, *inputs, **keywords)
        ctx = Context(apply, {}, key, step, state, network, progress=jnp.float32(1.0))
        loss = objective.loss(ctx, Params(params, own), batch)
        return {**{name: (t.sum, t.count) for name, t in loss.terms.items()}, **loss.metrics}

    return jax.jit(measure)
