"""Which laws hold for a configuration of the laboratory: `{statistic: expectation of rounds 0 .. K}`, NaN where a law
speaks of some rounds only. The laws themselves are in `laws.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import truncnorm

from recursive_jax.collapse.lab import laws
from recursive_jax.collapse.lab.categorical import Categorical, Poisson
from recursive_jax.collapse.lab.chain import Family, Regime
from recursive_jax.collapse.lab.gaussian import Gaussian
from recursive_jax.collapse.lab.kernels import Kernel
from recursive_jax.collapse.lab.linear import Classifier, Regression

MANY = 10_000  # rows from which a law for infinitely many is within a percent


def expected(family: Family, regime: Regime, sizes: Sequence[int]) -> dict[str, np.ndarray]:
    """Expectations over replicates. Empty where no law is known."""
    for kind, law in _LAWS.items():
        if isinstance(family, kind):
            return law(family, regime, np.asarray(sizes))
    return {}


def _bilinear(regime: Regime, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(what is left of the variance or of the Gini index, squared error of the mean or of p over the same), for plug-in
    estimates: both are half the expected difference of two draws."""
    M, K = int(sizes[0]), len(sizes)
    if regime.name == "replace":
        kept = laws._from_one(1 - 1 / sizes)
        return kept, 1 - kept
    if np.any(sizes != M):
        return None
    a = regime.real_rows(M) / M
    if regime.name == "fresh":
        kept = laws.retention(M, a, K)
    elif regime.name == "anchor" and 0 < a < 1:
        return laws.anchored(M, a, K)
    elif regime.name == "accumulate":
        kept = laws.accumulated(M, K)
    elif regime.name == "accumulate_subsample":
        kept = laws.accumulated_subsample(M, K)
    else:
        return None
    return kept, 1 - kept


def _gaussian(f: Gaussian, regime: Regime, sizes: np.ndarray) -> dict[str, np.ndarray]:
    spectrum = np.asarray(f.spectrum or (1.0,) * f.dimensions)
    total, d, K = spectrum.sum(), f.dimensions, len(sizes)
    bias = f.bias
    found: dict[str, np.ndarray] = {}
    if f.truncation:
        return found
    if f.estimator == "known_variance":
        if regime.name == "replace":
            found["mean_squared_error"] = laws._from_zero(total * bias / sizes)
        elif regime.name == "weighted" and bias == 1 and np.all(sizes == sizes[0]):
            found["mean_squared_error"] = total * laws.weighted_mean(int(sizes[0]), regime.weight, K)
        elif regime.name == "filtered" and (regime.keep_right, regime.keep_wrong, d, bias) == (1, 0, 1, 1):
            if sizes.min() >= MANY:
                found["mean"] = _truncated_means(np.sqrt(total), f.center, f.radius, K)
        return found
    plugin = f.estimator == "mle"
    if regime.name == "replace":
        step = bias * (1 - plugin / sizes)
        kept = laws._from_one(step)
        found["variance"] = total / d * kept
        found["mean_squared_error"] = laws._from_zero(total * kept[:-1] * bias / sizes)
        if sizes.min() > d:
            logs = laws.log_variance(sizes, d, unbiased=not plugin)[0] + d * np.log(bias) * np.arange(K + 1)
            found["log_determinant"] = np.log(spectrum).sum() + logs
            found["log_variance"] = found["log_determinant"] / d
        if d == 1:
            shrink = [laws.c4(int(M)) * np.sqrt(bias * (1 - plugin / M)) for M in sizes]
            found["std"] = np.sqrt(total) * laws._from_one(shrink)
            away = found["mean_squared_error"] + found["variance"] + total
            found["wasserstein2"] = away - 2 * np.sqrt(total) * found["std"]
    elif plugin and bias == 1 and (law := _bilinear(regime, sizes)):
        found["variance"], found["mean_squared_error"] = total / d * law[0], total * law[1]
    return found


def _truncated_means(scale: float, center: float, radius: float, rounds: int) -> np.ndarray:
    """A verifier that keeps |x - c| <= r, infinitely many rows: the mean becomes the truncated normal's. The limit is
    the verifier's centre (arXiv:2510.16657)."""
    means = [0.0]
    for _ in range(rounds):
        low, high = ((center + s * radius - means[-1]) / scale for s in (-1, 1))
        means.append(float(truncnorm.mean(low, high, loc=means[-1], scale=scale)))
    return np.array(means)


