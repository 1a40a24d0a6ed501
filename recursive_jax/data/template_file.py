"""Templates written as YAML: what is asked, and how the reply is read.

    prompt: "Write three questions like this one:\\n{question}\\n1."
    parser: {kind: numbered, field: question, opened: true}
    examples: {path: seeds.jsonl, count: 2}         # or pools: [{path: ..., count: ...}, ...]

Keys are those of `Template`, `Examples` and the parser of that `kind`; `chat` is the model's own way if left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from recursive_jax.config.yaml_text import read_yaml
from recursive_jax.data.parsers import parser_of
from recursive_jax.data.task import read_rows
from recursive_jax.data.template import Examples, Template
from recursive_jax.errors import InputError


def load_template(path: str, tokenizer: Any = None) -> Template:
    """The template of a YAML file. tokenizer: says whether `chat` is possible, and its default. Raises InputError
    naming the key that is wrong."""
    raw = read_yaml(path, "template")
    kinds = {"prompt": str, "completion": str, "system": str, "after": str, "chat": bool}
    _check_keys(path, raw, [*kinds, "parser", "examples"])
    for key, kind in kinds.items():
        if key in raw and not isinstance(raw[key], kind):
            what = "true or false" if kind is bool else "a text"
            raise InputError(f"template {path}: {key}={raw[key]!r} is no {what}; put texts in quotes")
    if not raw.get("prompt"):
        raise InputError(f"template {path} has no prompt")
    has = bool(getattr(tokenizer, "chat_template", None))
    if raw.get("chat") and tokenizer is not None and not has:
        raise InputError(f"template {path}: chat=true, but the model's tokenizer has no chat template")
    found = {key: raw[key] for key in kinds if key in raw} | {"chat": raw.get("chat", has)}
    try:
        if raw.get("parser") is not None:
            found["parser"] = parser_of(_mapping(raw["parser"], "parser"))
        if raw.get("examples") is not None:
            found["examples"] = _examples(path, _mapping(raw["examples"], "examples"))
        return Template(**found)
    except InputError as error:
        raise InputError(f"template {path}: {error}") from None


def _examples(path: str, raw: dict[str, Any]) -> Examples:
    settings = [f.name for f in dataclasses.fields(Examples) if f.name != "pools"]
    _check_keys(path, raw, ["pools", "path", "count", *settings], "examples.")
    pools = raw.get("pools", [{"path": raw.get("path"), "count": raw.get("count", 1)}])
    if not isinstance(pools, list) or not all(isinstance(p, Mapping) and isinstance(p.get("path"), str) for p in pools):
        raise InputError("examples needs a path, or pools: [{path: FILE, count: N}, ...]")
    for pool in pools:
        _check_keys(path, pool, ["path", "count"], "examples.pools.")
        if isinstance(pool.get("count", 1), bool) or not isinstance(pool.get("count", 1), int):
            raise InputError(f"examples.count={pool['count']!r}: an integer is wanted")
    read = tuple((tuple(read_rows(p["path"])), p.get("count", 1)) for p in pools)
    return Examples(read, **{key: raw[key] for key in settings if key in raw})


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{key} is a {type(value).__name__}; settings are wanted: {key}: {{kind: ...}}")
    return dict(value)


def _check_keys(path: str, raw: Mapping[str, Any], known: list[str], prefix: str = "") -> None:
    unknown = [key for key in raw if key not in known]
    if unknown:
        raise InputError(f"template {path}: {prefix}{unknown[0]} is no key; there are {', '.join(known)}")
