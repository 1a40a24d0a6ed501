"""Texts with the {field}s of a row: their parts, what they say of a row, and which row a text was filled with."""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping
from typing import Any

from recursive_jax.errors import InputError

Row = Mapping[str, Any]


def parts(text: str) -> tuple[tuple[str, str, str], ...]:
    """(literal, field, conversion and format as written) of a template, in order. Fields are plain names: `{a.b}` and
    `{a[0]}` would reach into objects. Raises InputError."""
    if not isinstance(text, str):
        raise InputError(f"a template is a text with {{field}}s, not {type(text).__name__}")
    return _parts(text)


@functools.lru_cache(1024)
def _parts(text: str) -> tuple[tuple[str, str, str], ...]:
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InputError(
            f"the template {text!r} is not valid: {error}; write {{{{ and }}}} for braces that are text"
        ) from None
    found = []
    for literal, field, form, conversion in parsed:
        if field is not None and not field.isidentifier():
            raise InputError(
                f"the template {text!r} has the field {{{field}}}: a plain name of a row's field is wanted; write {{{{ "
                "and }} for braces that are text"
            )
        if form and "{" in form:
            raise InputError(f"the template {text!r}: a format may not hold fields of its own")
        written = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        found.append((literal, field or "", written))
    return tuple(found)


def names(text: str) -> list[str]:
    """The fields of a text, each once, in order."""
    return list(dict.fromkeys(field for _, field, _ in parts(text) if field))


def filled(text: str, row: Row) -> str:
    """The template with the row's fields in it. Only the fields themselves are read, never their attributes."""
    missing = [field for _, field, _ in parts(text) if field and field in row and row[field] is None]
    if missing:
        raise InputError(f"the template {text!r} wants {missing[0]!r}, and this row has none (null)")
    try:
        return string.Formatter().vformat(text, (), row)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        there = ", ".join(map(str, row))
        raise InputError(f"the template {text!r} wants {error}; the row's fields are: {there}") from None


def found_in(form: str, text: str) -> dict[str, str] | None:
    """The fields of a text of this form, blanks around it left out; None for one of another form. Each field is as
    short as what follows it allows; one that stands twice must be equal. One pass over the text, whatever it holds."""
    rest, found, waiting = text.strip(), {}, None
    pieces = parts(form.strip())
    for n, (literal, field, _) in enumerate(pieces):
        at = _find(rest, literal, waiting is None, n == len(pieces) - 1 and not field)
        if at < 0:
            return None
        if waiting is not None and not _take(found, waiting, rest[:at]):
            return None
        rest, waiting = rest[at + len(literal) :], field or None
    if waiting is not None:
        return found if _take(found, waiting, rest) else None
    return None if rest else found


def _find(text: str, literal: str, here: bool, last: bool) -> int:
    """Where a literal stands: at the beginning, after a field of at least one character, or at the end; -1: nowhere."""
    if here:
        return 0 if text.startswith(literal) else -1
    if last:
        at = len(text) - len(literal)
        return at if at > 0 and text.endswith(literal) else -1
    return text.find(literal, 1) if literal else min(1, len(text))


def _take(found: dict[str, str], field: str, value: str) -> bool:
    """Notes a field's value; False for an empty one, and for another than it had."""
    value = value.strip() if value else ""
    if not value or found.get(field, value) != value:
        return False
    found[field] = value
    return True
