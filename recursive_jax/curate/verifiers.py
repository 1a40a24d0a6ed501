"""Rewards that need no model: a row against what is known of it. `of` is the column that is looked at (`text`: the
reply), `column` the one that holds what is right; a row in which that is null has no score."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from rapidfuzz.distance import LCSseq

from recursive_jax.curate.arithmetic import NotArithmetic, arithmetic
from recursive_jax.curate.rewards import Reward, Row, field, truth
from recursive_jax.data.json_parser import Json
from recursive_jax.data.parser import ParseError
from recursive_jax.data.parsers import Answer
from recursive_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ExactMatch(Reward):
    """1 where a text is that of a column, blanks around both left out; 0 where not. fold: case and white space do not
    count either."""

    version: ClassVar[int] = 2

    column: str = "answer"
    of: str = "text"
    fold: bool = False

    def of_row(self, row: Row) -> float | None:
        found, right = field(row, self.of), truth(row, self.column)
        return None if right is None else float(found is not None and self._plain(found) == self._plain(right))

    def _plain(self, value: Any) -> str:
        text = str(value).strip()
        return " ".join(text.casefold().split()) if self.fold else text


@dataclasses.dataclass(frozen=True)
class NumericMatch(Reward):
    """1 where the number that a text ends in (`\\boxed{}`, `####`, or the last one) is that of a column, to a relative
    `tolerance`; 0 where there is another, or none. form: where it is looked for, as in `parsers.Answer`."""

    version: ClassVar[int] = 2

    column: str = "answer"
    of: str = "text"
    tolerance: float = 1e-6
    form: str = "any"

    def of_row(self, row: Row) -> float | None:
        right = number_of(truth(row, self.column))
        if right is None:
            return None
        found = number_of(field(row, self.of), self.form)
        return float(found is not None and abs(found - right) <= self.tolerance * max(1.0, abs(right)))


def number_of(value: Any, form: str = "any") -> float | None:
    """The number that a value is, or that its text ends in; None where there is none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    found = Answer(form).read("" if value is None else str(value))
    if isinstance(found, ParseError):
        return None
    inner = Answer("number").read(found[0]["answer"])
    return None if isinstance(inner, ParseError) else float(inner[0]["answer"])


@dataclasses.dataclass(frozen=True)
class MathEqual(Reward):
    """1 where two answers are mathematically equal, by `math-verify` (LaTeX, fractions, sets, intervals); 0 where not.
    In `text` the answer stands in prose, between dollars or boxed; any other column is the answer itself. It runs in a
    process of its own: an expression that takes longer than `seconds` has no score and the status `timeout`. Needs the
    extra [math]."""

    version: ClassVar[int] = 2

    OUTSIDE: ClassVar[bool] = True

    column: str = "answer"
    of: str = "text"
    seconds: float = 10.0

    def of_row(self, row: Row) -> float | None:
        try:
            from math_verify import parse, verify
        except ImportError:
            raise InputError("math_equal needs math-verify: pip install 'recursive-jax[math]'") from None
        right = truth(row, self.column)
        if right is None:
            return None
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it says that its own time limit is off: ours is on
        in_prose = lambda text: parse(text, parsing_timeout=None)
        alone = lambda text: parse(f"${text}$", parsing_timeout=None) or in_prose(text)
        bare = lambda value: in_prose(str(value)) if "$" in str(value) or "\\boxed" in str(value) else alone(value)
        found = field(row, self.of)
        gold = bare(str(right).rpartition("####")[2].strip())
        return float(verify(gold, in_prose(str(found)) if self.of == "text" else bare(found), timeout_seconds=None))


@dataclasses.dataclass(frozen=True)
class Equation(Reward):
    """1 where the value of an equation (a text of arithmetic, read by a parser; `x = ...` is its right side) is the
    number of a column; 0 where it is another or it is none. names: the column with the numbers that `number0`,
    `number1`, ... stand for, as in MAWPS."""

    version: ClassVar[int] = 2

    column: str = "answer"
    of: str = "text"
    names: str = ""
    tolerance: float = 1e-4

    def of_row(self, row: Row) -> float | None:
        right = number_of(truth(row, self.column))
        if right is None:
            return None
        values = {}
        if self.names:
            listed = truth(row, self.names)
            listed = listed.split() if isinstance(listed, str) else listed or []
            values = {f"number{n}": value for n, value in enumerate(listed)}
        try:
            found = arithmetic(str(field(row, self.of)).rpartition("=")[2], values)
        except (NotArithmetic, ValueError):
            return 0.0
        return float(abs(float(found) - right) <= self.tolerance * max(1.0, abs(right)))


