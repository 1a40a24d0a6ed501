"""Values that one changed sign, sum or constant would move, found by leaving them out (benchmarks/mutation.py)."""

from __future__ import annotations

import datetime
import json
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pytest

import recursive_jax as rj
from recursive_jax.collapse.definitions import warnings
from recursive_jax.collapse.lab.categorical import Poisson
from recursive_jax.collapse.lab.kernels import Mixture
from recursive_jax.collapse.lab.lab import lab
from recursive_jax.collapse.lab.laws import weighted_mean, weighted_mean_limit
from recursive_jax.collapse.lab.ngram import Ngram
from recursive_jax.collapse.lab.vae import VAE
from recursive_jax.collapse.task import graded
from recursive_jax.data import chat
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.gguf_tokenizer import gguf_tokenizer
from recursive_jax.data.json_parser import _bounded
from recursive_jax.data.parsers import Json, Numbered, ParseError
from recursive_jax.data.task import class_field
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizer_files import read_tokenizer
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.request import as_requests
from recursive_jax.objectives import InfoNCE
from recursive_jax.objectives.base import Loss, Term
from recursive_jax.rounds.gate import decision
from recursive_jax.rounds.lineage import manifests, read_record, stored_rows
from recursive_jax.rounds.profile import _exact, run_profiles
from recursive_jax.rounds.progress import RunProgress
from recursive_jax.rounds.report.series import Arm
from recursive_jax.rounds.report.task import _before_and_after, task_layout
from recursive_jax.rounds.report.verdicts import attribution_section
from recursive_jax.rounds.status import status_text
from recursive_jax.train.log import TrainLog
from recursive_jax.train.step import _metrics
from tests.small_run import SmallRun


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


def test_one_row_of_a_list_that_the_schema_forbids_is_said():
    parser = Json({"properties": {"k": {"type": "integer"}}, "required": ["k"]}, many=True)
    assert parser.read('[{"k": 1}, {"k": "x"}]') == ParseError('[{"k": 1}, {"k": "x"}]', "schema")
    assert [row["k"] for row in parser.read('[{"k": 1}, {"k": 2}]')] == [1, 2]


def test_signs_that_nothing_measures_are_named():
    found = warnings({})
    assert [f.name for f in found] == ["entropy contracts", "tail erodes", "representation drifts"]
    assert all(f.answer == "not measured" and "needs one of" in f.evidence for f in found)


def test_a_loss_of_several_terms_is_logged_term_by_term():
    terms = {"a": Term(np.float32(6.0), np.float32(3.0), 1.0), "b": Term(np.float32(8.0), np.float32(2.0), 0.5)}
    found = _metrics(Loss(terms, metrics={"right": (np.float32(3.0), np.float32(4.0))}))
    wanted = {"loss": 2.0 + 0.5 * 4.0, "loss/a": 2.0, "loss/b": 4.0, "right": 0.75, "targets": 3.0}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted)
    assert "loss/a" not in _metrics(Loss({"a": terms["a"]}))


@pytest.mark.parametrize("sizes", [{"growth": 1.0}, {"schedule": "10,20"}])
def test_shares_of_real_rows_want_rounds_of_one_size(sizes):
    with pytest.raises(InputError, match="rounds of one size"):
        lab("gaussian", samples=20, rounds=2, replicates=2, regime="anchor", fraction=0.1, **sizes)


class _Rendered(ByteTokenizer):
    def __init__(self, template):
        self.chat_template = template


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages|length }}",  # what follows replaces the end
        "{% if add_generation_prompt %}?{% else %}!{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_renders_otherwise_once_it_goes_on_is_refused(template):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(InputError, match="renders a conversation differently once it goes on"):
        chat.render_spans(_Rendered(template), said)


def test_the_first_vae_learns_from_every_image(monkeypatch):
    monkeypatch.setattr(VAE, "real_NP", np.full((5, 16), 255, np.uint8))
    monkeypatch.setattr(VAE, "_train", lambda self, key, drawn: drawn)
    drawn = VAE().prepare(None)
    assert drawn.images_NP.tolist() == np.ones((5, 16)).tolist() and drawn.until_N.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("rounds", "whole"), [(0, False), (1, True)])
def test_one_round_beside_the_base_has_a_profile(rounds, whole, monkeypatch):
    made = [
        {"verb": "generate", "name": "samples", "round": k, "arm": "main" if k == 0 else "a"} for k in range(rounds + 1)
    ]
    rng = np.random.default_rng(0)
    rows = Dataset.from_rows([{"id": f"r{i}", "tokens": rng.integers(0, 20, 12).tolist()} for i in range(300)])
    for name, value in (("manifests", made), ("evaluations", []), ("stored_rows", rows)):
        monkeypatch.setattr(f"recursive_jax.rounds.profile.{name}", lambda *given, value=value: value)
    if whole:
        assert list(run_profiles("run")) == ["a"]
    else:
        with pytest.raises(InputError, match="no samples of a round"):
            run_profiles("run")


