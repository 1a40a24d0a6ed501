"""One `attention()`: a reference path that says what is meant, and the fast path of each platform.

Shapes: B rows, T query positions, S key positions, H query heads, G key heads (H a multiple of G), K head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from recursive_jax.mesh import reshape, rows_like

MASKED = -1e30  # finite: a fully masked row must give a uniform softmax, not NaN
BLOCK = 128  # query block of the blocked path; 64 gains little and doubles what is compiled


@struct.dataclass
class Mask:
    """Who may see whom. Every field is optional; a position is visible when all given rules allow it.

    causal: keys up to the query. prefix_B: keys before this index are seen by every query, for all that (prefix LM).
    window: at most this many keys back, the query included (and as many ahead, where the mask is not causal).
    segments: equal and non-zero segment ids only (packing). first_B: keys before this index are padding
    (left-padded prompts).
    """

    causal: bool = struct.field(pytree_node=False, default=True)
    window: Any = struct.field(pytree_node=False, default=None)  # int; traced where layers of several kinds are scanned
    segments_BT: jax.Array | None = None
    first_B: jax.Array | None = None
    prefix_B: jax.Array | None = None

    def visible(self, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
        """Boolean `[1 or B, T, S]` for the given query and key indices."""
        distance_TS = query_T[:, None] - key_S[None, :]
        seen = jnp.ones(distance_TS.shape, bool)
        if self.causal:
            seen &= distance_TS >= 0
        seen = seen[None]
        if self.causal and self.prefix_B is not None:
            seen = seen | (key_S[None, None, :] < self.prefix_B[:, None, None])
        if self.window is not None:
            seen = seen & ((distance_TS < self.window) & (distance_TS > -self.window))[None]
        if self.segments_BT is not None:
            query_BT, key_BS = self.segments_BT[:, query_T], self.segments_BT[:, key_S]
            seen = seen & (query_BT[:, :, None] == key_BS[:, None, :]) & (key_BS > 0)[:, None, :]
        if self.first_B is not None:
            seen = seen & (key_S[None, None, :] >= self.first_B[:, None, None])
        return seen


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask: Mask,
    kind: str = "auto",
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Softmax attention of a whole sequence with itself (T == S). Returns `[B, T, H, K]` in the dtype of q.

    kind: `reference`, `blocked` (skips the key blocks a causal query cannot see; CPU), `cudnn` (GPU, half
    precision), `splash` (TPU kernel), or `auto`: the fast one where it applies, else the reference.
    scale: multiplies the scores, default K^-0.5. cap: scores become cap * tanh(score / cap) (Gemma 2).
    """
    kind = _choose(kind, q_BTHK, mask, cap)
    if scale is not None:  # the paths below multiply by K^-0.5
        q_BTHK = q_BTHK * (scale * q_BTHK.shape[3] ** 0.5)
    if kind == "cudnn":
        return _cudnn(q_BTHK, k_BSGK, v_BSGK, mask)
    if kind == "splash":
        from recursive_jax.models import splash

        return splash.attention(q_BTHK, k_BSGK, v_BSGK, mask, cap)
    if kind == "blocked" and mask.causal and mask.first_B is None and mask.prefix_B is None:
        return _blocked(q_BTHK, k_BSGK, v_BSGK, mask, cap)
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    return _softmax_attention(q_BTHK, k_BSGK, v_BSGK, mask.visible(jnp.arange(T), jnp.arange(S)), cap)


def _choose(kind: str, q_BTHK: jax.Array, mask: Mask, cap: float | None) -> str:
    if kind != "auto":
        return kind
    platform, T = jax.default_backend(), q_BTHK.shape[1]
    if platform == "gpu" and q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and cap is None:
        return "cudnn"
    plain = mask.first_B is None and mask.prefix_B is None and isinstance(mask.window, int | None)
    if platform == "tpu" and T % 128 == 0 and q_BTHK.shape[3] % 128 == 0 and plain:
        return "splash"
    return "blocked" if T > BLOCK else "reference"


