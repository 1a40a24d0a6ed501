"""TPU attention: JAX's splash kernel (Pallas) behind the shapes of `attention()`. Never materialises T x S scores."""

from __future__ import annotations

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from recursive_jax.mesh import spec
from recursive_jax.models.masks import Mask


def attention(q_BTHK, k_BSGK, v_BSGK, mask: Mask, cap: float | None = None, interpret: bool = False) -> jax.Array:
    """Causal or bidirectional, windowed, with segments; T a multiple of 128. `interpret` runs it on a CPU, for tests.

    Positions with segment 0 see one another instead of nothing; they are padding and their output is not used.
    """
    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    block = next(b for b in (512, 256, 128) if T % b == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def local(q, k, v, segments_BT):
        """What one device does with its rows and heads."""
        heads = masks.MultiHeadMask([_mask(mask, T)] * q.shape[2])
        kernel = kernels.make_splash_mha(
            heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=cap, interpret=interpret
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q * K**-0.5, k, v))
        if segments_BT is None:
            out = jax.vmap(kernel)(q, k, v)
        else:
            out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernels.SegmentIds(s, s)))(q, k, v, segments_BT)
        return out.swapaxes(1, 2)

    if jax.sharding.get_abstract_mesh().empty:
        return local(q_BTHK, k_BSGK, v_BSGK, mask.segments_BT)
    rows = spec("batch", None, "heads", None)
    specs = (rows, rows, rows, None if mask.segments_BT is None else spec("batch", None))
    return jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)(
        q_BTHK, k_BSGK, v_BSGK, mask.segments_BT
    )


def _mask(mask: Mask, T: int):
    if mask.window is not None:
        return masks.LocalMask((T, T), (mask.window - 1, 0 if mask.causal else mask.window - 1), 0)
    return masks.CausalMask((T, T)) if mask.causal else masks.FullMask((T, T))