def test_rows_of_a_run_are_checked_as_they_are_looked_at(tmp_path, tokenizer, mesh):
    SmallRun(tokenizer, mesh, student=False)(tmp_path, until="rows")
    (made,) = [m for m in manifests(tmp_path) if m["name"] == "rows"]
    assert len(stored_rows(tmp_path, made)) == 24
    file = tmp_path / made["path"] / "rows-00000.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(InputError, match="rows-00000.parquet"):
        stored_rows(tmp_path, made)


def test_a_run_counts_its_results_and_says_what_is_left(monkeypatch):
    said = []
    monkeypatch.setattr("recursive_jax.rounds.progress.console.print", lambda line, **more: said.append(line))
    progress = RunProgress(quiet=False)
    progress.total = 20
    counts = {"rows": 3, "tokens": 9}
    for number in range(7):
        made = {"round": min(number, 1), "seconds": 100.0 if number == 0 else 20.0, "counts": counts, "verb": "data"}
        progress.finished("round · rows", made, stored=number == 6)
    assert said[0].startswith("   [1/20]") and said[5].startswith("   [6/20]") and "left" not in said[4]
    assert said[5].endswith("5 min left"), "14 results at the 20 seconds of a round's, without the first's 100"
    assert "stored" in said[6]
    quiet = RunProgress(quiet=True)
    quiet.finished("x", made)
    assert quiet.done == 1 and len(said) == 7


def test_a_quiet_log_says_nothing(capsys, tmp_path, monkeypatch):
    clock = iter(range(0, 9999, 20))
    monkeypatch.setattr("recursive_jax.train.log.time.perf_counter", lambda: float(next(clock)))
    for quiet in (True, False):
        log = TrainLog("label", 4, directory=tmp_path, every=1, quiet=quiet)
        for step in range(1, 4):
            log.step(step, {"loss": 1.0}, 10)
        log.close()
        assert ("label  step 3/4" in capsys.readouterr().err) is not quiet


@pytest.mark.parametrize(("fields", "wanted"), [({"tokenizer.chat_template": "{{ 1 }}"}, "{{ 1 }}"),
                                                ({"tokenizer.chat_template": 5}, None), ({}, None)])  # fmt: skip
def test_a_gguf_s_template_is_a_text(fields, wanted, capsys):
    own = {"model": "gpt2", "pre": "", "tokens": ["a", "b", "ab", "</s>"], "merges": ["a b"], "eos_token_id": 3}
    given = {f"tokenizer.ggml.{k}": v for k, v in own.items()}
    assert gguf_tokenizer({**given, **fields}, 4, "m.gguf").chat_template == wanted
    assert "no tokenizer.ggml.pre" in capsys.readouterr().err
    given["tokenizer.ggml.pre"] = "gpt-2"
    gguf_tokenizer(given, 4, "m.gguf")
    assert "no tokenizer.ggml.pre" not in capsys.readouterr().err


def test_texts_go_into_a_durable_generation_and_half_characters_do_not(tmp_path, mesh):
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=32)
    model = rj.transformer(config, ByteTokenizer(), mesh).initialized(0)
    with rj.Run(tmp_path, {"a": 1}, quiet=True) as run:
        rows = run.round(0).generate("rows", model, ["a", "b"], {"max_tokens": 2}).value
    assert [bytes(p[1:].tolist()).decode() for p in rows.prompts()] == ["a", "b"]
    with pytest.raises(InputError, match="prompt 1 holds half a character"):
        rj.generate(model, ["a", "\ud800"])
    assert repr(model).startswith("Model(") and len(repr(model)) < 300
    assert "no params yet" in repr(model.with_params(None))


def test_a_prompt_begins_as_its_tokenizer_says(mesh):
    """Without a start token where the tokenizer has none (Qwen's), in Python as on the command line."""

    class Unopened(ByteTokenizer):
        has_bos = False

    for tokenizer, wanted in ((ByteTokenizer(), [256, 97, 98]), (Unopened(), [97, 98])):
        assert as_requests("ab", tokenizer)[0].tokens(256).tolist() == wanted


def test_a_limit_on_texts_is_refused_where_some_are_missing():
    data = Dataset.from_rows([{"text": "a", "grade": "high"}, {"text": "b", "grade": None}])
    with pytest.raises(InputError, match="holds texts, numbers are wanted"):
        rj.select(data, rj.rules.at_least(1.0, "grade"))


