"""Tasks: what comes out of known answers, and the usual files of instructions and problems."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.collapse.tasks import Choices, Task, pass_at_k, right_choice, task_numbers
from recursive_jax.curate.verifiers import NumericMatch
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.forms import FORMS, as_conversations, form_of
from recursive_jax.data.parsers import Answer
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from tests.conftest import SHARED_DATA


@pytest.fixture(scope="module")
def model(mesh):
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=128)
    return rj.transformer(config, ByteTokenizer(), mesh).initialized(0)


def solved(texts, n, statuses=None):
    """Answers to problems whose right answer is 7, as they come back."""
    rows = [{"id": f"r/{i}", "text": t, "status": "ok", "found": t, "answer": 7} for i, t in enumerate(texts)]
    for i, status in (statuses or {}).items():
        rows[i] |= {"status": status, "found": None}
    return Dataset.from_rows(rows)


def task(rows=1):
    template = Template("{question}", "{answer}", parser=Answer("any", "found"))
    return Task("t", ({"question": "?", "answer": 7},) * rows, template, NumericMatch("answer", of="found"))


def test_pass_at_k_is_the_share_of_the_subsets():
    for n, right in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if right <= n:
                subsets = list(itertools.combinations(range(n), k))
                wanted = sum(any(i < right for i in s) for s in subsets) / len(subsets)
                assert pass_at_k(n, right, k) == pytest.approx(wanted)


def test_numbers_of_known_answers():
    data = rj.score(solved(["7", "8", "7", "x"], 1, {3: "parse_error:no answer"}), lambda d: [1.0, 0.0, 1.0, 0.0])
    found = task_numbers(task(4), data)
    assert found["score"] == found["accuracy"] == 0.5 and found["format"] == 0.75 and found["rows"] == 4
    assert found["score_stderr"] == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)
    # three questions, four answers each: majority 7, majority 8, and a tie that the first answer decides
    texts = ["7", "8", "7", "9", "8", "8", "7", "1", "7", "8", "1", "2"]
    data = rj.score(solved(texts, 4), lambda d: [float(t == "7") for t in texts])
    found = task_numbers(task(3), data, 4)
    assert found["majority"] == pytest.approx(2 / 3) and found["pass_at_1"] == pytest.approx((2 + 1 + 1) / 12)
    assert found["pass_at_4"] == 1.0 and found["pass_at_2"] == pytest.approx(np.mean([1 - 1 / 6, 1 - 3 / 6, 1 - 3 / 6]))
    with pytest.raises(InputError, match="gives no row a score"):
        task_numbers(task(), rj.score(solved(["7"], 1), lambda d: [None]))


def test_a_task_is_asked_read_and_graded(model):
    rows = tuple({"question": f"{n} + 0 = ", "answer": n} for n in range(6))
    asked = Task(
        "sums", rows, Template("{question}", parser=Answer("number", "found")), NumericMatch("answer", of="found")
    )
    found = rj.evaluate(model, asked, regex="[0-5]", max_tokens=4)
    assert found.metrics["format"] == 1.0 and 0 <= found.metrics["score"] <= 1 and found.metrics["rows"] == 6
    right = [float(f) == a for f, a in zip(found.rows.column("found"), found.rows.column("answer"), strict=True)]
    assert found.rows.column("score") == [float(x) for x in right]
    assert found.rows.column("parents") == [[f"sums/{n}"] for n in range(6)]
    many = rj.evaluate(model, asked, n=4, regex="[0-5]", max_tokens=4, seed=1)
    assert len(many.rows) == 24 and set(many.metrics) >= {"pass_at_1", "pass_at_2", "pass_at_4", "majority"}
    assert many.metrics["pass_at_4"] >= many.metrics["pass_at_1"] == pytest.approx(many.metrics["score"])
    with pytest.raises(InputError, match="n is for tasks"):
        rj.evaluate(model, ["text"], n=2)
    with pytest.raises(InputError, match="no rows"):
        Task("none", (), Template("{q}"), NumericMatch())


def test_choices_are_ranked_by_their_likelihood(model):
    rows = ({"question": "1 + 1 =", "choices": ["2", "three", "4"], "answer": 0},
            {"question": "The sky is", "choices": ["blue", "red"], "answer": "B"})  # fmt: skip
    found = rj.evaluate(model, Choices("c", rows))
    for row, given in zip(found.rows, rows, strict=True):
        wanted = []
        for choice in given["choices"]:
            prompt = [256, *f"{given['question']}\nAnswer:".encode()]
            whole = np.array([*prompt, *f" {choice}".encode()], np.int32)
            logits = np.asarray(model.logits(whole[None, :-1]), np.float64)[0]
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            wanted.append(logp[np.arange(len(whole) - 1), whole[1:]][len(prompt) - 1 :].sum())
        np.testing.assert_allclose(row["logprobs_of_choices"], wanted, rtol=1e-5)
        assert row["chosen"] == int(np.argmax(wanted)) and row["text"] == given["choices"][row["chosen"]]
        normed = np.argmax([w / len(f" {c}") for w, c in zip(wanted, given["choices"], strict=True)])
        assert row["score_norm"] == float(normed == right_choice(given)) and row["answer"] == right_choice(given)
    assert [right_choice(r) for r in rows] == [0, 1] and found.metrics["rows"] == 2
    with pytest.raises(InputError, match="answer='Z' is none of its 2 choices"):
        Choices("c", ({"question": "?", "choices": ["a", "b"], "answer": "Z"},))


def test_the_built_in_tasks_read_their_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}) + "\n")
    gsm8k = rj.tasks.gsm8k(str(path))
    reply = gsm8k.template.read(gsm8k.rows[0], "It is 5.0\n#### 5")
    assert reply == [{"found": "5"}] and gsm8k.reward([{**gsm8k.rows[0], **reply[0]}]) == [1.0]
    path.write_text(json.dumps({"Question": "number0 and number10?", "Numbers": "2.0 " * 11, "Answer": "4"}) + "\n")
    mawps = rj.tasks.mawps(str(path))
    assert mawps.rows[0]["question"] == "2 and 2?" and mawps.template.wanted(mawps.rows[0]) == {"solution": "4"}
    folder = tmp_path / "snips"
    folder.mkdir()
    (folder / "seq.in").write_text("play it\nrain today\n")
    (folder / "label").write_text("PlayMusic\nGetWeather\n")
    snips = rj.tasks.snips(str(folder))
    assert "GetWeather, PlayMusic?" in snips.template.asks(snips.rows[0])
    assert snips.template.read(snips.rows[0], "I think playmusic!") == [{"found": "PlayMusic"}]
    (folder / "label").write_text("PlayMusic\n")
    with pytest.raises(InputError, match="has 2 lines, label 1"):
        rj.tasks.snips(str(folder))


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the shared data are not here")
def test_the_right_answers_of_real_tasks_are_right():
    """Every gold answer, given as a reply, is read and counts as right."""
    paths = {"gsm8k": "gsm8k/test.jsonl", "mawps": "mawps/fold0/dev.csv", "snips": "snips/test"}
    for name, path in paths.items():
        one = getattr(rj.tasks, name)(str(SHARED_DATA / path), limit=300)
        replies = [one.template.read(row, one.template.messages(row)[-1]["content"]) for row in one.rows]
        rows = [{**row, **reply[0]} for row, reply in zip(one.rows, replies, strict=True)]
        assert math.fsum(one.reward(rows)) == len(rows) > 100, name


def test_the_usual_forms_are_told_apart():
    given = {
        "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "Alpaca": {"instruction": "a", "input": "", "output": "b"},
        "prompt and completion": {"prompt": "a", "completion": "b"},
        "prompt and response": {"prompt": "a", "response": "b"},
        "question and answer": {"question": "a", "answer": "b"},
    }
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name, row in given.items():
        assert as_conversations([row]) == ([{**row, "messages": turns}], name)
    (found,), name = as_conversations([{"prompt": "a", "chosen": [*turns], "rejected": "c", "k": 1}])
    assert name == "preferences" and found["messages"] == turns[:1] and found["k"] == 1
    assert (found["chosen"], found["rejected"]) == ("b", "c")
    with_input = as_conversations([{"instruction": "a", "input": "x", "output": "b"}])[0][0]["messages"]
    assert with_input[0]["content"] == "a\n\nx" and {f.name for f in FORMS} == {*given, "preferences"}
    assert form_of([{"x": 1}]) is None
    for rows, says in (
        ([{"x": 1}], "the columns x, which are those of no form"),
        ([{"conversations": [{"from": "alien", "value": "a"}]}], "row 0: a turn of ShareGPT"),
        ([{"messages": [1]}], "row 0 is not of the form messages"),
    ):
        with pytest.raises(InputError, match=says):
            as_conversations(rows)


def test_alpaca_rows_are_learnt_without_a_word_of_how(model, capsys):
    data = rj.evaluate(model, [{"instruction": "add", "input": "1 2", "output": "3", "k": 5}]).rows
    text = model.tokenizer.decode(data[0]["prompt"][1:])
    assert text == "### Instruction:\nadd\n\n1 2\n\n### Response:\n" and data[0]["text"] == "3"
    assert data.column("k") == [5] and "rows read as Alpaca" in capsys.readouterr().err
