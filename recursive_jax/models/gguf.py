"""GGUF files (llama.cpp) of the Llama layout, through the `gguf` package: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K
and whatever else it dequantises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from recursive_jax.config import ModelConfig
from recursive_jax.errors import InputError
from recursive_jax.models.families import Keys, read_config
from recursive_jax.models.families.values import check_values
from recursive_jax.models.gguf_header import Tensor, read_header
from recursive_jax.models.huggingface import params_from
from recursive_jax.models.transformer import frequencies

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK = 1 << 22  # bytes of quantised rows
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def _header(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    try:
        import gguf
    except ImportError:
        raise InputError(f"{path} is a GGUF file: pip install 'recursive-jax[gguf]'") from None
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return read_header(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})


def _full_name(name: str) -> str | None:
    """The Hugging Face name of a tensor; None for tables that are derived."""
    if name in _NAMES:
        return _NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _NAMES:
        return f"model.layers.{match[1]}.{_NAMES[match[2]]}.{match[3]}"
    return None if name == "rope_freqs.weight" else name


def _dequantized(tensor: Tensor, where: str) -> np.ndarray:
    """Float32, `[rows, values]`, some rows at a time: the package's own temporaries are several times the size of what
    they make. Raises InputError for a type that the package does not dequantise."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(tensor.kind)
    rows = tensor.data.reshape(int(np.prod(tensor.shape[1:], dtype=np.int64)), -1)
    step = max(1, _CHUNK // max(1, rows.shape[-1]))
    out = np.empty((len(rows), tensor.shape[0]), np.float32)
    try:
        for start in range(0, len(rows), step):
            out[start : start + step] = dequantize(rows[start : start + step], kind)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"{where}: {tensor.name} is {kind.name}: {error}") from None
    return out


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of each rotated head in q and k of the Llama layout."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _rotary(get: Keys, kind: str, head_dim: int, where: str) -> dict[str, Any]:
    """Rotary scaling and share as keys of a config.json. Absent keys mean what they mean to llama.cpp
    (src/llama-model.cpp, `load_hparams`): scaling without a type is linear, the factor may stand under its old name, a
    factor of 0 is none, and the llama architecture rotates whole heads only."""
    found: dict[str, Any] = {}
    scaling, factor = get("rope.scaling.type", "linear"), get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    if scaling not in ("none", "linear", "yarn"):
        raise InputError(f"{where}: {kind}.rope.scaling.type={scaling!r} is not supported; import the safetensors")
    check_values({"rope_scaling": {"factor": factor or 1.0}}, where)
    if scaling != "none" and factor not in (0.0, 1.0):
        found["rope_scaling"] = {"rope_type": scaling, "factor": float(factor)}
    if "rope_scaling" in found and scaling == "yarn":
        original = get("rope.scaling.original_context_length", get("context_length"))
        found["rope_scaling"] |= {"original_max_position_embeddings": original}
        ones = ("attn_factor", "yarn_ext_factor", "yarn_attn_factor")
        odd = [name for name in ones if get(f"rope.scaling.{name}", 1.0) != 1.0]
        if odd:
            raise InputError(f"{where}: {kind}.rope.scaling.{odd[0]} is not supported; import the safetensors")
        for name, key in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if get(f"rope.scaling.{name}", None) is not None:
                found["rope_scaling"][key] = float(get(f"rope.scaling.{name}"))
    size = get("attention.key_length", head_dim)
    if get("attention.value_length", size) != size:
        raise InputError(f"{where}: {kind}.attention.value_length differs from key_length; import the safetensors")
    rotated = get("rope.dimension_count", size)
    check_values({"head_dim": rotated}, where)
    if rotated != size and (kind == "llama" or rotated > size):
        raise InputError(f"{where}: {kind}.rope.dimension_count={rotated}, heads have {size}; llama.cpp refuses it too")
    return found if rotated == size else found | {"partial_rotary_factor": rotated / size}


def gguf_config(path: Path) -> tuple[ModelConfig, dict[str, Any], dict[str, Tensor]]:
    """(config, all fields of the file, its tensors by their full names), from the head of the file alone. Errors as
    `read_gguf`."""
    fields, parts = _header(path)
    kind = fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise InputError(f"{path}: general.architecture={kind!r} is not supported; known: {', '.join(_FAMILIES)}")
    get = Keys(
        {n.removeprefix(f"{kind}."): v for n, v in fields.items() if n.startswith(f"{kind}.")}, f"{path}: {kind}"
    )
    if get("expert_count", 0):
        raise InputError(
            f"{path}: {kind}.expert_count={get('expert_count', 0)} is not supported; import the safetensors"
        )
    tensors = {_full_name(t.name): t for t in parts}
    stretch = tensors.pop(None, None)
    stretch = None if stretch is None else _dequantized(stretch, str(path)).reshape(-1)
    if "model.embed_tokens.weight" not in tensors:
        raise InputError(f"{path}: the tensor token_embd.weight is missing")
    heads, width = get("attention.head_count"), get("embedding_length")
    biased = any(n.endswith("q_proj.bias") for n in tensors)
    if len(tensors["model.embed_tokens.weight"].shape) != 2:
        raise InputError(f"{path}: token_embd.weight is no matrix")
    check_values({"num_attention_heads": heads, "hidden_size": width}, str(path))
    epsilon, theta = get("attention.layer_norm_rms_epsilon"), get("rope.freq_base", 10_000.0)
    check_values({"rms_norm_eps": epsilon, "rope_theta": theta}, str(path))
    values = {
        "model_type": _FAMILIES[kind],
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[1]),
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": round(float(epsilon), 12),
        "rope_theta": float(theta),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": biased and kind == "llama",
        **_rotary(get, kind, width // heads, str(path)),
    }
    if stretch is not None:
        if values.get("rope_scaling"):
            raise InputError(f"{path}: both rope_freqs.weight and {kind}.rope.scaling; import the safetensors")
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(np.max(stretch)),
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    config = read_config(values, str(path))
    if stretch is not None:
        plain = frequencies(config.model_copy(update={"rope_scaling": None}))[0][0]
        if not np.allclose(plain / frequencies(config)[0][0], stretch, rtol=1e-3):
            raise InputError(f"{path}: rope_freqs.weight is not the stretching of Llama 3; import the safetensors")
    return config, fields, tensors


def read_gguf(path: Path, mesh: Mesh, dtype: str = "float32") -> tuple[ModelConfig, Any, dict[str, Any]]:
    """(config, params on the mesh, all fields of the file). Tensors are dequantised one at a time.

    Raises InputError for another architecture or rope scaling, and for a file that is truncated or damaged.
    """
    config, fields, tensors = gguf_config(path)
    shapes = {n: tuple(int(x) for x in reversed(t.shape)) for n, t in tensors.items()}

    def read(name: str) -> np.ndarray:
        array = _dequantized(tensors[name], str(path)).reshape(shapes[name])
        if fields["general.architecture"] == "llama" and re.search(r"self_attn\.[qk]_proj\.", name):
            array = _unpermuted(array, config.heads if ".q_proj." in name else config.G)
        return array

    config, params = params_from(config, shapes, read, mesh, dtype, str(path))
    return config, params, fields
