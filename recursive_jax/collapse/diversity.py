"""Count statistics of generated rows, always at a fixed token budget: they all depend on how much is counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recursive_jax.collapse.divergence import good_turing, zipf_exponent
from recursive_jax.collapse.selfbleu import bleu, dense_ngrams, precisions


def take_budget(rows: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Whole rows from the front, the last one cut, so that exactly `tokens` tokens are taken (or all there are)."""
    taken, left = [], tokens
    for row in rows:
        if left <= 0:
            break
        taken.append(row[:left])
        left -= len(taken[-1])
    return taken


def ngrams(rows: Sequence[np.ndarray], n: int, vocab: int) -> np.ndarray:
    """All n-grams within rows as one int64 code each (exact while vocab ** n < 2 ** 63)."""
    if vocab**n >= 2**63:
        raise ValueError(f"{n}-grams of {vocab} ids do not fit 63 bits")
    codes = []
    for row in rows:
        if len(row) >= n:
            code = np.zeros(len(row) - n + 1, np.int64)
            for i in range(n):
                code = code * vocab + row[i : len(row) - n + 1 + i]
            codes.append(code)
    return np.concatenate(codes) if codes else np.empty(0, np.int64)


def entropy(codes: np.ndarray) -> float:
    """Plug-in entropy of the empirical distribution, nats."""
    if not len(codes):
        return 0.0
    counts = np.unique(codes, return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def miller_madow(codes: np.ndarray) -> float:
    """Entropy with the first-order bias correction (K - 1) / 2N (Miller 1955)."""
    kinds = len(np.unique(codes))
    return entropy(codes) + (kinds - 1) / (2 * len(codes)) if len(codes) else 0.0


def distinct(codes: np.ndarray) -> float:
    """Different n-grams over all n-grams (arXiv:1510.03055)."""
    return len(np.unique(codes)) / len(codes) if len(codes) else 0.0


def repetition(rows: Sequence[np.ndarray], n: int, vocab: int) -> float:
    """rep-n: mean over rows of 1 - different / all n-grams in the row (arXiv:1908.04319). Rows too short for an
    n-gram are left out; 0 if there is none."""
    values = [1 - distinct(ngrams([row], n, vocab)) for row in rows if len(row) >= n]
    return float(np.mean(values)) if values else 0.0


def sample_statistics(rows: Sequence[np.ndarray], vocab: int, budget: int) -> dict[str, float]:
    """Entropies, distinct-n, exact self-BLEU, Zipf exponent, repetition and lengths of rows (token ids), at `budget`
    tokens."""
    taken = take_budget(rows, budget)
    lengths = np.array([len(r) for r in rows], np.float64)
    stats: dict[str, float] = {"tokens_counted": float(sum(map(len, taken)))}
    for n, codes, _ in dense_ngrams(taken, 4):
        stats[f"distinct_{n}"] = distinct(codes)
        if n < 3:
            stats[f"entropy_{n}gram"] = entropy(codes)
            stats[f"entropy_{n}gram_mm"] = miller_madow(codes)
    if len(taken) > 1:
        found = precisions(taken, 4)
        stats |= {f"self_bleu_{n}": float(bleu(*found, n).mean()) for n in (2, 3, 4)}
    if taken:
        counts = np.unique(np.concatenate(taken), return_counts=True)[1]
        stats["good_turing"] = good_turing(counts)
        if len(counts) > 1:
            stats["zipf_mle"] = zipf_exponent(counts)
    stats["types_alive"] = float(len(np.unique(np.concatenate(taken)))) if taken else 0.0
    stats["repetition_2"] = repetition(rows, 2, vocab)
    stats["length_mean"] = float(lengths.mean()) if len(rows) else 0.0
    stats["length_std"] = float(lengths.std()) if len(rows) else 0.0
    stats["duplicate_rows"] = 1 - len({r.tobytes() for r in rows}) / len(rows) if len(rows) else 0.0
    return stats