def _categorical(f: Categorical, regime: Regime, sizes: np.ndarray) -> dict[str, np.ndarray]:
    p = np.asarray(f.probabilities or np.arange(1.0, f.categories + 1) ** -f.zipf)
    p, K = p / p.sum(), len(sizes)
    if f.population:
        if regime.name != "replace" or f.truncation != 1 or f.categories < 2:
            return {}
        return {"log_odds": np.log(p[0] / p[1]) * f.temperature ** -np.arange(K + 1.0)}
    if f.temperature != 1 or f.truncation != 1:
        return {}
    found: dict[str, np.ndarray] = {}
    if law := _bilinear(regime, sizes):
        gini = 1 - (p**2).sum()
        found |= {"gini": gini * law[0], "mean_squared_error": gini * law[1], "first_mass": np.full(K + 1, p[0])}
    M = int(sizes[0])
    if regime.name == "replace":
        noise = laws._from_zero((len(p) - 1) / (2 * sizes))
        if (sizes.min() * p.min()) >= 20 * K:  # nothing is lost
            entropy = -(p * np.log(p)).sum()
            found |= {"kl": noise, "kl_reverse": noise, "entropy": entropy - noise}
        if np.all(sizes == M):
            gone = laws.lost(p, M, K)
            found |= {"types_alive": (1 - gone).sum(1), "tail_mass_lost": gone @ p}
    if regime.name == "filtered" and sizes.min() >= MANY and regime.keep_wrong > 0:
        mass = p[: f.right_types].sum()
        found["right_mass"] = laws.filtered_mass(mass, regime.keep_right, regime.keep_wrong, K)
    return found


def _poisson(f: Poisson, regime: Regime, sizes: np.ndarray) -> dict[str, np.ndarray]:
    if regime.name != "replace":
        return {}
    found = {"mean": np.full(len(sizes) + 1, f.rate), "mean_squared_error": laws._from_zero(f.rate / sizes)}
    if np.all(sizes == sizes[0]):
        found["extinct"] = laws.poisson_extinct(int(sizes[0]), f.rate, len(sizes))
    return found


def _kernel(f: Kernel, regime: Regime, sizes: np.ndarray) -> dict[str, np.ndarray]:
    M = int(sizes[0])
    if regime.name != "replace" or np.any(sizes != M) or not f.bandwidth:
        return {}
    variance = laws.kde_variance(M, f.bandwidth, len(sizes))
    model = np.where(np.arange(len(variance)) == 0, 1.0, variance + f.bandwidth**2)
    mse = laws._from_zero(f.dimensions * model[:-1] / M)
    return {"variance": variance, "model_variance": model, "mean_squared_error": mse}


def _regression(f: Regression, regime: Regime, sizes: np.ndarray) -> dict[str, np.ndarray]:
    T, K = int(sizes[0]), len(sizes)
    if np.any(sizes != T) or T <= f.dimensions + 1:
        return {}
    if regime.name == "replace" and f.shift == 0:
        return {"excess_risk": laws.regression_risk(T, f.dimensions, f.noise, K, accumulate=False)}
    if regime.name == "accumulate" and f.shift == 0 and f.covariates == "same":
        return {"excess_risk": laws.regression_risk(T, f.dimensions, f.noise, K, accumulate=True)}
    if regime.name == "fresh" and f.covariates == "fresh":
        synthetic = 1 - regime.real_rows(T) / T
        found = np.full(K + 1, np.nan)
        found[:2] = f.shift**2, laws.shifted_risk(T, f.dimensions, f.noise, synthetic, f.shift)
        return {"excess_risk": found}
    return {}


def _classifier(f: Classifier, regime: Regime, sizes: np.ndarray) -> dict[str, np.ndarray]:
    if regime.name not in ("replace", "filtered"):
        return {}
    keep = (regime.keep_right, regime.keep_wrong) if regime.name == "filtered" else (1.0, 1.0)
    found = np.full(len(sizes) + 1, np.nan)
    found[:2] = 1 - f.error, laws.filtered_accuracy(int(sizes[0]), f.dimensions, f.error, *keep)
    return {"accuracy": found}


_LAWS = {
    Gaussian: _gaussian,
    Categorical: _categorical,
    Poisson: _poisson,
    Kernel: _kernel,
    Regression: _regression,
    Classifier: _classifier,
}
