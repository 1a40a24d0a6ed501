"""Variational autoencoding: a lower bound on the likelihood of the data (arXiv:1312.6114)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from recursive_jax.data.packing import Batches
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Shapes, Term


def elbo(mean_NZ: jax.Array, log_var_NZ: jax.Array, logits_NP: jax.Array, pixels_NP: jax.Array) -> jax.Array:
    """Nats per image `[N]`: log-likelihood of Bernoulli pixels at one drawn code, less KL(code || N(0, I))."""
    likelihood_N = -optax.sigmoid_binary_cross_entropy(logits_NP, pixels_NP).sum(-1)
    return likelihood_N + 0.5 * (1 + log_var_NZ - mean_NZ**2 - jnp.exp(log_var_NZ)).sum(-1)


@dataclasses.dataclass(frozen=True)
class NegativeElbo(Objective):
    """The negative bound of images in [0, 1], for a network whose `apply(params, images, key)` gives (mean,
    log-variance, pixel logits). weight_decay: half of it times the sum of squared params is added (in the gradient, as
    Adam's own)."""

    fields: ClassVar[tuple[str, ...]] = ("images",)

    weight_decay: float = 0.0

    def shapes(self, rows: int, length: int) -> Shapes:
        raise InputError("what images are like is known from the data alone")

    def pack(self, data: Any, model: Model, length: int) -> Batches:
        return data

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        bound_N = elbo(*ctx.apply(params, batch["images"], ctx.key), batch["images"])
        terms = {"negative_elbo": Term(-jnp.sum(bound_N), jnp.float32(bound_N.shape[0]))}
        if self.weight_decay:
            squares = sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params.model))
            # Of the params, not of the rows: every micro-batch adds one to sum and count alike.
            terms["decay"] = Term(0.5 * self.weight_decay * squares, jnp.float32(1.0))
        return Loss(terms)
