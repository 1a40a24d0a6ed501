"""What an adapted model's params come to: {"base", "lora"} as the plain params of the function that they compute."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import NamedSharding, P

from recursive_jax.config import LoraConfig
from recursive_jax.models.nf4 import NF4, dequantize
from recursive_jax.models.weights import from_paths, leaf_paths


def updates_of(params: Any) -> dict[str, dict[str, Any]]:
    """{path of the weight: {"a", "b", maybe "magnitude"}} of an adapted model's params."""
    updates: dict[str, dict[str, Any]] = {}
    for path, value in leaf_paths(params["lora"]).items():
        weight, _, name = path.rpartition("/")
        updates.setdefault(weight, {})[name] = value
    return updates


def plain_base(base: Any) -> Any:
    """Base params with four-bit weights as float32."""
    is_nf4 = lambda x: isinstance(x, NF4)

    def opened(x: Any) -> Any:
        if not is_nf4(x):
            return x
        whole = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, P())), x)
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], whole) for i in range(len(x.codes))]
        return jnp.stack([dequantize(layer) for layer in layers])

    return jax.tree.map(opened, base, is_leaf=is_nf4)


def merge_params(params: Any, lora: LoraConfig) -> Any:
    """{"base", "lora"} -> plain params with the updates added in float32."""
    updates, leaves = updates_of(params), leaf_paths(plain_base(params["base"]))
    return from_paths({p: _merged(w, updates[p], lora.scale) if p in updates else w for p, w in leaves.items()})


@functools.partial(jax.jit, static_argnames="scale")
def _merged(w: jax.Array, update: dict[str, jax.Array], scale: float) -> jax.Array:
    """One stacked weight with its update; compiled once per shape, not at every merge."""
    a, b = update["a"], update["b"]
    inner = a.ndim - 2
    left, right = "lijk"[: 1 + inner], "xyz"[: b.ndim - 2]
    layout = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(w).sharding.spec
    delta = jnp.einsum(f"{left}r,lr{right}->{left}{right}", a, b, out_sharding=layout)
    new = w + scale * delta.astype(w.dtype)
    if "magnitude" in update:
        axes = tuple(range(1, 1 + inner))
        norm = jnp.sqrt(jnp.sum(jnp.square(new), axis=axes, keepdims=True))
        new = new / norm * jnp.expand_dims(update["magnitude"], axes)
    return new
