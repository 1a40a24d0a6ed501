"""The metric suite against closed forms, scikit-learn, SciPy and slow plain loops."""

from __future__ import annotations

import collections
import json
import math

import numpy as np
import pytest
import scipy.stats
from scipy.optimize import minimize_scalar

from recursive_jax.collapse import divergence, embeddings
from recursive_jax.collapse.calibration import calibration
from recursive_jax.collapse.intervals import measured
from recursive_jax.collapse.likelihood import HISTOGRAM_EDGES, histogram, merged_bins
from recursive_jax.collapse.mauve import frontier_area, kmeans, mauve
from recursive_jax.collapse.profile import collapse_profile
from recursive_jax.collapse.selfbleu import dense_ngrams, self_bleu
from recursive_jax.errors import InputError
from recursive_jax.rounds.profile import _against


def rows_of(rng, count, vocab=12, low=0, high=14):
    return [rng.integers(0, vocab, rng.integers(low, high)) for _ in range(count)]


def slow_self_bleu(rows, longest):
    """BLEU as Papineni et al. define it, pair by pair; of a row shorter than n tokens up to its own length."""
    grams = lambda r, n: collections.Counter(tuple(r[i : i + n].tolist()) for i in range(len(r) - n + 1))
    scores = []
    for i, row in enumerate(rows):
        others = [r for j, r in enumerate(rows) if j != i]
        logs, shared = [], False
        for n in range(1, min(longest, len(row)) + 1):
            mine, most = grams(row, n), collections.Counter()
            for other in others:
                most |= grams(other, n)
            hit = sum(min(c, most[g]) for g, c in mine.items())
            shared |= n == 1 and hit > 0
            logs.append(math.log((hit or 0.1) / sum(mine.values())))
        closest = min((len(r) for r in others), key=lambda n: (abs(n - len(row)), n))
        brevity = 1.0 if len(row) > closest else math.exp(1 - closest / max(len(row), 1e-9))
        scores.append(brevity * math.exp(sum(logs) / len(logs)) if shared else 0.0)
    return np.array(scores)


@pytest.mark.parametrize("longest", [1, 2, 4])
def test_self_bleu_is_bleu_against_all_others(longest):
    rng = np.random.default_rng(longest)
    rows = rows_of(rng, 40)
    np.testing.assert_allclose(self_bleu(rows, longest), slow_self_bleu(rows, longest), rtol=0, atol=1e-14)
    for same in (np.arange(6), np.array([3])):  # NLTK's smoothing gave 0.18 for equal rows of one token
        np.testing.assert_allclose(self_bleu([same] * 5), 1.0, rtol=1e-14)
    with pytest.raises(InputError, match="at least 2"):
        self_bleu(same[:1])


def test_ngrams_are_numbered_without_collisions():
    rng = np.random.default_rng(0)
    rows = [r * 1_000_003 for r in rows_of(rng, 30, vocab=5)]  # ids whose powers pass 63 bits
    for n, ids, row in dense_ngrams(rows, 4):
        grams = [tuple(r[i : i + n].tolist()) for r in rows for i in range(len(r) - n + 1)]
        assert len(ids) == len(grams) == len(row)
        assert len(set(zip(ids.tolist(), grams, strict=True))) == len(set(grams)) == len(set(ids.tolist()))


def test_distances_of_distributions_are_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 9, 50), rng.integers(0, 9, 50)
    p, q = (a + 0.5) / (a + 0.5).sum(), (b + 0.5) / (b + 0.5).sum()
    assert divergence.kl(a, b) == pytest.approx(scipy.stats.entropy(p, q), rel=1e-12)
    from scipy.spatial.distance import jensenshannon

    assert divergence.jensen_shannon(a, b) == pytest.approx(jensenshannon(a / a.sum(), b / b.sum()) ** 2, rel=1e-12)
    assert divergence.total_variation(a, b) == pytest.approx(np.abs(a / a.sum() - b / b.sum()).sum() / 2, rel=1e-12)
    x, y = rng.normal(size=40), rng.normal(1, 2, size=70)
    assert divergence.wasserstein(x, y) == pytest.approx(scipy.stats.wasserstein_distance(x, y), rel=1e-12)
    with pytest.raises(InputError):
        divergence.total_variation(np.zeros(3), a[:3])


