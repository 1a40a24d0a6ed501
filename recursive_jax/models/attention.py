"""One `attention()`: a reference path that says what is meant, and the fast path of each platform.

Shapes: B rows, T query positions, S key positions, H query heads, G key heads (H a multiple of G), K head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from recursive_jax.mesh import local, platform, reshape, rows_like, spec
from recursive_jax.models.masks import Mask

MASKED = -1e30  # finite: a fully masked row must give a uniform softmax, not NaN
BLOCK = 128  # query block of the blocked path; 64 gains little and doubles what is compiled


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

    kind: `reference`, `blocked` (skips the key blocks a causal query cannot see; CPU), `cudnn` (GPU, half precision),
    `splash` (TPU kernel; rows that are no multiple of 128 tokens take another), or `auto`: the fast one where it
    applies, else the reference.
    scale: multiplies the scores, default K^-0.5. cap: scores become cap * tanh(score / cap) (Gemma 2).
    """
    kind = _choose(kind, q_BTHK, mask, cap)
    if scale is not None:  # the paths below multiply by K^-0.5
        q_BTHK = q_BTHK * (scale * q_BTHK.shape[3] ** 0.5)
    if kind == "cudnn":
        return _cudnn(q_BTHK, k_BSGK, v_BSGK, mask)
    if kind == "splash":
        from recursive_jax.models import splash  # Pallas is imported where its kernel is used

        return splash.attention(q_BTHK, k_BSGK, v_BSGK, mask, cap)
    if kind == "blocked" and mask.causal and mask.plain:
        return _blocked(q_BTHK, k_BSGK, v_BSGK, mask, cap)
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    return _softmax_attention(q_BTHK, k_BSGK, v_BSGK, mask.visible(jnp.arange(T), jnp.arange(S)), cap)


def _choose(kind: str, q_BTHK: jax.Array, mask: Mask, cap: float | None) -> str:
    where, T = platform(), q_BTHK.shape[1]
    if kind == "splash" and T % 128:  # a short prompt, or the one token that params are made with
        return "blocked" if T > BLOCK else "reference"
    if kind != "auto":
        return kind
    if where == "gpu" and q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and cap is None:
        return "cudnn"
    plain = mask.plain and isinstance(mask.window, int | None)
    if where == "tpu" and T % 128 == 0 and q_BTHK.shape[3] % 64 == 0 and plain:
        return "splash"
    return "blocked" if T > BLOCK else "reference"


def chosen(length: int, head_dim: int, dtype: str) -> str:
    """The path that `auto` takes for causal rows of this length, on the mesh that is set."""
    shape = jax.ShapeDtypeStruct((1, length, 1, head_dim), jnp.dtype(dtype))
    return _choose("auto", shape, Mask(), None)


def _softmax_attention(q_BTHK, k_BSGK, v_BSGK, visible_BTS, cap: float | None = None) -> jax.Array:
    """The R = H / G query heads of one key head stand in line on the time axis, so every product is 4-D: XLA's
    CPU backend is a fifth slower on the 5-D form. Scaling q, not the scores, saves a pass over T x S."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    R = H // G
    q_BTGRK = reshape(q_BTHK * K**-0.5, (B, T, G, R, K), "batch", "time", "kv_heads", None, None)
    q_BtGK = reshape(q_BTGRK.swapaxes(2, 3), (B, T * R, G, K), "batch", "time", "kv_heads", None)
    scores_BGtS = jnp.einsum("btgk,bsgk->bgts", q_BtGK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BGtS = _capped(scores_BGtS, cap)
    scores_BGtS = jnp.where(rows_like(jnp.repeat(visible_BTS, R, axis=1), B)[:, None], scores_BGtS, MASKED)
    weights_BGtS = jax.nn.softmax(scores_BGtS, axis=-1).astype(v_BSGK.dtype)
    out_BtGK = jnp.einsum("bgts,bsgk->btgk", weights_BGtS, v_BSGK)
    out_BTGRK = reshape(out_BtGK, (B, T, R, G, K), "batch", "time", None, "kv_heads", None).swapaxes(2, 3)
    return reshape(out_BTGRK, (B, T, H, K), "batch", "time", "heads", None)


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
    if mask.segments_BT is None and mask.window is None and mask.plain:
        return call(q_BTHK, k_BSGK, v_BSGK, is_causal=mask.causal)
    visible = mask.visible(jnp.arange(T), jnp.arange(T))
    return call(q_BTHK, k_BSGK, v_BSGK, mask=visible[:, None])


FEW = 4  # queries that a CPU takes one by one


def cached_attention(
    q_BTHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    visible_BTS: jax.Array,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """T new queries per row against a cache. Returns `[B, T, H, K]`.

    Batched products with the R = H / G query heads of a key head side by side: on CPU a multiply-and-sum of the same
    shapes is 10 to 20 times slower. A few queries go one by one there: XLA's product of a matrix with 2 to 16 rows
    takes up to three times as long as so many products with one."""
    B, T, H, K = q_BTHK.shape
    G = k_BGSK.shape[1]
    q_BTGRK = reshape(q_BTHK * (K**-0.5 if scale is None else scale), (B, T, G, H // G, K), *_HEADS)
    q_BGtK = reshape(q_BTGRK.transpose(0, 2, 1, 3, 4), (B, G, T * H // G, K), "batch", "kv_heads", "time", None)
    visible_BtS = jnp.repeat(rows_like(visible_BTS, B), H // G, axis=1)

    def attend(q_BGtK, visible_BtS):
        scores_BGtS = jnp.einsum("bgtk,bgsk->bgts", q_BGtK, k_BGSK, preferred_element_type=jnp.float32)
        weights_BGtS = jax.nn.softmax(jnp.where(visible_BtS[:, None], _capped(scores_BGtS, cap), MASKED), axis=-1)
        return jnp.einsum("bgts,bgsk->bgtk", weights_BGtS.astype(v_BGSK.dtype), v_BGSK)

    t = q_BGtK.shape[2]
    if platform() == "cpu" and t <= FEW:
        parts = [attend(q_BGtK[:, :, i : i + 1], visible_BtS[:, i : i + 1]) for i in range(t)]
        out_BGtK = jnp.concatenate(parts, axis=2)
    else:
        out_BGtK = attend(q_BGtK, visible_BtS)
    out_BGTRK = reshape(out_BGtK, (B, G, T, H // G, K), "batch", "kv_heads", "time", None, None)
    return reshape(out_BGTRK.transpose(0, 2, 1, 3, 4), (B, T, H, K), "batch", "time", "heads", None)


_HEADS = ("batch", "time", "kv_heads", None, None)


def write_cache(cache_BGSK: jax.Array, new_BTGK: jax.Array, first_B: jax.Array) -> jax.Array:
    """The cache with T new entries in each row, from slot first_B on. Slots beyond the end are not written.

    A scatter: where the cache is updated in place it costs as little as writing one slot common to all rows. Each
    device writes its own part."""

    def write(cache, new, first_B):
        rows, heads = jnp.arange(cache.shape[0])[:, None, None], jnp.arange(cache.shape[1])[None, None]
        slots = (first_B[:, None] + jnp.arange(new.shape[1]))[:, :, None]
        return cache.at[rows, heads, slots].set(new.astype(cache.dtype), unique_indices=True, mode="drop")

    kept = spec("batch", "kv_heads", "time", None)
    return local(write, (kept, spec("batch", "time", "kv_heads", None), spec("batch")), kept)(
        cache_BGSK, new_BTGK, first_B
    )
