"""Arithmetic read by a parser of its own, never by `eval`: exact, in linear time, with limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

_TOKEN = re.compile(r"\s*(?:(\d[\d,]*(?:\.\d+)?|\.\d+)|([A-Za-z_]\w*)|(\*\*|[-+*/^()×÷−%]))")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "%": 2, "neg": 3, "^": 4}
_SAME = {"×": "*", "÷": "/", "−": "-", "**": "^"}
LENGTH = 10_000  # characters
BITS = 4096  # of a numerator or denominator


class NotArithmetic(ValueError):
    """A text that is no expression, or one beyond the limits."""


def arithmetic(text: str, names: Mapping[str, float | str] | None = None) -> Fraction:
    """The value of an expression: numbers (with thousands' commas), names, + - * / % ^ and parentheses, in the usual
    order or with operators in front (`- number0 number1`). Raises NotArithmetic."""
    tokens = _tokens(text, names or {})
    try:
        return _infix(tokens)
    except NotArithmetic as error:
        if len(tokens) < 3 or isinstance(tokens[0], Fraction) or "(" in tokens:
            raise
        try:
            return _prefix(tokens)
        except NotArithmetic:
            raise error from None


def _tokens(text: str, names: Mapping[str, float | str]) -> list[Fraction | str]:
    if len(text) > LENGTH:
        raise NotArithmetic(f"more than {LENGTH:,} characters")
    tokens: list[Fraction | str] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        found = _TOKEN.match(text, at)
        if found is None:
            raise NotArithmetic(f"{text[at : at + 20]!r} is no arithmetic")
        number, name, operator = found.groups()
        if number:
            tokens.append(_checked(Fraction(number.replace(",", ""))))
        elif name:
            if name not in names:
                raise NotArithmetic(f"{name} has no value")
            tokens.append(_checked(Fraction(str(names[name]))))
        else:
            tokens.append(_SAME.get(operator, operator))
        at = found.end()
    return tokens


def _infix(tokens: list[Fraction | str]) -> Fraction:
    """Dijkstra's shunting yard."""
    values: list[Fraction] = []
    waiting: list[str] = []
    operand = True  # whether one is wanted
    for token in tokens:
        if isinstance(token, Fraction):
            if not operand:
                raise NotArithmetic("two numbers without an operator")
            values.append(token)
            operand = False
        elif token == "(":
            if not operand:
                raise NotArithmetic("a number before a parenthesis")
            waiting.append(token)
        elif token == ")":
            if operand:
                raise NotArithmetic("a parenthesis without a number before it")
            while waiting and waiting[-1] != "(":
                _apply(values, waiting.pop())
            if not waiting:
                raise NotArithmetic("a parenthesis that was not opened")
            waiting.pop()
        elif operand:
            if token not in "+-":
                raise NotArithmetic(f"{token} without a number before it")
            if token == "-":
                waiting.append("neg")
        else:
            while waiting and waiting[-1] != "(" and _first(waiting[-1], token):
                _apply(values, waiting.pop())
            waiting.append(token)
            operand = True
    if operand:
        raise NotArithmetic("it ends without a number")
    while waiting:
        if waiting[-1] == "(":
            raise NotArithmetic("a parenthesis that is not closed")
        _apply(values, waiting.pop())
    return values[0]


def _first(before: str, after: str) -> bool:
    """Whether the operator that waits binds first: powers bind from the right."""
    a, b = _PRECEDENCE[before], _PRECEDENCE[after]
    return a > b or (a == b and after != "^")


def _prefix(tokens: list[Fraction | str]) -> Fraction:
    values: list[Fraction] = []
    for token in reversed(tokens):
        if isinstance(token, Fraction):
            values.append(token)
        elif len(values) < 2 or token in "()":
            raise NotArithmetic("an operator without two numbers behind it")
        else:
            values[-2:] = [values[-1], values[-2]]
            _apply(values, token)
    if len(values) != 1:
        raise NotArithmetic("numbers without an operator")
    return values[0]


def _apply(values: list[Fraction], operator: str) -> None:
    right = values.pop()
    if operator == "neg":
        values.append(-right)
        return
    left = values.pop()
    if operator in "/%" and right == 0:
        raise NotArithmetic("a division by zero")
    if operator == "^":
        values.append(_power(left, right))
        return
    found = {"+": lambda: left + right, "-": lambda: left - right, "*": lambda: left * right}
    found |= {"/": lambda: left / right, "%": lambda: left % right}
    values.append(_checked(found[operator]()))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or size * abs(exponent) > BITS:
        raise NotArithmetic("a power that is no fraction, or too large")
    if base == 0 and exponent < 0:
        raise NotArithmetic("a division by zero")
    return base ** int(exponent)


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise NotArithmetic("a number that is too large")
    return value