def test_sliced_wasserstein_of_a_shift():
    """|v . d| averaged over directions of the plane is 2 / pi times the shift."""
    x = np.random.default_rng(2).normal(size=(300, 2))
    shift = divergence.sliced_wasserstein(x, x + np.array([3.0, 0.0]), directions=4000)
    assert shift == pytest.approx(3 * 2 / math.pi, rel=0.03)  # 4,000 directions: a standard error of 0.5%


def test_a_histogram_shows_what_is_there():
    """However ordinary or strange the rows are: nothing is lost, and what is shown begins and ends with them."""
    rng = np.random.default_rng(0)
    for low, high in ((1.0, 1.0), (1.5, 4.0), (2.0, 3000.0), (1e5, 1e8)):
        rows = [np.exp(rng.uniform(np.log(low), np.log(high), 400)) for _ in range(2)]
        shares, edges = merged_bins([histogram(r) for r in rows], HISTOGRAM_EDGES)
        assert shares.shape[1] == len(edges) - 1 <= 40
        np.testing.assert_allclose(shares.sum(1), 1.0, atol=1e-3)
        width = edges[1] - edges[0]
        seen = np.clip(np.log([low, high]), 0, HISTOGRAM_EDGES[-1])
        assert edges[0] >= seen[0] - 2 * width and edges[-1] <= seen[1] + 2 * width


def test_zipf_exponent_is_the_likelihoods_maximum():
    rng = np.random.default_rng(3)
    ranks = np.arange(1, 501)
    p = ranks**-1.3 / (ranks**-1.3).sum()
    counts = rng.multinomial(200_000, p)
    found = divergence.zipf_exponent(counts)
    ordered = np.sort(counts[counts > 0])[::-1]
    logs = np.log(np.arange(1, len(ordered) + 1))
    loss = lambda s: s * ordered @ logs + ordered.sum() * np.log(np.exp(-s * logs).sum())
    assert found == pytest.approx(minimize_scalar(loss, bounds=(0, 5), method="bounded").x, abs=1e-4)
    assert found == pytest.approx(1.3, abs=0.01)
    assert divergence.zipf_exponent([5]) == math.inf and math.isnan(divergence.zipf_exponent([0]))
    assert divergence.zipf_exponent([10**12, 1]) == pytest.approx(math.log(10**12) / math.log(2), rel=1e-6)
    assert divergence.zipf_exponent([10**30, 1]) == math.inf and divergence.zipf_exponent([7, 7]) == pytest.approx(0)
    assert divergence.good_turing([1, 1, 3, 5]) == pytest.approx(0.2)


