"""What people write in Python, and what it becomes: texts, conversations, dicts, rules and rewards as functions, a run
that gets longer."""

from __future__ import annotations

import json

import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.config.loader import parse_section, with_settings
from recursive_jax.data.given import as_dataset
from recursive_jax.data.packing import pack_tokens
from recursive_jax.errors import InputError
from recursive_jax.recipes.collapse_config import CollapseConfig

BYTES = rj.ByteTokenizer()
EOS = BYTES.eos


def test_texts_are_learnt_whole_and_end():
    data = as_dataset(["ab", "é"], BYTES)
    assert [t.tolist() for t in data.tokens()] == [[97, 98, EOS], [0xC3, 0xA9, EOS]]
    assert as_dataset("ab", BYTES).fingerprint == as_dataset(["ab"], BYTES).fingerprint
    assert data.column("text") == ["ab", "é"] and not any(data.column("synthetic"))


def test_a_prompt_is_not_learnt_and_other_columns_go_along():
    data = as_dataset([{"prompt": "Q", "completion": "A", "source": "mine"}], BYTES)
    columns = pack_tokens(data, 8, BYTES).columns
    learnt = columns["tokens"][columns["loss"] & (columns["segments"] > 0)]
    assert learnt.tolist() == [65, EOS]
    texts = as_dataset([{"text": "ab", "n": 3}, {"text": "c", "n": 4}], BYTES)
    assert texts.column("n") == [3, 4] and [len(t) for t in texts.tokens()] == [3, 2]
    # A Dataset whose rows have texts alone is tokenized; one with tokens stays as it is.
    written = rj.Dataset.from_rows([{"text": "ab", "score": 0.5}])
    assert as_dataset(written, BYTES).lists("tokens")[0].tolist() == [97, 98, EOS]
    assert as_dataset(texts, BYTES) is texts


def test_conversations(tmp_path):
    class Chat(rj.ByteTokenizer):
        chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content }}{% endgeneration %}{% else %}<{{ m.content }}>{% endif %}{% endfor %}"
        )

    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    one, several, dicts = (as_dataset(given, Chat()) for given in (talk, [talk], [{"messages": talk}]))
    assert one.fingerprint == several.fingerprint
    assert [t.tolist() for t in dicts.tokens()] == [t.tolist() for t in one.tokens()]
    assert bytes(one.tokens()[0].tolist()).decode() == "A"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "this is a int"),
        ([], "no rows"),
        ({"text": "a"}, "this is a dict"),
        ([{"question": "a"}], "'question'.*`prompt` and `completion`"),
        (["a", 3], "row 1 is a int"),
        ([{"text": "a"}, {"prompt": "b"}], "'text', 'prompt'"),
        ([{"text": None}], "row 0 is a NoneType"),
    ],
)
def test_what_cannot_be_learnt_is_named(given, says):
    with pytest.raises(InputError, match=says):
        as_dataset(given, BYTES)


def test_settings_by_name():
    base = rj.TrainConfig(steps=7, batch=2)
    assert with_settings(rj.TrainConfig, base, {}) is base
    assert with_settings(rj.TrainConfig, base, {"steps": 9}) == rj.TrainConfig(steps=9, batch=2)
    assert with_settings(rj.TrainConfig, {"steps": 9}, {"batch": 4}) == rj.TrainConfig(steps=9, batch=4)
    with pytest.raises(InputError, match="did you mean steps"):
        with_settings(rj.TrainConfig, None, {"step": 1})
    with pytest.raises(InputError, match="not a SamplingConfig"):
        with_settings(rj.TrainConfig, rj.SamplingConfig(), {})


def test_rules_see_a_dataset_and_functions_a_row(capsys):
    data = rj.Dataset.from_rows([{"text": text, "score": n} for n, text in enumerate("aabc" * 30)])
    kept, dropped = rj.select(data, [rj.rules.unique(), lambda row: row["score"] < 3])
    assert kept.column("text") == ["a", "b"] and dropped == {"unique texts": 117, "<lambda>": 1}
    assert "keeps 2 of 120 rows: unique texts dropped 117, <lambda> dropped 1" in capsys.readouterr().err
    assert len(rj.select(data, lambda row: row["score"] > 9)[0]) == 110
    assert not capsys.readouterr().err, "a usual selection is silent"
    with pytest.raises(InputError, match="a function of a row, not a int"):
        rj.select(data, [3])
    assert rj.score(data, lambda rows: [2.0] * len(rows), "reward").column("reward") == [2.0] * 120
    with pytest.raises(InputError, match="119 scores for 120 rows"):
        rj.score(data, lambda rows: [2.0] * 119)


