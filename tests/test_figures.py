"""One name, one number: intervals of shares, bands within their range, charts and tables of one page, figures for a
paper in the report's colours."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy.stats import binomtest

from recursive_jax.collapse import figures
from recursive_jax.collapse.definitions import definitions
from recursive_jax.collapse.intervals import Measurement, measured, proportion
from recursive_jax.collapse.metrics import METRICS, metric
from recursive_jax.collapse.profile import collapse_profile
from recursive_jax.collapse.profile_page import verdict_table
from recursive_jax.collapse.profile_text import aligned
from recursive_jax.collapse.suite import TEXT, VECTORS
from recursive_jax.rounds.report.page import View, curves, panels_of
from recursive_jax.rounds.report.regimes import perplexity_histograms, tail_deciles
from recursive_jax.rounds.report.series import Arm, null_band
from tests.conftest import ROOT


@pytest.mark.parametrize(("successes", "count"), [(20, 20), (0, 20), (1, 3), (7, 10), (480, 512)])
def test_a_share_has_its_wilson_interval(successes, count):
    found = proportion("a", successes, count)
    oracle = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert (found["a_ci_lo"], found["a_ci_hi"]) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    assert found["a"] == successes / count and found["a_stderr"] > 0.0
    usual = math.sqrt(found["a"] * (1 - found["a"]) / count)
    assert found["a_stderr"] == pytest.approx(usual, rel=0.05) or count < 100


def test_bands_stay_in_the_range_of_the_metric():
    near_0 = np.array([0.0] * 9 + [0.1])
    near_1 = 1 - near_0
    low, high = (measured(x, x[::-1], name="distinct_2") for x in (near_0, near_1))
    free = measured(near_0, near_0[::-1])
    assert free.null_lo < 0 == low.null_lo and free.null_hi == low.null_hi and low.verdict == free.verdict == "same"
    assert high.null_hi == 1.0 and high.ci_hi <= 1.0 and high.null == pytest.approx(near_1.mean())
    assert all(m.name in METRICS for m in (*TEXT, *VECTORS)), "every metric of a profile says its range"


def test_the_limit_of_a_catastrophe_is_said_as_it_is_computed():
    risk = lambda null, value: Measurement(
        value, 9, null=null, null_lo=null - 0.1, null_hi=null + 0.1, verdict="higher"
    )
    found = lambda null, value: definitions({"ce_real": [risk(null, value)]})[0]
    assert "2 ln 2, the least" in found(0.1, 1.0).evidence and found(0.1, 1.0).answer == "no"
    assert "twice its value before recursion, 1.5" in found(1.5, 3.1).evidence and found(1.5, 3.1).answer == "yes"
    clipped = Measurement(1.39, 9, null=0.1, null_lo=0.0, null_hi=0.9, verdict="higher")
    assert definitions({"kl_total": [clipped]})[0].answer == "yes", "the band's middle says nothing of the value before"


def test_numbers_of_a_column_have_equal_digits():
    assert aligned([0.1, 0.12345, None, 1.5]) == ["0.100", "0.123", "–", "1.500"]
    assert aligned([12345.6, 1.0]) == ["12,346", "1"]
    assert aligned([0.00123, 0.0]) == ["0.001230", "0.000000"]
    assert aligned([None, math.nan]) == ["–", "–"] and aligned([0.0]) == ["0"]


@pytest.fixture(scope="module")
def view():
    """Two regimes of three rounds; the second has no round 3."""
    rng = np.random.default_rng(0)
    rows = lambda vocab: [rng.integers(0, vocab, rng.integers(5, 15)) for _ in range(200)]
    real = rows(50)
    profiles = {a: collapse_profile({f"round {k}": rows(50 - 10 * k) for k in range(1, n + 1)}, real, groups=4)
                for a, n in (("replace", 3), ("anchor", 2))}  # fmt: skip
    record = lambda k: {
        "ce_real": 1.0 + k, "kl_total": 0.2, "distinct_2": 0.123, "tail_mass_lost": 0.05, "tail_mass_lost_null": 0.01,
        "tail_lost_deciles": [0.0, 0.5], "tail_lost_deciles_null": [0.0, 0.1],
        "ppl_hist_under_gen0": [0.5, 0.5, 0.0], "ppl_hist_edges": [0.0, 1.0, 2.0, 3.0],
    }  # fmt: skip
    arms = [Arm("replace", 0, {k: [record(k)] for k in range(4)}), Arm("anchor", 1, {k: [record(k)] for k in range(3)})]
    records = [{"round": 0, "metrics": record(0)}]
    found = View(None, {"config": {"evaluate": {"token_budget": 999}}}, records, [], arms)
    found.__dict__["profiles"] = profiles
    return found


def test_chart_and_table_of_a_page_agree(view):
    """On one page tail_mass_lost was 0.0019 and 0.0927: the budgets of the evaluation and of the profile's groups."""
    panels = {p.metric.name: p for p in panels_of(view, [metric(m) for m in ("distinct_2", "tail_mass_lost")])}
    for name, panel in panels.items():
        for arm, series in zip(view.arms, panel.series, strict=True):
            table = [m.value for m in view.profiles[arm.name][name]]
            assert series.y[1:] == table and series.x == list(range(len(table) + 1)) and series.colour == arm.colour
            assert series.y[0] == view.profiles[arm.name][name][0].null
            shown = verdict_table(view.profiles[arm.name])
            assert all(text in shown for text in aligned([*table, view.profiles[arm.name][name][0].null_hi]))
        assert f"groups of {view.profiles['replace'].settings['tokens']}" in panel.note and panel.reference is None
        rounds, low, high = panel.null
        assert rounds == [0, 1, 2, 3]
        bands = [view.profiles[a][name] for a in ("replace", "anchor")]
        assert low[1] == min(b[0].null_lo for b in bands) and high[2] == max(b[1].null_hi for b in bands)
        assert high[3] == bands[0][2].null_hi
    page = curves(view, [metric("distinct_2"), metric("ce_real")])
    assert page.count('class="null"') == 1 and "best possible" in page


