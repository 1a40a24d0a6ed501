"""`select`: rules that keep rows, and for each rule how many it dropped. A rule sees the rows the ones before it kept.

A new rule is a frozen dataclass that is called with a Dataset, a function that names it, and a line in `RULES`. What
looks at one row alone is a plain function: `select(data, [unique(), lambda row: row["score"] > 0])`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.errors import InputError, say
from recursive_jax.identity import describe, fingerprint

Keep = Callable[[Dataset], Sequence[bool] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """name: stands in the ledger. keep: Dataset -> boolean per row. version: names what a closure or lambda decides,
    raised when that changes; a frozen dataclass or a function of a module needs none."""

    name: str
    keep: Keep
    version: int | str | None = None

    @property
    def fingerprint(self) -> str:
        decides = {"version": self.version} if self.version is not None else {"keep": describe(self.keep)}
        return fingerprint({"rule": self.name, **decides})


@dataclasses.dataclass(frozen=True)
class ForEachRow:
    """keep: of one row, a dict of its columns."""

    keep: Callable[[dict[str, Any]], bool]

    def __call__(self, data: Dataset) -> list[bool]:
        return [bool(self.keep(row)) for row in python_rows(data.table)]


def as_rules(rules: Any) -> list[Rule]:
    """A rule or rules, and plain functions of a row, as rules. Raises InputError for what is neither."""
    listed = [rules] if isinstance(rules, Rule) or callable(rules) else list(rules)
    for rule in listed:
        if not isinstance(rule, Rule) and not callable(rule):
            raise InputError(f"a rule is a Rule or a function of a row, not a {type(rule).__name__}: {rule!r}")
    name = lambda f: getattr(f, "__name__", type(f).__name__)
    return [rule if isinstance(rule, Rule) else Rule(name(rule), ForEachRow(rule)) for rule in listed]


FEW = 0.02  # of the rows; a selection that keeps less says so


def select(
    data: Dataset, rules: Rule | Callable[..., Any] | Sequence[Rule | Callable[..., Any]]
) -> tuple[Dataset, dict[str, int]]:
    """Rows that pass every rule, in order, and the rows dropped by each. rules: a `Rule` sees the Dataset, a function a
    row as a dict. One that keeps next to nothing says so on stderr. Raises InputError for a rule that does not decide
    on every row."""
    before, dropped = len(data), {}
    for rule in as_rules(rules):
        mask = np.asarray(rule.keep(data))
        if mask.size == 0 and not len(data):
            mask = mask.astype(bool)
        if mask.dtype != bool:
            raise InputError(f"rule {rule.name!r} gave {mask.dtype} decisions: True or False is wanted for each row")
        if mask.shape != (len(data),):
            raise InputError(f"rule {rule.name!r} gave {mask.shape} decisions for {len(data)} rows")
        dropped[rule.name] = dropped.get(rule.name, 0) + int((~mask).sum())
        data = data.take(np.flatnonzero(mask))
    if before and len(data) <= FEW * before:
        by = ", ".join(f"{name} dropped {count:,}" for name, count in dropped.items() if count)
        say(f"the selection keeps {len(data):,} of {before:,} rows: {by}")
    return data, dropped


@dataclasses.dataclass(frozen=True)
class HasStatus:
    allowed: tuple[str, ...]

    def __call__(self, data: Dataset) -> list[bool]:
        return [s in self.allowed for s in data.column("status")]


@dataclasses.dataclass(frozen=True)
class TokensBetween:
    least: int
    most: int

    def __call__(self, data: Dataset) -> list[bool]:
        return [self.least <= len(t) <= self.most for t in data.tokens()]


@dataclasses.dataclass(frozen=True)
class AtLeast:
    threshold: float
    column: str = "score"

    def __call__(self, data: Dataset) -> list[bool]:
        values = data.column(self.column)
        if any(isinstance(v, str) for v in values):
            raise InputError(f"at_least: column {self.column!r} holds texts, numbers are wanted")
        return [v is not None and v >= self.threshold for v in values]


@dataclasses.dataclass(frozen=True)
class FirstOfEqualTexts:
    def __call__(self, data: Dataset) -> list[bool]:
        seen: set[str] = set()
        out = []
        for text in data.column("text"):
            key = re.sub(r"\s+", " ", text).strip().lower()
            out.append(key not in seen)
            seen.add(key)
        return out


def with_status(*allowed: str) -> Rule:
    """Rows with one of the statuses; `with_status("ok", "length")` drops failures."""
    return Rule(f"status in {','.join(allowed)}", HasStatus(allowed))


def tokens_between(least: int, most: int) -> Rule:
    return Rule(f"{least}..{most} tokens", TokensBetween(least, most))


def at_least(threshold: float, column: str = "score") -> Rule:
    """Rows whose reward is at least the threshold; a missing reward is dropped."""
    return Rule(f"{column} >= {threshold:g}", AtLeast(threshold, column))


def unique() -> Rule:
    """The first of rows whose texts are equal but for case and white space."""
    return Rule("unique texts", FirstOfEqualTexts())


RULES: dict[str, Callable[..., Rule]] = {
    "with_status": with_status,
    "tokens_between": tokens_between,
    "at_least": at_least,
    "unique": unique,
}
