"""The tail of the truth: which rare token types a model no longer produces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recursive_jax.collapse.diversity import take_budget


def deciles(truth_V: np.ndarray, groups: int = 10) -> list[np.ndarray]:
    """Ids of the types with truth > 0, from the most to the least frequent, in `groups` of near-equal size."""
    ids = np.flatnonzero(truth_V > 0)
    ordered = ids[np.argsort(-truth_V[ids], kind="stable")]
    return [np.asarray(group) for group in np.array_split(ordered, groups)]


def tail_lost(rows: Sequence[np.ndarray], truth_V: np.ndarray, budget: int) -> dict[str, object]:
    """Truth mass and types with no token among the first `budget` tokens of `rows`.

    truth_V: frequencies of the truth (any scale). Returns `tail_mass_lost` (share of the truth's mass on types that
    do not occur), `tail_lost_deciles` (share of types lost per frequency decile, the rarest last) and their null for
    independent draws from the truth itself, E[lost] = (1 - p)^N: `tail_mass_lost_null`, `tail_lost_deciles_null`.
    Rows of a document are not independent draws, so the null is a lower bound; the k = 0 model is the practical one.
    """
    p = np.asarray(truth_V, np.float64)
    p = p / p.sum()
    taken = take_budget(rows, budget)
    tokens = np.concatenate(taken) if taken else np.empty(0, np.int64)
    counts = np.bincount(tokens[tokens < len(p)], minlength=len(p))
    gone, null = (counts == 0) & (p > 0), (1 - p) ** len(tokens)
    groups = deciles(p)
    return {
        "tail_mass_lost": float(p[gone].sum()),
        "tail_mass_lost_null": float((p * null).sum()),
        "tail_lost_deciles": [round(float(gone[g].mean()), 6) if len(g) else 0.0 for g in groups],
        "tail_lost_deciles_null": [round(float(null[g].mean()), 6) if len(g) else 0.0 for g in groups],
    }


def token_frequencies(rows: Sequence[np.ndarray], vocab: int) -> np.ndarray:
    """Counts of each id in rows, float64 `[vocab]`."""
    return (
        np.bincount(np.concatenate(rows), minlength=vocab)[:vocab].astype(np.float64) if len(rows) else np.zeros(vocab)
    )
