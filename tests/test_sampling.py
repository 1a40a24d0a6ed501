"""Sampling rules against their definitions, and the sampler against the distribution it must follow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from recursive_jax.config import SamplingConfig
from recursive_jax.generate.sampling import Rules, apply_rules, draw, request_keys, threshold

LOGITS = np.random.default_rng(0).normal(0, 2, (6, 37)).astype(np.float32)


def kept(**settings):
    z = apply_rules(jnp.asarray(LOGITS), Rules.of([SamplingConfig(**settings)] * len(LOGITS)))
    return np.asarray(z) > -1e29, np.asarray(z)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 37, 100])
def test_top_k_keeps_the_k_largest(k):
    mask, _ = kept(top_k=k)
    for row, m in zip(LOGITS, mask, strict=True):
        assert set(np.flatnonzero(m)) == set(np.argsort(-row)[:k])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    mask, _ = kept(top_p=p)
    for row, m in zip(softmax(LOGITS.astype(np.float64)), mask, strict=True):
        order = np.argsort(-row)
        count = int(np.searchsorted(np.cumsum(row[order]), p) + 1) if p < 1 else len(row)
        assert set(np.flatnonzero(m)) == set(order[:count])


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_min_p_is_relative_to_the_best(p):
    mask, _ = kept(min_p=p)
    q = softmax(LOGITS)
    np.testing.assert_array_equal(mask, q >= p * q.max(-1, keepdims=True))


def test_top_p_acts_on_what_top_k_left():
    mask, _ = kept(top_k=3, top_p=0.6)
    for row, m in zip(LOGITS, mask, strict=True):
        order = np.argsort(-row)[:3]
        q = softmax(row[order])
        assert set(np.flatnonzero(m)) == set(order[: int(np.searchsorted(np.cumsum(q), 0.6) + 1)])


def test_temperature_divides_and_zero_is_greedy():
    _, z = kept(temperature=0.5)
    np.testing.assert_allclose(z, LOGITS / 0.5, rtol=1e-6)
    mask, _ = kept(temperature=0.0, top_p=0.9)
    assert (mask.sum(-1) == 1).all() and (mask.argmax(-1) == LOGITS.argmax(-1)).all()


@pytest.mark.parametrize("V", [1, 2, 63, 64, 65, 1000])
def test_threshold_is_the_largest_value_that_reaches_the_target(V):
    rng = np.random.default_rng(V)
    values, weights = rng.normal(0, 50, (5, V)).astype(np.float32), rng.random((5, V)).astype(np.float32)
    values[0, : V // 2] = values[0, 0]  # ties
    for share in (0.0, 0.3, 0.999, 2.0):
        found = threshold(jnp.asarray(values), jnp.asarray(weights), jnp.asarray(share * weights.sum(-1)))
        for value, weight, t in zip(values, weights, np.asarray(found), strict=True):
            reach = [v for v in value if weight[value >= v].sum() >= share * weight.sum()]
            assert t == (max(reach) if reach else value.min())


def test_draws_follow_the_distribution_and_never_leave_the_support():
    """Chi-square over 200,000 draws; excluded tokens (a third) never occur."""
    logits = np.where(np.arange(30) % 3 == 0, -1e30, np.linspace(-2, 2, 30)).astype(np.float32)
    keys = request_keys(jax.random.key(0), jnp.arange(2000))
    program = jax.jit(lambda t: draw(keys, jnp.full(2000, t), jnp.broadcast_to(jnp.asarray(logits), (2000, 30))))
    counts = np.bincount(np.concatenate([np.asarray(program(t)) for t in range(100)]), minlength=30)
    live = np.flatnonzero(logits > -1e29)
    assert counts.sum() == counts[live].sum() == 200_000
    assert stats.chisquare(counts[live], 200_000 * softmax(logits[live].astype(np.float64))).pvalue > 1e-4


def test_draws_of_one_request_are_independent_over_positions():
    keys = request_keys(jax.random.key(1), jnp.arange(500))
    flat = jnp.zeros((500, 8))
    a, b = (np.asarray(draw(keys, jnp.full(500, t), flat)) for t in (3, 4))
    table = np.histogram2d(a, b, bins=8)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-4
