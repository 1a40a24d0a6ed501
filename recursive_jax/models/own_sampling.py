"""How a foreign model samples where nobody says: as the tool that its file was written for does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recursive_jax.config import SamplingConfig
from recursive_jax.config.loader import parse_section

#: What `transformers` takes for a key that generation_config.json leaves out, where `do_sample` is true
#: (GenerationConfig, 4.57 and 5; 50 is its famous default).
TRANSFORMERS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}
#: What llama.cpp does for a file without `general.sampling.*` (common/common.h, common_params_sampling), by our names.
LLAMA_CPP = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.0}
GGUF_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
#: Values that mean "off", here and there.
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}


def of_folder(folder: Path) -> dict[str, Any]:
    """Keys of `SamplingConfig` by generation_config.json: greedy unless it says `do_sample`. Nothing without the file,
    or where it names only token ids (a model that is no chat's has no sampling of its own)."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}  # the reader of the tokenizer's files says so
    named = {k: given[k] for k in TRANSFORMERS if given.get(k) is not None}
    if not named and given.get("do_sample") is None:
        return {}
    if not given.get("do_sample"):
        penalty = named.get("repetition_penalty", 1.0)
        return _used({"temperature": 0.0, "repetition_penalty": penalty}, str(file))
    return _used({**TRANSFORMERS, **named}, str(file))


def of_gguf(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same by the `general.sampling.*` keys of a GGUF, over llama.cpp's defaults."""
    named = {key: fields.get(f"general.sampling.{name}") for name, key in GGUF_KEYS.items()}
    return _used({**LLAMA_CPP, **{k: v for k, v in named.items() if v is not None}}, where)


def _used(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Without what is off. Raises InputError for values that are no numbers or out of range."""
    found = parse_section(SamplingConfig, values, where=where).model_dump(include=set(values))
    if found["temperature"] == 0:
        found = {k: v for k, v in found.items() if k in ("temperature", "repetition_penalty")}
    return {k: v for k, v in found.items() if k == "temperature" or v != OFF[k]}
