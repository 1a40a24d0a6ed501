"""Identity by value: what decides a result is named by its type, its version and its values, never by its source text
alone.

    fingerprint(Template("{q}", "{a}")) == fingerprint(Template("{q}", "{a}"))  # equal values agree, in every process
    round.score("s", rows, Longest(3))                                            # another 3 is another result

A value joins by being a frozen dataclass of plain values (raise its class variable `version` when its meaning changes).
Fields equal to their default stand in no fingerprint, so that a new field with a default strands no run; nor do fields
that say only *how* a result is made (`HOW` of a config section, `field(metadata={"how": True})` of a dataclass).
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import functools
import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recursive_jax.errors import InputError

LENGTH = 16  # hexadecimal digits of a fingerprint


class Value:
    """Base class of frozen dataclasses that are named by their values: objectives, rewards, templates."""

    version = 1

    @property
    def fingerprint(self) -> str:
        return fingerprint(self)


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that name `value`. Raises InputError for what has no identity (see `describe`)."""
    return digest(json.dumps(describe(value), sort_keys=True).encode())


def digest(*parts: bytes | memoryview) -> str:
    """The fingerprint of bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{len(part)}:".encode())
        found.update(part)
    return found.hexdigest()[:LENGTH]


def describe(value: Any) -> Any:
    """`value` as plain JSON that two equal values share.

    Plain values, mappings and sequences, arrays (by their bytes), frozen dataclasses and config sections (by type,
    version and the fields that differ from their defaults), whatever has a `fingerprint` (a Dataset, a Model, a stored
    result, a tokenizer), functions of a module (by name and source), functions with a name and version (`named`),
    partial functions and methods of what has an identity. Raises InputError, with the remedy, for closures, lambdas and
    others."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float, np.integer, np.floating)):
        return _number(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, bytes):
        return {"bytes": digest(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, type):
        return _name_of(value)
    if isinstance(value, Value):
        return _describe_dataclass(value)
    if hasattr(type(value), "model_fields"):
        return describe_section(value)
    own = getattr(value, "fingerprint", None)
    if isinstance(own, str):
        return own
    return _describe_composed(value)


def _number(value: Any) -> Any:
    if isinstance(value, (int, np.integer)):
        return int(value)
    value = float(value)
    if not math.isfinite(value):
        return {"float": str(value)}
    return int(value) if value.is_integer() else value  # 1 and 1.0 are one value


def _describe_composed(value: Any) -> Any:
    if isinstance(value, Mapping):
        if all(isinstance(k, str) for k in value):
            return {k: describe(v) for k, v in value.items()}
        return {"map": _sorted([describe(k), describe(v)] for k, v in value.items())}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return {"set": _sorted(describe(v) for v in value)}
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, enum.Enum)):
        return {type(value).__name__: str(value)}
    if dataclasses.is_dataclass(value):
        return _describe_dataclass(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
        if array.dtype == object:
            return {"array": describe(array.tolist())}
        return {"array": [str(array.dtype), list(array.shape), digest(array_bytes(array))]}
    if isinstance(value, functools.partial):
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"method": value.__func__.__name__, "of": describe(value.__self__)}
    if callable(value):
        return _describe_function(value)
    raise InputError(
        f"{type(value).__name__} has no identity, so a stored result could not tell that it changed: make it a frozen "
        "dataclass of plain values, or give it a `fingerprint`"
    )


def _sorted(described: Iterable[Any]) -> list[Any]:
    return sorted(described, key=lambda x: json.dumps(x, sort_keys=True))


def array_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array of any dtype, bfloat16 among them."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def describe_section(section: Any) -> dict[str, Any]:
    """The keys of a config section that differ from their defaults and change a result; `HOW` of its class names those
    that do not."""
    found = {}
    for name, field in type(section).model_fields.items():
        if name in getattr(type(section), "HOW", ()):
            continue
        value = describe(getattr(section, name))
        inner = getattr(type(section), "OVERRIDES", {}).get(name)
        if inner is not None:
            value = {k: v for k, v in value.items() if k not in inner.HOW}
        if field.is_required() or value != describe(field.get_default(call_default_factory=True)):
            found[name] = value
    return found


