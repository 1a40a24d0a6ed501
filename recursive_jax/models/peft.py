"""Adapters in the files of `peft`: `adapter_config.json` and `adapter_model.safetensors`, both ways."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import safetensors
from safetensors.numpy import load_file, save_file

from recursive_jax import mesh as meshes
from recursive_jax.config import LoraConfig, ModelConfig
from recursive_jax.errors import InputError, machine_errors, problems, say
from recursive_jax.models.families import FAMILIES, Source, write_config
from recursive_jax.models.huggingface import new_folder, read_json, whole_or_none
from recursive_jax.models.lora import adaptable, adapted_network, quantized_base, with_adapter
from recursive_jax.models.merging import updates_of
from recursive_jax.models.model import Model
from recursive_jax.models.network import TransformerNetwork
from recursive_jax.models.weights import (
    columns,
    from_paths,
    fuse,
    inner_axes,
    leaf_paths,
    out_size,
)

_PREFIX = "base_model.model."
_KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}


def save_adapter(model: Model, path: Any, base: str | None = None) -> Path:
    """Writes the adapter so that `PeftModel.from_pretrained` puts it on the Hugging Face form of the base.

    Where the file fuses weights that are apart here (GPT-2's c_attn), adapters with a rank of their own become the
    blocks of one of several times the rank: equal function, more numbers. base: what the adapter says its base is, a
    folder or a name of the hub; by default where the base was loaded from, if `peft` can open that. Raises InputError
    without an adapter.
    """
    if not model.network.frozen:
        raise InputError("this model has no adapter: export it whole")
    folder, c, lora = Path(path), model.network.config, model.network.lora
    new_folder(folder)
    family = FAMILIES[write_config(c)["model_type"]]
    plain = leaf_paths(model.merged_base().params) if lora.dora else {}
    updates = {p: meshes.fetch(u) for p, u in updates_of(model.params).items()}
    tensors: dict[str, np.ndarray] = {}
    patterns: dict[str, dict[str, Any]] = {"rank_pattern": {}, "alpha_pattern": {}}
    targets: list[str] = []
    for path, update in updates.items():
        source = family.names[path]
        parts = list(source.parts) or [path]
        if path != next(p for p in parts if p in updates):
            continue  # written with the first of the fused
        widen = 1
        for layer in range(c.layers):
            module = source.file.format(l=layer).removesuffix(".weight")
            a, b, widen = _fused_update(c, source, parts, updates, layer)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
            if "magnitude" in update:
                rows = [_magnitude(plain, updates, p, layer) for p in parts]
                tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = np.ascontiguousarray(fuse(c, source, rows))
        names = _target_names(c, family.names, source)
        targets += names
        rank = update["a"].shape[-1] * widen
        alpha = lora.scale * (rank**0.5 if lora.rslora else rank)
        for name in names if rank != lora.rank else ():
            patterns["rank_pattern"][name], patterns["alpha_pattern"][name] = rank, alpha
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if c.causal else None,
        "base_model_name_or_path": base or _opened_by_peft(model),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": targets,
        "fan_in_fan_out": any(s.conv for s in family.names.values()),
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
        **patterns,
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    with machine_errors(None), whole_or_none(folder):
        meshes.on_main(write)
    return folder


def _opened_by_peft(model: Model) -> str | None:
    """Where the base lies, if that is a Hugging Face folder; else None, said with the remedy."""
    source = model.base_source or model.source
    if source and (Path(source) / "config.json").is_file():
        return source
    say(
        f"the adapter's base, {source or 'which was made here'}, is no folder that peft opens: write it with "
        "save_huggingface (`recursive-jax export`), and give its folder as base (--base)"
    )
    return None


def _fused_update(c: ModelConfig, source: Source, parts: list[str], updates: Mapping[str, Any], layer: int):
    """(A `[r, in]`, B `[out, r]`, how many times the rank grew) of one module of the file."""
    present = [p for p in parts if p in updates]
    flat_a = [updates[p]["a"][layer].reshape(-1, updates[p]["a"].shape[-1]) for p in present]  # [in, r]
    flat_b = {p: updates[p]["b"][layer].reshape(updates[p]["b"].shape[1], -1) for p in present}  # [r, out]
    shared = all(x.shape == flat_a[0].shape and np.array_equal(x, flat_a[0]) for x in flat_a)
    if shared:
        empty = lambda p: np.zeros((flat_a[0].shape[1], out_size(c, p)), np.float32)
        joined = fuse(c, source, [flat_b.get(p, empty(p)) if len(parts) > 1 else flat_b[p] for p in parts])
        return _file(flat_a[0].T), _file(joined.T), 1
    ranks = [x.shape[1] for x in flat_a]
    blocks = []
    for p in parts:
        block = np.zeros((sum(ranks), out_size(c, p)), np.float32)
        if p in flat_b:
            i = present.index(p)
            block[sum(ranks[:i]) : sum(ranks[: i + 1])] = flat_b[p]
        blocks.append(block)
    return _file(np.concatenate(flat_a, axis=1).T), _file(fuse(c, source, blocks).T), len(present)


def _file(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32)


def _magnitude(plain: Mapping[str, Any], updates: Mapping[str, Any], path: str, layer: int) -> np.ndarray:
    """DoRA's magnitudes of one leaf; of one without an adapter, the norms its weight has."""
    if path in updates:
        return updates[path]["magnitude"][layer].reshape(-1)
    return _norms(plain, path, layer).reshape(-1)


def _norms(plain: Mapping[str, Any], path: str, layer: int) -> np.ndarray:
    w = np.asarray(meshes.fetch(plain[path][layer]), np.float32)
    return np.sqrt(np.square(w).sum(axis=tuple(range(inner_axes(path)))))


def _target_names(c: ModelConfig, names: Mapping[str, Source], source: Source) -> list[str]:
    """The shortest ending that means this weight in every layer and nothing else; full names where none does."""
    modules = {s.file.removesuffix(".weight") for p, s in names.items() if s.file.endswith(".weight")}
    mine = source.file.removesuffix(".weight")
    words = mine.split(".")
    for n in range(1, len(words)):
        ending = ".".join(words[-n:])
        if "{" not in ending and [m for m in modules if m.endswith(f".{ending}") or m == ending] == [mine]:
            return [ending]
    return [mine.format(l=layer) for layer in range(c.layers)]


def load_adapter(model: Model, path: Any, quantization: str = "none") -> Model:
    """`model` with the adapter of a `peft` folder. quantization: nf4 for four-bit frozen weights.

    Raises InputError for another kind of adapter, for parts that are not supported (embeddings, whole modules, biases),
    and for tensors that the model has no weight for or that have another shape, naming them.
    """
    if not isinstance(model.network, TransformerNetwork):
        raise InputError(f"an adapter goes on a Transformer, not on a network of kind {model.network.kind}")
    folder = Path(path)
    if model.params is None or model.network.lora is not None:
        raise InputError("an adapter goes on a plain Transformer with params")
    where = folder / "adapter_config.json"
    values = read_json(where, "the adapter's config")
    refused = {"peft_type": ("LORA", None), "bias": ("none", None), "lora_bias": (False, None)}
    lines = [f"{k}={values[k]!r} is not supported" for k, ok in refused.items() if k in values and values[k] not in ok]
    lines += [f"{k}={values[k]!r} is not supported" for k in ("modules_to_save", "layer_replication") if values.get(k)]
    if lines:
        raise problems(f"{where}:", lines)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{folder / 'adapter_model.safetensors'} is missing or damaged: {error}") from None
    ranks = [t.shape[0] for k, t in tensors.items() if k.endswith("lora_A.weight") and t.ndim]
    if not isinstance(values.get("r"), int) or values["r"] < 1 or not ranks:
        raise InputError(f"{folder}: r={values.get('r')!r} and {len(ranks)} lora_A tensors; this is not a LoRA adapter")
    odd = [k for k, t in tensors.items() if t.ndim not in (1, 2)]
    odd += [k for k in ("rank_pattern", "alpha_pattern") if not isinstance(values.get(k) or {}, Mapping)]
    if odd:
        raise InputError(f"{folder}: {odd[0]} is neither a matrix, a vector nor a mapping; this is not a LoRA adapter")
    try:
        lora = LoraConfig(
            rank=max(ranks),  # the largest there is; another scale of a module is folded into its B
            alpha=values.get("lora_alpha", 8),
            dropout=values.get("lora_dropout", 0.0),
            rslora=values.get("use_rslora", False),
            dora=values.get("use_dora", False),
            quantization=quantization,
        )
    except pydantic.ValidationError as error:
        raise problems(f"{where}:", [f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors()]) from None
    updates = _leaves(model, lora, values, tensors, str(folder))
    lora = lora.model_copy(update={"targets": tuple(p.removeprefix("blocks/") for p in updates)})
    frozen = quantized_base(model, list(updates)) if quantization == "nf4" else model.params
    adapted = dataclasses.replace(
        model,
        network=adapted_network(model.network, lora),
        params=None,
        mark="",
        base_fingerprint=model.fingerprint,
        base_source=model.source,
    )
    return with_adapter(adapted, frozen, from_paths(updates))


def _leaves(model: Model, lora: LoraConfig, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str):
    """{leaf: {"a", "b", "magnitude"}} stacked over the layers, from the modules of the file."""
    c = model.network.config
    family, shapes = FAMILIES[write_config(c)["model_type"]], leaf_paths(model.params)
    modules: dict[str, tuple[list[str], int]] = {}
    for path in adaptable(c, shapes):
        for layer in range(c.layers):
            name = family.names[path].file.format(l=layer).removesuffix(".weight")
            modules.setdefault(name, ([], layer))[0].append(path)
    found: dict[str, dict[str, np.ndarray]] = {}
    lines = []
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        kind = next((k for k in _KINDS if name.endswith(f".{k}")), None)
        name = name.removesuffix(f".{kind}")
        name = name if name in modules else family.prefix + name
        if kind is None or name not in modules:
            lines.append(f"{key} {tensor.shape} has no weight to adapt here")
        else:
            found.setdefault(name, {})[_KINDS[kind]] = np.asarray(tensor, np.float32)
    for name, parts in found.items():
        source = family.names[modules[name][0][0]]
        rows = int(np.prod(shapes[modules[name][0][0]].shape[1 : 1 + inner_axes(modules[name][0][0])]))
        out = sum(out_size(c, p) for p in source.parts) if source.parts else None
        if set(parts) != {"a", "b"} | ({"magnitude"} if lora.dora else set()):
            lines.append(f"{name} has {sorted(parts)}, lora_A and lora_B are wanted, with use_dora the magnitude too")
        elif parts["a"].shape[1] != rows or (out is not None and parts["b"].shape[0] != out):
            lines.append(f"{name}: lora_A {parts['a'].shape} and lora_B {parts['b'].shape} do not fit [{out}, {rows}]")
    if lines:
        raise problems(f"{where} does not fit the model:", lines[:20])
    paths = [p for p in adaptable(c, shapes) if any(p in modules[n][0] for n in found)]
    return {p: _stack(model, lora, values, p, family.names[p], modules, found) for p in paths}


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in peft."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _stack(model: Model, lora: LoraConfig, values, path: str, source: Source, modules, found) -> dict[str, np.ndarray]:
    c, shape = model.network.config, leaf_paths(model.params)[path].shape[1:]
    inner = inner_axes(path)
    inside, outside = shape[:inner], shape[inner:]
    layers = {layer: found[n] for n, (paths, layer) in modules.items() if path in paths and n in found}
    names = {layer: n for n, (paths, layer) in modules.items() if path in paths}
    rank = lora.rank
    stacked = {
        "a": np.zeros((c.layers, *inside, rank), np.float32),
        "b": np.zeros((c.layers, rank, *outside), np.float32),
    }
    if lora.dora:
        stacked["magnitude"] = np.stack([_norms(leaf_paths(model.params), path, i) for i in range(c.layers)])
    for layer, x in layers.items():
        r = x["a"].shape[0]
        alpha = _pattern(values.get("alpha_pattern"), names[layer], lora.alpha)
        scale = alpha / (r**0.5 if lora.rslora else r) / lora.scale  # what is left of it goes into B
        stacked["a"][layer, ..., :r] = x["a"].T.reshape(*inside, r)
        stacked["b"][layer, :r] = scale * columns(c, source, x["b"].T).reshape(r, *outside)
        if lora.dora:
            stacked["magnitude"][layer] = columns(c, source, x["magnitude"].reshape(-1)).reshape(outside)
    return stacked