def test_the_common_beginning_of_texts_of_any_lengths():
    from recursive_jax.generate.text import _common

    assert [_common("abc", b) for b in ("abcd", "abc", "ab", "abx", "", "x")] == [3, 3, 2, 2, 0, 0]


def test_the_poisson_s_numbers_are_of_its_own_rate():
    from scipy import stats

    family = Poisson(rate=3.0)
    found = {name: float(x) for name, x in family.measure(np.float64(2.0), None).items()}
    k = np.arange(200)
    p, log_q = stats.poisson.pmf(k, 3.0), stats.poisson.logpmf(k, 2.0)
    wanted = np.sum(p * (stats.poisson.logpmf(k, 3.0) - log_q))
    assert found["kl"] == pytest.approx(wanted, rel=1e-6) and found["mean_squared_error"] == pytest.approx(1.0)
    assert float(family.measure(np.float64(0.0), None)["extinct"]) == 1 and found["extinct"] == 0


def test_a_fine_tune_s_report_has_its_answers_where_there_are_some():
    class Seen:
        arms = ()

    assert task_layout.sections(Seen()) == []
    shown = [{"prompt": "q", "answer": "a", "right": True}]
    rounds = {k: [{"accuracy": float(k), "rows": 2, "shown": shown}] for k in (0, 1)}
    Seen.arms = [Arm("main", 0, rounds)]
    assert len(task_layout.sections(Seen())) == 1


def test_a_gate_promotes_at_its_level_too():
    stored = lambda scores: SimpleNamespace(value=Dataset.from_rows([{"text": "", "score": s} for s in scores]))
    new, old = {"target": stored([1.0] * 4)}, {"target": stored([0.0] * 4)}
    at = lambda alpha: decision(new, old, "paired_test", alpha, 1)["promoted"]
    assert (at(2.0**-3), at(2.0**-3 - 1e-9)) == (1.0, 0.0)  # p = 2^-4, of which round 1 may use half


def test_texts_are_named_alike_however_they_are_stored():
    data = Dataset.from_rows([{"text": "a", "own": "one"}, {"text": "b", "own": None}])
    place = data.table.column_names.index("own")
    for kind in (pa.string(), pa.large_string()):
        other = Dataset(data.table.set_column(place, "own", data.table["own"].cast(kind)))
        assert other.fingerprint == data.fingerprint


def test_a_class_may_be_a_date():
    rows = [{"day": datetime.date(2026, 1, 1 + i % 2), "n": i} for i in range(20)]
    assert class_field(rows, ["n", "day"]) == "day"


def test_environments_are_counted_from_the_first(tmp_path, tokenizer, mesh, monkeypatch):
    SmallRun(tokenizer, mesh, student=False)(tmp_path, until="data")
    record = {**read_record(tmp_path), "environments": [{"jax": "1"}, {"jax": "2"}]}
    monkeypatch.setattr("recursive_jax.rounds.status.read_record", lambda run: record)
    assert "environment 2: jax: '1' -> '2'" in status_text(tmp_path)


def test_the_weighted_mean_goes_to_its_limit():
    found = weighted_mean(10, 0.5, 60)
    assert len(found) == 61 and found[0] == 0 and found[1] == pytest.approx(0.25 / 10 + 0.25 / 10)
    assert 10 * found[-1] == pytest.approx(weighted_mean_limit(0.5), rel=1e-9)


def test_the_attribution_stands_beside_the_oracle_and_new_truth():
    numbers = {"kl_total": 0.5, "kl_oracle": 0.2}
    rounds = {k: [{name: value * (k + 1) for name, value in numbers.items()}] for k in (0, 1, 2)}
    page = attribution_section([Arm("replace", 0, rounds)])
    assert "<h3>replace</h3>" in page and page.count("<tr>") == 3 and "Add an arm" in page
    fresh = Arm("ceiling", 1, {k: [{"kl_total": 0.3}] for k in (0, 1, 2)})
    page = attribution_section([Arm("replace", 0, rounds), fresh])
    assert "recursion's damage" in page and "<h3>ceiling</h3>" not in page and ">0.70<" in page and ">1.20<" in page


def test_only_integers_are_bounded():
    assert _bounded({"type": "integer"}).keys() == {"minimum", "maximum", "type"}
    assert _bounded({"type": "string"}) == {"type": "string"} and _bounded("x") == "x"


def test_who_finds_its_passage_is_counted():
    queries = np.eye(3, 4, dtype=np.float32)
    passages = queries[[0, 2, 1]]
    batch = {"tokens": np.zeros((3, 2, 1), np.int32)}
    loss = InfoNCE().loss_of(None, None, np.stack([queries, passages], 1), batch)
    assert [float(x) for x in loss.metrics["accuracy"]] == [1.0, 3.0]
