"""Exact self-BLEU of any number of rows: every row against all others, by sorting instead of comparing pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from recursive_jax.errors import InputError


def dense_ngrams(rows: Sequence[np.ndarray], longest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(n, id of each n-gram, row it stands in) for n = 1 .. longest. Equal n-grams have equal ids below 2^31, whatever
    the vocabulary: an n-gram is the pair (its first n - 1 tokens, the last one), numbered anew for each n."""
    lengths = np.array([len(r) for r in rows])
    tokens = np.concatenate([np.asarray(r, np.int64) for r in rows]) if lengths.sum() else np.empty(0, np.int64)
    row = np.repeat(np.arange(len(rows)), lengths)
    left = np.concatenate([np.arange(n, 0, -1) for n in lengths]) if lengths.sum() else np.empty(0, np.int64)
    token_ids, tokens = np.unique(tokens, return_inverse=True)
    starts, ids = np.arange(len(tokens)), tokens
    yield 1, ids, row
    for n in range(2, longest + 1):
        keep = left[starts] >= n
        starts = starts[keep]
        pair = ids[keep] * max(1, len(token_ids)) + tokens[starts + n - 1]
        ids = np.unique(pair, return_inverse=True)[1]
        yield n, ids, row[starts]


def self_bleu(rows: Sequence[np.ndarray], longest: int = 4) -> np.ndarray:
    """BLEU of each row with all other rows as references (arXiv:1802.01886), float64 `[rows]`: uniform weights over n =
    1 .. `longest`, 0.1 in place of a zero numerator (NLTK's `method1`), brevity against the closest length. A row
    shorter than n has no n-grams, and is judged by the shorter ones alone (sacrebleu's effective order; NLTK counts a
    miss), so that equal rows have 1 whatever their length; an empty one has 0. Raises InputError for fewer than two
    rows."""
    return bleu(*precisions(rows, longest), longest)


def precisions(rows: Sequence[np.ndarray], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(log of the clipped n-gram precisions of each row against all others `[longest, rows]`, NaN where a row is
    shorter than n; brevity penalty `[rows]`, 0 for a row that shares no token with another).

    An n-gram counts at most as often as in the reference that has it most often. For all rows but the one that alone
    has the most, that is the largest count of any row; for that one, the second largest."""
    if len(rows) < 2:
        raise InputError(f"self-BLEU compares rows with each other: at least 2 are wanted, there are {len(rows)}")
    R, lengths = len(rows), np.array([len(r) for r in rows])
    logs, brevity = np.zeros((longest, R)), _brevity(lengths)
    for n, ids, row in dense_ngrams(rows, longest):
        hits = np.zeros(R)
        if len(ids):
            key, count = np.unique(ids * R + row, return_counts=True)
            gram, owner = key // R, key % R
            hits = np.bincount(owner, np.minimum(count, _most_elsewhere(gram, count)), minlength=R)
        if n == 1:
            brevity = np.where(hits == 0, 0.0, brevity)
        shares = np.where(hits > 0, hits, 0.1) / np.maximum(lengths - n + 1, 1)
        logs[n - 1] = np.where(lengths >= n, np.log(shares), np.nan)
    return logs, brevity


def bleu(logs: np.ndarray, brevity: np.ndarray, longest: int) -> np.ndarray:
    """BLEU of each row from what `precisions` found, n-grams up to `longest`."""
    known = np.isfinite(logs[:longest])
    mean = np.where(known, logs[:longest], 0.0).sum(0) / np.maximum(known.sum(0), 1)
    return np.exp(mean) * np.where(known.any(0), brevity, 0.0)


def _most_elsewhere(gram: np.ndarray, count: np.ndarray) -> np.ndarray:
    """For each (gram, row): the largest count of the gram in any other row. gram is sorted."""
    first = np.flatnonzero(np.diff(gram, prepend=-1))
    group = np.cumsum(np.diff(gram, prepend=gram[0] - 1) != 0) - 1
    most = np.maximum.reduceat(count, first)
    is_most = count == most[group]
    alone = np.add.reduceat(is_most.astype(np.int64), first) == 1
    second = np.maximum.reduceat(np.where(is_most, 0, count), first)
    return np.where(is_most & alone[group], second[group], most[group])


def _brevity(lengths: np.ndarray) -> np.ndarray:
    """exp(1 - closest / length) where the row is shorter than the closest other row (ties: the shorter)."""
    kinds, index, count = np.unique(lengths, return_inverse=True, return_counts=True)
    below = np.concatenate([[-np.inf], kinds[:-1]])
    above = np.concatenate([kinds[1:], [np.inf]])
    other = np.where(kinds - below <= above - kinds, below, above)
    closest = np.where(count > 1, kinds, other)[index]
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.exp(1 - closest / np.maximum(lengths, 1e-9))
    return np.where(lengths > closest, 1.0, np.where(lengths == 0, 0.0, factor))
