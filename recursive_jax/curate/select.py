"""`select`: rules that keep rows, and for each rule how many it dropped. A rule sees the rows the ones before it kept.

What looks at one row alone is a plain function: `select(data, [unique(), lambda row: row["score"] > 0])`. The rules
there are, and how a new one joins: `rules.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.errors import InputError, say
from recursive_jax.identity import describe, fingerprint
from recursive_jax.storage import sync_directory

Keep = Callable[[Dataset], Sequence[bool] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """name: stands in the ledger. keep: Dataset -> boolean per row; with `begin()`, which gives such a function anew,
    where it must remember rows. make: Dataset -> Dataset, in its place, where other rows are made of these. version:
    names what a closure or lambda decides, raised when that changes; a frozen dataclass or a function of a module needs
    none. why: what its rows are dropped as, where a ledger counts them apart: `duplicates`, `contaminated`."""

    name: str
    keep: Keep | None = None
    version: int | str | None = None
    make: Callable[[Dataset], Dataset] | None = None
    why: str = ""

    @property
    def fingerprint(self) -> str:
        decides = {"version": self.version} if self.version is not None else {"keep": describe(self.keep or self.make)}
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
SHOWN = 3  # rows of those that a rule dropped


class Dropped(dict[str, int]):
    """rule -> rows that it dropped. examples: rule -> the first of them, `id: text`."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, list[str]] = {}

    def note(self, rule: str, gone: Dataset, count: int) -> None:
        self[rule] = self.get(rule, 0) + count
        shown = self.examples.setdefault(rule, [])
        for row in python_rows(gone.table.slice(0, SHOWN - len(shown))):
            shown.append(textwrap.shorten(f"{row['id']}: {row['text']}", 200))


def select(
    data: Dataset, rules: Rule | Callable[..., Any] | Sequence[Rule | Callable[..., Any]]
) -> tuple[Dataset, Dropped]:
    """Rows that pass every rule, in order, and the rows dropped by each, with examples. rules: a `Rule` sees the
    Dataset, a function a row as a dict. One that keeps next to nothing says so on stderr. Raises InputError for a rule
    that does not decide on every row."""
    before, dropped = len(data), Dropped()
    for rule in as_rules(rules):
        data = _applied(rule, rule.keep, data, dropped)
    _say_few(before, len(data), dropped)
    return data, dropped


def _applied(rule: Rule, keep: Keep | None, data: Dataset, dropped: Dropped) -> Dataset:
    if rule.make is not None:
        made = rule.make(data)
        dropped.note(rule.name, data.take([]), max(0, len(data) - len(made)))
        return made
    mask = np.asarray(keep(data))
    if mask.size == 0 and not len(data):
        mask = mask.astype(bool)
    if mask.dtype != bool:
        raise InputError(f"rule {rule.name!r} gave {mask.dtype} decisions: True or False is wanted for each row")
    if mask.shape != (len(data),):
        raise InputError(f"rule {rule.name!r} gave {mask.shape} decisions for {len(data)} rows")
    gone = np.flatnonzero(~mask)
    dropped.note(rule.name, data.take(gone[:SHOWN]), len(gone))
    return data.take(np.flatnonzero(mask))


def _say_few(before: int, after: int, dropped: Dropped) -> None:
    if before and after <= FEW * before:
        by = ", ".join(f"{name} dropped {count:,}" for name, count in dropped.items() if count)
        say(f"the selection keeps {after:,} of {before:,} rows: {by}")


def select_files(
    paths: Sequence[str], out: str, rules: Rule | Callable[..., Any] | Sequence[Rule | Callable[..., Any]]
) -> Dropped:
    """`select` over Parquet files larger than memory: rows pass in parts, and those that are kept are written to `out`,
    in order, which is there when all is done. Returns what each rule dropped. Raises InputError for a rule that must
    see all rows at once (`top`, `best_of`, `pairs`, `difficulty`), an `out` that exists, and files that cannot be read.
    """
    rules = as_rules(rules)
    for rule in rules:
        if rule.make is not None or getattr(rule.keep, "WHOLE", False):
            raise InputError(f"the rule {rule.name!r} must see all rows at once: select(Dataset.read(paths), rules)")
    if os.path.exists(out):
        raise InputError(f"{out} is there already: remove it, or give another name")
    keeps = [rule.keep.begin() if hasattr(rule.keep, "begin") else rule.keep for rule in rules]
    dropped, before, after = Dropped(), 0, 0
    temporary = f"{out}.tmp"
    writer: pq.ParquetWriter | None = None
    try:
        for part in _parts(paths):
            before += len(part)
            for rule, keep in zip(rules, keeps, strict=True):
                part = _applied(rule, keep, part, dropped)
            after += len(part)
            writer = writer or pq.ParquetWriter(temporary, part.table.schema, compression="zstd")
            writer.write_table(part.table)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise InputError(f"{', '.join(paths)}: there are no rows")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, out)
    sync_directory(os.path.dirname(os.path.abspath(out)))
    _say_few(before, after, dropped)
    return dropped


def _parts(paths: Sequence[str]) -> Iterator[Dataset]:
    number, schema = 0, None
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(PART):
                    data = Dataset(pa.Table.from_batches([batch]))
                    if not data.has("id"):
                        rows = python_rows(data.table)
                        data = Dataset.from_rows([{"id": f"row/{number + n}", **row} for n, row in enumerate(rows)])
                    number += len(data)
                    schema = schema or data.table.schema
                    if data.table.schema != schema:
                        raise InputError(
                            f"{path} has other columns than the files before it: {data.table.schema.names}"
                        )
                    yield data
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}") from None


PART = 16_384  # rows that are looked at together


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
    column: str = "text"

    def begin(self) -> Keep:
        seen: set[str] = set()

        def keep(data: Dataset) -> list[bool]:
            out = []
            for text in data.column(self.column):
                key = re.sub(r"\s+", " ", str(text)).strip().lower()
                out.append(key not in seen)
                seen.add(key)
            return out

        return keep

    def __call__(self, data: Dataset) -> Sequence[bool] | np.ndarray:
        return self.begin()(data)


def with_status(*allowed: str) -> Rule:
    """Rows with one of the statuses; `with_status("ok", "length")` drops failures."""
    return Rule(f"status in {','.join(allowed)}", HasStatus(allowed))


def tokens_between(least: int, most: int) -> Rule:
    return Rule(f"{least}..{most} tokens", TokensBetween(least, most))


def at_least(threshold: float, column: str = "score") -> Rule:
    """Rows whose reward is at least the threshold; a missing reward is dropped."""
    return Rule(f"{column} >= {threshold:g}", AtLeast(threshold, column))


def unique(
    column: str = "text", near: float | None = None, similar: float | None = None, model: Any = None, **settings: Any
) -> Rule:
    """The first of rows whose texts are equal but for case and white space. near: or whose sets of three words are
    alike to this Jaccard similarity (MinHash; `words`, `hashes`). similar: or whose embeddings by `model` have this
    cosine."""
    if near is None and similar is None:
        name = "unique texts" if column == "text" else f"unique {column}"
        return Rule(name, FirstOfEqualTexts(column), why="duplicates")
    from recursive_jax.curate.near import NearDuplicates, SimilarMeaning

    if similar is None:
        return Rule(f"{column} unique at {near:g}", NearDuplicates(near, column, **settings), why="duplicates")
    if near is not None or model is None:
        raise InputError("unique(similar=...) compares embeddings: give it a model, and no `near`")
    return Rule(f"{column} unique in meaning at {similar:g}", SimilarMeaning(similar, model, column), why="duplicates")
