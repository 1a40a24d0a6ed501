"""Low-rank adapters: params {"base": frozen params, "lora": A and B of each adapted weight} and what they merge to.

A weight `[*in, *out]` of a block gets `a [L, *in, r]` (uniform as in Kaiming's rule) and `b [L, r, *out]` (zeros), so
that a fresh adapter changes nothing; DoRA adds `magnitude [L, *out]`. The forward pass is in `layers.project`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from typing import Any

import jax
import numpy as np
from jax import NamedSharding, P

from recursive_jax import mesh as meshes
from recursive_jax.config import LoraConfig, ModelConfig
from recursive_jax.errors import InputError
from recursive_jax.models.merging import updates_of
from recursive_jax.models.model import Model, abstract_params
from recursive_jax.models.network import TransformerNetwork, adapted_network
from recursive_jax.models.nf4 import quantized
from recursive_jax.models.weights import from_paths, inner_axes, is_matrix, leaf_paths, stacked


def adaptable(c: ModelConfig, shapes: dict[str, Any]) -> list[str]:
    """Paths of the weights that can be adapted: the matrices of the blocks (not the experts' stacks)."""
    return [
        p for p, x in shapes.items() if p.startswith("blocks/") and is_matrix(p) and len(stacked(c, p, x.shape)) == 1
    ]


def chosen(c: ModelConfig, lora: LoraConfig, shapes: dict[str, Any]) -> list[str]:
    """The weights that `lora.targets` names. Raises InputError for a pattern that names none."""
    known = adaptable(c, shapes)
    found = []
    for pattern in lora.targets:
        hits = [p for p in known if fnmatch.fnmatch(p.removeprefix("blocks/"), pattern)]
        if not hits:
            names = ", ".join(p.removeprefix("blocks/") for p in known)
            raise InputError(f"lora.targets: {pattern!r} names no weight; there are: {names}")
        found += [p for p in hits if p not in found]
    return found


def adapted_model(model: Model, lora: LoraConfig, seed: int = 0) -> Model:
    """`model` with a fresh adapter: the same function until it is trained. The base is shared, not copied, unless
    lora.quantization is nf4. Raises InputError for a model without params or of user functions, or one adapted
    already."""
    if not isinstance(model.network, TransformerNetwork) or model.params is None:
        raise InputError("an adapter needs a built-in Transformer with params: load one, or train it first")
    if model.network.lora is not None:
        raise InputError("this model has an adapter already: merge it first (model.merged())")
    c = model.network.config
    leaves = leaf_paths(model.params)
    paths = chosen(c, lora, leaves)
    draw = np.random.default_rng(seed)
    updates = {}
    for path in paths:
        w = leaves[path]
        inner = inner_axes(path)
        L, inside, outside = w.shape[0], w.shape[1 : 1 + inner], w.shape[1 + inner :]
        limit = 1.0 / math.sqrt(math.prod(inside))  # kaiming_uniform(a=sqrt(5)): 1 / sqrt(fan in)
        update = {
            "a": draw.uniform(-limit, limit, (L, *inside, lora.rank)).astype(np.float32),
            "b": np.zeros((L, lora.rank, *outside), np.float32),
        }
        if lora.dora:
            axes = tuple(range(1, 1 + inner))
            update["magnitude"] = np.sqrt(np.sum(np.square(np.asarray(meshes.fetch(w), np.float32)), axis=axes))
        updates[path] = update
    adapter = from_paths(updates)
    base = quantized_base(model, paths) if lora.quantization == "nf4" else model.params
    network = adapted_network(model.network, lora)
    adapted = dataclasses.replace(
        model,
        network=network,
        params=None,
        mark="",
        base_fingerprint=model.fingerprint,
        base_source=model.source,
    )
    return with_adapter(adapted, base, adapter)


def with_adapter(model: Model, base: Any, adapter: Any) -> Model:
    """Base params and host arrays of an adapter as the params of an adapted model, laid out like the weights."""
    shapes = leaf_paths(abstract_params(model.network.plain, model.mesh))

    def place(path: str, update: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        layout = _layout(path, shapes[path])
        return {
            k: jax.make_array_from_callback(
                v.shape, NamedSharding(model.mesh, layout[k]), lambda index, v=v: np.asarray(v[index], np.float32)
            )
            for k, v in update.items()
        }

    placed = from_paths({p: place(p, u) for p, u in updates_of({"lora": adapter}).items()})
    return model.with_params({"base": base, "lora": placed})


def _layout(path: str, weight: Any) -> dict[str, P]:
    """How the parts of an adapter lie, beside their weight."""
    axes = tuple(weight.sharding.spec)
    axes = axes + (None,) * (len(weight.shape) - len(axes))
    inner = inner_axes(path)
    return {
        "a": P(*axes[: 1 + inner], None),
        "b": P(axes[0], None, *axes[1 + inner :]),
        "magnitude": P(axes[0], *axes[1 + inner :]),
    }


def abstract_adapted(network: TransformerNetwork, mesh: Any) -> Any:
    """Shapes, dtypes and shardings of the params of an adapted network. Raises InputError for a four-bit base, whose
    size is known once it is made."""
    if network.lora.quantization != "none":
        raise InputError(f"lora.quantization={network.lora.quantization}: its size is known once it is made; plan none")
    base = abstract_params(network.plain, mesh)
    leaves = leaf_paths(base)
    updates = {}
    for path in chosen(network.config, network.lora, leaves):
        weight, inner = leaves[path], inner_axes(path)
        L, inside, outside = weight.shape[0], weight.shape[1 : 1 + inner], weight.shape[1 + inner :]
        sizes = {"a": (L, *inside, network.lora.rank), "b": (L, network.lora.rank, *outside)}
        if network.lora.dora:
            sizes["magnitude"] = (L, *outside)
        layout = _layout(path, weight)
        updates[path] = {
            k: jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, layout[k]))
            for k, shape in sizes.items()
        }
    return {"base": base, "lora": from_paths(updates)}


def quantized_base(model: Model, paths: list[str]) -> Any:
    """The base with the adapted weights in four bits, stored split over fsdp as other weights are."""
    leaves = leaf_paths(model.params)
    for path in paths:
        w = np.asarray(meshes.fetch(leaves[path]))
        if w[0].size % 64:
            raise InputError(f"lora.quantization=nf4 needs weights of a multiple of 64 values, {path} has {w[0].size}")
        leaves[path] = jax.tree.map(lambda x: _split_over_fsdp(model.mesh, x), quantized(w, inner_axes(path)))
    return from_paths(leaves)


def _split_over_fsdp(mesh: Any, values: np.ndarray) -> jax.Array:
    layout = P(None, "fsdp") if values.shape[1] % mesh.shape["fsdp"] == 0 else P()
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, layout), lambda index: values[index])
