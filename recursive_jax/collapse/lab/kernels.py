"""Models that are their data or must search: kernel density estimates and Gaussian mixtures."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.collapse.lab.chain import Family, mask, normal


@dataclasses.dataclass(frozen=True)
class Kernel(Family):
    """A Gaussian kernel density estimate of N(0, I) (arXiv:2410.16713). params: the points `[N, d]`, their weights and
    the width of the kernel. `bandwidth` 0 is Silverman's rule of the points. `log_prob` costs N for each row.

    Its variance does not vanish under `replace` but tends to (M - 1) bandwidth^2.
    """

    dimensions: int = 1
    samples: int = 100
    pooled: int = 0  # rows of the largest fit; 0: `samples`
    bandwidth: Any = 0.2

    name = "kde"

    def truth(self):
        """Round 0 is the truth itself: no points, and a kernel of width 1 about the origin."""
        N = self.pooled or self.samples
        return jnp.zeros((N, self.dimensions)), mask(N, N), jnp.ones(self.dimensions)

    def sample(self, params, key, most: int, count, context):
        points_ND, weight_N, width_D = params
        which_key, noise_key = jax.random.split(key)
        until_N = jnp.cumsum(weight_N)
        u_M = jax.random.uniform(which_key, (most,), until_N.dtype) * until_N[-1]
        index_M = jnp.minimum(jnp.searchsorted(until_N, u_M, side="right"), len(weight_N) - 1)
        noise_MD = normal(noise_key, (most, self.dimensions)) * width_D
        return points_ND[index_M] + noise_MD, mask(most, count)

    def fit(self, data, weight_N, previous, context, key):
        missing = len(previous[1]) - len(weight_N)
        width_D = jnp.broadcast_to(jnp.asarray(self.bandwidth, data.dtype), (self.dimensions,))
        if isinstance(self.bandwidth, int | float) and self.bandwidth == 0:
            n, d = weight_N.sum(), self.dimensions
            width_D = jnp.sqrt(_moments(data, weight_N)[1]) * (n * (d + 2) / 4) ** (-1 / (d + 4))
        return jnp.pad(data, ((0, missing), (0, 0))), jnp.pad(weight_N, (0, missing)), width_D

    def log_prob(self, params, data):
        points_ND, weight_N, width_D = params
        z_RND = (data[:, None] - points_ND) / width_D
        log_RN = -0.5 * (z_RND**2).sum(-1) - jnp.log(width_D).sum() - 0.5 * self.dimensions * np.log(2 * np.pi)
        return jax.nn.logsumexp(log_RN, b=weight_N / weight_N.sum(), axis=-1)

    def measure(self, params, context):
        """`variance`: of the points (mean over axes; that of the model has the kernel's on top, `model_variance`)."""
        points_ND, weight_N, width_D = params
        mean_D, variance_D = _moments(points_ND, weight_N)
        is_truth = jnp.all(points_ND == 0)
        variance = jnp.where(is_truth, 1.0, variance_D.mean())
        return {
            "mean": mean_D.mean(),
            "mean_squared_error": (mean_D**2).sum(),
            "variance": variance,
            "log_variance": jnp.log(variance),
            "model_variance": jnp.where(is_truth, 1.0, variance_D.mean() + (width_D**2).mean()),
        }


def _moments(data_ND: jax.Array, weight_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = weight_N.sum()
    mean_D = (weight_N[:, None] * data_ND).sum(0) / total
    return mean_D, (weight_N[:, None] * (data_ND - mean_D) ** 2).sum(0) / total


@dataclasses.dataclass(frozen=True)
class Mixture(Family):
    """`components` Gaussians of full covariance in two dimensions, at equal angles on a circle of radius `separation`
    (arXiv:2305.17493, sec. 4.2 uses two). params: weights `[C]`, means `[C, 2]`, covariances `[C, 2, 2]`.

    fit: `iterations` of expectation maximisation from the last model's params, covariances kept above `floor`.
    """

    components: int = 2
    separation: Any = 2.0
    iterations: int = 50
    floor: float = 1e-6

    name = "mixture"

    def truth(self):
        C = self.components
        angle_C = 2 * jnp.pi * jnp.arange(C) / C
        means_C2 = self.separation * jnp.stack([jnp.cos(angle_C), jnp.sin(angle_C)], -1)
        return jnp.full(C, 1.0 / C), means_C2, jnp.broadcast_to(jnp.eye(2), (C, 2, 2))

    def sample(self, params, key, most: int, count, context):
        weight_C, mean_C2, cov_C22 = params
        which_key, noise_key = jax.random.split(key)
        which_N = jax.random.categorical(which_key, jnp.log(weight_C), shape=(most,))
        root_C22 = jnp.linalg.cholesky(cov_C22)
        noise_N2 = jnp.einsum("nij,nj->ni", root_C22[which_N], normal(noise_key, (most, 2)))
        return mean_C2[which_N] + noise_N2, mask(most, count)

    def _component_log_prob(self, params, data_N2) -> jax.Array:
        weight_C, mean_C2, cov_C22 = params
        a, b, c = cov_C22[:, 0, 0], cov_C22[:, 0, 1], cov_C22[:, 1, 1]
        det_C = a * c - b * b
        x_NC, y_NC = (data_N2[:, None, i] - mean_C2[:, i] for i in (0, 1))
        square_NC = (c * x_NC**2 - 2 * b * x_NC * y_NC + a * y_NC**2) / det_C
        return jnp.log(weight_C) - 0.5 * (square_NC + jnp.log(det_C)) - jnp.log(2 * jnp.pi)

    def log_prob(self, params, data):
        return jax.nn.logsumexp(self._component_log_prob(params, data), axis=-1)

    def fit(self, data, weight_N, previous, context, key):
        def step(_, params):
            share_NC = jax.nn.softmax(self._component_log_prob(params, data), axis=-1) * weight_N[:, None]
            total_C = share_NC.sum(0) + 1e-12
            mean_C2 = share_NC.T @ data / total_C[:, None]
            away_NC2 = data[:, None] - mean_C2
            cov_C22 = jnp.einsum("nc,nci,ncj->cij", share_NC, away_NC2, away_NC2) / total_C[:, None, None]
            return total_C / total_C.sum(), mean_C2, cov_C22 + self.floor * jnp.eye(2)

        return jax.lax.fori_loop(0, self.iterations, step, previous)

    def measure(self, params, context):
        """`l2`: the integral of the squared difference of the two densities (closed form). `separation`: mean distance
        of the components from their centre. `weight_entropy` in nats."""
        weight_C, mean_C2, cov_C22 = params
        centre_2 = weight_C @ mean_C2
        within = jnp.einsum("c,cij->ij", weight_C, cov_C22)
        between = jnp.einsum("c,ci,cj->ij", weight_C, mean_C2 - centre_2, mean_C2 - centre_2)
        truth = self.truth()
        overlap = lambda p, q: jnp.einsum("i,j,ij->", p[0], q[0], _products(p, q))
        return {
            "mean_squared_error": (centre_2**2).sum(),
            "variance": jnp.trace(within + between) / 2,
            "component_variance": jnp.trace(within) / 2,
            "separation": jnp.sqrt(((mean_C2 - centre_2) ** 2).sum(-1)).mean(),
            "weight_entropy": -(weight_C * jnp.log(jnp.maximum(weight_C, 1e-300))).sum(),
            "l2": overlap(params, params) - 2 * overlap(params, truth) + overlap(truth, truth),
        }


def _products(p, q) -> jax.Array:
    """Integrals of the products of two mixtures' components: N(m_i - m_j; 0, S_i + S_j)."""
    away_IJ2 = p[1][:, None] - q[1][None]
    cov_IJ22 = p[2][:, None] + q[2][None]
    a, b, c = cov_IJ22[..., 0, 0], cov_IJ22[..., 0, 1], cov_IJ22[..., 1, 1]
    det = a * c - b * b
    x, y = away_IJ2[..., 0], away_IJ2[..., 1]
    return jnp.exp(-0.5 * (c * x**2 - 2 * b * x * y + a * y**2) / det) / (2 * jnp.pi * jnp.sqrt(det))
