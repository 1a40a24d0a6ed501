"""What theory says of recursive training: expectations over replicates, in NumPy, each with its source.

Round 0 is the truth; round k is k times (M rows -> fit). `expected(family, regime, sizes)` collects those that hold for
a configuration: `{statistic: [K + 1] values}`. Laws derived for this project are in `docs/lab.md`, with their
derivations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import digamma, gammaln, polygamma, zeta
from scipy.stats import binom


def c4(M: int) -> float:
    """E of the standard deviation over its true value, unbiased variance of M normal rows."""
    return float(np.sqrt(2 / (M - 1)) * np.exp(gammaln(M / 2) - gammaln((M - 1) / 2)))


def log_variance(sizes: Sequence[int], dimensions: int = 1, unbiased: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of log det(covariance) relative to the truth, under `replace`: sums of log chi-square variables
    (Wishart; for d = 1 arXiv:2305.17493, sec. 4.1 has the setting)."""
    i = np.arange(1, dimensions + 1)
    mean = [(digamma((M - i) / 2) - np.log((M - 1 if unbiased else M) / 2)).sum() for M in sizes]
    variance = [polygamma(1, (M - i) / 2).sum() for M in sizes]
    return _from_zero(mean), _from_zero(variance)


def retention(M: int, fraction: float, rounds: int) -> np.ndarray:
    """R_k: E[var_k] / var_0, and E[gini_k] / gini_0, when each round has fraction * M new real rows (fraction 0:
    `replace`), plug-in estimates. E[(mean_k - mean_0)^2] / var_0 is 1 - R_k. Derived for this project."""
    a = fraction
    ratio = (1 - a) * (1 - a - 1 / M)
    k = np.arange(rounds + 1)
    return 1 - (1 - ratio**k) / (1 - ratio) / M


def retention_limit(M: int, fraction: float) -> float:
    """R_k for k without end."""
    a = fraction
    return a * (2 - a - 1 / M) / (a * (2 - a) + (1 - a) / M)