@dataclasses.dataclass(frozen=True)
class Regex(Reward):
    """1 where a regular expression is found in a text (whole: is all of it). It runs in a process of its own: a pattern
    that backtracks for longer than `seconds` costs that row its score."""

    OUTSIDE: ClassVar[bool] = True

    pattern: str
    of: str = "text"
    whole: bool = False
    seconds: float = 1.0

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(f"regex={self.pattern!r} is not valid: {error}") from None

    def of_row(self, row: Row) -> float:
        text = str(field(row, self.of))
        return float(bool(re.fullmatch(self.pattern, text) if self.whole else re.search(self.pattern, text)))


@dataclasses.dataclass(frozen=True)
class JsonValid(Reward):
    """1 where a text is JSON, and by the schema where there is one; 0 where not. lenient: what stands around it does
    not count, as in `parsers.Json`."""

    schema: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of: str = "text"
    lenient: bool = False

    def of_row(self, row: Row) -> float:
        text = str(field(row, self.of))
        if not self.lenient:
            try:
                json.loads(text)
            except (ValueError, RecursionError):
                return 0.0
            if not self.schema:
                return 1.0
        return float(not isinstance(self._parser.read(text), ParseError))

    @functools.cached_property
    def _parser(self) -> Json:
        return Json(self.schema)


@dataclasses.dataclass(frozen=True)
class Contains(Reward):
    """The share of `texts` that stand in a text. case: whether capitals count."""

    texts: tuple[str, ...]
    of: str = "text"
    case: bool = False

    def __post_init__(self):
        texts = (self.texts,) if isinstance(self.texts, str) else tuple(self.texts)
        if not texts or not all(isinstance(t, str) and t for t in texts):
            raise InputError(f"contains wants texts, got {self.texts!r}")
        object.__setattr__(self, "texts", texts)

    def of_row(self, row: Row) -> float:
        plain = str if self.case else lambda value: str(value).casefold()
        text = plain(field(row, self.of))
        return sum(plain(t) in text for t in self.texts) / len(self.texts)


@dataclasses.dataclass(frozen=True)
class Length(Reward):
    """1 where a text has `low` to `high` words (or `characters`); 0 where not."""

    low: int = 0
    high: int | None = None
    of: str = "text"
    unit: str = "words"

    def __post_init__(self):
        if self.unit not in ("words", "characters"):
            raise InputError(f"unit={self.unit!r}: words or characters is wanted")

    def of_row(self, row: Row) -> float:
        text = str(field(row, self.of))
        size = len(text.split()) if self.unit == "words" else len(text)
        return float(self.low <= size and (self.high is None or size <= self.high))


def rouge_tokens(text: str) -> list[str]:
    """Words as the package `rouge_score` takes them without a stemmer: ASCII letters and digits, in small letters."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_l(one: list[str], other: list[str]) -> float:
    """ROUGE-L F1 of two lists of words: twice the longest common subsequence over both lengths (Lin 2004)."""
    if not one or not other:
        return 0.0
    return 2 * LCSseq.similarity(one, other) / (len(one) + len(other))


@dataclasses.dataclass(frozen=True)
class RougeL(Reward):
    """ROUGE-L F1 of a text against a column's, equal to the package `rouge_score`'s without a stemmer."""

    version: ClassVar[int] = 2

    column: str = "answer"
    of: str = "text"

    def of_row(self, row: Row) -> float | None:
        right = truth(row, self.column)
        return None if right is None else rouge_l(rouge_tokens(str(right)), rouge_tokens(str(field(row, self.of))))


@dataclasses.dataclass(frozen=True)
class TokenCount(Reward):
    """The row's tokens, up to `most`."""

    most: int = 1_000_000

    def of_row(self, row: Row) -> float:
        return float(min(self.most, len(field(row, "tokens"))))
