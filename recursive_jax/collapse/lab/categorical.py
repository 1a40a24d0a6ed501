"""Categorical distributions refitted to counts: neutral drift, extinction of rare types, verifiers, temperature."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.collapse.lab.chain import Family, mask


@dataclasses.dataclass(frozen=True)
class Categorical(Family):
    """`categories` types with probabilities proportional to rank^-zipf (0: uniform), or as given. params: p `[V]`.

    temperature: rows are drawn from p^(1/T). truncation: only from the most likely types that hold this share (top-p;
    1: off). The first `right_types` types are what a verifier holds for right. population: no sampling at all, every
    round is drawn infinitely often. counted: rows come as counts of the types, by binomial draws: faster where a round
    has many rows of few types."""

    categories: int = 50
    zipf: Any = 0.0
    probabilities: tuple[float, ...] = ()
    temperature: Any = 1.0
    truncation: Any = 1.0
    right_types: int = 1
    population: bool = False
    counted: bool = False

    name = "categorical"
    additive = True

    def truth(self) -> jax.Array:
        if self.probabilities:
            p_V = jnp.asarray(self.probabilities)
        else:
            p_V = jnp.arange(1, self.categories + 1, dtype=jnp.result_type(float)) ** -jnp.asarray(self.zipf)
        return p_V / p_V.sum()

    def biased(self, p_V: jax.Array) -> jax.Array:
        """What is drawn from: sharpened, then truncated."""
        if not (isinstance(self.temperature, int | float) and self.temperature == 1):
            alive = p_V > 0
            p_V = jnp.where(alive, jnp.exp(jnp.log(jnp.where(alive, p_V, 1.0)) / self.temperature), 0.0)
            p_V = p_V / p_V.sum()
        if not (isinstance(self.truncation, int | float) and self.truncation == 1):
            order_V = jnp.argsort(-p_V)
            before_V = jnp.cumsum(p_V[order_V]) - p_V[order_V]
            kept_V = jnp.zeros_like(p_V, bool).at[order_V].set(before_V < self.truncation)
            p_V = jnp.where(kept_V, p_V, 0.0)
            p_V = p_V / p_V.sum()
        return p_V

    def sample(self, params, key, most: int, count, context) -> tuple[jax.Array, jax.Array]:
        p_V = self.biased(params)
        V = self.categories
        if self.population:
            return jnp.arange(V), p_V
        if self.counted:
            return jnp.arange(V), multinomial(key, count, p_V)
        until_V = jnp.cumsum(p_V)
        u_N = jax.random.uniform(key, (most,), until_V.dtype) * until_V[-1]
        method = "compare_all" if V <= 128 else "scan_unrolled"
        ids_N = jnp.searchsorted(until_V, u_N, side="right", method=method)
        return jnp.minimum(ids_N, V - 1), mask(most, count)

    def right(self, data: jax.Array) -> jax.Array:
        return data < self.right_types

    def thin(self, key, weight_N, rate_N):
        if self.population:
            return weight_N * rate_N
        if self.counted:
            return jax.random.binomial(key, weight_N, rate_N)
        return super().thin(key, weight_N, rate_N)

    def statistics(self, data, weight_N, context, previous=None) -> jax.Array:
        """Counts `[V]`."""
        return jnp.zeros(self.categories, weight_N.dtype).at[data].add(weight_N)

    def merge(self, a, b):
        return a + b

    def estimate(self, statistics, previous, context) -> jax.Array:
        """Frequencies; a round of which nothing was kept leaves the model as it is."""
        total = statistics.sum()
        return jnp.where(total > 0, statistics / jnp.maximum(total, 1e-300), previous)

    def log_prob(self, params, data: jax.Array) -> jax.Array:
        return jnp.log(params[data])

    def measure(self, params, context) -> dict[str, jax.Array]:
        """`kl`: KL(truth || model), infinite once a type is lost; `kl_reverse`: KL(model || truth). `fixated`: one type
        is left. `log_odds`: of the first two types, without sampling noise. `right_mass`: of the types a verifier holds
        for right. Nats."""
        p_V, truth_V = params, self.truth()
        alive_V = p_V > 0
        log_V = jnp.log(jnp.where(alive_V, p_V, 1.0))
        entropy = -(p_V * log_V).sum()
        forward_V = truth_V * (jnp.log(truth_V) - jnp.where(alive_V, log_V, -jnp.inf))
        found = {
            "gini": 1 - (p_V**2).sum(),
            "entropy": entropy,
            "types_alive": alive_V.sum(),
            "tail_mass_lost": jnp.where(alive_V, 0.0, truth_V).sum(),
            "fixated": alive_V.sum() == 1,
            "kl": forward_V.sum(),
            "kl_reverse": -entropy - (p_V * jnp.log(truth_V)).sum(),
            "mean_squared_error": ((p_V - truth_V) ** 2).sum(),
            "first_mass": p_V[0],
            "right_mass": p_V[: self.right_types].sum(),
        }
        if self.population and self.categories > 1:  # elsewhere both may be lost
            found["log_odds"] = jnp.log(p_V[0]) - jnp.log(p_V[1])
        return found


def multinomial(key: jax.Array, count: Any, p_V: jax.Array) -> jax.Array:
    """Counts `[V]` of `count` draws, as binomials of what the types before have left."""
    left_V = 1 - jnp.cumsum(p_V) + p_V  # mass from each type on

    def one(left, inputs):
        key, p, mass = inputs
        n = jax.random.binomial(key, left, jnp.clip(p / jnp.maximum(mass, 1e-300), 0.0, 1.0))
        return left - n, n

    last = jnp.arange(len(p_V)) == len(p_V) - 1
    inputs = (jax.random.split(key, len(p_V)), jnp.where(last, 1.0, p_V), jnp.where(last, 1.0, left_V))
    return jax.lax.scan(one, jnp.asarray(count, p_V.dtype), inputs)[1]


@dataclasses.dataclass(frozen=True)
class Poisson(Family):
    """Poisson(rate), refitted to the mean of its samples. params: the rate; 0 is never left again."""

    rate: Any = 1.0

    name = "poisson"
    additive = True

    def truth(self) -> jax.Array:
        return jnp.asarray(self.rate, jnp.result_type(float))

    def sample(self, params, key, most: int, count, context):
        return jax.random.poisson(key, params, (most,)).astype(jnp.result_type(float)), mask(most, count)

    def statistics(self, data, weight_N, context, previous=None):
        return jnp.stack([weight_N.sum(), (weight_N * data).sum()])

    def merge(self, a, b):
        return a + b

    def estimate(self, statistics, previous, context):
        return statistics[1] / statistics[0]

    def log_prob(self, params, data):
        return jax.scipy.stats.poisson.logpmf(data, params)

    def measure(self, params, context):
        """`extinct`: the rate is 0. `kl`: KL(truth || model), nats, infinite then."""
        rate = np.float64(1.0) * self.truth()
        return {
            "mean": params,
            "mean_squared_error": (params - rate) ** 2,
            "extinct": params == 0,
            "kl": rate * jnp.log(rate / params) - rate + params,
        }
