"""MAUVE (arXiv:2102.01454): the area under the frontier of KL divergences between two clouds of embeddings, quantised
together."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from recursive_jax.collapse.divergence import smoothed
from recursive_jax.collapse.embeddings import _on_device, _pair
from recursive_jax.errors import InputError

SCALE = 5.0  # of the divergences in exp(-c KL), the paper's


def mauve(generated: Any, real: Any, clusters: int = 0, seed: int = 0, smooth: bool = False) -> float:
    """In (0, 1]; near 1 for equal clouds. Rows of unit length, the principal axes that hold 90 percent of the variance,
    k-means over both together (clusters 0: a tenth of the smaller one), then `frontier_area` of the two histograms.

    smooth: half a count more in every cluster (MAUVE* of arXiv:2212.14578), which removes most of the dependence on N.
    Raises InputError as `vectors` does, and for fewer than 20 rows.
    """
    generated, real = _pair(generated, real, least=20)
    both = np.concatenate([generated, real])
    norm = np.linalg.norm(both, axis=1, keepdims=True)
    if (norm == 0).any():
        raise InputError(f"{int((norm == 0).sum())} rows are zero: they have no direction to compare")
    k = clusters or max(2, round(min(len(generated), len(real)) / 10))
    label = kmeans(principal(both / norm, 0.9), k, seed)
    count = lambda x: np.bincount(x, minlength=k)
    p, q = count(label[: len(generated)]), count(label[len(generated) :])
    p, q = (smoothed(p), smoothed(q)) if smooth else (p / p.sum(), q / q.sum())
    return frontier_area(p, q)


def frontier_area(p: np.ndarray, q: np.ndarray, points: int = 25) -> float:
    """Area under the curve (exp(-c KL(q || r)), exp(-c KL(p || r))), r = w p + (1 - w) q for w in (0, 1), closed
    at both axes."""
    curve = [(1.0, 0.0)]
    for w in np.linspace(1e-6, 1 - 1e-6, points):
        r = w * p + (1 - w) * q
        curve.append((np.exp(-SCALE * _kl(q, r)), np.exp(-SCALE * _kl(p, r))))
    x, y = np.array([*curve, (0.0, 1.0)])[::-1].T
    return float(np.trapezoid(y, x))


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


def principal(x_ND: np.ndarray, share: float) -> np.ndarray:
    """Coordinates on the fewest principal axes that hold `share` of the variance."""
    away = x_ND - x_ND.mean(0)
    values, axes = np.linalg.eigh(away.T @ away / len(away))
    values, axes = values[::-1], axes[:, ::-1]
    if values[0] <= 0:
        return away[:, :1]
    keep = int(np.searchsorted(np.cumsum(values) / values.sum(), share)) + 1
    return away @ axes[:, :keep]


def kmeans(x_ND: np.ndarray, k: int, seed: int = 0, iterations: int = 100, starts: int = 3) -> np.ndarray:
    """Cluster of each row: Lloyd's iterations from k-means++ (Arthur and Vassilvitskii 2007), the best of several
    starts."""
    rng, best = np.random.default_rng(seed), (np.inf, np.zeros(len(x_ND), np.int64))
    k = min(k, len(x_ND))
    for _ in range(starts):
        centre_KD = _spread(x_ND, k, rng)
        before = None
        for _ in range(iterations):
            label, away = _assign(x_ND, centre_KD)
            if before is not None and np.array_equal(label, before):
                break
            before, count = label, np.bincount(label, minlength=k)
            order, some = np.argsort(label, kind="stable"), np.flatnonzero(count)
            first = np.concatenate([[0], np.cumsum(count[some])[:-1]])
            centre_KD[some] = np.add.reduceat(x_ND[order], first, axis=0) / count[some, None]
        best = min(best, (float(away.sum()), label), key=lambda x: x[0])
    return best[1]


def _spread(x_ND: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each centre is drawn in proportion to the squared distance from those before."""
    square_N = (x_ND**2).sum(1)
    chosen = [int(rng.integers(len(x_ND)))]
    away_N = np.full(len(x_ND), np.inf)
    while len(chosen) < k:
        last = chosen[-1]
        away_N = np.minimum(away_N, np.maximum(square_N + square_N[last] - 2 * x_ND @ x_ND[last], 0.0))
        away_N[last] = 0.0
        total = np.cumsum(away_N)
        at = rng.random()
        chosen.append(int(np.searchsorted(total, at * total[-1], "right") if total[-1] > 0 else at * len(x_ND)))
    return x_ND[chosen]


@_on_device
def _assign(x_ND, centre_KD):
    away_NK = (x_ND**2).sum(1)[:, None] + (centre_KD**2).sum(1)[None] - 2 * x_ND @ centre_KD.T
    return away_NK.argmin(1), jnp.maximum(away_NK.min(1), 0.0)
