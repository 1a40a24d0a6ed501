"""What the families share: reading keys with clear errors, rotary and window switches in both dialects of
`config.json`, and the table of tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from recursive_jax.config import ModelConfig
from recursive_jax.errors import InputError, problems

_REQUIRED = object()
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
_KINDS = {"full_attention": "full", "sliding_attention": "window"}
_KIND_NAMES = {v: k for k, v in _KINDS.items()}


class Keys:
    """A `config.json`: `k("hidden_size")`, with a default `k("head_dim", None)`; a missing key is named."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise InputError(f"{self.where}: the key {name} is missing")
            return default
        return value

    def absent(self, name: str, default: Any) -> Any:
        """The value of a key that may be null: `default`, that of the class, only where the key is not there."""
        return self.values[name] if name in self.values else default

    def must(self, **allowed: Any) -> None:
        """Refuses values that the Transformer has no switch for."""
        lines = [
            f"{name}={self.values[name]!r} is not supported, only {value!r}"
            for name, value in allowed.items()
            if self.values.get(name) not in (None, value)
        ]
        if lines:
            raise problems(f"{self.where}:", lines)

    def activation(self, name: str, default: str) -> str:
        value = self(name, default)
        if value not in ACTIVATIONS:
            raise InputError(f"{self.where}: {name}={value!r} is not supported; known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]


class Source(NamedTuple):
    """Where a leaf lies in the file. Fused tensors hold several leaves: `parts` in file order, one after the other
    along the output, or interleaved per head. conv: the matrix is stored `[in, out]` (GPT-2)."""

    file: str
    part: int = 0
    parts: tuple[str, ...] = ()
    per_head: bool = False
    conv: bool = False


class Family(NamedTuple):
    architecture: str  # class name in `architectures`
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    names: dict[str, Source]
    prefix: str  # of the base model's tensors; files of bare base models lack it
    ignored: tuple[str, ...] = ()  # patterns of tensors that carry nothing this model computes


# ---- reading and writing what many families share


def rope(k: Keys, theta: float = 10_000.0, nested: Sequence[str] = ()) -> dict[str, Any]:
    """Rotary switches. nested: v4 names of the (full, local) thetas of families with two."""
    p = k("rope_parameters", {})
    if nested and "full_attention" in p:
        full, local = p["full_attention"], p.get("sliding_attention", {}).get("rope_theta")
    elif nested:
        full = {**k("rope_scaling", {}), "rope_theta": k(nested[0], theta)}
        local = k(nested[1], 10_000.0)
    else:
        full, local = {**k("rope_scaling", {}), **p}, None
    found = dict(
        rope_theta=float(full.get("rope_theta", k("rope_theta", theta))),
        rope_fraction=float(full.get("partial_rotary_factor", k("partial_rotary_factor", 1.0))),
        rope_local_theta=local,
    )
    kind = full.get("rope_type", full.get("type", "default"))
    number = lambda name, default=_REQUIRED: Keys(full, f"{k.where}: rope_parameters")(name, default)
    original = int(number("original_max_position_embeddings", k("original_max_position_embeddings", 0)) or 0)
    if kind == "linear":
        found["rope_scaling"] = dict(kind="linear", factor=number("factor"))
    elif kind == "llama3":
        found["rope_scaling"] = dict(
            kind="llama3",
            factor=number("factor"),
            original=number("original_max_position_embeddings"),
            low=number("low_freq_factor"),
            high=number("high_freq_factor"),
        )
    elif kind == "yarn":
        unsupported = [n for n in ("mscale", "mscale_all_dim") if full.get(n)]
        if unsupported or full.get("truncate") is False:
            raise InputError(f"{k.where}: rope_parameters.{(unsupported or ['truncate'])[0]} is not supported")
        found["rope_scaling"] = dict(
            kind="yarn",
            factor=number("factor"),
            original=original or k("max_position_embeddings"),
            low=number("beta_slow", 1.0),
            high=number("beta_fast", 32.0),
            attention=number("attention_factor", None),
        )
    elif kind != "default":
        raise InputError(f"{k.where}: rope_type={kind!r} is not supported; known: default, linear, llama3, yarn")
    return found


def write_rope(c: ModelConfig, nested: Sequence[str] = ()) -> dict[str, Any]:
    p: dict[str, Any] = {"rope_type": "default"}
    s = c.rope_scaling
    if s is not None:
        p = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            p |= {"low_freq_factor": s.low, "high_freq_factor": s.high, "original_max_position_embeddings": s.original}
        elif s.kind == "yarn":
            p |= {"beta_slow": s.low, "beta_fast": s.high, "original_max_position_embeddings": s.original}
            p |= {} if s.attention is None else {"attention_factor": s.attention}
    old = {"rope_scaling": None if s is None else dict(p)}
    p["rope_theta"] = c.rope_theta
    if c.rope_fraction != 1.0:
        p["partial_rotary_factor"] = old["partial_rotary_factor"] = c.rope_fraction
    if nested:
        local = {"rope_type": "default", "rope_theta": c.rope_local_theta or c.rope_theta}
        both = {"full_attention": p, "sliding_attention": local}
        return {**old, nested[0]: c.rope_theta, nested[1]: local["rope_theta"], "rope_parameters": both}
    return {**old, "rope_theta": c.rope_theta, "rope_parameters": p}


def windows(k: Keys, layers: int, window: int | None, default: Callable[[int], bool]) -> dict[str, Any]:
    """window and layer_types from `layer_types`, or from the family's own rule for which layers slide."""
    if not window:
        return {}
    kinds = [_KINDS.get(x, x) for x in k("layer_types", [])] or [
        "window" if default(i) else "full" for i in range(layers)
    ]
    if set(kinds) - {"full", "window"}:
        raise InputError(f"{k.where}: layer_types has {sorted(set(kinds) - {'full', 'window'})}, not supported")
    return {"sliding_window": window, "layer_types": tuple(kinds)} if "window" in kinds else {}


def write_windows(c: ModelConfig) -> dict[str, Any]:
    kinds = ["window" if c.is_windowed(i) else "full" for i in range(c.layers)]
    return {"sliding_window": c.sliding_window, "layer_types": [_KIND_NAMES[x] for x in kinds]}


def tensor_names(top: Mapping[str, str], prefix: str, layer: Mapping[str, Any]) -> dict[str, Source]:
    """Leaf -> Source. `layer` is per block: a name, or (name, fused leaves[, per_head][, conv])."""
    found = {leaf: Source(file) for leaf, file in top.items()}
    for leaf, what in layer.items():
        if isinstance(what, str):
            found[f"blocks/{leaf}"] = Source(f"{prefix}.{what}")
            continue
        name, flags = what[0], what[1:]
        parts = leaf.split("+")
        if parts == [leaf]:
            found[f"blocks/{leaf}"] = Source(f"{prefix}.{name}", conv="conv" in flags)
        for i, part in enumerate(parts if len(parts) > 1 else []):
            fused = tuple(f"blocks/{p}" for p in parts)
            found[f"blocks/{part}"] = Source(f"{prefix}.{name}", i, fused, "per_head" in flags, "conv" in flags)
    return found


def norms(*pairs: tuple[str, str]) -> dict[str, str]:
    """Layer norms: scale and bias of each (ours, theirs)."""
    return {
        f"{ours}/{leaf}": f"{theirs}.{w}"
        for ours, theirs in pairs
        for leaf, w in (("scale", "weight"), ("bias", "bias"))
    }


def linear(**names: str) -> dict[str, str]:
    """Weight and bias of plain linear layers: query="self_attn.q_proj"."""
    room = {
        "query": "attention",
        "key": "attention",
        "value": "attention",
        "out": "attention",
        "up": "mlp",
        "down": "mlp",
    }
    both = (("", "weight"), ("_bias", "bias"))
    return {f"{room[n]}/{n}{s}": f"{theirs}.{w}" for n, theirs in names.items() for s, w in both}


QKV = "attention/query+attention/key+attention/value"
QKV_BIAS = "attention/query_bias+attention/key_bias+attention/value_bias"
INV_FREQ = (r".*rotary_emb\.inv_freq",)
