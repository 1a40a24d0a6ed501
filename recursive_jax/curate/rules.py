"""Rules: which rows are kept.

    rj.select(data, [rj.rules.words(4, 150, "instruction"), rj.rules.novel(0.7, "instruction")])

A new rule is a frozen dataclass that is called with a Dataset and gives a boolean per row, a function that names it,
and a line in `RULES`. What must remember rows it has seen, and can be given them in parts (a file larger than memory),
has `begin()`, which gives such a function anew. A rule that makes other rows of them (`pairs`) is `Rule(name,
make=...)`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recursive_jax.config import LanguageConfig
from recursive_jax.curate.arithmetic import NotArithmetic, arithmetic
from recursive_jax.curate.select import Rule
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.language import Language
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.identity import Value


def numbers(data: Dataset, column: str) -> np.ndarray:
    """A column as floats, NaN for null. Raises InputError for texts."""
    values = data.column(column)
    if any(isinstance(v, str) for v in values):
        raise InputError(f"column {column!r} holds texts, numbers are wanted")
    return np.array([math.nan if v is None else float(v) for v in values], float)


def groups(data: Dataset, by: str) -> np.ndarray:
    """A number for each row, the same for rows that are equal in the column `by`."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(repr(v), len(seen)) for v in data.column(by)], np.int64)


@dataclasses.dataclass(frozen=True)
class Between(Value):
    """Whether a column's number lies between two, both included; null does not."""

    low: float
    high: float
    column: str = "score"

    def __call__(self, data: Dataset) -> np.ndarray:
        found = numbers(data, self.column)
        return (found >= self.low) & (found <= self.high)


def correct(column: str = "score") -> Rule:
    """Rows whose score is 1."""
    return Rule(f"{column} is 1", Between(1.0, 1.0, column))


def wrong(column: str = "score") -> Rule:
    """Rows whose score is less than 1; those without a score are dropped too."""
    return Rule(f"{column} below 1", Between(-math.inf, math.nextafter(1.0, 0.0), column))


@dataclasses.dataclass(frozen=True)
class Top(Value):
    """Whether a row is among the `count` best of its group (by: the column whose equal values are one; none: all rows).
    Of equal scores the earlier row is better; a row without a score is never kept."""

    WHOLE: ClassVar[bool] = True  # it must see all rows at once

    count: int
    column: str = "score"
    by: str = ""

    def __call__(self, data: Dataset) -> np.ndarray:
        found = numbers(data, self.column)
        group = groups(data, self.by) if self.by else np.zeros(len(data), np.int64)
        order = np.lexsort((np.arange(len(found)), -np.nan_to_num(found, nan=-math.inf), group))
        kept = np.zeros(len(found), bool)
        starts = np.r_[True, np.diff(group[order]) != 0]
        place = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
        kept[order] = place < self.count
        return kept & ~np.isnan(found)


def top(count: int, column: str = "score") -> Rule:
    """The `count` best rows."""
    return Rule(f"{count} best by {column}", Top(count, column))


def best_of(column: str = "score", by: str = "parents", count: int = 1) -> Rule:
    """The best rows to each question (arXiv:2304.01196, sec. 4; best-of-n)."""
    return Rule(f"{count} best of equal {by} by {column}", Top(count, column, by))


@dataclasses.dataclass(frozen=True)
class First(Value):
    """Whether a row is one of the first `count` with its value of the column `by`."""

    count: int
    by: str

    def begin(self) -> Any:
        seen: dict[str, int] = {}

        def keep(data: Dataset) -> list[bool]:
            kept = []
            for value in map(repr, data.column(self.by)):
                seen[value] = seen.get(value, 0) + 1
                kept.append(seen[value] <= self.count)
            return kept

        return keep

    def __call__(self, data: Dataset) -> list[bool]:
        return self.begin()(data)


def cap(count: int, by: str = "parents") -> Rule:
    """At most `count` rows of one parent, the first ones (ReST-EM, arXiv:2312.06585, keeps ten)."""
    return Rule(f"at most {count} of equal {by}", First(count, by))


@dataclasses.dataclass(frozen=True)
class DistinctEquations(Value):
    """Whether no earlier row to the same question has the same list of equations (RFT, arXiv:2308.01825, sec. 3.2):
    what stands in `<<...=...>>`, or on both sides of an equals sign, blanks left out, with a value of its own."""

    column: str = "text"
    by: str = "parents"

    def begin(self) -> Any:
        seen: set[tuple[str, tuple[str, ...]]] = set()

        def keep(data: Dataset) -> list[bool]:
            kept = []
            for text, question in zip(data.column(self.column), map(repr, data.column(self.by)), strict=True):
                key = (question, equations(text or ""))
                kept.append(key not in seen)
                seen.add(key)
            return kept

        return keep

    def __call__(self, data: Dataset) -> list[bool]:
        return self.begin()(data)


_EQUATION = re.compile(r"[-+*/^()\d.,\s×÷]{1,200}=")


