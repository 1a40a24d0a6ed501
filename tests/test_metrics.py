"""Count statistics against brute force and closed forms."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from recursive_jax.collapse.diversity import (
    distinct,
    entropy,
    miller_madow,
    ngrams,
    repetition,
    sample_statistics,
    take_budget,
)
from recursive_jax.collapse.likelihood import cross_entropy, histogram, histogram_edges, row_perplexities, token_losses
from recursive_jax.collapse.tails import deciles, tail_lost
from recursive_jax.config import ModelConfig
from recursive_jax.models.model import transformer


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [rng.zipf(1.5, rng.integers(1, 40)).clip(max=49).astype(np.int32) for _ in range(60)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_agree_with_python_counters(rows, n):
    counted = Counter(tuple(r[i : i + n].tolist()) for r in rows for i in range(len(r) - n + 1))
    codes = ngrams(rows, n, 50)
    total = sum(counted.values())
    assert len(codes) == total
    assert distinct(codes) == pytest.approx(len(counted) / total)
    plug_in = -sum(c / total * math.log(c / total) for c in counted.values())
    assert entropy(codes) == pytest.approx(plug_in)
    assert miller_madow(codes) == pytest.approx(plug_in + (len(counted) - 1) / (2 * total))


def test_miller_madow_removes_the_bias_of_the_plug_in():
    """E[H_plugin] = H - (V - 1) / 2M to first order (collapse.md, T26)."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(20) * 5)
    truth = -(p * np.log(p)).sum()
    draws = [rng.choice(20, 400, p=p) for _ in range(400)]
    plug_in, corrected = np.mean([entropy(d) for d in draws]), np.mean([miller_madow(d) for d in draws])
    assert plug_in - truth == pytest.approx(-19 / 800, rel=0.15)
    assert abs(corrected - truth) < 0.15 * 19 / 800


def test_repetition_and_edge_cases():
    assert repetition([np.array([1, 2, 1, 2, 1, 2])], 2, 10) == pytest.approx(1 - 2 / 5)
    assert repetition([np.array([1])], 2, 10) == 0.0
    empty = sample_statistics([np.empty(0, np.int32)], 10, 100)
    assert empty["distinct_1"] == 0.0 and empty["length_mean"] == 0.0
    assert all(math.isfinite(v) for v in empty.values())
    assert all(math.isfinite(v) for v in sample_statistics([], 10, 100).values())


def test_budget_is_exact(rows):
    taken = take_budget(rows, 100)
    assert sum(map(len, taken)) == 100
    assert np.array_equal(np.concatenate(taken), np.concatenate(rows)[:100])


def test_tail_null_is_the_expectation_of_independent_draws():
    p = np.arange(1, 201, dtype=float) ** -1.2
    p /= p.sum()
    rng = np.random.default_rng(0)
    found = [tail_lost([rng.choice(200, 300, p=p)], p, 300) for _ in range(300)]
    masses = np.array([f["tail_mass_lost"] for f in found])
    null = found[0]["tail_mass_lost_null"]
    assert abs(masses.mean() - null) < 4 * masses.std() / math.sqrt(300)
    deciles_mean = np.mean([f["tail_lost_deciles"] for f in found], axis=0)
    np.testing.assert_allclose(deciles_mean, found[0]["tail_lost_deciles_null"], atol=0.03)


def test_tail_counts_by_hand():
    truth = np.array([0, 50, 30, 15, 5], float)
    lost = tail_lost([np.array([1, 1, 2])], truth, 10)
    assert lost["tail_mass_lost"] == pytest.approx(0.2)
    assert [g.tolist() for g in deciles(truth, 2)] == [[1, 2], [3, 4]]


def test_token_losses_are_the_model_s_own(tiny, tokenizer, language, mesh):
    model = transformer(tiny, tokenizer, mesh).initialized(0)
    rows = language.sample(0, 0, 5)
    losses = token_losses(model, rows)
    for row, loss in zip(rows, losses, strict=True):
        row = row[: tiny.context]
        logits = np.asarray(model.logits(np.concatenate([[tokenizer.bos], row[:-1]])[None]))[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(loss, -logp[np.arange(len(row)), row], atol=1e-5)


def test_cross_entropy_error_shrinks_as_it_should():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        losses = [rng.exponential(1.0, rng.integers(5, 20)) for _ in range(50)]
        mean, error = cross_entropy(losses)
        means.append(mean)
        errors.append(error)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.15)


def test_histogram_shares_sum_to_one_and_keep_the_outside(rows):
    reference = np.exp(np.random.default_rng(0).normal(1.0, 0.3, 500))
    edges = histogram_edges(reference)
    shares = histogram(np.concatenate([reference, [1e9, 1.0]]), edges)
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    assert shares[-1] > 0 and len(shares) == len(edges) - 1
    assert len(row_perplexities([np.array([1.0, 3.0]), np.array([])])) == 1


def test_context_is_respected(tokenizer, mesh):
    model = transformer(ModelConfig(layers=1, width=16, heads=2, context=8), tokenizer, mesh).initialized(0)
    losses = token_losses(model, [np.full(20, 5, np.int32), np.empty(0, np.int32)])
    assert [len(x) for x in losses] == [8, 0]
