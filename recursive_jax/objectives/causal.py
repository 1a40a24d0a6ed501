"""Causal language modelling: the negative log-likelihood of each token given those before it in its segment."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

#: An objective: (architecture.apply, params, batch) -> (summed loss, number of targets). Both are sums, so that
#: micro-batches and devices add up before the one division (a mean of means would weight short rows more).
Objective = Callable[[Callable[..., jax.Array], Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]


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


def causal(apply: Callable[..., jax.Array], params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Summed next-token loss over the packed rows of `batch` and its number of targets (the sum of their weights)."""
    inputs, segments, labels, weight_BT = targets(batch)
    return _weighted(token_nll(apply(params, inputs, segments), labels), weight_BT)


def _weighted(nll_BT: jax.Array, weight_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(jnp.where(weight_BT > 0, weight_BT * nll_BT, 0.0)), jnp.sum(weight_BT)


@functools.cache
def truncated(confidence: float) -> Objective:
    """`causal` without the tokens that the model already gives more than `confidence`: what a model writes is what it is
    sure of, and learning that again is what narrows it (truncated cross-entropy, arXiv:2509.08972). The number of targets
    counts the kept tokens only. Cached, so that equal thresholds share one compiled step."""

    def objective(apply, params, batch):
        inputs, segments, labels, weight_BT = targets(batch)
        nll_BT = token_nll(apply(params, inputs, segments), labels)
        unsure_BT = jax.lax.stop_gradient(nll_BT) > -math.log(confidence)
        return _weighted(nll_BT, jnp.where(unsure_BT, weight_BT, 0.0))

    return objective
