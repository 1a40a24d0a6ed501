"""Sampling rules as pure functions on logits; every setting is data, so a new temperature never compiles again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from recursive_jax.config import SamplingConfig

NEVER = -1e30


@struct.dataclass
class Rules:
    """temperature (0: greedy), top_k (0: off), top_p (1: off), min_p (0: off): scalars, or `[B]` per request.

    `truncates` is static: without top-k and top-p the sort over the vocabulary is left out of the program.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    truncates: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def of(cls, c: SamplingConfig) -> Rules:
        return cls(
            np.float32(c.temperature),
            np.int32(c.top_k),
            np.float32(c.top_p),
            np.float32(c.min_p),
            truncates=c.top_k > 0 or c.top_p < 1.0,
        )


def apply_rules(logits_BV: jax.Array, rules: Rules) -> jax.Array:
    """Logits of the distribution to sample from: divided by the temperature, then everything that top-k, top-p
    (arXiv:1904.09751) or min-p (arXiv:2407.01082) excludes set to NEVER. The most likely token always stays; tokens
    tied with the last one kept stay too."""
    greedy = rules.temperature <= 0
    z = logits_BV / jnp.where(greedy, 1.0, rules.temperature)[..., None]
    if rules.truncates:
        V = z.shape[-1]
        sorted_BV = jnp.sort(z, axis=-1)[:, ::-1]
        k = jnp.where(rules.top_k > 0, jnp.minimum(rules.top_k, V), V)
        k_B1 = jnp.broadcast_to(k, z.shape[:1])[:, None]
        kth_B1 = jnp.take_along_axis(sorted_BV, k_B1 - 1, axis=-1)
        # top-p acts on what top-k left, as other samplers chain them.
        p_BV = jax.nn.softmax(jnp.where(sorted_BV >= kth_B1, sorted_BV, NEVER), axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        kept_BV = before_BV < rules.top_p[..., None]
        last_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        z = jnp.where(z >= jnp.maximum(kth_B1, last_B1), z, NEVER)
    top_B1 = jnp.max(z, axis=-1, keepdims=True)
    floor = jnp.where(rules.min_p > 0, jnp.log(jnp.maximum(rules.min_p, 1e-30)), -jnp.inf)[..., None]
    z = jnp.where(z >= top_B1 + floor, z, NEVER)
    return jnp.where(greedy[..., None], jnp.where(z >= top_B1, 0.0, NEVER), z)


def request_keys(key: jax.Array, request_B: jax.Array) -> jax.Array:
    """One key per request: a row's randomness depends on nothing but the round's key and its own id."""
    return jax.vmap(lambda r: jax.random.fold_in(key, r))(request_B)


def draw(keys_B: jax.Array, position_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """One token per row by inverse transform: one uniform number per request and position.

    Gumbel noise would need a number per vocabulary entry.
    """
    u_B = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t)))(keys_B, position_B)
    p_BV = jax.nn.softmax(logits_BV, axis=-1)
    cdf_BV = cumulative(p_BV)
    # The first allowed token beyond u: rounding in the sum can neither pick an excluded token nor run off the end.
    beyond_BV = (cdf_BV > (u_B * cdf_BV[:, -1])[:, None]) & (p_BV > 0)
    last_B = p_BV.shape[-1] - 1 - jnp.argmax(p_BV[:, ::-1] > 0, axis=-1)
    return jnp.where(jnp.any(beyond_BV, axis=-1), jnp.argmax(beyond_BV, axis=-1), last_B).astype(jnp.int32)


def cumulative(p_BV: jax.Array) -> jax.Array:
    """Cumulative sum along the vocabulary, in two levels: within blocks by a triangular product, then across.

    XLA's CPU cumsum is a scan of passes over the array; this is one small matrix product."""
    B, V = p_BV.shape
    width = 64
    blocks_BNW = jnp.pad(p_BV, ((0, 0), (0, -V % width))).reshape(B, -1, width)
    upper = jnp.triu(jnp.ones((width, width), p_BV.dtype))
    inner_BNW = jnp.einsum("bnw,wx->bnx", blocks_BNW, upper, precision=jax.lax.Precision.HIGHEST)
    before_BN = jnp.cumsum(inner_BNW[:, :, -1], axis=1) - inner_BNW[:, :, -1]
    return (inner_BNW + before_BN[:, :, None]).reshape(B, -1)[:, :V]
