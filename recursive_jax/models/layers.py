"""The parts of a Transformer block, each with every switch of `ModelConfig`: norm, attention, MLP, experts.

Shapes: B rows, T positions, D width, H query heads, G key heads, K head width, F MLP width, N experts, r rank of a
low-rank update, S cache slots.
"""

from __future__ import annotations

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import P

from recursive_jax.config import LoraConfig, ModelConfig
from recursive_jax.mesh import spec
from recursive_jax.models import experts
from recursive_jax.models.attention import attention, cached_attention, write_cache
from recursive_jax.models.masks import Mask
from recursive_jax.models.nf4 import NF4, dequantize

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@struct.dataclass
class LayerKind:
    """What sets one layer apart: numbers in an unrolled stack, traced values where layers are scanned."""

    frequency_F: Any = None  # radians per position of each rotated pair; zeros leave a layer without positions
    turn: Any = 1.0  # multiplies the rotated queries and keys (yarn)
    window: Any = struct.field(pytree_node=False, default=None)
    traced_window: Any = None
    normalized: Any = True  # False: attention reads the residual stream as it is


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float
) -> jax.Array:
    """A float32 master weight, cast to the module's compute dtype; scale 0 and 1 give constants. A four-bit one comes
    as it is: `project` opens it."""

    def init(key: jax.Array) -> jax.Array:
        if scale in (0.0, 1.0):
            return jnp.full(shape, scale, jnp.float32, out_sharding=spec(*axes))
        return scale * jax.random.normal(key, shape, jnp.float32, out_sharding=spec(*axes))

    if module.has_variable("params", name) and isinstance(module.get_variable("params", name), NF4):
        return module.get_variable("params", name)
    return module.param(name, init).astype(module.dtype)


def project(
    module: nn.Module, name: str, equation: str, x: jax.Array, w: jax.Array, layout: Any, key: jax.Array | None
) -> jax.Array:
    """`x @ w`, plus the low-rank update of this weight where the model carries one (LoRA arXiv:2106.09685, DoRA
    arXiv:2402.09353). key: randomness of the update's dropout."""
    if isinstance(w, NF4):
        opened = lambda w: dequantize(w).astype(module.dtype)
        # Opened again in the backward pass: a weight kept for it would be the float32 model that four bits are to
        # spare.
        y = jax.checkpoint(lambda x, w: jnp.einsum(equation, x, opened(w), out_sharding=layout))(x, w)
    else:
        opened = lambda w: w
        y = jnp.einsum(equation, x, w, out_sharding=layout)
    if not module.has_variable("lora", name):
        return y
    update, lora = module.get_variable("lora", name), module.lora
    a, b = update["a"].astype(module.dtype), update["b"].astype(module.dtype)
    left, y_axes = equation.split("->")
    x_axes, w_axes = left.split(",")
    out = "".join(c for c in w_axes if c not in x_axes)
    inner = "".join(c for c in w_axes if c in x_axes)
    if key is not None and lora.dropout > 0:
        draw = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), x.shape, out_sharding=_layout(x))
        x = jnp.where(draw < lora.dropout, 0.0, x / (1 - lora.dropout)).astype(x.dtype)
    low = jnp.einsum(f"{x_axes},{inner}r->btr", x, a, out_sharding=spec("batch", "time", None))
    low = lora.scale * jnp.einsum(f"btr,r{out}->{y_axes}", low, b, out_sharding=layout)
    if "magnitude" not in update:
        return y + low
    norm = jnp.sqrt(jnp.sum(jnp.square(adapted(opened(w), update, lora.scale)), axis=tuple(range(len(inner)))))
    factor = (update["magnitude"] / jax.lax.stop_gradient(norm)).astype(y.dtype)
    if not jax.sharding.get_abstract_mesh().empty:  # lies like the weight's outputs, is wanted like y's
        factor = jax.reshard(factor, P(*tuple(layout)[-len(out) :]))
    return (y + low) * factor


