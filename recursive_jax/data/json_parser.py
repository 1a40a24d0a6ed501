"""JSON in replies: fenced or in prose, whole or cut, of any form or by a schema."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from recursive_jax.data.parser import TEXT, ParseError, Parser, Rows
from recursive_jax.errors import InputError

_OPENS = re.compile(r'\{\s*["}]|\[\s*[{\]]')
_FENCE = re.compile(r"```(?:json)?[ \t]*\n")


@dataclasses.dataclass(frozen=True)
class Json(Parser):
    """schema: a JSON Schema of one row (an object; its `properties` are the columns); none: any object. In a reply with
    a fenced block that is read, else from the first bracket that opens an object or a list of them. A list gives a row
    for each of its objects, one that was cut for those that are whole. key: of the list in an object, `{"items":
    [...]}`. many: whether the constraint asks for a list."""

    schema: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: str = ""
    many: bool = False

    def __post_init__(self):
        if self.schema:
            jsonschema = _jsonschema()
            try:
                jsonschema.validators.validator_for(self.schema).check_schema(self.schema)
            except jsonschema.SchemaError as error:
                raise InputError(f"the parser's schema is not valid JSON Schema: {error.message}") from None

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        kinds = {"string": TEXT, "number": pa.float64(), "integer": pa.int64(), "boolean": pa.bool_()}
        types = {n: of.get("type") if isinstance(of, Mapping) else None for n, of in self._properties.items()}
        return {n: kinds.get(kind) if isinstance(kind, str) else None for n, kind in types.items()}

    @property
    def _properties(self) -> Mapping[str, Any]:
        return self.schema.get("properties", {})

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        fence = _FENCE.search(text)
        body = text[fence.end() :] if fence else text
        found = _first_value(body, cut)
        if found is None:
            return ParseError(text, "cut" if cut else "no json")
        value = found[0]
        if self.key:
            value = value.get(self.key) if isinstance(value, Mapping) else None
        rows = [value] if isinstance(value, Mapping) else value
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            return ParseError(text, "no object")
        if not rows:
            return ParseError(text, "empty")
        if not _is_text(value):
            return ParseError(text, "no unicode")
        if self.schema and any(not self._validator.is_valid(row) for row in rows):
            return ParseError(text, "schema")
        return [dict.fromkeys(self.columns) | dict(row) for row in rows]

    @functools.cached_property
    def _validator(self) -> Any:
        return _jsonschema().validators.validator_for(self.schema)(self.schema)

    def constraint(self) -> dict[str, str]:
        row = {"type": "object", "additionalProperties": False, **self.schema}
        if self._properties:
            row["properties"] = {name: _bounded(of) for name, of in self._properties.items()}
        whole = {"type": "array", "items": row, "minItems": 1} if self.many or self.key else row
        if self.key:
            whole = {"type": "object", "properties": {self.key: whole}, "required": [self.key]}
        return {"json_schema": json.dumps(whole)}


def _bounded(schema: Any) -> Any:
    """Integers of 64 bits, which a column can hold."""
    whole = isinstance(schema, Mapping) and schema.get("type") == "integer"
    return {"minimum": -(10**18), "maximum": 10**18, **schema} if whole else schema


def _jsonschema() -> Any:
    import jsonschema

    return jsonschema


def _first_value(text: str, cut: bool) -> tuple[Any] | None:
    """The first object, or list of objects, of a text; of a list that was cut, the objects that are whole. Brackets of
    the prose are passed over: one that opens JSON is followed by what follows it there."""
    decoder = json.JSONDecoder(parse_constant=_finite, parse_float=_finite, parse_int=_integer)
    opens = _OPENS.search(text)
    if opens is None:
        return None
    try:
        return (decoder.raw_decode(text, opens.start())[0],)
    except (ValueError, RecursionError):
        return ((whole,) if (whole := _whole_objects(decoder, text, opens.start())) else None) if cut else None


def _whole_objects(decoder: json.JSONDecoder, text: str, at: int) -> list[Any]:
    """The objects of the list that opens at `at`, up to the one that is not whole."""
    found: list[Any] = []
    between = re.compile(r"[\s,]*")
    if text[at] != "[":
        return found
    at += 1
    while True:
        at = between.match(text, at).end()
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return found
        found.append(value)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON's")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:40]} is no integer of 64 bits")
    return int(text)


def _is_text(value: Any) -> bool:
    """Whether all texts in it are Unicode: JSON can escape half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
