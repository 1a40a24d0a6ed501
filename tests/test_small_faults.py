"""Values that one changed sign, sum or constant would move, found by leaving them out (benchmarks/mutation.py)."""

from __future__ import annotations

import jax
import numpy as np

from recursive_jax.collapse.lab.ngram import Ngram
from recursive_jax.collapse.task import graded
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.parsers import Numbered
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizer_files import read_tokenizer
from recursive_jax.rounds.report.series import Arm
from recursive_jax.rounds.report.task import _before_and_after


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
