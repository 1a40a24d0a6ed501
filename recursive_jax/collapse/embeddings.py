"""Clouds of vectors (embeddings, images, any features): how far apart, how spread, how well one covers the other.

Float64 on the device that JAX has (`float32` on one without). Shapes: N, M rows, D features, G generated, R real rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.errors import InputError

BLOCK = 256  # rows of a matrix of distances held at once
STRIPE = 64  # rows of a stripe, when the nearest neighbours are looked for


def vectors(x: Any, name: str, least: int = 2) -> np.ndarray:
    """`[N, D]` float64; InputError for another shape, too few rows, or values that are not finite."""
    x = np.asarray(x, np.float64)
    x = x.reshape(len(x), -1) if x.ndim > 2 else x
    if x.ndim != 2 or x.shape[1] == 0:
        raise InputError(f"{name}: rows of features are wanted, [rows, features], got shape {x.shape}")
    if len(x) < least:
        raise InputError(f"{name}: at least {least} rows are wanted, there are {len(x)}")
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise InputError(f"{name}: {bad.sum()} of {len(x)} rows hold NaN or infinity, the first is row {bad.argmax()}")
    return x


def _pair(generated: Any, real: Any, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generated, real = vectors(generated, "generated", least), vectors(real, "real", least)
    if generated.shape[1] != real.shape[1]:
        raise InputError(
            f"generated rows have {generated.shape[1]} features, real ones {real.shape[1]}: use one encoder"
        )
    return generated, real


def _on_device(function, static: tuple[str, ...] = ()):
    """Jitted in float64."""
    program = jax.jit(function, static_argnames=static)

    @functools.wraps(function)
    def call(*arguments, **static):
        with jax.enable_x64(True):
            return jax.device_get(program(*arguments, **static))

    return call


@_on_device
def _moments(x_ND):
    mean_D = x_ND.mean(0)
    away_ND = x_ND - mean_D
    return mean_D, away_ND.T @ away_ND / (len(x_ND) - 1)


def frechet(generated: Any, real: Any) -> float:
    """Squared Frechet distance of the Gaussians fitted to two clouds (FID where the features are Inception's,
    arXiv:1706.08500): |dm|^2 + tr(S1 + S2 - 2 (S1^.5 S2 S1^.5)^.5). Biased upwards by about (2 D + D (D + 1) / 2) / N
    for equal clouds: compare at one N, or use `frechet_unbiased`. Raises InputError as `vectors` does."""
    generated, real = _pair(generated, real)
    return float(_frechet(*_moments(generated), *_moments(real)))


def frechet_of_moments(mean_D, cov_DD, other_D, other_DD):
    """The distance of two Gaussians, traceable."""
    values_D, axes_DD = jnp.linalg.eigh(cov_DD)
    root_DD = (axes_DD * jnp.sqrt(jnp.maximum(values_D, 0.0))) @ axes_DD.T
    cross_D = jnp.linalg.eigvalsh(root_DD @ other_DD @ root_DD)
    overlap = jnp.sqrt(jnp.maximum(cross_D, 0.0)).sum()
    return jnp.maximum(((mean_D - other_D) ** 2).sum() + jnp.trace(cov_DD) + jnp.trace(other_DD) - 2 * overlap, 0.0)


_frechet = _on_device(frechet_of_moments)


def frechet_unbiased(generated: Any, real: Any, seed: int = 0, points: int = 5) -> float:
    """Frechet distance extrapolated to infinitely many rows, linearly in 1 / N (arXiv:1911.07023)."""
    generated, real = _pair(generated, real, least=20)
    rng = np.random.default_rng(seed)
    n = min(len(generated), len(real))
    sizes = np.unique(np.linspace(max(n // 4, 10), n, points).astype(int))
    take = lambda x, m: x[rng.permutation(len(x))[:m]]
    found = [frechet(take(generated, m), take(real, m)) for m in sizes]
    return float(np.polynomial.polynomial.polyfit(1 / sizes, found, 1)[0])


def kernel_distance(generated: Any, real: Any) -> float:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 (KID, arXiv:1801.01401). May be negative for equal
    clouds."""
    generated, real = _pair(generated, real)
    total = 0.0
    for x, y, sign in ((generated, generated, 1), (real, real, 1), (generated, real, -2)):
        sums = sum(float(_kernel_sum(x[i : i + BLOCK], y)) for i in range(0, len(x), BLOCK))
        if sign == 1:
            sums = (sums - float((((x**2).sum(1) / x.shape[1] + 1) ** 3).sum())) / (len(x) * (len(x) - 1))
        else:
            sums /= len(x) * len(y)
        total += sign * sums
    return total


