"""The families of Hugging Face models as settings of one Transformer: for each, how its `config.json` reads and is
written, and how its tensors are called. A new family is an entry of a table, not a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic

from recursive_jax.config import ModelConfig
from recursive_jax.errors import InputError, problems
from recursive_jax.models.families import encoders, gpt, llama
from recursive_jax.models.families.shared import Family, Keys, Source
from recursive_jax.models.families.values import check_values

FAMILIES: dict[str, Family] = {**llama.FAMILIES, **gpt.FAMILIES, **encoders.FAMILIES}
for _kind, _family in FAMILIES.items():
    if _family.architecture.endswith(("ForCausalLM", "LMHeadModel")):  # a reward model reads the last token's state
        FAMILIES[_kind] = _family._replace(names={**_family.names, "score": Source("score.weight")})
_RUNTIME = ("family", "scan", "remat", "attention")  # say how a model runs, not what it computes


def read_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """`config.json` -> ModelConfig. Raises InputError for an unknown model_type, a missing key, or a switch that is
    not supported, naming it."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{where}: model_type={kind!r} is not known; known: {', '.join(sorted(FAMILIES))}")
    check_values(values, where)
    try:
        found = FAMILIES[kind].read(Keys(values, where))
    except (TypeError, AttributeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"{where}: its values do not fit together ({type(error).__name__}: {error})") from None
    try:
        return ModelConfig(**found, family=kind)
    except pydantic.ValidationError as error:
        raise problems(f"{where}:", [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]) from None


def write_config(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> the keys of `config.json` for its own family, or for the first that has all its switches.

    Raises InputError when no family computes what this model computes.
    """
    kinds = [config.family] if config.family else list(FAMILIES)
    for kind in kinds:
        family = FAMILIES[kind]
        values = family.write(config)
        try:
            again = read_config({**values, "model_type": kind}, kind)
        except InputError:
            continue
        if resolved(again) == resolved(config):
            return {"architectures": [family.architecture], "model_type": kind, **values}
    if config.family:
        changed = [k for k, v in resolved(config).items() if resolved(again).get(k) != v]
        raise InputError(
            f"this model was read as {config.family}, whose format cannot say model.{changed[0]}="
            f"{getattr(config, changed[0], None)!r}"
        )
    raise InputError(
        f"no Hugging Face family has this model's switches; known: {', '.join(FAMILIES)}. "
        "The default switches (rms norm, rope, gated silu) are a Llama"
    )


def resolved(c: ModelConfig) -> dict[str, Any]:
    """The switches with every default filled in: equal for two configs that compute the same."""
    values = {k: v for k, v in c.model_dump().items() if k not in _RUNTIME}
    windows = tuple(c.is_windowed(i) for i in range(c.layers))
    rotary = c.position == "rope"
    local = c.rope_local_theta or c.rope_theta
    return values | dict(
        kv_heads=c.G,
        head_dim=c.K,
        d_ff=c.F,
        embedding_width=c.E,
        bias=None,
        qkv_bias=c.has_bias("qkv"),
        out_bias=c.has_bias("out"),
        mlp_bias=c.has_bias("mlp"),
        sliding_window=c.sliding_window if any(windows) else None,
        layer_types=windows,
        attention_scale=round(c.attention_scale or c.K**-0.5, 9),
        embedding_scale=round(c.embedding_scale, 6),
        norm_bias=c.norm_bias if c.norm == "layer" else None,
        rope_theta=c.rope_theta if rotary else None,
        rope_local_theta=local if rotary and any(windows) else None,
        rope_fraction=c.rope_fraction if rotary else None,
        experts_per_token=c.experts_per_token if c.experts else None,
        experts_renormalize=c.experts_renormalize if c.experts else None,
    )


__all__ = ["FAMILIES", "Family", "Keys", "Source", "read_config", "resolved", "write_config"]
