"""One configurable decoder Transformer in Flax Linen, used as pure functions.

`Transformer(config).init(key, tokens)` makes the params (a plain dict, layers stacked on the first axis);
`.apply(...)` reads them, whether the layers are scanned (training large models: compiles once) or unrolled
(decoding: a scan would copy every layer's weights and cache out of the stacks at each token).
The KV cache is an argument and a result.

Shapes: B rows, T positions, D width, H query heads, G key heads, K head width, F MLP width, L layers, V
vocabulary, S cache slots.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from recursive_jax.config import ModelConfig
from recursive_jax.mesh import rows_like, spec
from recursive_jax.models.attention import Mask, attention, decode_attention

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@struct.dataclass
class Cache:
    """Keys and values per layer, time last (`[B, G, K, S]`), left-padded rows: all rows write the same slot."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    slot: jax.Array  # int32 scalar: the next slot to write
    first_B: jax.Array  # int32: the slot of each row's first real token

    def grown(self, slots: int) -> Cache:
        """Room for `slots` tokens."""
        return self.replace(
            keys=tuple(_grow(x, slots) for x in self.keys), values=tuple(_grow(x, slots) for x in self.values)
        )


def _weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float
) -> jax.Array:
    """A float32 master weight, cast to the module's compute dtype; scale 0 and 1 give constants."""

    def init(key: jax.Array) -> jax.Array:
        if scale in (0.0, 1.0):
            return jnp.full(shape, scale, jnp.float32, out_sharding=spec(*axes))
        return scale * jax.random.normal(key, shape, jnp.float32, out_sharding=spec(*axes))

    return module.param(name, init).astype(module.dtype)


