"""Gaussians in any dimension, refitted to their own samples (arXiv:2305.17493, sec. 4; arXiv:2410.16713;
arXiv:2307.01850)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.scipy.stats import truncnorm

from recursive_jax.collapse.lab.chain import Family, mask, normal

ESTIMATORS = ("mle", "unbiased", "known_variance")


@dataclasses.dataclass(frozen=True)
class Gaussian(Family):
    """N(0, diag(spectrum)). params: the mean `[d]` and a root `[d, d]` with root^T root = covariance.

    Covariances are kept as roots and never as differences of moments: the variance of a collapsed chain is many orders
    of magnitude smaller than its mean square. `root`: `triangular`, by QR; `whitened`, by the Cholesky factor of rows
    seen from the last model, several times as fast where there are many rows for each dimension; `rows`, the centred
    rows themselves where there are no more of them than dimensions (the determinant is 0).

    draw: `rows`, or `statistics`: the mean and the root of the scatter of n rows are drawn themselves (Bartlett's
    decomposition of the Wishart distribution), which is the same in distribution and, for many rows, many times as
    fast; `auto` is that from four rows for each of several dimensions on.

    estimator: `mle` divides by n, `unbiased` by n - 1, `known_variance` fits the mean alone. Sampling bias: the
    variance is multiplied by `temperature` (that of density^(1/T)) and `shrink` (arXiv:2307.01850, sec. 2), divided by
    1 + `guidance`; `truncation` draws within that many standard deviations (0: off). The verifier holds for right what
    lies within `radius` of `center` on every axis."""

    dimensions: int = 1
    spectrum: tuple[float, ...] = ()
    estimator: str = "mle"
    temperature: Any = 1.0
    shrink: Any = 1.0
    guidance: Any = 0.0
    truncation: Any = 0.0
    center: Any = 0.0
    radius: Any = 1.0
    draw: str = "auto"
    root: str = "triangular"

    name = "gaussian"
    additive = True

    @property
    def scales(self) -> jax.Array:
        """Standard deviations of the truth, `[d]`."""
        return jnp.sqrt(jnp.asarray(self.spectrum or (1.0,) * self.dimensions))

    def truth(self) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(self.scales), jnp.diag(self.scales)

    @property
    def bias(self) -> Any:
        """Factor of the variance that is drawn from."""
        return self.temperature * self.shrink / (1 + self.guidance)

    def draw_statistics(self, params, key, count, context):
        """`statistics` of `count` > d rows, without the rows."""
        mean_D, root_DD = params
        d = self.dimensions
        mean_key, below_key, diagonal_key = jax.random.split(key, 3)
        scale = jnp.sqrt(self.bias)
        centre_D = mean_D + scale / jnp.sqrt(count) * (normal(mean_key, (d,)) @ root_DD)
        freedom_D = count - 1 - jnp.arange(d)
        upper_DD = jnp.triu(normal(below_key, (d, d)), 1)
        upper_DD += jnp.diag(jnp.sqrt(jax.random.chisquare(diagonal_key, freedom_D.astype(jnp.result_type(float)))))
        return jnp.asarray(count, jnp.result_type(float)), centre_D, scale * upper_DD @ root_DD

    def sample(self, params, key, most: int, count, context) -> tuple[jax.Array, jax.Array]:
        mean_D, root_DD = params
        z_ND = normal(key, (most, self.dimensions))
        if not (isinstance(self.truncation, int | float) and self.truncation == 0):
            u_ND = jax.random.uniform(key, z_ND.shape)
            z_ND = truncnorm.ppf(u_ND, -self.truncation, self.truncation)
        z_ND = z_ND * jnp.sqrt(self.bias)
        spread_ND = z_ND * root_DD[0, 0] if self.dimensions == 1 else z_ND @ root_DD
        return mean_D + spread_ND, mask(most, count)

    def right(self, data: jax.Array) -> jax.Array:
        return jnp.all(jnp.abs(data - self.center) <= self.radius, axis=-1)

    def statistics(self, data, weight_N, context, previous=None):
        """(weight, mean `[d]`, root `[d, d]` of the scatter about the mean)."""
        total = weight_N.sum()
        mean_D = (weight_N[:, None] * data).sum(0) / jnp.maximum(total, 1e-300)
        away_ND = jnp.sqrt(weight_N)[:, None] * (data - mean_D)
        if self.dimensions > 1 and self.root == "rows":
            return total, mean_D, jnp.pad(away_ND, ((0, self.dimensions - len(away_ND)), (0, 0)))
        if self.dimensions > 1 and self.root == "whitened":
            seen_DN = solve_triangular(previous[1].T, away_ND.T, lower=True)
            return total, mean_D, jnp.linalg.cholesky(seen_DN @ seen_DN.T).T @ previous[1]
        return total, mean_D, self._root(away_ND)

    def merge(self, a, b):
        total = a[0] + b[0]
        mean_D = (a[0] * a[1] + b[0] * b[1]) / jnp.maximum(total, 1e-300)
        between_1D = jnp.sqrt(a[0] * b[0] / jnp.maximum(total, 1e-300)) * (a[1] - b[1])[None]
        return total, mean_D, self._root(jnp.concatenate([a[2], b[2], between_1D]))

    def _root(self, rows_ND: jax.Array) -> jax.Array:
        """Triangular R with R^T R = rows^T rows."""
        if self.dimensions == 1:
            return jnp.sqrt((rows_ND**2).sum(0, keepdims=True))
        short = max(0, self.dimensions - len(rows_ND))
        return jnp.linalg.qr(jnp.pad(rows_ND, ((0, short), (0, 0))), mode="r")

    def estimate(self, statistics, previous, context):
        total, mean_D, root_DD = statistics
        if self.estimator == "known_variance":
            return mean_D, previous[1]
        return mean_D, root_DD / jnp.sqrt(total - (self.estimator == "unbiased"))

    def log_prob(self, params, data: jax.Array) -> jax.Array:
        mean_D, root_DD = params
        z_DN = solve_triangular(root_DD.T, (data - mean_D).T, lower=True)
        half = jnp.log(jnp.abs(jnp.diag(root_DD))).sum() + 0.5 * self.dimensions * jnp.log(2 * jnp.pi)
        return -0.5 * (z_DN**2).sum(0) - half

    def measure(self, params, context) -> dict[str, jax.Array]:
        """`variance` is the mean over axes, `log_variance` that of log det, `wasserstein2` the squared distance to the
        truth, `kl` KL(truth || model) in nats."""
        (mean_D, root_DD), scale_D, d = params, self.scales, self.dimensions
        mse = (mean_D**2).sum()
        variance = (root_DD**2).sum() / d
        log_det = 2 * jnp.log(jnp.abs(jnp.diag(root_DD))).sum()
        if self.root == "rows":
            log_det = jnp.where(jnp.any(root_DD != jnp.diag(scale_D)), -jnp.inf, log_det)  # round 0 is the truth
        nuclear = jnp.abs(root_DD[0, 0]) * scale_D[0]
        if d > 1:
            nuclear = jnp.linalg.svd(root_DD * scale_D, compute_uv=False).sum()
        whitened = solve_triangular(root_DD.T, jnp.concatenate([jnp.diag(scale_D), mean_D[:, None]], 1), lower=True)
        kl = 0.5 * ((whitened**2).sum() - d + log_det - 2 * jnp.log(scale_D).sum())
        return {
            "mean": mean_D.mean(),
            "mean_squared_error": mse,
            "variance": variance,
            "log_variance": log_det / d,
            "log_determinant": log_det,
            "std": jnp.sqrt(variance),
            "wasserstein2": mse + d * variance + (scale_D**2).sum() - 2 * nuclear,
            "kl": jnp.where(jnp.isneginf(log_det), jnp.inf, kl),
        }
