"""YAML as people write it in configs, and nothing that only an attacker or an accident writes: keys given twice,
anchors that explode, nesting and numbers without end are refused, by line where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from recursive_jax.errors import InputError

BYTES = 4 * 2**20  # of a file
VALUES = 100_000  # with every alias counted as often as it is used
DEPTH = 50


class _Loader(yaml.SafeLoader):
    """Safe YAML with numbers of 64 bits."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        found = super().construct_yaml_int(node)
        if found.bit_length() > 64:
            raise yaml.constructor.ConstructorError(None, None, "a number of more than 64 bits", node.start_mark)
        return found


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refuse_twice(node: yaml.MappingNode) -> None:
    """A key that stands twice in one mapping: YAML would keep the last in silence. Merged keys may be overridden."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                raise yaml.YAMLError(f"the key {key.value!r} is given twice, in line {key.start_mark.line + 1}")
            seen.add((key.tag, key.value))


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for. Raises YAMLError for nesting that is too deep."""
    if depth > DEPTH:
        raise yaml.YAMLError(f"it is nested more than {DEPTH} deep")
    if known.get(id(node)) == 0:
        raise yaml.YAMLError(f"an alias stands inside of what it names, in line {node.start_mark.line + 1}")
    if id(node) not in known:
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
            inside = [part for pair in node.value for part in pair]
        known[id(node)] = 0  # being counted
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in inside)
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError with what is wrong and where."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        found = _count(node, {}, 0)
        if found > VALUES:
            raise yaml.YAMLError(f"it stands for {found:,} values by its anchors, at most {VALUES:,} are read")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {DEPTH} deep") from None
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:  # a date that is none, say
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None
    finally:
        loader.dispose()


def read_yaml(path: str | Path, what: str = "config file") -> dict[str, Any]:
    """A YAML file as nested dicts. Raises InputError, naming the files that are there where this one is not."""
    file = Path(path)
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"{what} {path} is not a file")
        if file.stat().st_size > BYTES:
            raise InputError(f"{what} {path} has {file.stat().st_size:,} bytes, at most {BYTES:,} are read as YAML")
        loaded = parse_yaml(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        near = sorted(str(p) for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        hint = f"; there are: {', '.join(near)}" if near else ""
        raise InputError(f"{what} {path} does not exist{hint}") from None
    except IsADirectoryError:
        raise InputError(f"{what} {path} is a folder; give one of the .yaml files in it") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        raise InputError(f"{what} {path} cannot be read as YAML: {_short(error)}") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise InputError(f"{what} {path} must be a mapping of sections, it is a {type(loaded).__name__}")
    if odd := [k for k in loaded or {} if not isinstance(k, str)]:
        raise InputError(f"{what} {path}: keys are names, {odd[0]!r} is none")
    return loaded or {}


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) < 500 else text[:500] + " ..."
