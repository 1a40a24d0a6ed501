"""What a model says of given tokens, without holding its logits whole: head and softmax run piece by piece over the
positions, in training too (their backward pass computes a piece again).

Shapes: B rows, T positions, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from recursive_jax import mesh as meshes
from recursive_jax.config import ModelConfig
from recursive_jax.models.attention import MASKED
from recursive_jax.models.masks import Mask
from recursive_jax.models.network import Network, TransformerNetwork
from recursive_jax.models.transformer import Taps

HELD = 2**24  # values of logits that a device holds at once (64 MiB); more are computed in pieces


@struct.dataclass
class Read:
    """logprobs_BT: of the labels, nats, float32. entropy_BT: of what was expected in their place. states_BTD: that it
    was expected from (None: of a model of user functions)."""

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    states_BTD: jax.Array | None


def read_tokens(
    network: Network | None,
    apply: Callable[..., Any],
    params: Any,
    inputs_BT: jax.Array,
    segments_BT: jax.Array | None,
    labels_BT: jax.Array,
    change: Callable[[jax.Array], jax.Array] | None = None,
    held: int | None = None,
) -> Read:
    """What the model expects after each input, at the labels. apply: of the network, bound to a
    dtype. change: made of the logits before anything is read off them. held: values of
    logits at once on a device, by default HELD; a network that is no Transformer gives all of them at once."""
    change = change or (lambda logits_BTV: logits_BTV)
    if not isinstance(network, TransformerNetwork):
        return Read(*_of_logits(change(apply(params, inputs_BT, segments_BT)), labels_BT), None)
    states_BTD = apply(params, inputs_BT, segments_BT, hidden=True)
    head = lambda states, labels: _of_logits(change(apply(params, None, states_BTD=states)), labels)
    B, T = labels_BT.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.size
    pieces = min(T, -(-B * T * network.padded_vocab // (devices * (HELD if held is None else held))))
    if pieces <= 1:
        return Read(*head(states_BTD, labels_BT), states_BTD)
    width = -(-T // pieces)
    fill = width * pieces - T

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, fill), *((0, 0),) * (x.ndim - 2)))
        shape = (B, pieces, width, *x.shape[2:])
        return meshes.reshape(x, shape, "batch", *(None,) * (len(shape) - 1)).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return meshes.reshape(x.swapaxes(0, 1), (B, width * pieces), "batch", None)[:, :T]

    labels_BT = meshes.rows_like(labels_BT, B)
    found = jax.lax.map(lambda piece: jax.checkpoint(head)(*piece), (cut(states_BTD), cut(labels_BT)))
    return Read(*map(join, found), states_BTD)


def attention_logprobs(c: ModelConfig, layer: int, taps: Taps, segments_BT: jax.Array) -> jax.Array:
    """What a layer attends to, as log-probabilities `[B, H, T, S]` float32; -1e30 where it may not look."""
    q_BTHK, k_BTGK = (x.astype(jnp.float32) for x in (taps.query_BTHK, taps.key_BTGK))
    B, T, H, K = q_BTHK.shape
    window = c.sliding_window if c.is_windowed(layer) else None
    visible_BTS = Mask(causal=c.causal, window=window, segments_BT=segments_BT).visible(jnp.arange(T), jnp.arange(T))

    def of_rows(q_BTHK, k_BTGK, visible_BTS):
        k_BTHK = jnp.repeat(k_BTGK, H // k_BTGK.shape[2], axis=2)
        scale = K**-0.5 if c.attention_scale is None else c.attention_scale
        scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK * scale, k_BTHK)
        if c.score_cap is not None:
            scores_BHTS = c.score_cap * jnp.tanh(scores_BHTS / c.score_cap)
        return jax.nn.log_softmax(jnp.where(visible_BTS[:, None], scores_BHTS, MASKED), axis=-1)

    rows = meshes.spec("batch")
    return meshes.local(of_rows, (rows, rows, rows), rows)(q_BTHK, k_BTGK, meshes.rows_like(visible_BTS, B))


def _of_logits(logits_BTV: jax.Array, labels_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities of the labels, entropies). A label's logit is picked by a masked sum: a gather along a split
    axis is not allowed."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    column = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    picked_BT = jnp.sum(jnp.where(column == labels_BT[..., None], logits_BTV, 0.0), axis=-1)
    total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    mean_BT = jnp.sum(jnp.exp(logits_BTV - total_BT[..., None]) * logits_BTV, axis=-1)
    return picked_BT - total_BT, total_BT - mean_BT
