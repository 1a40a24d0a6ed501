"""`decontaminate`: rows that hold items of an evaluation. What is found, and where, is kept beside the row.

A row is hit by an item when it holds a share of the item's n-grams (containment), boilerplate left out: n-grams that
many items share (their template) say nothing about one of them. An item shorter than n words is looked for whole.
marin found a third of what a plain n-gram check called contamination to be such boilerplate, and nearly half of short
items missed (marin#6852, marin#5519).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from recursive_jax.curate.select import Rule
from recursive_jax.curate.words import hashed_words, ngrams
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.identity import Value

ROWS = 50_000  # looked at together


@dataclasses.dataclass(frozen=True)
class Contaminated(Value):
    """items: texts of an evaluation. n: words of an n-gram. share: of an item's n-grams that a row must hold. common:
    n-grams that stand in more than this share of the items (and in three at least) are boilerplate. column: where it is
    looked."""

    items: tuple[str, ...]
    n: int = 8
    share: float = 0.5
    common: float = 0.02
    column: str = "text"

    def __post_init__(self):
        items = tuple(self.items)
        if not items or not all(isinstance(item, str) for item in items):
            raise InputError("decontaminate wants the texts of an evaluation, at least one")
        if not 0 < self.share <= 1:
            raise InputError(f"decontaminate(share={self.share:g}): above 0 and up to 1 is wanted")
        object.__setattr__(self, "items", items)

    @functools.cached_property
    def _index(self) -> _Index:
        return _Index(self)

    def __call__(self, data: Dataset) -> np.ndarray:
        """Whether a row is clean."""
        return self.hits(data)[0] < 0

    def hits(self, data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(item, first word, words) of each row: the item of which it holds the largest share, and the span of the row
        that holds it; -1 and zeros for a clean row."""
        column = data.table[self.column]
        parts = [self._index.look(column.slice(at, ROWS)) for at in range(0, len(data), ROWS)]
        empty = (np.empty(0, np.int64),) * 3
        return tuple(np.concatenate(x) for x in zip(*parts, strict=True)) if parts else empty


class _Index:
    """The n-grams of the items, sorted: for each its item; and those of short items by their length."""

    def __init__(self, rule: Contaminated):
        self.rule = rule
        words, offsets = hashed_words(list(rule.items))
        lengths = np.diff(offsets)
        self.sizes = sorted({rule.n, *lengths[(lengths > 0) & (lengths < rule.n)].tolist()})
        self.tables = []
        self.needed = np.zeros(len(lengths), np.int64)
        for size in self.sizes:
            grams, ends = ngrams(words, offsets, size)
            item = np.repeat(np.arange(len(lengths)), np.diff(ends))
            mine = (lengths[item] >= rule.n) if size == rule.n else lengths[item] == size
            pairs = np.unique(np.stack([grams[mine], item[mine].astype(np.uint64)]), axis=1)
            grams, item = pairs[0], pairs[1].astype(np.int64)
            values, inverse, counts = np.unique(grams, return_inverse=True, return_counts=True)
            own = counts[inverse] <= max(2, rule.common * len(lengths))
            np.add.at(self.needed, item[own], 1)
            starts = np.searchsorted(grams[own], values)
            stops = np.searchsorted(grams[own], values, side="right")
            self.tables.append((values, starts, stops, item[own]))
        self.needed = np.maximum(1, np.ceil(self.needed * rule.share)).astype(np.int64)

    def look(self, texts: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        words, offsets = hashed_words(texts)
        count = len(offsets) - 1
        rows, items, places, sizes, which = [], [], [], [], []
        for size, (values, starts, stops, owner) in zip(self.sizes, self.tables, strict=True):
            if not len(values):
                continue
            grams, ends = ngrams(words, offsets, size)
            at = np.searchsorted(values, grams)
            found = np.flatnonzero(values[np.minimum(at, len(values) - 1)] == grams)
            if not len(found):
                continue
            row = np.searchsorted(ends, found, side="right") - 1
            first, many = starts[at[found]], stops[at[found]] - starts[at[found]]
            spread = np.repeat(first - np.concatenate([[0], np.cumsum(many)[:-1]]), many) + np.arange(many.sum())
            rows.append(np.repeat(row, many))
            items.append(owner[spread])
            places.append(np.repeat(found - ends[row], many))
            sizes.append(np.full(many.sum(), size))
            which.append(np.repeat(at[found], many))
        joined = (np.concatenate(x) if x else np.empty(0, np.int64) for x in (rows, items, places, sizes, which))
        return self._best(count, *joined)

    def _best(self, count: int, rows, items, places, sizes, which) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        item, start, length = np.full(count, -1), np.zeros(count, np.int64), np.zeros(count, np.int64)
        order = np.lexsort((places, items, rows))
        rows, items, places, sizes, which = (x[order] for x in (rows, items, places, sizes, which))
        bounds = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]) | (items[1:] != items[:-1])]) if len(rows) else []
        best = np.zeros(count)
        for a, b in zip(bounds, [*bounds[1:], len(rows)][: len(bounds)], strict=True):
            n, owner = rows[a], items[a]
            share = len(np.unique(which[a:b])) / self.needed[owner]  # an n-gram that the row repeats counts once
            if share >= 1 and share > best[n]:
                best[n], item[n] = share, owner
                start[n], length[n] = places[a], places[b - 1] + sizes[b - 1] - places[a]
        return item, start, length


@dataclasses.dataclass(frozen=True)
class Flagged(Value):
    """Adds `contaminated_by` (the item's place, null for a clean row) and `contaminated_span` (the words of the row
    that hold it)."""

    check: Contaminated

    def __call__(self, data: Dataset) -> Dataset:
        item, start, length = self.check.hits(data)
        clean = item < 0
        data = data.with_column("contaminated_by", pa.array(item, pa.int64(), mask=clean))
        texts = data.column(self.check.column)
        spans = [None if c else span_of(texts[i], int(start[i]), int(length[i])) for i, c in enumerate(clean)]
        return data.with_column("contaminated_span", pa.array(spans, pa.large_string()))


def decontaminate(
    items: Sequence[str],
    drop: bool = False,
    n: int = 8,
    share: float = 0.5,
    common: float = 0.02,
    column: str = "text",
) -> Rule:
    """Flags rows that hold an item of an evaluation, with the columns `contaminated_by` and `contaminated_span`. drop:
    drops them instead."""
    check = Contaminated(tuple(items), n, share, common, column)
    if drop:
        return Rule(f"{column} holds none of {len(check.items):,} items", check, why="contaminated")
    return Rule(f"{column} is looked through for {len(check.items):,} items", make=Flagged(check))


def span_of(text: str, first: int, words: int) -> str:
    """Some words of a text, as they stand in it."""
    found = list(re.finditer(r"[^\W_]+", text.lower()))[first : first + words]
    return text[found[0].start() : found[-1].end()] if found else ""
