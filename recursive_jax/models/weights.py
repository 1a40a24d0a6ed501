"""Leaves of the param tree <-> tensors of a file: names, orientation, fused and stacked tensors.

In a file a linear layer is a matrix `[out, in]`; a leaf here is `[*in, *out]` with the layers (and experts) stacked
in front, so that reading is a transpose and a reshape. Tables (`[rows, width]`) lie the same way in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from recursive_jax.config import ModelConfig
from recursive_jax.errors import problems
from recursive_jax.models.families.shared import Family, Source
from recursive_jax.waiting import note

TABLES = ("embedding", "head", "score", "positions", "token_types")
PADDED = ("embedding", "head", "head_bias")  # rows beyond the vocabulary are ours alone
Read = Callable[[str], np.ndarray]


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Leaf path ("blocks/attention/query") -> leaf."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(p.key) for p in path): leaf for path, leaf in flat}


def from_paths(leaves: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `leaf_paths`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *rooms, name = path.split("/")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
        node[name] = leaf
    return tree


def inner_axes(path: str) -> int:
    """How many leading axes of a layer's weight are multiplied away."""
    return 2 if path == "blocks/attention/out" else 1


def is_matrix(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return not (name == "scale" or name.endswith("bias") or name in TABLES)


def out_size(c: ModelConfig, path: str) -> int:
    """Width of a leaf's output, the size it takes in a fused tensor."""
    name = path.rsplit("/", 1)[-1].removesuffix("_bias")
    return {"query": c.heads * c.K, "key": c.G * c.K, "value": c.G * c.K}.get(name, c.F)


def stacked(c: ModelConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stacking axes of a leaf: none, (layers,), or (layers, experts)."""
    if not path.startswith("blocks/"):
        return ()
    experts = c.experts and path in ("blocks/mlp/gate", "blocks/mlp/up", "blocks/mlp/down")
    return shape[:2] if experts else shape[:1]


def held(c: ModelConfig, path: str, index: tuple[int, ...]) -> bool:
    """Whether the file has this layer's tensor (ModernBERT's layer 0 has no attention norm)."""
    return c.first_norm or not (path.startswith("blocks/attention_norm/") and index[0] == 0)


def file_name(source: Source, index: tuple[int, ...]) -> str:
    return source.file.format(l=index[0] if index else "", e=index[1] if len(index) > 1 else "")


def columns(c: ModelConfig, source: Source, flat: np.ndarray) -> np.ndarray:
    """This leaf's share of a fused `[..., out]` array."""
    if not source.parts:
        return flat
    if source.per_head:
        split = flat.reshape(*flat.shape[:-1], c.heads, len(source.parts), c.K)
        return split[..., source.part, :].reshape(*flat.shape[:-1], -1)
    sizes = [out_size(c, p) for p in source.parts]
    start = sum(sizes[: source.part])
    return flat[..., start : start + sizes[source.part]]


def fuse(c: ModelConfig, source: Source, parts: list[np.ndarray]) -> np.ndarray:
    """The inverse of `columns` for all leaves of one fused tensor."""
    if not source.per_head:
        return np.concatenate(parts, axis=-1)
    split = [p.reshape(*p.shape[:-1], c.heads, 1, c.K) for p in parts]
    return np.concatenate(split, axis=-2).reshape(*parts[0].shape[:-1], -1)


def file_shape(c: ModelConfig, path: str, source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the file's tensor for one layer of a leaf of (unstacked) `shape`."""
    name = path.rsplit("/", 1)[-1]
    if name in PADDED:
        return (c.vocab, *shape[1:])
    if not is_matrix(path):
        size = int(np.prod(shape)) if name not in TABLES else None
        fused = sum(out_size(c, p) for p in source.parts) if source.parts else size
        return shape if name in TABLES else (fused,)
    rows = int(np.prod(shape[: inner_axes(path)]))
    out = sum(out_size(c, p) for p in source.parts) if source.parts else int(np.prod(shape)) // rows
    return (rows, out) if source.conv else (out, rows)


def to_leaf(c: ModelConfig, path: str, source: Source, shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """One layer's leaf from the file's tensor."""
    if path.rsplit("/", 1)[-1] in PADDED and len(array) < shape[0]:
        return np.pad(array, [(0, shape[0] - len(array))] + [(0, 0)] * (array.ndim - 1))
    if is_matrix(path) and not source.conv:
        array = array.T
    return columns(c, source, array).reshape(shape)


def from_leaf(c: ModelConfig, path: str, source: Source, parts: list[np.ndarray]) -> np.ndarray:
    """One layer's file tensor from its leaves (one, or all that are fused in it)."""
    name = path.rsplit("/", 1)[-1]
    if name in PADDED:
        return parts[0][: c.vocab]
    if name in TABLES:
        return parts[0]
    if not is_matrix(path):
        return fuse(c, source, [p.reshape(-1) for p in parts])
    rows = int(np.prod(parts[0].shape[: inner_axes(path)]))
    flat = fuse(c, source, [p.reshape(rows, -1) for p in parts])
    return np.ascontiguousarray(flat if source.conv else flat.T)


#: Types of numbers as safetensors calls them. Others hold codes of a quantisation, which are no weights without it.
FLOATS = ("F64", "F32", "F16", "BF16")


def check(
    c: ModelConfig,
    family: Family,
    target: Any,
    shapes: dict[str, tuple[int, ...]],
    where: str,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Compares the tensors in a file with those the model needs. Raises InputError naming every missing, unexpected
    or misshapen one, and those whose type (`dtypes`) is no plain float."""
    needed: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaf_paths(target).items():
        source = family.names.get(path)
        if source is None:
            raise problems(f"{where}:", [f"the family has no tensor for {path}"])
        stack = stacked(c, path, leaf.shape)
        for index in np.ndindex(stack):
            if held(c, path, index):
                needed[file_name(source, index)] = file_shape(c, path, source, leaf.shape[len(stack) :])
    ignored = [re.compile(p) for p in family.ignored]
    if c.tied and c.head not in ("none", "score") and "head" in family.names:
        ignored.append(re.compile(re.escape(family.names["head"].file)))
    lines = [f"missing tensor {n} {shape}" for n, shape in needed.items() if n not in shapes]
    lines += [
        f"{n} has shape {tuple(shapes[n])}, expected {shape}"
        for n, shape in needed.items()
        if n in shapes and tuple(shapes[n]) != shape
    ]
    lines += [
        f"{n} is of type {dtypes[n]}: quantised weights are not read, give the folder before it was quantised"
        for n in needed
        if dtypes and dtypes.get(n, "F32") not in FLOATS
    ]
    lines += [
        f"unexpected tensor {n} {tuple(shapes[n])}"
        for n in shapes
        if n not in needed and not any(p.fullmatch(n) for p in ignored)
    ]
    if lines:
        more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise problems(f"{where} does not fit its config:", lines[:20] + more)


def assemble(c: ModelConfig, family: Family, target: Any, read: Read, put: Callable[[np.ndarray, Any], Any]) -> Any:
    """The param tree, leaf by leaf: one host copy of one leaf is alive at a time. `put` places it on the mesh."""

    def build(path: str, leaf: Any) -> Any:
        note(path.rsplit("/", 1)[-1])
        source, stack = family.names[path], stacked(c, path, leaf.shape)
        shape = leaf.shape[len(stack) :]
        if not stack:
            return put(to_leaf(c, path, source, shape, read(source.file)).astype(leaf.dtype, copy=False), leaf)
        host = np.empty(leaf.shape, leaf.dtype)
        for index in np.ndindex(stack):
            if held(c, path, index):
                host[index] = to_leaf(c, path, source, shape, read(file_name(source, index)))
            else:
                host[index] = 0.0 if c.norm_plus_one or path.endswith("bias") else 1.0  # a norm that is not used
        return put(host, leaf)

    return from_paths({path: build(path, leaf) for path, leaf in leaf_paths(target).items()})


def tensors(c: ModelConfig, family: Family, params: Any) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """(name in the file, its array) for every tensor of the model, in the leaves' order; arrays are made when
    called."""
    leaves = leaf_paths(params)
    for path, leaf in leaves.items():
        source = family.names[path]
        if source.part > 0:
            continue  # written with the first of the fused
        parts = [leaves[p] for p in source.parts] if source.parts else [leaf]
        for index in np.ndindex(stacked(c, path, leaf.shape)):
            if held(c, path, index):
                yield (
                    file_name(source, index),
                    lambda parts=parts, index=index, path=path, source=source: from_leaf(
                        c, path, source, [np.asarray(p[index]) for p in parts]
                    ),
                )


def names_without_prefix(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Full name -> name in the file: bare base models lack the family's prefix, and old files say gamma and beta."""
    files = {re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", n)): n for n in names}
    known = {re.sub(r"\{[le]\}", "0", s.file) for s in family.names.values()}
    based = any(n.startswith(family.prefix) for n in files)
    return {
        n if based or (n in known and not n.startswith(family.prefix)) else family.prefix + n: f
        for n, f in files.items()
    }
