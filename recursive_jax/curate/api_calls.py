"""Whether a text calls an API as it should, by its syntax tree: a name that exists nowhere is told from a wrong
argument (Gorilla, arXiv:2305.15334, sec. 4.2: hallucination against error)."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recursive_jax.curate.rewards import Grade, Reward, Row, field
from recursive_jax.errors import InputError


class Source(str):
    """An argument that is no literal, as it stands: `red` is not the text 'red'."""

    __slots__ = ()


RIGHT, WRONG, HALLUCINATION, UNREAD = "right", "wrong", "hallucination", "no call"


@dataclasses.dataclass(frozen=True)
class Call:
    """name: dotted. arguments: values by name; those without a name by place (0, 1, ...)."""

    name: str
    arguments: Mapping[Any, Any]


def calls_in(text: str) -> list[Call]:
    """The calls in a text, outermost first: of all of it where it is Python, else of the first stretch that is (an
    answer in words with a call in it, a fenced block). Arguments that are no literals are their own source."""
    for candidate in _candidates(text):
        try:
            tree = ast.parse(candidate.strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        found = [_call(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found = [call for call in found if call is not None]
        if found:
            return found
    return []


def _candidates(text: str) -> list[str]:
    fenced = re.findall(r"```(?:\w+\n)?(.*?)```", text, re.S)
    lines = text.splitlines()
    stretches = []
    for match in list(re.finditer(r"[A-Za-z_][\w.]*\(", text))[:32]:
        depth = 0
        for end in range(match.end() - 1, min(len(text), match.start() + 4000)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                stretches.append(text[match.start() : end + 1])
                break
    return [*fenced, text, *lines, *stretches]


def _call(node: ast.Call) -> Call | None:
    parts, at = [], node.func
    while isinstance(at, ast.Attribute):
        parts.append(at.attr)
        at = at.value
    if not isinstance(at, ast.Name):
        return None
    named = {k.arg or "**": _value(k.value) for k in node.keywords}
    return Call(".".join([at.id, *reversed(parts)]), {**dict(enumerate(map(_value, node.args))), **named})


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return Source(ast.unparse(node))


def check_call(text: str, wanted: str, apis: Sequence[str] = ()) -> str:
    """`right`: a call of the text has the wanted one's name and every argument that it names, with an equal value, and
    no argument besides (in any order; by place or by name where the wanted call says both). `wrong`: it calls an API
    that exists, another or with other arguments. `hallucination`: it calls what is none of `apis` (where they are
    given). `no call`: there is none. Numbers are equal by value, True is not 1.

    wanted: a call as text. A value of it may be a tuple of alternatives written `one_of(a, b)`."""
    (target, *_) = calls_in(wanted) or [None]
    if target is None:
        raise InputError(f"{wanted!r} is wanted, and it is no call: name(argument=value)")
    found = calls_in(text)
    if not found:
        return UNREAD
    if any(call.name == target.name and _same_arguments(call, target) for call in found):
        return RIGHT
    known = {*apis, target.name}
    if apis and not any(call.name in known for call in found):
        return HALLUCINATION
    return WRONG


def _same_arguments(call: Call, target: Call) -> bool:
    if set(call.arguments) != set(target.arguments):
        return False
    return all(_fits(call.arguments[name], value) for name, value in target.arguments.items())


def _fits(found: Any, value: Any) -> bool:
    if isinstance(value, Source) and value.startswith("one_of("):
        return any(_fits(found, option) for option in calls_in(value)[0].arguments.values())
    if isinstance(found, bool) != isinstance(value, bool):
        return False
    if isinstance(found, list | tuple) and isinstance(value, list | tuple):
        return len(found) == len(value) and all(map(_fits, found, value))
    if isinstance(found, dict) and isinstance(value, dict):
        return set(found) == set(value) and all(_fits(found[k], v) for k, v in value.items())
    return (type(found) in (int, float) and type(value) in (int, float) and found == value) or (
        type(found) is type(value) and found == value
    )


@dataclasses.dataclass(frozen=True)
class ApiCall(Reward):
    """1 for a row whose `text` makes the call in `column`, else 0; the text of the grade says what it was
    (`check_call`). apis: all names that exist."""

    column: str = "answer"
    apis: tuple[str, ...] = ()

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        found = [check_call(str(row.get("text") or ""), str(field(row, self.column)), self.apis) for row in rows]
        return [Grade(float(one == RIGHT), one) for one in found]