def _softmax_attention(q_BTHK, k_BSGK, v_BSGK, visible_BTS, cap: float | None = None) -> jax.Array:
    """The R = H / G query heads of one key head stand in line on the time axis, so every product is 4-D: XLA's
    CPU backend is a fifth slower on the 5-D form. Scaling q, not the scores, saves a pass over T x S."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    R = H // G
    q_BTGRK = reshape(q_BTHK * K**-0.5, (B, T, G, R, K), "batch", None, "kv_heads", None, None)
    q_BtGK = reshape(q_BTGRK.swapaxes(2, 3), (B, T * R, G, K), "batch", None, "kv_heads", None)
    scores_BGtS = jnp.einsum("btgk,bsgk->bgts", q_BtGK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BGtS = _capped(scores_BGtS, cap)
    scores_BGtS = jnp.where(rows_like(jnp.repeat(visible_BTS, R, axis=1), B)[:, None], scores_BGtS, MASKED)
    weights_BGtS = jax.nn.softmax(scores_BGtS, axis=-1).astype(v_BSGK.dtype)
    out_BtGK = jnp.einsum("bgts,bsgk->btgk", weights_BGtS, v_BSGK)
    out_BTGRK = reshape(out_BtGK, (B, T, R, G, K), "batch", None, None, "kv_heads", None).swapaxes(2, 3)
    return reshape(out_BTGRK, (B, T, H, K), "batch", None, "heads", None)


def _capped(scores: jax.Array, cap: float | None) -> jax.Array:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _blocked(q_BTHK, k_BSGK, v_BSGK, mask: Mask, cap: float | None) -> jax.Array:
    """Each block of queries meets only the keys that causality (and the window) leaves it."""
    T = q_BTHK.shape[1]
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        low = max(0, start - mask.window + 1) if isinstance(mask.window, int) else 0
        visible = mask.visible(jnp.arange(start, stop), jnp.arange(low, stop))
        blocks.append(_softmax_attention(q_BTHK[:, start:stop], k_BSGK[:, low:stop], v_BSGK[:, low:stop], visible, cap))
    return jnp.concatenate(blocks, axis=1)


def _cudnn(q_BTHK, k_BSGK, v_BSGK, mask: Mask) -> jax.Array:
    T = q_BTHK.shape[1]
    call = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if mask.segments_BT is None and mask.first_B is None and mask.window is None and mask.prefix_B is None:
        return call(q_BTHK, k_BSGK, v_BSGK, is_causal=mask.causal)
    visible = mask.visible(jnp.arange(T), jnp.arange(T))
    return call(q_BTHK, k_BSGK, v_BSGK, mask=visible[:, None])


def decode_attention(
    q_BHK: jax.Array,
    k_BGKS: jax.Array,
    v_BGKS: jax.Array,
    visible_BS: jax.Array,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """One query per row against a cache whose time axis is last. Returns `[B, H, K]`.

    Batched products with the R = H / G query heads of a key head side by side. On CPU a multiply-and-sum of the same
    shapes is 2 to 30 times slower here, and time-last beats time-first as soon as the cache outgrows the L2.
    """
    B, H, K = q_BHK.shape
    G = k_BGKS.shape[1]
    q_BGRK = reshape(q_BHK * (K**-0.5 if scale is None else scale), (B, G, H // G, K), "batch", "kv_heads", None, None)
    scores_BGRS = jnp.einsum("bgrk,bgks->bgrs", q_BGRK, k_BGKS, preferred_element_type=jnp.float32)
    scores_BGRS = _capped(scores_BGRS, cap)
    weights_BGRS = jax.nn.softmax(jnp.where(rows_like(visible_BS, B)[:, None, None], scores_BGRS, MASKED), axis=-1)
    out_BGRK = jnp.einsum("bgrs,bgks->bgrk", weights_BGRS.astype(v_BGKS.dtype), v_BGKS)
    return reshape(out_BGRK, (B, H, K), "batch", "heads", None)