def test_without_a_profile_a_count_says_its_budget(view):
    import dataclasses

    plain = dataclasses.replace(view)
    plain.__dict__["profiles"] = {}
    (panel,) = panels_of(plain, [metric("tail_mass_lost")])
    assert panel.note.endswith("at 999 tokens") and panel.series[0].y == [0.05] * 4
    assert panel.reference == ("by chance", 0.01) and panel.null is None


def test_null_bands_of_no_arm_are_none():
    assert null_band([]) is None and null_band([[Measurement(1.0, 1)]]) is None


def test_figures_have_the_colours_of_the_report_on_paper():
    css = (ROOT / "recursive_jax" / "rounds" / "report" / "style.css").read_text()
    light = css.partition("@media")[0]
    assert tuple(re.findall(r"--c\d:(#\w+)", light)) == figures.COLOURS
    assert tuple(re.findall(r"--p\d:(#\w+)", light)) == figures.PARTS


def test_figures_for_a_paper(view, tmp_path):
    """Colours by arm, whole subtitles, lines that say what they are, rows from the first round down."""
    pytest.importorskip("matplotlib")
    from recursive_jax.rounds.report.export import _lines

    panels = panels_of(view, [metric(m) for m in ("ce_real", "tail_mass_lost", "ppl_gen")])
    long = "share of the real mass on types no longer produced; mean over groups of"
    only_second = {"anchor": {"x": [0, 1], "y": [1.0, 2.0], "colour": 1}}
    drawn = figures.curves([*((f"{p.metric.title}\n{p.note}", _lines(p)) for p in panels), ("Its own", only_second)])
    axes = drawn.axes
    for axis, colours in ((axes[0], (0, 1)), (axes[1], (0, 1)), (axes[2], (1,))):
        lines = [line for line in axis.lines if line.get_linestyle() == "-"]
        assert [line.get_color() for line in lines] == [figures.COLOURS[c] for c in colours]
    assert long in " ".join(axes[1].texts[0].get_text().split())
    assert "best possible" in [t.get_text() for t in axes[0].texts]
    (legend,) = drawn.legends
    assert [t.get_text() for t in legend.get_texts()] == ["replace", "anchor"]
    tails = tail_deciles(view.arms)
    assert tails["anchor"][0] == ["by chance", "round 0", "round 1", "round 2"]
    heat = figures.heatmap(tails, "share")
    image = heat.axes[0].images[0]
    assert image.origin == "upper" and image.get_clim() == (0.0, 0.5), "the scale fits what is shown"
    rows, edges = perplexity_histograms(view.arms, view.base)
    ridge = figures.ridges(rows, edges, [0, 1])
    first, second = ridge.axes
    assert first.get_xlim() == second.get_xlim()
    tops = [t.get_text() for t in first.get_yticklabels()]
    assert tops == ["0", "1", "2", "3"] and first.get_yticks()[0] > first.get_yticks()[-1], "round 0 on top"
    assert figures.save(ridge, tmp_path, "ridges")[0].stat().st_size > 1000