def equations(text: str) -> tuple[str, ...]:
    """The left sides of a text's equations that are arithmetic, without blanks, in order."""
    found = []
    for left in _EQUATION.findall(text):
        left = left[:-1].strip().strip(",.").strip()
        try:
            arithmetic(left)
        except (NotArithmetic, ValueError):
            continue
        if not left.replace(".", "").replace(",", "").isdigit():
            found.append(re.sub(r"\s+", "", left))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Pairs(Value):
    """Makes a row of each question that has answers of different scores: the best is `chosen`, the worst `rejected`.
    gap: how far they must be apart, at least."""

    column: str = "score"
    by: str = "parents"
    of: str = "text"
    gap: float = 0.0

    def __call__(self, data: Dataset) -> Dataset:
        found, group = numbers(data, self.column), groups(data, self.by)
        best, worst = [], []
        for g in range(int(group.max()) + 1 if len(group) else 0):
            members = np.flatnonzero((group == g) & ~np.isnan(found))
            if not len(members):
                continue
            high, low = members[found[members].argmax()], members[found[members].argmin()]
            if found[high] > found[low] and found[high] - found[low] >= self.gap:
                best.append(high)
                worst.append(low)
        texts = data.column(self.of)
        rows = data.take(np.array(best, np.int64))
        rows = rows.with_column("chosen", pa.array([texts[i] for i in best], pa.large_string()))
        rows = rows.with_column("rejected", pa.array([texts[i] for i in worst], pa.large_string()))
        rows = rows.with_column("rejected_id", pa.array([data.column("id")[i] for i in worst], pa.large_string()))
        return rows.with_column("rejected_score", pa.array(found[worst] if worst else [], pa.float64()))


def pairs(column: str = "score", by: str = "parents", of: str = "text", gap: float = 0.0) -> Rule:
    """A row of each question with its best answer as `chosen` and its worst as `rejected`, to learn a preference."""
    return Rule(f"best and worst of equal {by} by {column}", make=Pairs(column, by, of, gap))


def distinct(by: str) -> Rule:
    """The first row with each value of a column."""
    return Rule(f"distinct {by}", First(1, by), why="duplicates")


def distinct_equations(column: str = "text", by: str = "parents") -> Rule:
    """Solutions of a question that reach it by other equations than those before."""
    return Rule("distinct equations", DistinctEquations(column, by), why="duplicates")


@dataclasses.dataclass(frozen=True)
class Sized(Value):
    """Whether a text has so many words or characters."""

    low: int
    high: float
    column: str = "text"
    unit: str = "words"

    def __call__(self, data: Dataset) -> list[bool]:
        size = (lambda t: len(t.split())) if self.unit == "words" else len
        return [self.low <= size(text or "") <= self.high for text in data.column(self.column)]


def words(low: int = 0, high: float = math.inf, column: str = "text") -> Rule:
    """Texts of `low` to `high` words."""
    return Rule(f"{low}..{high:g} words", Sized(low, high, column))


def characters(low: int = 0, high: float = math.inf, column: str = "text") -> Rule:
    """Texts of `low` to `high` characters."""
    return Rule(f"{low}..{high:g} characters", Sized(low, high, column, "characters"))


@dataclasses.dataclass(frozen=True)
class Pattern(Value):
    """Whether an RE2 pattern is found in a text: linear in its length, whatever the pattern. wanted: False: is not."""

    pattern: str
    column: str = "text"
    wanted: bool = True

    def __call__(self, data: Dataset) -> np.ndarray:
        texts = pc.fill_null(data.table[self.column].cast(pa.large_string()), "")
        try:
            found = pc.match_substring_regex(texts, self.pattern)
        except pa.ArrowInvalid as error:
            raise InputError(f"the pattern {self.pattern!r} is not valid: {error}") from None
        return found.to_numpy(zero_copy_only=False).astype(bool) == self.wanted


def without_keywords(keywords: Sequence[str], column: str = "text") -> Rule:
    """Texts with none of the words (whole, in capitals or not), as Self-Instruct drops `image`, `graph`, `draw`."""
    if isinstance(keywords, str) or not all(keywords):
        raise InputError("without_keywords takes a list of words")
    either = "|".join(re.escape(word).replace(r"\ ", " ") for word in keywords)
    return Rule(f"none of {len(keywords)} keywords", Pattern(rf"(?i)\b(?:{either})\b", column, False))


def first_character(allowed: str = r"[A-Za-z0-9]", column: str = "text") -> Rule:
    """Texts whose first character, blanks aside, is of a class: Self-Instruct and LLM2LLM drop those that begin with
    punctuation or beyond ASCII."""
    return Rule(f"begins with {allowed}", Pattern(rf"^\s*{allowed}", column))


