"""`chain`: rounds of (sample from the model, mix by the regime, fit again), for any family of models.

A family is a frozen dataclass:

    truth() -> params                                      what real rows are drawn from
    prepare(key) -> context                                what one replicate keeps: fixed covariates, say
    start(truth, context) -> params                        round 0; the truth unless the first model is already off
    sample(params, key, most, count, context) -> (data, weight_N)    `most` rows, those from `count` on with weight 0
    right(data) -> bool_N                                  what a verifier holds to be right
    fit(data, weight_N, previous, context, key) -> params
    log_prob(params, data) -> float_N
    measure(params, context) -> {statistic: number}

Where these methods can be traced (`traced`, the default), the rounds are one `lax.scan`, to be vmapped over replicates.
Any other family, a transformer trained and sampled by this package's own verbs or a model of another library, runs the
same rounds in a Python loop; its data is an array or a tree of arrays, its params are anything.

An additive family has sufficient statistics: `statistics(data, weight_N, context, previous)`, `merge(a, b)` and
`estimate(statistics, previous, context)`, of which `fit` is the composition. Its pool of all rounds then has the size
of one statistic; any other family keeps the rows.

Shapes: N rows of a round, M of them at most, K rounds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

REGIMES = ("replace", "accumulate", "accumulate_subsample", "fresh", "anchor", "weighted", "filtered")


class Family:
    """Defaults of a family; see the module."""

    name = ""
    additive = False
    traced = True
    apart = False  # replicates one after another instead of side by side

    def start(self, truth: Any, context: Any) -> Any:
        return truth

    def prepare(self, key: jax.Array) -> Any:
        return ()

    def fit(self, data: Any, weight_N: jax.Array, previous: Any, context: Any, key: jax.Array) -> Any:
        return self.estimate(self.statistics(data, weight_N, context, previous), previous, context)

    def right(self, data: Any) -> jax.Array:
        raise NotImplementedError(f"{self.name} has no verifier")

    def thin(self, key: jax.Array, weight_N: jax.Array, rate_N: jax.Array) -> jax.Array:
        """Weights after each row was kept with its rate."""
        return weight_N * jax.random.bernoulli(key, rate_N)


@dataclasses.dataclass(frozen=True)
class Regime:
    """What a round is trained on.

    `replace`: the last model's rows. `accumulate`: those of all rounds. `accumulate_subsample`: as many of those as a
    round has, without replacement. `fresh`: a share `fraction` of new rows of the truth. `anchor`: the same share, the
    same rows in every round. `weighted`: as many rows of the truth again, with weight `weight` against 1 - weight.
    `filtered`: a verifier keeps right rows with probability keep_right, wrong ones with keep_wrong.
    """

    name: str = "replace"
    fraction: float = 0.0
    weight: Any = 0.5
    keep_right: Any = 1.0
    keep_wrong: Any = 1.0

    def real_rows(self, samples: int) -> int:
        return round(self.fraction * samples) if self.name in ("fresh", "anchor") else 0


def chain(family: Family, regime: Regime, sizes: tuple[int, ...], key: jax.Array) -> dict[str, jax.Array]:
    """The statistics of rounds 0 .. K of one replicate, each `[K + 1]`. sizes: rows of each of the K rounds."""
    M, K = max(sizes), len(sizes)
    context_key, anchor_key, key = jax.random.split(key, 3)
    context = family.prepare(context_key)
    first = family.start(family.truth(), context)
    mix = _Mix(family, regime, M, K, context, anchor_key)
    keys_K = jax.random.split(key, K)
    if not family.traced:
        params, pool, found = first, None, [family.measure(first, context)]
        for k, size in enumerate(sizes):
            params, pool = mix.fit(params, pool, keys_K[k], k, size)
            found.append(family.measure(params, context))
        return {name: np.array([x[name] for x in found]) for name in found[0]}

    def one_round(carry, inputs):
        params, pool = carry
        key, k, size = inputs
        params, pool = mix.fit(params, pool, key, k, size)
        return (params, pool), family.measure(params, context)

    inputs = (keys_K, jnp.arange(K), jnp.asarray(sizes))
    _, found = jax.lax.scan(one_round, (first, mix.empty()), inputs)
    before = family.measure(first, context)
    return {name: jnp.concatenate([jnp.asarray(before[name], x.dtype)[None], x]) for name, x in found.items()}


class _Mix:
    """The regime of one replicate: what is kept from round to round, and what each round fits."""

    def __init__(self, family: Family, regime: Regime, M: int, K: int, context: Any, anchor_key: jax.Array):
        self.family, self.regime, self.M, self.K, self.context = family, regime, M, K, context
        self.real = regime.real_rows(M)
        self.truth = family.truth()
        self.direct = getattr(family, "draw", "rows") == "statistics"
        self.keeps_rows = regime.name == "accumulate_subsample" or (regime.name == "accumulate" and not family.additive)
        if regime.name == "anchor":
            self.anchor = self._real(anchor_key)

    def empty(self) -> Any:
        """The pool before the first round."""
        if self.keeps_rows:
            rows = jax.eval_shape(self._draw, self.truth, jax.random.key(0), self.M)
            return jax.tree.map(lambda x: jnp.zeros((self.M * self.K, *x.shape[1:]), x.dtype), rows)
        if self.regime.name == "accumulate":
            if self.direct:
                total, *rest = self.family.draw_statistics(self.truth, jax.random.key(0), self.M, self.context)
                return jax.tree.map(jnp.zeros_like, (total, *rest))
            data, weight_N = self._draw(self.truth, jax.random.key(0), self.M)
            return self.family.statistics(data, jnp.zeros_like(weight_N), self.context)
        return ()

    def _real(self, key: jax.Array) -> Any:
        """The real rows of a round, or their statistics."""
        if self.direct:
            return self.family.draw_statistics(self.truth, key, self.real, self.context)
        return self.family.sample(self.truth, key, self.real, self.real, self.context)

    def _draw(self, params: Any, key: jax.Array, size: Any) -> tuple[Any, jax.Array]:
        return self.family.sample(params, key, self.M, size, self.context)

    def fit(self, params: Any, pool: Any, key: jax.Array, k: jax.Array, size: jax.Array) -> tuple[Any, Any]:
        family, name = self.family, self.regime.name
        draw_key, real_key, keep_key = jax.random.split(key, 3)
        fit_key = jax.random.fold_in(key, 3)
        fitted = lambda data, weight_N: family.fit(data, weight_N, params, self.context, fit_key)
        real = self.anchor if name == "anchor" else self._real(real_key) if name == "fresh" else None
        if self.direct:
            found = family.draw_statistics(params, draw_key, size - self.real, self.context)
            if real is not None:
                found = family.merge(real, found)
            if name == "accumulate":
                found = pool = family.merge(pool, found)
            return family.estimate(found, params, self.context), pool
        if real is not None:
            rows = family.sample(params, draw_key, self.M - self.real, size - self.real, self.context)
            return fitted(*_join(real, rows)), pool
        data, weight_N = self._draw(params, draw_key, size)
        if name == "weighted":
            real, real_N = self._draw(self.truth, real_key, size)
            w = self.regime.weight
            return fitted(*_join((real, real_N * w), (data, weight_N * (1 - w)))), pool
        if name == "filtered":
            rate_N = jnp.where(family.right(data), self.regime.keep_right, self.regime.keep_wrong)
            weight_N = family.thin(keep_key, weight_N, rate_N)
        if self.keeps_rows:
            rows = pool = self._put(pool, (data, weight_N), k)
            if name == "accumulate_subsample":
                index_M = without_replacement(keep_key, (k + 1) * self.M, self.M, len(pool[1]))
                rows = jax.tree.map(lambda x: x[index_M], pool)
            return fitted(*rows), pool
        if name == "accumulate":
            pool = family.merge(pool, family.statistics(data, weight_N, self.context))
            return family.estimate(pool, params, self.context), pool
        return fitted(data, weight_N), pool

    def _put(self, pool: Any, rows: Any, k: Any) -> Any:
        """The pool with the rows of round k: in their place where shapes are fixed, else at its end."""
        if not self.family.traced:
            return rows if pool is None else _join(pool, rows)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), k * self.M, 0)
        return jax.tree.map(put, pool, rows)


def _join(first: tuple[Any, jax.Array], second: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def without_replacement(key: jax.Array, population: jax.Array, count: int, most: int) -> jax.Array:
    """`count` different indices below `population` <= `most`, uniform (the first steps of a Fisher-Yates shuffle)."""
    u_N = jax.random.uniform(key, (count,))

    def swap(i, index):
        j = i + jnp.minimum((u_N[i] * (population - i)).astype(jnp.int32), population - i - 1)
        return index.at[i].set(index[j]).at[j].set(index[i])

    return jax.lax.fori_loop(0, count, swap, jnp.arange(most, dtype=jnp.int32))[:count]


def mask(most: int, count: Any) -> jax.Array:
    """Weights of `most` rows of which the first `count` are wanted."""
    return (jnp.arange(most) < count).astype(jnp.result_type(float))


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal values. Drawn in float32 and then widened: what precision is for is the sums over many rounds."""
    return jax.random.normal(key, shape, np.float32).astype(jnp.result_type(float))
