"""`unique(near=0.8)`: the first of rows whose texts are almost the same, by MinHash (Broder 1997, doi:
10.1109/SEQUEN.1997.666900) with banded lookups; the signatures are `rensa`'s, chosen by measurement
(benchmarks/curation.py). `unique(similar=0.95, model=...)`: by the cosine of embeddings (SemDeDup, arXiv:2303.09540).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from recursive_jax.curate.words import hashed_words, ngrams
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.generate.score import embed
from recursive_jax.identity import Value
from recursive_jax.models.model import Model

ROWS = 8192  # signed together
PAIRS = 100_000  # of signatures, compared together


@dataclasses.dataclass(frozen=True)
class NearDuplicates(Value):
    """Whether no earlier kept row has an estimated Jaccard similarity of the sets of `words`-grams of at least the
    threshold. hashes: of a signature; the estimate's standard error is at most 0.5 / sqrt(hashes). A text shorter than
    `words` words is compared by its words, one without words is kept."""

    threshold: float = 0.8
    column: str = "text"
    words: int = 3
    hashes: int = 128
    seed: int = 1

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise InputError(f"unique(near={self.threshold:g}): a similarity above 0 and up to 1 is wanted")

    def begin(self) -> _Signatures:
        """Nothing seen yet, for rows that come in parts."""
        return _Signatures(self)

    def __call__(self, data: Dataset) -> np.ndarray:
        return self.begin()(data)


class _Runs:
    """Hashes of a band and where they were seen: sorted runs, merged as they grow, twelve bytes for each."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, hashes: np.ndarray, places: np.ndarray) -> None:
        order = np.argsort(hashes, kind="stable")
        self._runs.append((hashes[order], places[order]))
        while len(self._runs) > 1 and 2 * len(self._runs[-1][0]) >= len(self._runs[-2][0]):
            (a, b), (c, d) = self._runs.pop(-2), self._runs.pop()
            both, where = np.concatenate([a, c]), np.concatenate([b, d])
            order = np.argsort(both, kind="stable")
            self._runs.append((both[order], where[order]))

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, place) of every place that holds the hash of a row."""
        rows, places = [np.empty(0, np.int64)], [np.empty(0, np.uint32)]
        for known, where in self._runs:
            first = np.searchsorted(known, hashes, side="left")
            many = np.searchsorted(known, hashes, side="right") - first
            rows.append(np.repeat(np.arange(len(hashes)), many))
            begin = np.repeat(first - np.concatenate([[0], np.cumsum(many)[:-1]]), many)
            places.append(where[begin + np.arange(many.sum())])
        return np.concatenate(rows), np.concatenate(places)


class _Signatures:
    """Signatures of what is kept, and where each of their bands was seen."""

    def __init__(self, rule: NearDuplicates):
        self.rule, self.rows = rule, bands_for(rule.threshold, rule.hashes)
        self._bands = [_Runs() for _ in range(rule.hashes // self.rows)]
        self._kept = np.empty((0, rule.hashes), np.uint32)
        self._count = 0

    def __call__(self, data: Dataset) -> np.ndarray:
        column = data.table[self.rule.column]
        parts = [self._part(column.slice(at, ROWS)) for at in range(0, len(data), ROWS)]
        return np.concatenate(parts) if parts else np.empty(0, bool)

    def _part(self, texts: Any) -> np.ndarray:
        signatures, empty = self._sign(texts)
        rows = self.rows
        bands = [_mixed(signatures[:, k * rows : (k + 1) * rows]) for k in range(len(self._bands))]
        kept = empty | ~self._like_earlier(signatures, bands)
        self._drop_within(signatures, bands, kept, empty)
        new = np.flatnonzero(kept & ~empty)
        if self._count + len(new) > len(self._kept):
            self._kept = np.resize(self._kept, (max(ROWS, 2 * self._count, self._count + len(new)), self.rule.hashes))
        self._kept[self._count : self._count + len(new)] = signatures[new]
        places = np.arange(self._count, self._count + len(new), dtype=np.uint32)
        for runs, band in zip(self._bands, bands, strict=True):
            runs.add(band[new], places)
        self._count += len(new)
        return kept

    def _like_earlier(self, signatures: np.ndarray, bands: list[np.ndarray]) -> np.ndarray:
        """Which rows are like one of an earlier part."""
        like = np.zeros(len(signatures), bool)
        for runs, band in zip(self._bands, bands, strict=True):
            open_rows = np.flatnonzero(~like)
            rows, places = runs.find(band[open_rows])
            for at in range(0, len(rows), PAIRS):
                row, place = open_rows[rows[at : at + PAIRS]], places[at : at + PAIRS]
                near = (self._kept[place] == signatures[row]).mean(1) >= self.rule.threshold
                like[row[near]] = True
        return like

    def _drop_within(self, signatures: np.ndarray, bands: list, kept: np.ndarray, empty: np.ndarray) -> None:
        """Takes from `kept` the rows that are like an earlier kept one of the same part."""
        seen: list[dict[int, list[int]]] = [{} for _ in bands]
        hashes = [band.tolist() for band in bands]
        for n in np.flatnonzero(kept & ~empty).tolist():
            near = {place for k, known in enumerate(seen) for place in known.get(hashes[k][n], ())}
            if near and (signatures[list(near)] == signatures[n]).mean(1).max() >= self.rule.threshold:
                kept[n] = False
                continue
            for k, known in enumerate(seen):
                known.setdefault(hashes[k][n], []).append(n)

    def _sign(self, texts: Any) -> tuple[np.ndarray, np.ndarray]:
        """(signatures [N, hashes] uint32, which texts have no words)."""
        words, offsets = hashed_words(texts)
        grams, ends = ngrams(words, offsets, self.rule.words)
        short = np.diff(ends) == 0
        if short.any():  # by their words
            counts = np.where(short, np.diff(offsets), np.diff(ends))
            merged = np.empty(int(counts.sum()), np.uint64)
            at = np.concatenate([[0], np.cumsum(counts)])
            for n in np.flatnonzero(short):
                merged[at[n] : at[n + 1]] = words[offsets[n] : offsets[n + 1]]
            long = np.repeat(~short, counts)
            merged[long] = grams
            grams, ends = merged, at
        matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(
            grams, ends.astype(np.uint64), self.rule.hashes, self.rule.seed
        )
        return np.asarray(matrix.to_rows(), np.uint32).reshape(len(ends) - 1, self.rule.hashes), np.diff(ends) == 0


def bands_for(threshold: float, hashes: int) -> int:
    """Rows of a band, the most with which a pair at the threshold still shares one with probability 0.99: 1 - (1 - t^r)
    ^ (hashes / r)."""
    fits = [r for r in range(1, hashes + 1) if hashes % r == 0 and 1 - (1 - threshold**r) ** (hashes // r) >= 0.99]
    return max(fits, default=1)


def _mixed(block_NR: np.ndarray) -> np.ndarray:
    """One uint64 for each row."""
    out = np.zeros(len(block_NR), np.uint64)
    for column in block_NR.T:
        out = (out ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        out ^= out >> np.uint64(31)
    return out


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise InputError("unique(near=...) needs rensa: pip install 'recursive-jax[curate]'") from None
    return rensa


@dataclasses.dataclass(frozen=True)
class SimilarMeaning(Value):
    """Whether no earlier kept row's embedding has a cosine of at least the threshold."""

    WHOLE: ClassVar[bool] = True  # it must see all rows at once

    threshold: float
    model: Model
    column: str = "text"

    def __call__(self, data: Dataset) -> list[bool]:
        states = np.asarray(embed(self.model, data.column(self.column)), np.float32)
        kept: list[int] = []
        out = []
        for n, state in enumerate(states):
            out.append(not kept or float((states[kept] @ state).max()) < self.threshold)
            kept += [n] if out[-1] else []
        return out
