"""Values that one changed sign, sum or constant would move, found by leaving them out (benchmarks/mutation.py)."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from recursive_jax.collapse.lab.kernels import Mixture
from recursive_jax.collapse.lab.lab import lab
from recursive_jax.collapse.lab.ngram import Ngram
from recursive_jax.collapse.task import graded
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.parsers import Numbered
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizer_files import read_tokenizer
from recursive_jax.rounds.profile import _exact
from recursive_jax.rounds.report.series import Arm
from recursive_jax.rounds.report.task import _before_and_after
from recursive_jax.train.log import TrainLog


def test_answers_are_right_where_they_are_read_equal_and_whole():
    rows = [{"a": "yes"}] * 4
    said = [("So: yes", "ok"), ("So: no", "ok"), ("yes", "ok"), ("So: yes", "length")]
    answers = Dataset.from_rows([{"text": text, "status": status} for text, status in said])
    assert graded(Template("?", "So: {a}"), rows, answers) == ([True, False, False, False], [True, True, False, False])
    listed = Template("?", "{item}", parser=Numbered())
    cut = Dataset.from_rows([{"text": "1. yes\n2. ye", "status": s} for s in ("ok", "length")])
    assert graded(listed, [{"item": "yes"}] * 2, cut) == ([False, False], [True, False])


def test_the_n_gram_chain_draws_from_its_table():
    """Frequencies of each context's next type against its row of the table: chi-square, 1e-4 of which 30 tests hold."""
    from scipy import stats

    family = Ngram(categories=5, order=2, length=40)
    table = family.truth()
    (first_N, types_NL), _ = family.sample(table, jax.random.key(0), 400, 400, None)
    before, after = family._walk((first_N, types_NL))[0], np.asarray(types_NL)
    counts = np.zeros((family.contexts, family.categories))
    np.add.at(counts, (np.asarray(before).ravel(), after.ravel()), 1)
    for observed, p in zip(counts, np.asarray(table, np.float64), strict=True):
        if observed.sum() >= 100:
            assert stats.chisquare(observed, p / p.sum() * observed.sum()).pvalue > 1e-4


def test_word_pieces_are_of_small_letters_unless_the_files_say_otherwise(tmp_path):
    """As BertTokenizer's do_lower_case, True where it is left out."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello"]))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert read_tokenizer(tmp_path, 7, writes=False).encode("Hello") == [5]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read_tokenizer(tmp_path, 7, writes=False).encode("Hello") == [6]


def test_a_fine_tune_s_report_shows_the_answers_side_by_side():
    shown = lambda answer, right: [{"prompt": "what <is> it?", "answer": answer, "right": right}]
    rounds = {0: [{"accuracy": 0.0, "rows": 7, "shown": shown("a & b", False)}],
              1: [{"accuracy": 1.0, "rows": 7, "shown": shown("it", True)}]}  # fmt: skip
    page = _before_and_after(Arm("main", 0, rounds))
    assert "<td class=text>what &lt;is&gt; it?</td><td class=text>✗ a &amp; b</td><td class=text>✓ it</td>" in page
    assert "0.000 → 1.000" in page and "The first of the 7" in page


def test_the_mixture_s_density_is_the_sum_of_its_normals():
    from scipy import stats

    family = Mixture(components=3, separation=2.0)
    weights, means, covariances = (np.asarray(x, np.float64) for x in family.truth())
    covariances = covariances + np.array([[0.5, 0.3], [0.3, 0.1]])
    points = np.random.default_rng(0).normal(0, 2, (7, 2))
    each = [
        w * stats.multivariate_normal(m, c).pdf(points) for w, m, c in zip(weights, means, covariances, strict=True)
    ]
    found = family.log_prob((weights, means, covariances), points)
    np.testing.assert_allclose(found, np.log(np.sum(each, 0)), rtol=1e-4)


@pytest.mark.parametrize(("given", "wanted"), [
    ({"dimensions": 3}, "statistics"), ({"dimensions": 1}, "rows"), ({"dimensions": 3, "samples": 11}, "rows"),
    ({"dimensions": 3, "samples": 12}, "statistics"), ({"dimensions": 3, "regime": "weighted"}, "rows"),
    ({"dimensions": 3, "regime": "fresh", "fraction": 0.04}, "rows"),
])  # fmt: skip
def test_many_rows_of_several_dimensions_are_drawn_by_their_statistics(given, wanted):
    result = lab("gaussian", **{"samples": 200, "rounds": 1, "replicates": 2, **given})
    assert result.config["draw"] == wanted


def test_the_log_s_rate_is_of_the_tokens_between_its_lines(tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 100.0, 0.5))
    monkeypatch.setattr("recursive_jax.train.log.time.perf_counter", lambda: float(next(clock)))
    log = TrainLog("x", 4, directory=tmp_path, every=2, quiet=True)
    for step in range(1, 5):
        log.step(step, {"loss": 1.0}, 100)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [2, 4]
    assert lines[1]["tokens_per_second"] == pytest.approx(200 / 0.5)  # two steps, and one reading of the clock


def test_the_error_over_replicates_is_that_of_their_mean(monkeypatch):
    monkeypatch.setattr("recursive_jax.rounds.profile._against", lambda *given: given)
    records = [{"round": 1, "metrics": {"kl_total": x}} for x in (1.0, 2.0, 4.0)]
    _, _, before, error, count, _ = _exact(records, [{"kl_total": 0.5}], ["round 1"], 0.99)["round 1"]["kl_total"]
    assert (before, count) == (0.5, 3) and error == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