@dataclasses.dataclass(frozen=True)
class Script(Value):
    """Whether at least a share of a text's letters is of a script (a Unicode name: Latin, Cyrillic, Han, Arabic). A
    text without letters has none of it."""

    name: str
    share: float = 0.9
    column: str = "text"

    def __call__(self, data: Dataset) -> np.ndarray:
        texts = pc.fill_null(data.table[self.column].cast(pa.large_string()), "")
        try:
            own = pc.count_substring_regex(texts, rf"\p{{{self.name}}}").to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            raise InputError(f"script({self.name!r}): a script of Unicode is wanted, as Latin, Cyrillic, Han") from None
        letters = pc.count_substring_regex(texts, r"\p{L}").to_numpy(zero_copy_only=False)
        return (own >= self.share * letters) & (letters > 0)


def script(name: str, share: float = 0.9, column: str = "text") -> Rule:
    """Texts in a script."""
    return Rule(f"{share:.0%} {name}", Script(name, share, column))


@dataclasses.dataclass(frozen=True)
class Difficulty(Value):
    """Whether the share of a question's answers with a score of 1 lies between two."""

    WHOLE: ClassVar[bool] = True

    low: float
    high: float
    column: str = "score"
    by: str = "parents"

    def __call__(self, data: Dataset) -> np.ndarray:
        found, group = numbers(data, self.column), groups(data, self.by)
        scored = ~np.isnan(found)
        right = np.bincount(group, weights=(found >= 1.0) & scored)
        counts = np.bincount(group, weights=scored)
        rate = np.divide(right, counts, out=np.full(len(counts), np.nan), where=counts > 0)[group]
        return (rate >= self.low) & (rate <= self.high)


def difficulty(low: float, high: float, column: str = "score", by: str = "parents") -> Rule:
    """Rows of questions that are answered rightly between `low` and `high` of the time: neither too hard nor known."""
    return Rule(f"pass rate {low:g}..{high:g}", Difficulty(low, high, column, by))


@dataclasses.dataclass(frozen=True)
class Fits(Value):
    """Whether a row's prompt and answer fit a row of a training."""

    template: Template
    tokenizer: Any
    length: int

    def __call__(self, data: Dataset) -> list[bool]:
        sizes = [len(self.template.example(row, self.tokenizer).tokens) for row in python_rows(data.table)]
        return [size <= self.length + 1 for size in sizes]


def fits(template: Template, tokenizer: Any, length: int) -> Rule:
    """Rows that a template makes no longer than `length` tokens, as a training wants them."""
    return Rule(f"fits {length} tokens", Fits(template, tokenizer, length))


LEVELS = {"syntax": 3, "semantics": 2, "facts": 1}  # of `Language.parse`: from what level on a token is wrong


@dataclasses.dataclass(frozen=True)
class Valid(Value):
    """Whether no token of a row is wrong in the embedded language: in form (`syntax`), number, type or attribute
    (`semantics`), or what it says of the world (`facts`)."""

    language: LanguageConfig
    level: str = "facts"

    def __post_init__(self):
        if self.level not in LEVELS:
            raise InputError(f"valid(level={self.level!r}): one of {', '.join(LEVELS)} is wanted")

    @functools.cached_property
    def _grammar(self) -> Language:
        return Language(self.language)

    def __call__(self, data: Dataset) -> np.ndarray:
        rows, grammar = data.tokens(), self._grammar
        if not rows:
            return np.empty(0, bool)
        longest = max(1, *map(len, rows))
        tokens = np.full((len(rows), longest), grammar.dot, np.int32)
        for n, row in enumerate(rows):
            tokens[n, : len(row)] = np.where(row < grammar.vocab, row, grammar.dot)
        _, level = grammar.parse(tokens)
        within = np.arange(longest) < np.array([len(row) for row in rows])[:, None]
        known = np.array([bool((row < grammar.vocab).all()) for row in rows])
        return known & ~((level >= LEVELS[self.level]) & within).any(1)


def valid(language: Language | LanguageConfig, level: str = "facts") -> Rule:
    """Rows of the embedded language without an error."""
    return Rule(f"valid {level}", Valid(getattr(language, "config", language), level))


#: name -> module of the function that makes the rule.
RULES: dict[str, str] = {
    "with_status": "curate.select",
    "tokens_between": "curate.select",
    "at_least": "curate.select",
    "unique": "curate.select",
    "correct": "curate.rules",
    "wrong": "curate.rules",
    "top": "curate.rules",
    "best_of": "curate.rules",
    "pairs": "curate.rules",
    "cap": "curate.rules",
    "distinct": "curate.rules",
    "distinct_equations": "curate.rules",
    "words": "curate.rules",
    "characters": "curate.rules",
    "without_keywords": "curate.rules",
    "first_character": "curate.rules",
    "script": "curate.rules",
    "difficulty": "curate.rules",
    "valid": "curate.rules",
    "fits": "curate.rules",
    "novel": "curate.novel",
    "decontaminate": "curate.decontaminate",
}


def __getattr__(name: str) -> Any:
    """`rules.novel`, from the table."""
    if name not in RULES:
        raise AttributeError(f"there is no rule {name!r}; there are {', '.join(RULES)}")
    return getattr(importlib.import_module(f"recursive_jax.{RULES[name]}"), name)
