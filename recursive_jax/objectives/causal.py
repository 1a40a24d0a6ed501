"""Causal language modelling: the negative log-likelihood of each token given those before it in its segment."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Term


def token_nll(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[label], float32 `[B, T]`. Works on logits split over the vocabulary: the label's logit is
    picked by a masked sum, because a gather along a split axis is not allowed."""
    column = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    picked_BT = jnp.sum(jnp.where(column == labels_BT[..., None], logits_BTV, 0.0), axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def targets(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(inputs, their segments, labels, weights), each `[B, T]`, from packed rows of T + 1 positions.

    `batch["loss"]` (bool or float32 `[B, T + 1]`), where there is one, says which tokens count and how much: supervised
    fine-tuning is this objective on completions only, weighted mixing this objective with a weight for each row.
    """
    tokens, segments = batch["tokens"], batch["segments"]
    counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weight_BT = counted.astype(jnp.float32)
    if "loss" in batch:
        weight_BT *= batch["loss"][:, 1:]
    return tokens[:, :-1], segments[:, :-1], tokens[:, 1:], weight_BT


def weighted_sum(values_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """The sum of weight * value where the weight is not 0 (a value there may be anything)."""
    return jnp.sum(jnp.where(weight_BT > 0, weight_BT * values_BT, 0.0))


@dataclasses.dataclass(frozen=True)
class Causal(Objective):
    """Next-token loss over packed rows; the count is the sum of the weights. On prompts with completions this is
    supervised fine-tuning: a prompt is never learnt.

    truncate: tokens that the model already gives more than this are left out of sum and count (truncated cross-entropy,
    arXiv:2509.08972): what a model writes is what it is sure of, and learning that again is what narrows it. 1: none.

    pieces: head and softmax run piece by piece over the positions, forward and back (`models/read.py`): the memory of
    64 MiB of logits a device instead of all of them, for running the head once more.
    """

    truncate: float = 1.0
    pieces: bool = False

    def sampling(self, model: Model, length: int) -> dict[str, Any]:
        return {"denoise": None} if model.sampling.get("denoise") else {}  # it writes from left to right again

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        inputs, segments, labels, weight_BT = targets(batch)
        if self.pieces:
            nll_BT = -ctx.read(params, inputs, segments, labels).logprobs_BT
        else:
            nll_BT = token_nll(ctx.apply(params, inputs, segments), labels)
        if self.truncate < 1.0:
            unsure_BT = jax.lax.stop_gradient(nll_BT) > -math.log(self.truncate)
            weight_BT = jnp.where(unsure_BT, weight_BT, 0.0)
        return Loss({"nll": Term(weighted_sum(nll_BT, weight_BT), jnp.sum(weight_BT))})


causal = Causal()
