"""`novel`: rows unlike all in a pool that grows with what is kept (Self-Instruct, arXiv:2212.10560, sec. 2.2).

ROUGE-L against a pool of N rows is N comparisons a row: days for 52,000 rows. Here a row meets only those that it can
be like. ROUGE-L F1 above t needs a common subsequence of more than t (m + n) / 2 words, so at least as many words in
common, and so one among the few rarest of each (prefix filtering: Chaudhuri, Ganti and Kaushik 2006,
doi:10.1109/ICDE.2006.9). An index of these words finds them; a bit-parallel comparison (`rapidfuzz`) decides. The
decisions are those of comparing with every row.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from recursive_jax.curate.select import Rule
from recursive_jax.curate.verifiers import rouge_tokens
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.identity import Value


def needed(t: float, m: int, n: int) -> int:
    """The least length of a common subsequence with which ROUGE-L F1, 2 L / (m + n), is above t."""
    least = math.floor(t * (m + n) / 2)
    while 2 * least / (m + n) <= t:
        least += 1
    return least


class Pool:
    """Texts as lists of words, and those among them that a new one is like."""

    def __init__(self, threshold: float):
        self.t = threshold
        self._ids: dict[str, int] = {}
        self._rank: dict[tuple[int, int], int] = {}
        self._texts: list[list[int]] = []
        self._index: dict[int, list[int]] = collections.defaultdict(list)

    def __len__(self) -> int:
        return len(self._texts)

    def closest(self, words: Sequence[str]) -> int | None:
        """The place of a text that is more like `words` than the threshold; None where there is none."""
        m = len(words)
        if not m:
            return None
        ids = self._encode(words)
        seen: set[int] = set()
        for rank in self._prefix(ids):
            for place in self._index.get(rank, ()):
                if place in seen:
                    continue
                seen.add(place)
                other = self._texts[place]
                least = needed(self.t, m, len(other))
                if least <= min(m, len(other)) and LCSseq.similarity(ids, other, score_cutoff=least) >= least:
                    return place
        return None

    def add(self, words: Sequence[str]) -> None:
        ids = self._encode(words)
        for rank in self._prefix(ids):
            self._index[rank].append(len(self._texts))
        self._texts.append(ids)

    def _encode(self, words: Sequence[str]) -> list[int]:
        known = self._ids
        return [known.setdefault(word, len(known)) for word in words]

    def _prefix(self, ids: Sequence[int]) -> list[int]:
        """Ranks of the rarest words: so many that a text which is like this one has one of them among its own. A word
        that stands twice counts as two. The rarest are those that were met last: any order will do if it never
        changes."""
        m = len(ids)
        if not m:
            return []
        shortest = max(1, math.floor(self.t * m / (2 - self.t)))
        least = max(1, needed(self.t, m, shortest))
        count: collections.Counter[int] = collections.Counter()
        ranks = []
        for word in ids:
            count[word] += 1
            ranks.append(self._rank.setdefault((word, count[word]), len(self._rank)))
        ranks.sort(reverse=True)
        return ranks[: max(1, m - least + 1)]


@dataclasses.dataclass(frozen=True)
class Novel(Value):
    """Whether a text's ROUGE-L F1 against every text of the pool is at most the threshold; kept rows join the pool. A
    text without words is like nothing. known: texts that are in the pool before."""

    threshold: float = 0.7
    column: str = "text"
    known: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise InputError(f"novel({self.threshold:g}): a threshold between 0 and 1 is wanted")
        object.__setattr__(self, "known", tuple(self.known))

    def begin(self) -> _Growing:
        """A pool of its own, for rows that come in parts."""
        return _Growing(self)

    def __call__(self, data: Dataset) -> list[bool]:
        return self.begin()(data)


class _Growing:
    def __init__(self, rule: Novel):
        self.column, self.pool = rule.column, Pool(rule.threshold)
        for text in rule.known:
            self.pool.add(rouge_tokens(text))

    def __call__(self, data: Dataset) -> list[bool]:
        kept = []
        for text in data.column(self.column):
            words = rouge_tokens(text or "")
            kept.append(self.pool.closest(words) is None)
            if kept[-1]:
                self.pool.add(words)
        return kept


def novel(threshold: float = 0.7, column: str = "text", known: Sequence[str] = ()) -> Rule:
    """Rows whose ROUGE-L F1 against all that are kept before them, and all of `known`, is at most the threshold."""
    return Rule(f"{column} novel at {threshold:g}", Novel(threshold, column, tuple(known)), why="duplicates")