def test_frechet_distance_and_its_bias():
    """T23: of a cloud against its like, 2d/N + d(d+1)/2N; and the exact value of shifted, scaled Gaussians."""
    rng, d, N = np.random.default_rng(4), 16, 800
    found = [embeddings.frechet(rng.normal(size=(N, d)), rng.normal(size=(N, d))) for _ in range(30)]
    law = 2 * d / N + d * (d + 1) / (2 * N)
    assert np.mean(found) == pytest.approx(law, rel=0.05)
    x = rng.normal(size=(4000, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    scale = np.array([1.0, 2.0, 3.0])
    exact = 4.0 + ((scale - 1) ** 2).sum()
    assert embeddings.frechet(x * scale + np.array([2.0, 0, 0]), x) == pytest.approx(exact, rel=1e-9)
    root = scipy.linalg.sqrtm(np.cov((x @ scale[:, None] * x).T) @ np.cov(x.T))
    moved = x @ scale[:, None] * x
    direct = ((moved.mean(0) - x.mean(0)) ** 2).sum() + np.trace(np.cov(moved.T) + np.cov(x.T) - 2 * root.real)
    assert embeddings.frechet(moved, x) == pytest.approx(direct, rel=1e-6)
    assert (
        abs(
            np.mean(
                [
                    embeddings.frechet_unbiased(rng.normal(size=(N, d)), rng.normal(size=(N, d)), seed=i)
                    for i in range(8)
                ]
            )
        )
        < law / 3
    )


def test_kernel_distance_is_unbiased():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(40, 4)), rng.normal(0.5, 1, size=(30, 4))
    k = lambda a, b: (a @ b / 4 + 1) ** 3
    inner = lambda z: np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])
    slow = inner(x) + inner(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert embeddings.kernel_distance(x, y) == pytest.approx(slow, rel=1e-10)
    null = [embeddings.kernel_distance(rng.normal(size=(50, 4)), rng.normal(size=(50, 4))) for _ in range(100)]
    assert abs(np.mean(null)) <= 4 * np.std(null) / 10


def test_coverage_of_equal_clouds():
    """T22: E coverage = 1 - prod (N - 1 - i) / (2N - 1 - i), E density = 1."""
    rng = np.random.default_rng(6)
    found = [embeddings.coverage(rng.normal(size=(600, 8)), rng.normal(size=(600, 8))) for _ in range(15)]
    law = embeddings.coverage_of_equals(600, 600)
    assert law == pytest.approx(0.9691, abs=2e-4)
    for key, value in (("coverage", law), ("density", 1.0)):
        values = [f[key] for f in found]
        assert abs(np.mean(values) - value) <= 4 * np.std(values) / np.sqrt(15)


def test_balls_are_sklearns():
    """Precision, recall, density and coverage from scikit-learn's neighbours."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(7)
    real, fake = rng.normal(size=(1500, 6)), rng.normal(0.3, 0.8, size=(1300, 6))
    radius = lambda z: neighbors.NearestNeighbors(n_neighbors=6).fit(z).kneighbors(z)[0][:, -1]
    away = np.sqrt(((fake[:, None] - real[None]) ** 2).sum(-1))
    inside = away <= radius(real)[None]
    slow = {
        "precision": inside.any(1).mean(),
        "recall": (away <= radius(fake)[:, None]).any(0).mean(),
        "density": inside.sum() / 5 / len(fake),
        "coverage": inside.any(0).mean(),
    }
    found = embeddings.coverage(fake, real)
    for key, value in slow.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key
    shrunk = embeddings.coverage(real * 0.6, real)
    assert shrunk["recall"] < 0.7 < 0.98 < shrunk["coverage"]


def test_a_point_on_the_sphere_lies_in_the_ball():
    """arXiv:1904.06991, eq. 1 has `<=`. By brute force on whole numbers, whose distances are exact and tie often."""
    rng = np.random.default_rng(9)
    squares = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(-1)
    radius = lambda z: np.sort(squares(z, z), axis=1)[:, 3]  # its own zero stands first
    for real, fake in (
        (rng.integers(0, 3, (60, 2)), rng.integers(0, 4, (50, 2))),
        (np.repeat(rng.integers(0, 9, (6, 3)), 10, axis=0), np.repeat(rng.integers(0, 9, (5, 3)), 12, axis=0)),
        (np.zeros((9, 2)), np.zeros((8, 2))),
        (np.zeros((9, 2)), np.ones((8, 2))),
    ):
        inside, reached = squares(fake, real) <= radius(real), squares(fake, real) <= radius(fake)[:, None]
        slow = {
            "precision": inside.any(1).mean(),
            "recall": reached.any(0).mean(),
            "density": inside.sum() / 3 / len(fake),
            "coverage": inside.any(0).mean(),
        }
        assert embeddings.coverage(fake, real, k=3) == pytest.approx(slow)
    cloud = np.repeat(rng.normal(5.0, 1.0, (40, 16)), 20, axis=0)  # a model that says forty things
    for shift in (0.0, 1e4):
        found = embeddings.coverage(cloud[rng.permutation(len(cloud))] + shift, cloud + shift)
        assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
        assert embeddings.neighbour_entropy(cloud + shift) == -np.inf


def test_vendi_counts_what_is_different():
    """T24."""
    eye = np.eye(7)
    for q in (0.5, 1, 2, np.inf):
        assert embeddings.vendi(np.repeat(eye, 3, axis=0), q) == pytest.approx(7, rel=1e-10)
        assert embeddings.vendi(np.ones((9, 4)), q) == pytest.approx(1, rel=1e-10)
    x = np.random.default_rng(8).normal(size=(4000, 32))
    assert embeddings.vendi(x) == pytest.approx(32, rel=0.01)
    wide = x[:20]
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 20)
    assert embeddings.vendi(wide, 2) == pytest.approx(1 / (values**2).sum(), rel=1e-9)
    with pytest.raises(InputError, match="zero"):
        embeddings.vendi(np.zeros((3, 2)))


def test_spread_and_entropy_of_a_gaussian():
    x = np.random.default_rng(9).normal(size=(5000, 3))
    assert embeddings.variance_ratio(0.5 * x, x) == pytest.approx(0.25, rel=1e-12)
    assert embeddings.log_det_difference(0.5 * x, x) == pytest.approx(math.log(0.25), rel=1e-4)
    assert embeddings.log_det_difference(0 * x, x) == pytest.approx(math.log(1e-6), abs=0.1)
    assert embeddings.neighbour_entropy(x) == pytest.approx(1.5 * math.log(2 * math.pi * math.e), abs=0.05)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    slow = (unit[:200] @ unit[:200].T)[~np.eye(200, dtype=bool)].mean()
    assert embeddings.mean_cosine(x[:200]) == pytest.approx(slow, abs=1e-12)
    with pytest.raises(InputError, match="all the same"):
        embeddings.variance_ratio(x, np.ones((4, 3)))


def test_mauve_tells_clouds_apart():
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(400, 8)), rng.normal(size=(400, 8))
    assert (
        1 > mauve(y, x, smooth=True) > mauve(y, x) > 0.96 > mauve(x + np.eye(8)[0], x) > mauve(x + 9 * np.eye(8)[0], x)
    )
    p = np.array([0.5, 0.5, 0.0])
    assert frontier_area(p, p) == pytest.approx(1.0, abs=1e-6)
    assert frontier_area(p, np.array([0.0, 0.0, 1.0])) < 0.01


def test_kmeans_finds_separate_clusters():
    centres = np.array([[0, 0], [10, 0], [0, 10]])
    rng = np.random.default_rng(11)
    truth = rng.integers(0, 3, 300)
    label = kmeans(centres[truth] + rng.normal(size=(300, 2)), 3)
    assert len(set(zip(truth.tolist(), label.tolist(), strict=True))) == 3


def test_calibration_of_the_calibrated_is_its_null():
    rng = np.random.default_rng(12)
    sure = rng.uniform(size=(300, 2000))
    found = [calibration(c, rng.uniform(size=2000) < c) for c in sure]
    ratio = np.mean([f["ece"] for f in found]) / np.mean([f["ece_null"] for f in found])
    assert ratio == pytest.approx(1, abs=0.03)  # 3,000 bins: a standard error of 1.4%
    wrong = calibration([0.95, 0.95, 0.5], [0, 1, 1])
    assert wrong["confident_wrong"] == pytest.approx(1 / 3)
    assert wrong["brier"] == pytest.approx((0.95**2 + 0.05**2 + 0.25) / 3)
    with pytest.raises(InputError):
        calibration([1.2], [1])


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((0, 3)), "at least 2 rows"),
        (np.array([[1.0, np.nan], [0, 1]]), "NaN or infinity, the first is row 0"),
        (np.zeros(4), "rows of features"),
        (np.zeros((3, 2)), "2 features, real ones 3"),
    ],
)
def test_degenerate_clouds_are_named(x, said):
    with pytest.raises(InputError, match=said):
        embeddings.frechet(x, np.random.default_rng(0).normal(size=(5, 3)))


def test_a_collapsed_sample_gets_a_verdict_where_a_metric_is_infinite():
    """Rows that repeat have no entropy between neighbours, one type has no Zipf exponent: that is collapse, and was
    `untested`."""
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(200, 4))
    same = np.repeat(cloud[:2], 100, axis=0)
    profile = collapse_profile([same, cloud], cloud, metrics=["neighbour_entropy", "recall", "vendi_1"], groups=4)
    first, second = profile["neighbour_entropy"]
    assert (first.value, first.verdict, first.why) == (None, "lower", "minus infinity on 4 of 4 groups")
    assert (
        second.verdict == "same" and json.loads(profile.jsonl().splitlines()[0])["neighbour_entropy"]["value"] is None
    )
    assert "–" in str(profile) and "▼" in str(profile)
    texts = collapse_profile([[np.full(9, 3)] * 40], [rng.integers(0, 20, 9) for _ in range(40)], groups=4)
    (zipf,) = texts["zipf_mle"]
    assert (zipf.value, zipf.verdict) == (None, "higher") and "infinity on 4 of 4" in zipf.why
    assert texts["self_bleu_4"][0].value == pytest.approx(1) and texts["entropy_1gram_mm"][0].verdict == "lower"
    mixed = measured([1.0, np.inf, -np.inf, 0.0], [1.0, 1.1])
    assert mixed.value is None and mixed.verdict == "untested"
    assert measured([1.0, np.inf], []).verdict == "untested", "without a null there is no verdict"


def test_equal_replicates_are_the_same_however_they_are_added_up():
    values = [0.1 + 0.2, 0.3, 0.3]
    x = measured(values)
    assert _against("ce_real", x, 0.3, 0.0, 3, 0.99).verdict == "same"
    assert _against("ce_real", x, 0.31, 0.0, 3, 0.99).verdict == "lower"
