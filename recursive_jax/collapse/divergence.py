"""Distances between distributions of counts and of numbers, and the shape of a frequency list."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

from recursive_jax.errors import InputError


def smoothed(counts: np.ndarray) -> np.ndarray:
    """Probabilities with one half added to every count (Krichevsky and Trofimov 1981)."""
    counts = np.asarray(counts, np.float64) + 0.5
    return counts / counts.sum()


def kl(counts: np.ndarray, other: np.ndarray) -> float:
    """KL(counts || other), nats, of two count vectors over the same types, both smoothed by one half."""
    p, q = smoothed(counts), smoothed(other)
    return float((p * np.log(p / q)).sum())


def jensen_shannon(counts: np.ndarray, other: np.ndarray) -> float:
    """Jensen-Shannon divergence of the plug-in distributions, nats (at most ln 2)."""
    p, q = _frequencies(counts), _frequencies(other)
    m = (p + q) / 2
    half = lambda x: np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0) / np.where(m > 0, m, 1.0)), 0.0).sum() / 2
    return float(half(p) + half(q))


def total_variation(counts: np.ndarray, other: np.ndarray) -> float:
    """Half the absolute differences of the plug-in distributions, in [0, 1]."""
    return float(np.abs(_frequencies(counts) - _frequencies(other)).sum() / 2)


def _frequencies(counts: np.ndarray) -> np.ndarray:
    counts = np.asarray(counts, np.float64)
    if counts.sum() <= 0:
        raise InputError("a distribution without a single count cannot be compared")
    return counts / counts.sum()


def wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """Wasserstein-1 distance of two samples of numbers: the area between their distribution functions."""
    x, y = np.sort(np.asarray(x, np.float64).ravel()), np.sort(np.asarray(y, np.float64).ravel())
    if not len(x) or not len(y):
        raise InputError("an empty sample has no distance to another")
    every = np.sort(np.concatenate([x, y]))
    at = lambda z: np.searchsorted(z, every[:-1], side="right") / len(z)
    return float((np.abs(at(x) - at(y)) * np.diff(every)).sum())


def sliced_wasserstein(x_ND: np.ndarray, y_MD: np.ndarray, directions: int = 128, seed: int = 0) -> float:
    """Mean Wasserstein-1 distance of the projections on random directions."""
    rng = np.random.default_rng(seed)
    axis_DP = rng.standard_normal((np.shape(x_ND)[1], directions))
    axis_DP /= np.linalg.norm(axis_DP, axis=0)
    x_NP, y_MP = np.asarray(x_ND) @ axis_DP, np.asarray(y_MD) @ axis_DP
    return float(np.mean([wasserstein(a, b) for a, b in zip(x_NP.T, y_MP.T, strict=True)]))


def zipf_exponent(counts: np.ndarray) -> float:
    """Maximum likelihood of s in p(rank) ~ rank^-s over the ranks that occur: the s at which the mean log rank is what
    the distribution expects. One type has all mass on the first rank: infinity; none: NaN."""
    counts = np.sort(np.asarray(counts, np.float64)[np.asarray(counts) > 0])[::-1]
    if len(counts) < 2:
        return float("inf") if len(counts) else float("nan")
    logs = np.log(np.arange(1, len(counts) + 1))
    seen = counts @ logs / counts.sum()

    def excess(s: float) -> float:
        weights = np.exp(-s * logs)
        return weights @ logs / weights.sum() - seen

    if excess(60.0) >= 0:
        return float("inf")  # all but all of the mass
    return float(brentq(excess, -2.0, 60.0))  # ordered counts do not rise, so it is not below 0


def good_turing(counts: np.ndarray) -> float:
    """Estimate of the mass of types not seen: types seen once over tokens (Good 1953)."""
    counts = np.asarray(counts)
    if counts.sum() == 0:
        raise InputError("nothing was counted: the missing mass is not defined")
    return float((counts == 1).sum() / counts.sum())
