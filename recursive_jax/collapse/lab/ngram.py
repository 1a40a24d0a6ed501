"""An n-gram language model refitted to its own text."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.collapse.lab.chain import Family, mask


@dataclasses.dataclass(frozen=True)
class Ngram(Family):
    """Text of `categories` types in which the type after each context of order - 1 types has probabilities proportional
    to rank^-zipf, every context with an order of its own. Rows are `length` types long and begin in a uniform context.

    params: the table `[C, V]` of next-type probabilities. smoothing: added to every count; contexts never seen keep
    their last probabilities."""

    categories: int = 20
    order: int = 2
    zipf: Any = 1.0
    length: int = 32
    smoothing: Any = 0.0
    language: int = 0  # seed of the truth

    name = "ngram"
    additive = True

    @property
    def contexts(self) -> int:
        return self.categories ** (self.order - 1)

    def truth(self) -> jax.Array:
        rng = np.random.default_rng(self.language)
        rank_CV = np.argsort(rng.random((self.contexts, self.categories)), axis=1)
        p_CV = (1.0 + jnp.asarray(rank_CV, jnp.result_type(float))) ** -jnp.asarray(self.zipf)
        return p_CV / p_CV.sum(1, keepdims=True)

    def sample(self, params, key, most: int, count, context):
        first_key, key = jax.random.split(key)
        until_CV = jnp.cumsum(params, axis=1)
        first_N = jax.random.randint(first_key, (most,), 0, self.contexts)

        def step(before_N, key):
            row_NV = until_CV[before_N]
            u_N = jax.random.uniform(key, (most,), row_NV.dtype) * row_NV[:, -1]
            type_N = jnp.minimum((row_NV <= u_N[:, None]).sum(1), self.categories - 1)
            return (before_N * self.categories + type_N) % self.contexts, type_N

        _, types_LN = jax.lax.scan(step, first_N, jax.random.split(key, self.length))
        return (first_N, types_LN.T), mask(most, count)

    def _walk(self, data) -> tuple[jax.Array, jax.Array]:
        """The context before each type, and the type; both `[N, L]`."""
        first_N, types_NL = data

        def step(before_N, type_N):
            return (before_N * self.categories + type_N) % self.contexts, before_N

        _, before_LN = jax.lax.scan(step, first_N, types_NL.T)
        return before_LN.T, types_NL

    def statistics(self, data, weight_N, context, previous=None):
        before_NL, types_NL = self._walk(data)
        counts_CV = jnp.zeros((self.contexts, self.categories), weight_N.dtype)
        return counts_CV.at[before_NL, types_NL].add(jnp.broadcast_to(weight_N[:, None], types_NL.shape))

    def merge(self, a, b):
        return a + b

    def estimate(self, statistics, previous, context):
        counts_CV = statistics + self.smoothing
        total_C1 = counts_CV.sum(1, keepdims=True)
        return jnp.where(total_C1 > 0, counts_CV / jnp.maximum(total_C1, 1e-300), previous)

    def log_prob(self, params, data):
        before_NL, types_NL = self._walk(data)
        return jnp.log(params[before_NL, types_NL]).sum(1) - np.log(self.contexts)

    def measure(self, params, context):
        """Per token, in nats, contexts weighted as the truth's text visits them: `kl` KL(truth || model), infinite once
        an n-gram is lost; `kl_reverse`; `entropy` of the next type. `types_alive`: n-grams still possible;
        `tail_mass_lost`: the truth's mass on the others."""
        truth_CV = self.truth()
        visit_C = stationary(truth_CV, self.order)
        alive_CV = params > 0
        log_CV = jnp.log(jnp.where(alive_CV, params, 1.0))
        entropy_C = -(params * log_CV).sum(1)
        forward_CV = truth_CV * (jnp.log(truth_CV) - jnp.where(alive_CV, log_CV, -jnp.inf))
        return {
            "kl": visit_C @ forward_CV.sum(1),
            "kl_reverse": visit_C @ (-entropy_C - (params * jnp.log(truth_CV)).sum(1)),
            "entropy": visit_C @ entropy_C,
            "gini": visit_C @ (1 - (params**2).sum(1)),
            "types_alive": alive_CV.sum(),
            "tail_mass_lost": visit_C @ jnp.where(alive_CV, 0.0, truth_CV).sum(1),
        }


def stationary(table_CV: jax.Array, order: int, steps: int = 64) -> jax.Array:
    """How often text of the table is in each context, `[C]`, by power iteration from uniform."""
    C, V = table_CV.shape
    if order == 1:
        return jnp.ones(1)
    after_CV = (jnp.arange(C)[:, None] * V + jnp.arange(V)[None]) % C
    step = lambda _, visit_C: jnp.zeros(C, visit_C.dtype).at[after_CV].add(visit_C[:, None] * table_CV)
    return jax.lax.fori_loop(0, steps, step, jnp.full(C, 1.0 / C, table_CV.dtype))
