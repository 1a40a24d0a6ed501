"""YAML -> frozen typed config, dotted overrides, all errors in one message."""

from __future__ import annotations

import copy
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

import pydantic
import yaml

from recursive_jax.config.section import Section
from recursive_jax.config.yaml_text import parse_yaml
from recursive_jax.errors import InputError, problems

Kind = TypeVar("Kind", bound=Section)


def parse_section(
    kind: type[Kind],
    raw: Mapping[str, Any],
    overrides: Sequence[str] = (),
    where: str = "config",
    elsewhere: Callable[[str], str | None] = lambda key: None,
) -> Kind:
    """`raw` with `key=value` overrides (dotted keys, YAML values) as a section. Raises one InputError with every
    problem: unknown keys (with the nearest known one), wrong types, values out of range. elsewhere: says of an unknown
    key at the top where it has a use, if it knows."""
    merged = copy.deepcopy(dict(raw))
    for override in overrides:
        apply_override(merged, override, kind)
    try:
        return kind.model_validate(merged)
    except pydantic.ValidationError as error:
        lines = explain(error, kind, elsewhere)
        raise problems(f"{where} has {len(lines)} problem(s):", lines) from None


def with_settings(kind: type[Kind], given: Kind | Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Kind:
    """A config, a dict or nothing, with keys by name on top: `train(model, texts, steps=100)`. Raises InputError naming
    every wrong one."""
    if isinstance(given, kind) and not settings:
        return given
    if given is not None and not isinstance(given, (kind, Mapping)):
        raise InputError(f"settings are a {kind.__name__} or a dict of its keys, not a {type(given).__name__}")
    base = given.model_dump(exclude_unset=True) if isinstance(given, kind) else dict(given or {})
    return parse_section(kind, {**base, **settings}, where=kind.__name__)


def split_override(override: str) -> tuple[str, str]:
    """`key=value` -> (key, value as text). Raises InputError for another form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override '{override}' is not of the form key=value, for example train.steps=100")
    return key, text


def _value(text: str, section: Any, key: str) -> Any:
    """A word of the command line as the value of a key: where the key holds text, the text as it stands (`null`: none);
    else YAML."""
    field = section.model_fields.get(key) if isinstance(section, type) and issubclass(section, Section) else None
    if field is not None and set(get_args(field.annotation) or (field.annotation,)) <= {str, type(None)}:
        return None if text == "null" else text
    try:
        return parse_yaml(text) if text else None
    except yaml.YAMLError:
        return text


def apply_override(raw: dict[str, Any], override: str, kind: type[Section]) -> None:
    """Sets one dotted key in nested dicts; old names of keys are taken for their new ones. A key that holds text takes
    the word as it is: `sampling.regex= #[0-9]{3}`, `data.path=corpus #2.txt`."""
    key, text = split_override(override)
    node, section = raw, kind
    *parents, last = key.split(".")
    for parent in parents:
        parent = section.RENAMED.get(parent, parent) if section is not None else parent
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise InputError(f"override '{override}': {parent} is a value, not a section")
        node, section = child, _inner(section, parent)
    new = section.RENAMED.get(last) if section is not None else None
    same = [new] if new is not None else [old for old, n in getattr(section, "RENAMED", {}).items() if n == last]
    for other in same:
        node.pop(other, None)  # the override stands for both names; the section says which is the new one
    node[last] = _value(text, section, new or last)


def _inner(kind: Any, key: str) -> Any:
    """The section class under a key, `None` where there is none; a dict of sections stands for its values' class."""
    if isinstance(kind, _Values):
        return kind.kind
    if kind is None:
        return None
    field = kind.model_fields.get(kind.RENAMED.get(key, key))
    if field is None:
        return None
    inner = section_of(field.annotation)
    return _Values(inner) if inner is not None and _is_dict(field.annotation) else inner


class _Values:
    """Stands for a dict of sections: every key leads to the same class."""

    RENAMED: typing.ClassVar[dict[str, str]] = {}

    def __init__(self, kind: type[Section]):
        self.kind = kind


def explain(
    error: pydantic.ValidationError, root: type[Section], elsewhere: Callable[[str], str | None] = lambda key: None
) -> list[str]:
    """One line for each problem."""
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = ".".join(location) or "config"
        if item["type"] == "extra_forbidden":
            known = elsewhere(location[0]) if len(location) == 1 else None
            lines.append(f"unknown key {key}: {known}" if known else unknown_key(root, location))
        elif item["type"] == "value_error":
            prefix = "" if key == "config" else f"{key}: "
            lines.extend(prefix + line for line in str(item["ctx"]["error"]).split("\n"))
        else:
            lines.append(f"{key}={_shown(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return list(dict.fromkeys(lines))


def _shown(value: Any) -> str:
    """A value as text that fits a line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has no text
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def unknown_key(root: type[Section], location: Sequence[str]) -> str:
    """The message for a key that is not there, with what was probably meant."""
    known = _known_keys(root, location[:-1])
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    elsewhere = [k for k in all_keys(root) if k.rsplit(".", 1)[-1] == location[-1]]
    hint = f"known here: {', '.join(known)}"
    if near:
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}?"
    return f"unknown key {'.'.join(location)}; {hint}"


def section_of(annotation: Any) -> type[Section] | None:
    """The Section class inside an annotation such as `X`, `X | None` or `dict[str, X]`."""
    candidates = [annotation]
    if isinstance(annotation, types.UnionType) or get_origin(annotation) in (dict, typing.Union):
        candidates = list(get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _is_dict(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def _known_keys(root: type[Section], path: Sequence[str]) -> list[str]:
    section: Any = root
    for part in path:
        section = _inner(section, part)
        if section is None:
            return []
    section = section.kind if isinstance(section, _Values) else section
    return list(section.model_fields)


def all_keys(root: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of a section."""
    keys = []
    for name, field in root.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            keys.append(prefix + name)
        else:
            keys.extend(
                all_keys(inner, f"{prefix}{name}.<name>." if _is_dict(field.annotation) else f"{prefix}{name}.")
            )
    return keys


def grown(config: Any, old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Of the keys of a section that may grow (`GROWS`), those that did, dotted, between two resolved configs."""
    found = []
    for name in type(config).model_fields if isinstance(config, Section) else ():
        a, b, value = old.get(name), new.get(name), getattr(config, name)
        if isinstance(value, Section) and isinstance(a, Mapping) and isinstance(b, Mapping):
            found += grown(value, a, b, f"{prefix}{name}.")
        elif name in type(config).GROWS and name in old and (b[: len(a)] == a != b if isinstance(a, list) else b > a):
            found.append(prefix + name)
    return found


def without_keys(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Nested mappings without the dotted keys."""
    inside = lambda name: [key.partition(".")[2] for key in keys if key.startswith(f"{name}.")]
    kept = {k: without_keys(v, inside(k)) if isinstance(v, Mapping) else v for k, v in values.items() if k not in keys}
    return {k: v for k, v in kept.items() if v != {} or values[k] == {}}


def changed_keys(section: Section) -> list[str]:
    """The keys that were given another value than their default."""
    fields = type(section).model_fields
    default = lambda name: fields[name].get_default(call_default_factory=True)
    return sorted(name for name in section.model_fields_set if getattr(section, name) != default(name))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two mappings differ, as `key: old -> new` lines; one that is missing is `default`."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) or isinstance(b, Mapping):
            if (a is None or isinstance(a, Mapping)) and (b is None or isinstance(b, Mapping)):
                lines.extend(difference(a or {}, b or {}, f"{prefix}{key}."))
                continue
        if a != b or (key in old) != (key in new):
            shown = [repr(v) if key in where else "default" for v, where in ((a, old), (b, new))]
            lines.append(f"{prefix}{key}: {shown[0]} -> {shown[1]}")
    return lines