def _describe_dataclass(value: Any) -> dict[str, Any]:
    kind = type(value)
    flax = any(base.__module__.startswith("flax.") for base in kind.__mro__)
    if not flax and not ("__dataclass_params__" in vars(kind) and kind.__dataclass_params__.frozen):
        raise InputError(f"{kind.__name__} is not named by its values: put @dataclass(frozen=True) above it")
    found: dict[str, Any] = {"type": _name_of(kind), "version": getattr(value, "version", 1)}
    if not kind.__module__.startswith(("recursive_jax.", "flax.")):
        found |= _source(kind)  # what a user's class computes may be edited without a thought of its version
    for field in dataclasses.fields(value):
        if field.metadata.get("how") or field.name == "version" or (flax and field.name in ("parent", "name")):
            continue
        if getattr(value, field.name) is field.default:
            continue
        described = describe(getattr(value, field.name))
        if field.default is not dataclasses.MISSING:
            default = describe(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = describe(field.default_factory())
        else:
            default = found  # no default: always named
        if described != default:
            found[field.name] = described
    return found


def _source(thing: Any) -> dict[str, str]:
    try:
        return {"source": digest(inspect.getsource(thing).encode())}
    except (OSError, TypeError):  # compiled, or typed at a prompt
        return {}


def _name_of(kind: type) -> str:
    """A type's own name; of another package's (a user's) with its module, where two may share one."""
    return (
        kind.__qualname__ if kind.__module__.startswith("recursive_jax.") else f"{kind.__module__}.{kind.__qualname__}"
    )


def named(name: str, version: int | str) -> Callable[[Callable], Callable]:
    """Gives a function that is not a module's (a closure, a lambda) an identity of its own:

        round.score("s", rows, named("longer than", (1, limit))(lambda data: ...))

    name and version say what it computes; change one of them whenever that changes, captured values included.
    """
    identity = {"named": name, "version": describe(version)}

    def give(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args: Any, **keywords: Any) -> Any:
            return function(*args, **keywords)

        wrapped.__identity__ = identity
        return wrapped

    return give


def _describe_function(function: Any) -> dict[str, Any]:
    own = getattr(function, "__identity__", None)
    if own is not None:
        return own
    name = getattr(function, "__qualname__", None)
    if name is None:
        raise InputError(
            f"an instance of {type(function).__name__} is called here, and has no identity: make it a frozen dataclass"
        )
    module = getattr(function, "__module__", None) or "builtins"
    if "<lambda>" in name or "<locals>" in name:
        raise InputError(
            f"{name} of {module} is a function made inside another one: what it captured cannot be seen, so a stored "
            "result could not tell that it changed. Make it a function of a module or a frozen dataclass with "
            "__call__, "
            'or give it a name and a version: recursive_jax.named("name", version)(function)'
        )
    found: dict[str, Any] = {"function": f"{module}:{name}"}
    if module.startswith("recursive_jax."):
        return {**found, "version": getattr(function, "version", 1)}
    found |= _source(function)
    seen = {"defaults": getattr(function, "__defaults__", None), "keywords": getattr(function, "__kwdefaults__", None)}
    if getattr(function, "__closure__", None):  # a decorated function: what its wrapper captured
        seen["captured"] = [cell.cell_contents for cell in function.__closure__]
    if isinstance(function, types.FunctionType):
        seen["globals"] = _plain_globals(function)
    return {**found, **{k: describe(v) for k, v in seen.items() if v}}


def _plain_globals(function: types.FunctionType) -> dict[str, Any]:
    """The constants of its module that a function reads."""
    plain = (bool, int, float, str, bytes, tuple, frozenset)
    named = {n: function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__}
    return {n: v for n, v in named.items() if isinstance(v, plain) and not n.startswith("__")}


def derived(operation: str, arguments: Any, parents: Iterable[str]) -> str:
    """The fingerprint of what an operation makes of stored results."""
    return fingerprint({"operation": operation, "arguments": arguments, "parents": list(parents)})
