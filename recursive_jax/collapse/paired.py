"""Whether one model's scores on the same rows are better than another's, or only luckier.

Promoting whatever looks better is many tests without a correction (arXiv:2606.08106): a chain of rounds then promotes
noise. `paired_p` is the p-value of one comparison, `spent` what is left of the error rate in round k."""

from __future__ import annotations

import math

import numpy as np

from recursive_jax.errors import InputError

RESAMPLES = 10_000


def paired_p(new: np.ndarray, old: np.ndarray) -> tuple[float, str]:
    """(p, how) of the hypothesis that `new` is no better than `old` on the same N rows, one-sided.

    Scores of 0 and 1: McNemar's exact test, of the rows that only one of the two has right (doi:10.1007/BF02295996).
    Others: the paired bootstrap of the mean difference, centred on none (Efron and Tibshirani, An Introduction to the
    Bootstrap, sec. 16.4). Rows without a score on either side (NaN) are left out. Raises InputError for unlike lengths,
    and where no row has both."""
    new, old = np.asarray(new, float), np.asarray(old, float)
    if new.shape != old.shape or new.ndim != 1:
        raise InputError(f"paired scores have the shapes {new.shape} and {old.shape}: one each for the same rows")
    known = ~(np.isnan(new) | np.isnan(old))
    new, old = new[known], old[known]
    if not len(new):
        raise InputError("no row has a score of both models")
    if set(np.unique(np.concatenate([new, old]))) <= {0.0, 1.0}:
        return mcnemar_p(int(np.sum(new > old)), int(np.sum(new < old))), "McNemar"
    return bootstrap_p(new - old), "paired bootstrap"


def two_sided_p(one: np.ndarray, other: np.ndarray) -> float:
    """`paired_p` of whichever is better, doubled: that the two are alike."""
    return min(1.0, 2 * min(paired_p(one, other)[0], paired_p(other, one)[0]))


def mcnemar_p(gained: int, lost: int) -> float:
    """P(X >= gained) for X ~ Binomial(gained + lost, 1/2); 1 where the two never differ."""
    n = gained + lost
    return min(1.0, sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n)


def bootstrap_p(difference_N: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """The share of resamples whose mean lies as far above the mean as that lies above none (itself counted, so that it
    is never 0)."""
    rng = np.random.default_rng(seed)
    mean, N = float(difference_N.mean()), len(difference_N)
    above = 0
    for begin in range(0, resamples, 1000):
        size = min(1000, resamples - begin)
        drawn = difference_N[rng.integers(0, N, (size, N))].mean(1)
        above += int(np.sum(drawn - mean >= mean - 1e-12))
    return (1 + above) / (1 + resamples)


def spent(number: int) -> float:
    """The share of the error rate that the test of round `number` (from 1) may use: 1 / (k (k + 1)), which sums to 1
    over any number of rounds, so that a run may grow without the tests behind it changing."""
    return 1.0 / (number * (number + 1))