@_on_device
def _kernel_sum(x_ND, y_MD):
    return ((x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3).sum()


def variance_ratio(generated: Any, real: Any) -> float:
    """Total variance of the generated cloud over the real one's."""
    generated, real = _pair(generated, real)
    total = np.trace(_moments(real)[1])
    if total == 0:
        raise InputError("real rows are all the same: a variance ratio is not defined")
    return float(np.trace(_moments(generated)[1]) / total)


def log_det_difference(generated: Any, real: Any, ridge: float = 1e-6) -> float:
    """log det of the generated covariance minus the real one's, nats per feature. `ridge` times the mean real variance
    stands on both diagonals, so that a collapsed axis counts as that and not as minus infinity."""
    generated, real = _pair(generated, real)
    a, b = _moments(generated)[1], _moments(real)[1]
    floor = ridge * np.trace(b) / len(b) * np.eye(len(b))
    if floor[0, 0] == 0:
        raise InputError("real rows are all the same: a log-determinant is not defined")
    return float((np.linalg.slogdet(a + floor)[1] - np.linalg.slogdet(b + floor)[1]) / len(b))


def vendi(x: Any, order: float = 1.0) -> float:
    """Vendi score of order q with the cosine kernel: exp of the Renyi entropy of the eigenvalues of K / N, the
    effective number of different rows (arXiv:2210.02410, 2310.12952). q = inf: one over the largest. From the smaller
    of the N x N and the D x D matrix: they share their eigenvalues. Rows of zeros raise InputError."""
    x = vectors(x, "rows", 1)
    norm_N1 = np.linalg.norm(x, axis=1, keepdims=True)
    if (norm_N1 == 0).any():
        raise InputError(f"{int((norm_N1 == 0).sum())} rows are zero: they have no direction to compare")
    x = x / norm_N1
    values = np.maximum(_spectrum(x if x.shape[0] >= x.shape[1] else x.T) / len(x), 0.0)
    values = values[values > 1e-12]
    if order == 1:
        return float(np.exp(-(values * np.log(values)).sum()))
    if np.isinf(order):
        return float(1 / values.max())
    return float((values**order).sum() ** (1 / (1 - order)))


@_on_device
def _spectrum(x_ND):
    return jnp.linalg.eigvalsh(x_ND.T @ x_ND)


def mean_cosine(x: Any) -> float:
    """Mean cosine of two different rows."""
    x = vectors(x, "rows")
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if (norm == 0).any():
        raise InputError(f"{int((norm == 0).sum())} rows are zero: they have no direction to compare")
    x, n = x / norm, len(x)
    return float(((x.sum(0) ** 2).sum() - n) / (n * (n - 1)))


def neighbour_entropy(x: Any, k: int = 3) -> float:
    """Differential entropy in nats from distances to the k-th neighbour (Kozachenko and Leonenko 1987). Minus infinity
    where rows repeat more than k times."""
    from scipy.special import digamma, gammaln

    x = vectors(x, "rows", k + 1)
    n, d = x.shape
    radius = np.sqrt(_radii(x - x.mean(0), k))
    ball = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    with np.errstate(divide="ignore"):
        return float(digamma(n) - digamma(k) + ball + d * np.log(radius).mean())


def coverage(generated: Any, real: Any, k: int = 5) -> dict[str, float]:
    """Precision, recall (arXiv:1904.06991), density, coverage (arXiv:2002.09797) with balls to the k-th neighbour.

    For two clouds of one distribution, without ties, density is 1 and coverage 1 - prod_{i<k} (R - 1 - i) / (R + G - 1
    - i). When the generated cloud is a shrunk copy, recall falls long before coverage does.

    A point on the sphere lies in the ball (`<=`, as arXiv:1904.06991 defines it; the package `prdc` takes `<`): rows
    that repeat more than k times have balls of radius zero, which hold what is equal to them. So for two equal clouds
    precision, recall and coverage are 1, whatever repeats in them; density, which counts balls, is larger than 1 there.
    """
    generated, real = _pair(generated, real, least=k + 1)
    middle = real.mean(0)  # distances do not change, and lose fewer digits
    generated, real = generated - middle, real - middle
    radius_R, radius_G = _radii(real, k), _radii(generated, k)
    found = [
        _ball_counts(generated[i : i + BLOCK], real, radius_R, radius_G[i : i + BLOCK])
        for i in range(0, len(generated), BLOCK)
    ]
    in_real_G = np.concatenate([f[0] for f in found]).astype(np.float64)
    reached_R = np.any([f[1] for f in found], axis=0)
    covered_R = np.any([f[2] for f in found], axis=0)
    return {
        "precision": float((in_real_G > 0).mean()),
        "recall": float(reached_R.mean()),
        "density": float(in_real_G.mean() / k),
        "coverage": float(covered_R.mean()),
    }


def coverage_of_equals(real: int, generated: int, k: int = 5) -> float:
    """Expected coverage when both clouds are from one distribution: the null of `coverage`."""
    i = np.arange(k)
    return float(1 - np.prod((real - 1 - i) / (real + generated - 1 - i)))


def _radii(x_ND: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th neighbour, itself not counted."""
    parts = [
        _kth(x_ND[i : i + BLOCK], np.arange(i, min(i + BLOCK, len(x_ND))), x_ND, k=k)
        for i in range(0, len(x_ND), BLOCK)
    ]
    return np.concatenate(parts)


def _squares(x_ND, y_MD):
    """(squared distances, how exact they are): by |x|^2 + |y|^2 - 2 x y, whose rounding is of the second's size
    (errors of D products add up as their root). What is less than that is zero."""
    sizes_NM = (x_ND**2).sum(1)[:, None] + (y_MD**2).sum(1)[None]
    slack_NM = 8 * (x_ND.shape[1] ** 0.5 + 2) * jnp.finfo(sizes_NM.dtype).eps * sizes_NM
    away_NM = sizes_NM - 2 * x_ND @ y_MD.T
    return jnp.where(away_NM > slack_NM, away_NM, 0.0), slack_NM


@functools.partial(_on_device, static=("k",))
def _kth(x_BD, index_B, y_ND, k):
    """Where there are many rows, the k-th smallest is looked for in the k stripes with the smallest minima, which hold
    it."""
    away_BN = _squares(x_BD, y_ND)[0].at[jnp.arange(len(index_B)), index_B].set(jnp.inf)
    B, N = away_BN.shape
    if N > 4 * STRIPE * k:
        padded_BN = jnp.pad(away_BN, ((0, 0), (0, -N % STRIPE)), constant_values=jnp.inf)
        minima_BW = padded_BN
        while minima_BW.shape[1] * STRIPE > padded_BN.shape[1]:  # halving: XLA's CPU reductions are not vectorised
            minima_BW = jnp.minimum(*jnp.split(minima_BW, 2, axis=1))
        chosen_Bk = _least(minima_BW, k)[1]
        away_BSW = padded_BN.reshape(B, STRIPE, -1)
        away_BN = jnp.take_along_axis(away_BSW, chosen_Bk[:, None], axis=2).reshape(B, -1)
    return _least(away_BN, k)[0][:, -1]


def _least(x_BN, k):
    """(the k smallest of each row, where they stand) by k passes: on a CPU several times as fast as top_k."""
    rows, found, places = jnp.arange(x_BN.shape[0]), [], []
    for _ in range(k):
        places.append(jnp.argmin(x_BN, axis=1))
        found.append(x_BN[rows, places[-1]])
        x_BN = x_BN.at[rows, places[-1]].set(jnp.inf)
    return jnp.stack(found, axis=1), jnp.stack(places, axis=1)


@_on_device
def _ball_counts(generated_BD, real_RD, radius_R, radius_B):
    """(real balls each generated row lies in, real rows in a generated ball, real rows whose ball holds one)."""
    away_BR, slack_BR = _squares(generated_BD, real_RD)
    away_BR -= slack_BR  # a tie is a tie, however it was rounded
    in_real_BR = (away_BR <= radius_R[None]).astype(jnp.float32)  # counted by products: exact, faster than reductions
    in_generated_BR = (away_BR <= radius_B[:, None]).astype(jnp.float32)
    rows_B, rows_R = jnp.ones(in_real_BR.shape[0], jnp.float32), jnp.ones(in_real_BR.shape[1], jnp.float32)
    return in_real_BR @ rows_R, rows_B @ in_generated_BR > 0, rows_B @ in_real_BR > 0