class Norm(nn.Module):
    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D = x_BTD.shape[-1]
        gain = _weight(self, "gain", (D,), (None,), 1.0)
        x = x_BTD.astype(jnp.float32)
        if self.config.norm == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        x = x.astype(self.dtype) * gain
        return x + _weight(self, "bias", (D,), (None,), 0.0) if self.config.norm == "layer" else x


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half-split convention (arXiv:2104.09864; the layout of Llama files)."""
    half = x_BTHK.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1F = positions_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle_BT1F).astype(x_BTHK.dtype), jnp.sin(angle_BT1F).astype(x_BTHK.dtype)
    a, b = x_BTHK[..., :half], x_BTHK[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask: Mask, layer_cache=None):
        c = self.config
        D, H, G, K = c.width, c.heads, c.G, c.K
        heads = spec("batch", None, "heads", None)
        q = jnp.einsum(
            "btd,dhk->bthk",
            x_BTD,
            _weight(self, "query", (D, H, K), ("embed", "heads", None), D**-0.5),
            out_sharding=heads,
        )
        k = jnp.einsum(
            "btd,dgk->btgk",
            x_BTD,
            _weight(self, "key", (D, G, K), ("embed", "kv_heads", None), D**-0.5),
            out_sharding=heads,
        )
        v = jnp.einsum(
            "btd,dgk->btgk",
            x_BTD,
            _weight(self, "value", (D, G, K), ("embed", "kv_heads", None), D**-0.5),
            out_sharding=heads,
        )
        if c.bias:
            q = q + _weight(self, "query_bias", (H, K), ("heads", None), 0.0)
            k = k + _weight(self, "key_bias", (G, K), ("kv_heads", None), 0.0)
            v = v + _weight(self, "value_bias", (G, K), ("kv_heads", None), 0.0)
        if c.position == "rope":
            q, k = rotate(q, positions_BT, c.rope_theta), rotate(k, positions_BT, c.rope_theta)
        if layer_cache is None:
            mixed = attention(q, k, v, mask, c.attention)
            written = (_time_last(k), _time_last(v))
        else:  # one new token per row
            keys, values, slot = layer_cache
            keys = jax.lax.dynamic_update_slice_in_dim(keys, _time_last(k).astype(keys.dtype), slot, axis=3)
            values = jax.lax.dynamic_update_slice_in_dim(values, _time_last(v).astype(values.dtype), slot, axis=3)
            visible_BS = mask.visible(slot[None], jnp.arange(keys.shape[3]))[:, 0]
            mixed = decode_attention(q[:, 0], keys, values, visible_BS)[:, None]
            written = (keys, values)
        out_scale = (H * K) ** -0.5 * (2 * c.layers) ** -0.5  # residual branches start small (GPT-2)
        out = _weight(self, "out", (H, K, D), ("heads", None, "embed"), out_scale)
        out = jnp.einsum("bthk,hkd->btd", mixed, out, out_sharding=spec("batch", None, None))
        return (out + _weight(self, "out_bias", (D,), (None,), 0.0) if c.bias else out), written


def _time_last(x_BTGK: jax.Array) -> jax.Array:
    return x_BTGK.transpose(0, 2, 3, 1)


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        D, F = c.width, c.F
        hidden = spec("batch", None, "hidden")
        act = ACTIVATIONS[c.activation]
        up = jnp.einsum(
            "btd,df->btf", x_BTD, _weight(self, "up", (D, F), ("embed", "hidden"), D**-0.5), out_sharding=hidden
        )
        if c.bias:
            up = up + _weight(self, "up_bias", (F,), ("hidden",), 0.0)
        if c.gated:
            gate = _weight(self, "gate", (D, F), ("embed", "hidden"), D**-0.5)
            h = act(jnp.einsum("btd,df->btf", x_BTD, gate, out_sharding=hidden)) * up
        else:
            h = act(up)
        down = _weight(self, "down", (F, D), ("hidden", "embed"), F**-0.5 * (2 * c.layers) ** -0.5)
        out = jnp.einsum("btf,fd->btd", h, down, out_sharding=spec("batch", None, None))
        return out + _weight(self, "down_bias", (D,), (None,), 0.0) if c.bias else out


class Block(nn.Module):
    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask: Mask, layer_cache=None):
        mixed, written = Attention(self.config, self.dtype, name="attention")(
            Norm(self.config, self.dtype, name="attention_norm")(x_BTD), positions_BT, mask, layer_cache
        )
        x_BTD = x_BTD + mixed
        return x_BTD + MLP(self.config, self.dtype, name="mlp")(
            Norm(self.config, self.dtype, name="mlp_norm")(x_BTD)
        ), written


def _remat(kind: str) -> type[nn.Module]:
    if kind == "none":
        return Block
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if kind == "dots" else None
    return nn.remat(Block, policy=policy, prevent_cse=False)


class Transformer(nn.Module):
    """tokens_BT int32 -> logits_BTV float32. `hidden=True` stops before the output matrix.

    segments_BT: packed documents, 0 is padding; positions restart with each segment. cache: `Cache` for one new
    token per row (T == 1). keep_cache: slots S of the cache to return after a prefill of T tokens. last_only: logits
    of the last position only (a prompt's others are not needed).
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens_BT, segments_BT=None, cache=None, first_B=None, keep_cache=None, last_only=False, hidden=False
    ):
        c = self.config
        T = tokens_BT.shape[1]
        table_VD = _weight(self, "embedding", (c.V, c.width), ("vocab_rows", None), 0.02)
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=spec("batch", None, None))
        if cache is not None:
            first_B, index_T = cache.first_B, cache.slot[None]
        else:
            index_T = jnp.arange(T)
        positions_BT = _positions(tokens_BT, segments_BT, index_T, first_B)
        if c.position == "learned":
            where_PD = _weight(self, "positions", (c.context, c.width), (None, "embed"), 0.02)
            x_BTD = x_BTD + where_PD.at[positions_BT].get(out_sharding=spec("batch", None, None))
        mask = Mask(causal=True, window=c.window, segments_BT=segments_BT, first_B=first_B)
        x_BTD, written = self._blocks(x_BTD, positions_BT, mask, cache, keep_cache is not None)
        x_BTD = Norm(c, self.dtype, name="final_norm")(x_BTD[:, -1:] if last_only else x_BTD)
        if not c.tied:
            head_VD = _weight(self, "head", (c.V, c.width), ("vocab_rows", None), c.width**-0.5)
        else:
            head_VD = table_VD
        out = x_BTD if hidden else unembed(x_BTD, head_VD, c.vocab)
        if cache is not None:
            return out, Cache(*_columns(written), cache.slot + 1, cache.first_B)
        if keep_cache is not None:
            grown = [tuple(_grow(x, keep_cache) for x in column) for column in _columns(written)]
            return out, Cache(*grown, jnp.int32(T), first_B)
        return (out, head_VD) if hidden else out

    def _blocks(self, x_BTD, positions_BT, mask, cache, keep):
        """Runs all layers over one stored layout: params stacked on the layer axis."""
        c = self.config
        if self.is_initializing() or (c.scan and cache is None and not keep):
            scanned = nn.scan(
                lambda block, x, _: (block(x, positions_BT, mask)[0], None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=c.layers,
            )
            x_BTD, _ = scanned(_remat(c.remat)(c, self.dtype, name="blocks"), x_BTD, None)
            return x_BTD, []
        block = _remat(c.remat)(c, self.dtype, parent=None)
        stacked, written = self.variables["params"]["blocks"], []
        for layer in range(c.layers):
            params = jax.tree.map(lambda w, layer=layer: w[layer], stacked)
            layer_cache = None if cache is None else (cache.keys[layer], cache.values[layer], cache.slot)
            x_BTD, pair = block.apply({"params": params}, x_BTD, positions_BT, mask, layer_cache)
            written.append(pair)
        return x_BTD, written


def _columns(written):
    return tuple(tuple(column) for column in zip(*written, strict=True))


def _grow(x_BGKT: jax.Array, slots: int) -> jax.Array:
    return jnp.pad(x_BGKT, ((0, 0), (0, 0), (0, 0), (0, slots - x_BGKT.shape[3])))


def _positions(tokens_BT, segments_BT, index_T, first_B):
    """Position of each token in its own document."""
    index_BT = rows_like(jnp.broadcast_to(index_T[None, :], tokens_BT.shape), tokens_BT.shape[0])
    if first_B is not None:
        return jnp.maximum(index_BT - first_B[:, None], 0)
    if segments_BT is None:
        return index_BT
    starts = jnp.concatenate(
        [jnp.ones_like(segments_BT[:, :1], bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1
    )
    return index_BT - jax.lax.cummax(jnp.where(starts, index_BT, 0), axis=1)


def unembed(x_BTD: jax.Array, head_VD: jax.Array, vocab: int | None) -> jax.Array:
    """Float32 logits; rows of the table beyond the vocabulary are padding and get no probability."""
    logits_BTV = jnp.einsum(
        "btd,vd->btv", x_BTD, head_VD, out_sharding=spec("batch", None, "vocab"), preferred_element_type=jnp.float32
    )
    V = head_VD.shape[0]
    if vocab is None or vocab == V:
        return logits_BTV
    column = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    return jnp.where(column < vocab, logits_BTV, -1e30)
