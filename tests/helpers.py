"""What several tests need of an objective: its sum and count outside of training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from recursive_jax.models.network import FunctionNetwork
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Term
from recursive_jax.objectives.causal import causal


def loss_of(objective: Objective, apply, params, batch, others=None, key=None, extra=None) -> Loss:
    """The loss of one batch; apply(params, *inputs) is called as it is."""
    run = lambda p, *inputs, **kw: apply(p.model, *inputs, **kw)
    ctx = Context(run, others or {}, jax.random.key(0) if key is None else key, jnp.int32(0), None)
    return objective.loss(ctx, Params(params, {} if extra is None else extra), batch)


def sum_and_count(objective: Objective, apply, params, batch):
    """Of an objective with one term."""
    (term,) = loss_of(objective, apply, params, batch).terms.values()
    return term.sum, term.count


@dataclasses.dataclass(frozen=True)
class Exploding(Objective):
    """The causal loss until the first norm has moved, then infinity."""

    def loss(self, ctx, params, batch):
        (term,) = causal.loss(ctx, params, batch).terms.values()
        scale = params.model["final_norm"]["scale"][0]
        return Loss({"nll": Term(term.sum / jnp.where(scale > 0.999, 1.0, 0.0), term.count)})


@dataclasses.dataclass(frozen=True)
class ShardedFunctions(FunctionNetwork):
    """Functions that lay out their arrays themselves, as the built-in Transformer's do."""

    def bind(self, dtype="float32"):
        return self.apply_function


def plain_functions(model):
    """A built-in model as two functions: without its cache, every step is a whole forward pass."""
    network = ShardedFunctions(model.network.init, model.network.bind(), model.vocab, model.max_length, "plain", 1)
    return dataclasses.replace(model, network=network)