def test_lineage_goes_through_every_verb():
    stored = rj.Dataset(rj.Dataset.from_rows([{"text": t, "n": n} for n, t in enumerate("abcd")]).table, "mark")
    template = rj.Template("{n}", "{n}!")
    made = [
        stored[1:3],
        stored.take([2]),
        stored.where(n=1),
        stored.where(lambda row: row["n"] > 1),
        stored.first_tokens(1),
        stored.without("n"),
        stored + stored[:1],
        rj.score(stored, lambda data: [1] * len(data)),
        rj.select(stored, lambda row: row["n"] > 0)[0],
        rj.examples_dataset(stored, template, BYTES),
        as_dataset(stored, BYTES),
    ]
    assert all(data.origins == ("mark",) for data in made)
    examples = rj.examples_dataset(stored, template, BYTES)
    assert examples.column("parents") == [[f"row/{i}"] for i in range(4)] and examples.column("n") == [0, 1, 2, 3]
    assert examples.tokens()[2].tolist() == [*b"2!", EOS] and examples.prompts()[2].tolist() == [256, *b"2"]


def test_a_dataset_shows_its_first_rows():
    data = rj.Dataset.from_rows([{"text": "x" * 500, "n": n} for n in range(5)])
    lines = repr(data).splitlines()
    assert lines[0] == "Dataset(5 rows, 0 tokens; own columns: n)" and lines[-1] == "  ... and 2 more"
    assert len(lines) == 5 and all(len(line) <= 120 for line in lines)
    assert repr(rj.Dataset.from_rows([])) == "Dataset(0 rows, 0 tokens)"


def test_evaluate_counts_what_is_learnt(mesh, tiny):
    """Against the log-probabilities of the rows, added up by hand."""
    model = rj.transformer(tiny, BYTES, mesh).initialized(0)
    found = rj.evaluate(model, ["abc", "d"])
    by_hand = list(rj.token_logprobs(model, [np.array([*b"abc", EOS]), np.array([*b"d", EOS])]))
    assert found.metrics["tokens"] == 6
    assert found.metrics["cross_entropy"] == pytest.approx(-np.concatenate(by_hand).mean(), rel=1e-5)
    assert found.rows.column("nats") == pytest.approx([-x.mean() for x in by_hand], rel=1e-5)
    pair = rj.evaluate(model, [{"prompt": "ab", "completion": "c"}])
    assert pair.metrics["tokens"] == 2
    assert pair.metrics["cross_entropy"] == pytest.approx(-by_hand[0][2:].mean(), rel=1e-5)
    template = rj.Template("{q}", "{a}")
    asked = rj.evaluate(model, [{"q": "x", "a": "y"}], template, max_tokens=3)
    assert asked.rows.column("q") == ["x"] and asked.rows.column("score") == [0.0] and asked.rows[0]["tokens"]
    with pytest.raises(InputError, match="no rows to evaluate"):
        rj.evaluate(model, [], template)


def config(*overrides):
    return parse_section(CollapseConfig, {}, ["rounds.token_budget=100", *overrides])


def test_a_run_may_get_longer_in_place(tmp_path):
    """`rounds.count` and the end of `rounds.schedule` may grow; nothing may shrink or change."""
    folder = tmp_path / "run"
    rj.Run(folder, config("rounds.count=2"), quiet=True).close()
    with rj.Run(folder, config("rounds.count=2"), quiet=True) as run:
        run.round(0).dataset("rows", rj.Dataset.from_rows, [{"text": "a"}])
    rj.Run(folder, config("rounds.count=5"), quiet=True).close()
    assert json.loads((folder / "run.json").read_text())["config"]["rounds"]["count"] == 5
    for overrides, says in (
        (["rounds.count=4"], "rounds.count: 5 -> 4"),
        (["rounds.count=6", "rounds.token_budget=200"], "rounds.token_budget: 100 -> 200"),
    ):
        with pytest.raises(InputError, match=says):
            rj.Run(folder, config(*overrides), quiet=True)
    assert json.loads((folder / "run.json").read_text())["config"]["rounds"]["count"] == 5, "a refusal writes nothing"


def test_a_schedule_may_go_on(tmp_path):
    folder = tmp_path / "run"
    with rj.Run(folder, config("rounds.count=2", "rounds.schedule=[100, 200]"), quiet=True) as run:
        run.round(0).dataset("rows", rj.Dataset.from_rows, [{"text": "a"}])
    rj.Run(folder, config("rounds.count=3", "rounds.schedule=[100, 200, 50]"), quiet=True).close()
    with pytest.raises(InputError, match="schedule"):
        rj.Run(folder, config("rounds.count=4", "rounds.schedule=[100, 300, 50, 50]"), quiet=True)
