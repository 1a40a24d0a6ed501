"""`collapse_profile` on samples whose fate is known."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from recursive_jax import InputError, collapse_profile
from recursive_jax.collapse.intervals import bootstrap, measured
from recursive_jax.collapse.scaling import scaling_exponents


def zipf_rows(rng, count=300, vocab=400, exponent=1.0, length=20):
    p = np.arange(1, vocab + 1) ** -exponent
    return [rng.choice(vocab, length, p=p / p.sum()) for _ in range(count)]


def test_samples_of_the_reference_itself_are_the_same():
    """At 99% bands about one in a hundred verdicts on equal distributions is wrong; many metrics are correlated, so a
    few seeds are pooled: of about 190 verdicts at most a few are outside."""
    outside = tests = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        profile = collapse_profile(zipf_rows(rng), zipf_rows(rng))
        found = [profile[m][0] for m in profile.metrics]
        outside += sum(m.outside for m in found)
        tests += len(found)
    assert tests >= 180 and outside / tests < 0.04


def test_what_sharpening_loses_is_named():
    rng = np.random.default_rng(0)
    real = zipf_rows(rng)
    rounds = [zipf_rows(rng, exponent=1.0 + 0.15 * k) for k in range(1, 6)]
    profile = collapse_profile(rounds, real)
    for metric, verdict in {
        "entropy_1gram_mm": "lower",
        "types_alive": "lower",
        "tail_mass_lost": "higher",
        "kl_1gram": "higher",
        "zipf_mle": "higher",
        "self_bleu_4": "higher",
        "length_mean": "same",
    }.items():
        assert profile[metric][-1].verdict == verdict, metric
    answers = {f.name: f.answer for f in profile.definitions}
    assert len(answers) == 8
    assert answers["risk rises"] == answers["tail is lost"] == answers["variance collapses"] == "yes"
    assert answers["scaling law changes"] == "not measured"
    assert {f.name: f.answer for f in profile.warnings}["tail erodes"] == "yes"
    assert "▼" in str(profile) and "tail is lost" in str(profile)


def test_numbers_do_not_depend_on_how_much_there_is():
    """A fixed budget: ten times as many rows give the same values within their intervals."""
    rng = np.random.default_rng(1)
    real, few, many = zipf_rows(rng, 300), zipf_rows(rng, 300), zipf_rows(rng, 3000)
    profile = collapse_profile({"few": few, "many": many}, real)
    for metric in ("distinct_2", "types_alive", "entropy_1gram_mm"):
        a, b = profile[metric]
        assert b.ci_lo <= a.value <= b.ci_hi or a.ci_lo <= b.value <= a.ci_hi, metric


def test_types_are_counted_over_all_samples():
    """Each sample has types that the others lack, the largest ids among them."""
    rng = np.random.default_rng(5)
    rows = lambda high: [np.append(rng.integers(0, 20, 30), high) for _ in range(50)]
    profile = collapse_profile([rows(21), rows(500), rows(40)], rows(90))
    assert [m.value for m in profile["tail_mass_lost"]] == pytest.approx([1 / 31] * 3)


def test_vectors_and_images():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(600, 4, 4))
    profile = collapse_profile([rng.normal(size=(600, 16)), 0.6 * rng.normal(size=(600, 4, 4))], real)
    same, shrunk = ({m: profile[m][k] for m in profile.metrics} for k in (0, 1))
    assert shrunk["variance_ratio"].value == pytest.approx(0.36, rel=0.1)
    assert shrunk["variance_ratio"].verdict == shrunk["recall"].verdict == "lower"
    assert same["variance_ratio"].verdict == same["frechet"].verdict == "same"
    assert {f.name: f.answer for f in profile.definitions}["variance collapses"] == "yes"


def test_log_probabilities_alone_give_the_risk():
    rng = np.random.default_rng(3)
    rows = zipf_rows(rng, 100)
    base = [np.full(20, -3.0) + rng.normal(0, 0.1, 20) for _ in rows]
    rounds = [[x - 0.2 * k for x in base] for k in range(1, 6)]
    profile = collapse_profile([rows] * 5, rows, logprobs=rounds, reference_logprobs=base)
    risk = profile["ce_real"]
    assert risk[0].value == pytest.approx(3.2, abs=0.01) and [m.verdict for m in risk] == ["higher"] * 5
    answers = {f.name: f.answer for f in profile.definitions}
    assert answers["risk rises"] == answers["risk diverges"] == "yes"


def test_files_of_texts_and_what_is_written(tmp_path):
    rng = np.random.default_rng(4)
    texts = lambda: [" ".join(f"w{i}" for i in row) for row in zipf_rows(rng)]
    pa.parquet.write_table(pa.table({"text": texts()}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts()))
    profile = collapse_profile([str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")], texts())
    assert profile.rounds == ("round 1", "round 2")
    page = profile.save(tmp_path / "out")
    lines = [json.loads(x) for x in (tmp_path / "out/profile.jsonl").read_text().splitlines()]
    assert [x["generation"] for x in lines] == [1, 2]
    assert {"value", "n", "ci_lo", "ci_hi", "null_lo", "null_hi", "verdict"} <= set(lines[0]["distinct_2"])
    assert "Is it collapse?" in page.read_text() and (tmp_path / "out/figures/profile.png").stat().st_size > 10_000
    assert (tmp_path / "out/profile.csv").read_text().startswith("generation,name,metric,value,n,ci_lo")


def test_texts_with_an_encoder():
    rng = np.random.default_rng(5)
    axes = rng.normal(size=(400, 8))
    encode = lambda rows: np.stack([axes[r].mean(0) for r in rows])
    profile = collapse_profile([zipf_rows(rng, exponent=2.0)], zipf_rows(rng), encoder=encode)
    assert profile["variance_ratio"][0].verdict == "lower" and profile["distinct_2"][0].verdict == "lower"


def test_bands_hold_what_they_promise():
    """Coverage of the band of the null and of the bootstrap interval, on normal values."""
    rng = np.random.default_rng(6)
    same = np.mean([measured(rng.normal(size=10), rng.normal(size=10)).verdict == "same" for _ in range(1500)])
    assert same == pytest.approx(0.99, abs=0.012)
    inside = np.mean([np.prod(np.array(bootstrap(rng.normal(size=10), seed=i))) < 0 for i in range(400)])
    assert 0.89 < inside < 0.98  # ten values: a percentile bootstrap stays a little below 95%


@pytest.mark.parametrize(
    ("samples", "reference", "said"),
    [
        ([[]], [np.arange(3)] * 40, "there are no rows"),
        ([[np.array([], int)] * 40], [np.arange(3)] * 40, "there is no token in 40 rows"),
        ([[np.arange(3)] * 3], [np.arange(3)] * 40, "too few"),
        ([np.full((60, 3), np.nan)], np.ones((60, 3)), "NaN"),
        ([np.ones((60, 3))], [np.arange(3)] * 40, "give one kind"),
        (["missing.parquet"], [np.arange(3)] * 40, "does not exist"),
        ([[np.array([-1, 2])] * 40], [np.arange(3)] * 40, "not negative"),
    ],
)
def test_bad_samples_are_named(samples, reference, said):
    with pytest.raises(InputError, match=said):
        collapse_profile(samples, reference)


def test_constant_samples_have_documented_values():
    rng = np.random.default_rng(7)
    profile = collapse_profile([[np.zeros(20, int)] * 300], zipf_rows(rng))
    at = {m: profile[m][0] for m in profile.metrics}
    assert at["entropy_1gram_mm"].value == pytest.approx(0) and at["self_bleu_4"].value == pytest.approx(1)
    assert at["zipf_mle"].value is None and at["zipf_mle"].why
    assert at["types_alive"].value == 1 and at["types_alive"].verdict == "lower"
    flat = collapse_profile([np.ones((100, 3))], rng.normal(size=(100, 3)))
    assert flat["variance_ratio"][0].value == 0 and flat["vendi_1"][0].value == pytest.approx(1)
    assert json.loads(flat.jsonl().splitlines()[0])  # no NaN in it


def test_a_scaling_law_that_recursion_flattened():
    """risk = c size^-a, exactly, then with noise: the exponent comes back, and only a flatter one is a change."""
    sizes = np.array([1e3, 3e3, 1e4, 3e4])
    found = scaling_exponents(sizes, np.stack([2 * sizes**-0.5, 2 * sizes**-0.3]))
    assert found[0].value == pytest.approx(0.3, abs=1e-12)
    noise = np.exp(0.02 * np.random.default_rng(0).normal(size=(3, 4, 5)))
    risks = np.stack([sizes**-0.5, sizes**-0.5, sizes**-0.3])[..., None] * noise
    same, flat = scaling_exponents(sizes, risks)
    assert (same.verdict, flat.verdict) == ("same", "lower") and flat.ci_lo < 0.3 < flat.ci_hi
    rng = np.random.default_rng(1)
    profile = collapse_profile([zipf_rows(rng), zipf_rows(rng)], zipf_rows(rng), scaling=(sizes, risks))
    finding = next(x for x in profile.definitions if x.name == "scaling law changes")
    assert finding.answer == "yes" and finding.first == 2
    with pytest.raises(InputError, match="risks are positive numbers"):
        scaling_exponents(sizes, risks - 1)
    with pytest.raises(InputError, match="at least three different sizes"):
        scaling_exponents([1, 2], risks)


def test_the_seed_deals_the_groups():
    """It was ignored for texts: every seed gave the same intervals."""
    rng = np.random.default_rng(1)
    real, rows = zipf_rows(rng, 300), zipf_rows(rng, 300)
    one, again, two = (collapse_profile([rows], real, seed=s)["distinct_2"][0] for s in (0, 0, 1))
    assert one == again and (one.ci_lo, one.value) != (two.ci_lo, two.value)
    assert two.value == pytest.approx(one.value, rel=0.05)