def _layout(x: jax.Array) -> Any:
    """How x lies on the mesh, for a random draw of its shape; None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec


def adapted(w: jax.Array, update: dict[str, jax.Array], scale: float) -> jax.Array:
    """w + scale A B: the direction of an adapted weight."""
    a, b = update["a"], update["b"]
    layout = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(w).sharding.spec
    return w + scale * jnp.tensordot(a, b, axes=1, out_sharding=layout)


class Norm(nn.Module):
    """RMS or layer norm over the last `axes` axes, computed in float32."""

    config: ModelConfig
    dtype: Any = jnp.float32
    kind: str | None = None
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, kind = self.config, self.kind or self.config.norm
        shape, over = x.shape[-self.axes :], tuple(range(-self.axes, 0))
        logical = ("heads", None)[-self.axes :] if self.axes > 1 else (None,)
        scale = weight(self, "scale", shape, logical, 0.0 if c.norm_plus_one else 1.0)
        y = x.astype(jnp.float32)
        if kind == "layer":
            y = y - jnp.mean(y, axis=over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=over, keepdims=True) + c.norm_eps)
        if c.norm_plus_one:
            return (y * (1.0 + scale.astype(jnp.float32))).astype(self.dtype)
        y = y.astype(self.dtype) * scale
        return y + weight(self, "bias", shape, logical, 0.0) if kind == "layer" and c.norm_bias else y


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, frequency_F: Any, turn: Any = 1.0) -> jax.Array:
    """Rotary position embedding of the first 2F dimensions of each head, half-split convention (arXiv:2104.09864; the
    layout of Llama files)."""
    half = frequency_F.shape[-1]
    angle_BT1F = positions_BT[..., None, None].astype(jnp.float32) * frequency_F
    cos, sin = (turn * jnp.cos(angle_BT1F)).astype(x_BTHK.dtype), (turn * jnp.sin(angle_BT1F)).astype(x_BTHK.dtype)
    a, b, rest = x_BTHK[..., :half], x_BTHK[..., half : 2 * half], x_BTHK[..., 2 * half :]
    parts = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1)


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask: Mask, kind: LayerKind, layer_cache=None, key=None):
        c = self.config
        D, H, G, K = c.d_model, c.heads, c.G, c.K
        heads = spec("batch", "time", "heads", None)

        def part(name: str, equation: str, count: int, axis: str) -> jax.Array:
            w = weight(self, name, (D, count, K), ("embed", axis, None), D**-0.5)
            y = project(self, name, equation, x_BTD, w, heads, key)
            return y + weight(self, f"{name}_bias", (count, K), (axis, None), 0.0) if c.has_bias("qkv") else y

        q = part("query", "btd,dhk->bthk", H, "heads")
        k = part("key", "btd,dgk->btgk", G, "kv_heads")
        v = part("value", "btd,dgk->btgk", G, "kv_heads")
        if c.qk_norm != "none":
            axes = 2 if c.qk_norm == "flat" else 1
            q = Norm(c, self.dtype, "rms", axes, name="query_norm")(q)
            k = Norm(c, self.dtype, "rms", axes, name="key_norm")(k)
        if c.position == "rope":
            q, k = (rotate(x, positions_BT, kind.frequency_F, kind.turn) for x in (q, k))
        if self.is_mutable_collection("taps") and not self.is_initializing():
            self.sow("taps", "query", q)
            self.sow("taps", "key", k)
        written = None
        if layer_cache is not None:  # T new tokens per row, from slot first_B on
            keys, values, first_B = layer_cache
            written = keys, values = write_cache(keys, k, first_B), write_cache(values, v, first_B)
        if layer_cache is None or mask.fresh:
            mixed = attention(q, k, v, mask, c.attention, c.attention_scale, c.score_cap)
        else:
            slots_BT = first_B[:, None] + jnp.arange(q.shape[1])
            slot_S = jnp.arange(keys.shape[2])
            visible_BTS = mask.visible(slots_BT, slot_S)
            if not mask.causal:  # both ways among what is there; slots behind hold nothing yet
                visible_BTS = visible_BTS & (slot_S < first_B[:, None] + q.shape[1])[:, None]
            mixed = cached_attention(q, keys, values, visible_BTS, c.attention_scale, c.score_cap)
        out_scale = (H * K) ** -0.5 * (2 * c.layers) ** -0.5  # residual branches start small (GPT-2)
        w = weight(self, "out", (H, K, D), ("heads", None, "embed"), out_scale)
        out = project(self, "out", "bthk,hkd->btd", mixed, w, spec("batch", "time", None), key)
        return (out + weight(self, "out_bias", (D,), (None,), 0.0) if c.has_bias("out") else out), written


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x_BTD, key=None):
        c = self.config
        D, F = c.d_model, c.F
        hidden, act, bias = spec("batch", "time", "mlp"), ACTIVATIONS[c.activation], c.has_bias("mlp")

        def into(name: str) -> jax.Array:
            w = weight(self, name, (D, F), ("embed", "mlp"), D**-0.5)
            y = project(self, name, "btd,df->btf", x_BTD, w, hidden, key)
            return y + weight(self, f"{name}_bias", (F,), ("mlp",), 0.0) if bias else y

        up = into("up")
        h = act(into("gate")) * up if c.gated else act(up)
        w = weight(self, "down", (F, D), ("mlp", "embed"), F**-0.5 * (2 * c.layers) ** -0.5)
        out = project(self, "down", "btf,fd->btd", h, w, spec("batch", "time", None), key)
        return out + weight(self, "down_bias", (D,), (None,), 0.0) if bias else out


class Experts(nn.Module):
    """A mixture of gated MLPs (`models/experts.py`)."""

    config: ModelConfig
    dtype: Any = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x_BTD, key=None):
        c = self.config
        D, F, N = c.d_model, c.F, c.experts
        router = weight(self, "router", (D, N), ("embed", "experts"), D**-0.5)
        logits_BTN = project(self, "router", "btd,dn->btn", x_BTD, router, spec("batch", "time", "experts"), key)
        p_BTN = jax.nn.softmax(logits_BTN.astype(jnp.float32), axis=-1)
        p_BTk, chosen_BTk = jax.lax.top_k(p_BTN, c.experts_per_token)
        if c.experts_renormalize:
            p_BTk = p_BTk / jnp.sum(p_BTk, axis=-1, keepdims=True)
        into = [weight(self, name, (N, D, F), ("experts", "embed", "mlp"), D**-0.5) for name in ("gate", "up")]
        down = weight(self, "down", (N, F, D), ("experts", "mlp", "embed"), F**-0.5 * (2 * c.layers) ** -0.5)
        mixed = experts.grouped if c.experts_path == "grouped" else experts.dense
        return mixed(x_BTD, p_BTk, chosen_BTk, *into, down, ACTIVATIONS[c.activation])


class Block(nn.Module):
    """One layer; `config.block` says where its norms stand."""

    config: ModelConfig
    dtype: Any = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask: Mask, kind: LayerKind, layer_cache=None, key=None):
        c = self.config
        norm = lambda name: Norm(c, self.dtype, name=name)
        attend = Attention(c, self.dtype, self.lora, name="attention")
        mlp = (Experts if c.experts else MLP)(c, self.dtype, self.lora, name="mlp")
        mask = mask.replace(window=kind.window if kind.traced_window is None else kind.traced_window)
        before = c.block in ("pre", "sandwich", "parallel")
        after = c.block in ("sandwich", "output")
        h = norm("attention_norm")(x_BTD) if before else x_BTD
        if kind.normalized is not True:
            h = jnp.where(kind.normalized, h, x_BTD)
        tapped = self.is_mutable_collection("taps") and not self.is_initializing()
        if tapped:
            self.sow("taps", "attention_input", h)
        mixed, written = attend(h, positions_BT, mask, kind, layer_cache, key)
        if c.block == "parallel":
            return x_BTD + mixed + mlp(norm("mlp_norm")(x_BTD), key), written
        x_BTD = x_BTD + (norm("attention_out_norm")(mixed) if after else mixed)
        if c.block == "post":
            x_BTD = norm("attention_norm")(x_BTD)
        h = norm("mlp_norm")(x_BTD) if before else x_BTD
        if tapped:
            self.sow("taps", "mlp_input", h)
        mixed = mlp(h, key)
        x_BTD = x_BTD + (norm("mlp_out_norm")(mixed) if after else mixed)
        return (norm("mlp_norm")(x_BTD) if c.block == "post" else x_BTD), written