def anchored(M: int, fraction: float, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """(E var_k / var_0, E (mean_k - mean_0)^2 / var_0) when the same fraction * M real rows are in every round: a
    linear recursion in the mean's distance from the real rows' and in the variance. Derived for this project."""
    a, n = fraction, round(fraction * M)
    distance, covariance, variance = 1 / n, -1 / n, 1.0
    found = [(1.0, 0.0)]
    for _ in range(rounds):
        second = a * (1 - 1 / n) + (1 - a) * (variance + distance)
        distance = (1 - a) ** 2 * distance + (1 - a) * variance / M
        covariance *= 1 - a
        variance = second - distance
        found.append((variance, distance + 2 * covariance + 1 / n))
    variance_K, mse_K = np.array(found).T
    return variance_K, mse_K


def anchored_limit(M: int, fraction: float) -> float:
    """E var / var_0 of `anchor` for k without end."""
    a, n = fraction, round(fraction * M)
    return (1 - 1 / n) * a * (2 - a) / (a * (2 - a) + (1 - a) / M)


def accumulated(n: int, rounds: int) -> np.ndarray:
    """E var_t / var_0 (and gini) when all rounds of n rows are pooled, plug-in estimates: prod (1 - 1 / (n j^2)).

    The product tends to `accumulated_limit` (derived for this project; arXiv:2410.16713 has the boundedness)."""
    j = np.arange(1, rounds + 1)
    return _from_one(1 - 1 / (n * j**2.0))


def accumulated_limit(n: int) -> float:
    """sin(pi / sqrt n) / (pi / sqrt n), Euler's product of the sine."""
    return float(np.sinc(1 / np.sqrt(n)))


def accumulated_subsample(M: int, rounds: int) -> np.ndarray:
    """E gini_t / gini_0 of a model fitted to M rows drawn without replacement from the pool of all rounds."""
    pool, model = 1 - 1 / M, [1.0]
    for t in range(1, rounds + 1):
        share = 1 - (t - 1) / (M * t - 1)
        model.append(pool * share)
        pool *= 1 - (1 - share * (1 - 1 / M)) / (t + 1) ** 2
    return np.array(model)


def shrunk(M: int, factor: float, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """(E var_k, E mean_k^2) over var_0 when rows are drawn with `factor` times the variance and fitted without bias
    (arXiv:2307.01850, sec. 2)."""
    variance = factor ** np.arange(rounds + 1.0)
    return variance, _from_zero(factor * variance[:-1] / M)


def weighted_mean(n: int, weight: float, rounds: int) -> np.ndarray:
    """E (mean_k - mean_0)^2 / var for N(mu, known variance), n new real rows of weight w, n synthetic of weight 1 -
    w."""
    w, mse = weight, [0.0]
    for _ in range(rounds):
        mse.append(w * w / n + (1 - w) ** 2 * (mse[-1] + 1 / n))
    return np.array(mse)


def weighted_mean_limit(weight: float) -> float:
    """n E (mean - mean_0)^2 for k without end; least at the golden ratio w = (sqrt 5 - 1) / 2 (arXiv:2502.18049)."""
    w = weight
    return (2 * w * w - 2 * w + 1) / (2 * w - w * w)


def extinction(rounds: int) -> np.ndarray:
    """s_k: probability that the line of one copy has died out after k rounds, offspring Poisson(1): s' = exp(s - 1)."""
    s = [0.0]
    for _ in range(rounds):
        s.append(math.exp(s[-1] - 1))
    return np.array(s)


def lost(p: np.ndarray | float, M: int, rounds: int, exact: bool | None = None) -> np.ndarray:
    """P(a type of probability p has no copy left in round k), `[K + 1, ...]`, M rows a round.

    exact: by the binomial transition matrix of the type's count (M + 1 states; default up to M = 1000). Else for rare
    types, exp(-M p (1 - s_{k-1})): counts as a critical branching process, which is also exact for Poisson models.
    """
    p = np.asarray(p, np.float64)
    if exact if exact is not None else M <= 1000:
        step = binom.pmf(np.arange(M + 1)[None], M, np.arange(M + 1)[:, None] / M)
        start = binom.pmf(np.arange(M + 1), M, p[..., None])
        gone, found = np.eye(M + 1)[0], [np.zeros_like(p)]
        for _ in range(rounds):
            found.append(start @ gone)
            gone = step @ gone
        return np.array(found)
    found = [np.zeros_like(p)]
    for k, s in enumerate(extinction(rounds)[:-1]):
        found.append((1 - p) ** M if k == 0 else np.exp(-M * p * (1 - s)))
    return np.array(found)


def poisson_extinct(samples: int, rate: float, rounds: int) -> np.ndarray:
    """P(rate_k = 0) = exp(-M rate (1 - s_{k-1})), exactly."""
    return np.concatenate([[0.0], np.exp(-samples * rate * (1 - extinction(rounds)[:-1]))])


def zipf_tail(exponent: float, M: int, rounds: int) -> float:
    """Truth mass lost after `rounds` rounds, p_i ~ i^-b without end: the asymptote k^(1 - 1/b) of arXiv:2402.07043 with
    the effective sample size M (1 - s_{k-1}), about 2M / k."""
    b, size = exponent, M * (1 - extinction(rounds)[rounds - 1])
    return float(math.gamma(1 - 1 / b) / b * zeta(b) ** (-1 / b) * size ** -(1 - 1 / b))


def fixation_rounds(M: int, p: float, diffusion: bool = False) -> float:
    """Mean number of rounds until one of two types is left: [(I - Q)^-1 1], or Kimura's diffusion value, a few percent
    high: -2M (p ln p + (1 - p) ln (1 - p))."""
    if diffusion:
        return -2 * M * (p * math.log(p) + (1 - p) * math.log(1 - p))
    inner = np.arange(1, M)
    Q = binom.pmf(inner[None], M, inner[:, None] / M)
    times = np.linalg.solve(np.eye(M - 1) - Q, np.ones(M - 1))
    return 1 + float(binom.pmf(inner, M, p) @ times)


def filtered_mass(mass: float, keep_right: float, keep_wrong: float, rounds: int) -> np.ndarray:
    """Mass of the right types under `filtered` as M grows without end: odds_k = odds_0 (keep_right / keep_wrong)^k."""
    weight = mass * (keep_right / keep_wrong) ** np.arange(rounds + 1.0)
    return weight / (weight + 1 - mass)


def verifier_limit(keep_right: float, keep_wrong: float) -> float:
    """The largest error share from which filtering still learns the truth: 1 / (1 + psi / phi) (arXiv:2406.07515)."""
    return 1 / (1 + keep_wrong / keep_right)


def filtered_accuracy(n: int, d: int, error: float, keep_right: float, keep_wrong: float) -> float:
    """Accuracy of the averaging classifier after one filtered round (arXiv:2406.07515, sec. 3; finite-n form)."""
    kept = error * keep_wrong + (1 - error) * keep_right
    wrong = error * keep_wrong / kept
    m = (1 - 2 * wrong) * math.sqrt(2 / math.pi)
    return 1 - math.acos(m / math.sqrt(m * m + d / (n * kept))) / math.pi


def kde_variance(M: int, bandwidth: float, rounds: int) -> np.ndarray:
    """E of the biased variance of the points: r^k + (M - 1) h^2 (1 - r^(k-1)), r = 1 - 1/M. It tends to (M - 1) h^2."""
    k, r = np.arange(rounds + 1.0), 1 - 1 / M
    return np.where(k == 0, 1.0, r**k + (M - 1) * bandwidth**2 * (1 - r ** (k - 1)))


def regression_risk(T: int, d: int, noise: float, rounds: int, accumulate: bool) -> np.ndarray:
    """Excess risk of least squares on its own labels: noise^2 d / (T - d - 1) times k under `replace`, times
    sum_{i <= k} 1/i^2 <= pi^2/6 under `accumulate`, one design for all rounds (arXiv:2404.01413, th. 1 and 2)."""
    i = np.arange(1, rounds + 1.0)
    return noise**2 * d / (T - d - 1) * _from_zero(1 / i**2 if accumulate else np.ones_like(i))


def shifted_risk(n: int, d: int, noise: float, synthetic: float, shift: float) -> float:
    """Excess risk of least squares on a union of real rows and a share p2 of rows labelled by a model that is off by
    `shift`: noise^2 d/n + p2^2 c^2 + p1 p2 c^2 d/n (arXiv:2410.04840)."""
    p2, c2 = synthetic, shift**2
    return noise**2 * d / n + p2**2 * c2 + (1 - p2) * p2 * c2 * d / n


def oracle_kl(parameters: int, documents: int, rounds: int) -> np.ndarray:
    """E KL per document of a model of the right form refitted to `documents` of its own: k d / 2N, d free
    parameters."""
    return np.arange(rounds + 1) * parameters / (2 * documents)


def _from_zero(steps: Sequence[float]) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(steps)])


def _from_one(factors: Sequence[float]) -> np.ndarray:
    return np.concatenate([[1.0], np.cumprod(factors)])
