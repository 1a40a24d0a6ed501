"""Linear models refitted to their own labels: least squares (arXiv:2404.01413, sec. 3; arXiv:2410.04840) and the
averaging classifier under a verifier (arXiv:2406.07515)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax.collapse.lab.chain import Family, mask, normal


@dataclasses.dataclass(frozen=True)
class Regression(Family):
    """y = x w + noise * N(0, 1) with x ~ N(0, I) and w = 0, so that |w_k|^2 is the excess risk. params: w `[d]`.

    covariates: `same` reuses one design in every round (as the theory does), `fresh` draws it anew. shift: the norm by
    which the first labeller is off, in an arbitrary direction (arXiv:2410.04840); real rows keep the true w.
    """

    dimensions: int = 10
    samples: int = 111
    noise: Any = 1.0
    covariates: str = "same"
    shift: Any = 0.0

    name = "regression"
    additive = True

    def prepare(self, key):
        return normal(key, (self.samples, self.dimensions)) if self.covariates == "same" else ()

    def truth(self):
        return jnp.zeros(self.dimensions), jnp.zeros(self.dimensions)

    def start(self, truth, context):
        """The first labeller."""
        return truth[0].at[0].add(self.shift), truth[1]

    def sample(self, params, key, most: int, count, context):
        x_key, noise_key = jax.random.split(key)
        x_ND = context[:most] if self.covariates == "same" else normal(x_key, (most, self.dimensions))
        y_N = x_ND @ params[0] + self.noise * normal(noise_key, (most,))
        return (x_ND, y_N), mask(most, count)

    def statistics(self, data, weight_N, context, previous=None):
        x_ND, y_N = data
        weighted_ND = x_ND * weight_N[:, None]
        return weighted_ND.T @ x_ND, weighted_ND.T @ y_N

    def merge(self, a, b):
        return a[0] + b[0], a[1] + b[1]

    def estimate(self, statistics, previous, context):
        return jnp.linalg.solve(*statistics), previous[1]

    def log_prob(self, params, data):
        x_ND, y_N = data
        return jax.scipy.stats.norm.logpdf(y_N, x_ND @ params[0], self.noise)

    def measure(self, params, context):
        return {"excess_risk": (params[0] ** 2).sum()}


@dataclasses.dataclass(frozen=True)
class Classifier(Family):
    """sign(x w) with x ~ N(0, I), learnt as the mean of y x. params: w `[d]` and the share of labels its labeller
    flips, `error` in the first round and 0 after. A verifier holds for right the labels that the truth gives."""

    dimensions: int = 20
    error: Any = 0.1

    name = "classifier"
    additive = True

    def truth(self):
        return jnp.zeros(self.dimensions).at[0].set(1.0), jnp.asarray(0.0)

    def start(self, truth, context):
        return truth[0], jnp.asarray(self.error) + truth[1]

    def sample(self, params, key, most: int, count, context):
        w_D, error = params
        x_key, flip_key = jax.random.split(key)
        x_ND = normal(x_key, (most, self.dimensions))
        flip_N = jax.random.bernoulli(flip_key, error, (most,))
        return (x_ND, jnp.where(flip_N, -1.0, 1.0) * jnp.sign(x_ND @ w_D)), mask(most, count)

    def right(self, data):
        return data[1] == jnp.sign(data[0][:, 0])

    def statistics(self, data, weight_N, context, previous=None):
        return (data[0] * (weight_N * data[1])[:, None]).sum(0)

    def merge(self, a, b):
        return a + b

    def estimate(self, statistics, previous, context):
        return statistics / jnp.linalg.norm(statistics), jnp.zeros_like(previous[1])

    def log_prob(self, params, data):
        return jnp.where(jnp.sign(data[0] @ params[0]) == data[1], 0.0, -jnp.inf)

    def measure(self, params, context):
        """`accuracy` against the truth's labels: 1 - angle / pi. Of the labeller before the first round: what it
        flips."""
        w_D, error = params
        accuracy = 1 - jnp.arccos(jnp.clip(w_D[0] / jnp.linalg.norm(w_D), -1.0, 1.0)) / jnp.pi
        return {"accuracy": accuracy * (1 - error) + (1 - accuracy) * error}
