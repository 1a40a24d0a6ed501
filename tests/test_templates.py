"""Templates and tasks: what is asked, what is read back, and which rows are held out."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from recursive_jax.collapse.likelihood import cross_entropy
from recursive_jax.collapse.task import task_metrics
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.task import class_field, hold_out
from recursive_jax.data.template import ParseError, Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError


def test_a_format_is_read_back_as_it_was_written():
    template = Template("{q}", "about {x:.1f} of {name!r}")
    row = {"q": "?", "x": 3.14159, "name": "pi"}
    written = template.messages(row)[-1]["content"]
    assert written == "about 3.1 of 'pi'"
    assert template.read(row, written) == [template.wanted(row)] == [{"x": "3.1", "name": "'pi'"}]


def test_fields_are_fields_and_nothing_else():
    """`str.format_map` follows attributes and items of what it is given."""

    class Secret:
        key = "hidden"

    for text in ("{row.key}", "{row[0]}", "{0}", "{}", "{row.__class__}"):
        with pytest.raises(InputError, match="plain name"):
            Template(text, "{a}")
    with pytest.raises(InputError, match="fields of its own"):
        Template("{a:{width}}", "{a}")
    with pytest.raises(InputError, match="not valid"):
        Template("{a", "{a}")
    assert Template("{{a}} {b}", "{b}").messages({"b": Secret.key}, answered=False)[-1]["content"] == "{a} hidden"
    with pytest.raises(InputError, match="row's fields are: b"):
        Template("{a}", "{b}").messages({"b": 1})


@pytest.mark.parametrize(
    ("completion", "text", "wanted"),
    [
        ("Intent: {intent}", " Intent: PlayMusic\n", {"intent": "PlayMusic"}),
        ("Intent: {intent}", "intent: x", None),
        ("{a} and {b}", "x and y and z", {"a": "x", "b": "y and z"}),
        ("{a}, {b}.", "x, y. z.", {"a": "x", "b": "y. z"}),
        ("{a}, {b}.", "x, y", None),
        ("{a} = {a}", "7 = 7", {"a": "7"}),
        ("{a} = {a}", "7 = 8", None),
        ("<{a}>", "<>", None),
        ("<{a}>", "<x> y", None),
        ("done", "done", {}),
        ("done", "done!", None),
        ("{a}{b}", "xyz", {"a": "x", "b": "yz"}),
        ("{a}\n{b}", "one\ntwo\nthree", {"a": "one", "b": "two\nthree"}),
    ],
)
def test_answers_are_read_back(completion, text, wanted):
    found = Template("{q}", completion).parse(text)
    assert found == (ParseError(text) if wanted is None else wanted)


def test_reading_agrees_with_the_lazy_pattern_it_replaces():
    """On random texts of few letters, where fields differ: the same fields as of a lazy regular expression."""
    rng = np.random.default_rng(0)
    for completion in ("{x}: {y}", "a{x}b{y}c", "{x} {y} {z}", "({x})"):
        pattern = re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>.+?)", re.escape(completion)), re.DOTALL)
        for _ in range(400):
            text = "".join(rng.choice(list("abc: ()\n"), rng.integers(1, 12)))
            found, match = Template("{q}", completion).parse(text), pattern.fullmatch(text.strip())
            wanted = {k: v.strip() for k, v in match.groupdict().items()} if match else None
            if wanted is not None and not all(wanted.values()):
                wanted = None  # a field of blanks is no answer
            assert found == (ParseError(text) if wanted is None else wanted), (completion, text)


def test_reading_is_linear_in_what_a_model_wrote():
    """Eight fields and text that never ends the form: a backtracking pattern took half a minute on 320 words."""
    template = Template("{q}", ", ".join(f"{{{c}}}" for c in "abcdefgh") + ".")

    def seconds(words):
        text = "word, " * words
        start = time.process_time()
        assert isinstance(template.parse(text), ParseError)
        return time.process_time() - start

    seconds(100)
    assert seconds(200_000) < 2.0  # a backtracking pattern needs the age of the universe


def test_held_out_rows_are_of_every_class():
    """A file that is sorted by class held out one class."""
    rows = [{"text": f"t{i}", "label": "abc"[i // 40]} for i in range(120)]
    assert class_field(rows, ["text", "label"]) == "label" and class_field(rows, ["text"]) is None
    learnt, held, how = hold_out(rows, 0.2, 0, "label")
    assert [sum(r["label"] == c for r in held) for c in "abc"] == [8, 8, 8] and len(learnt) == 96
    assert "equal shares of the 3 values of 'label'" in how and "24 of 120" in how and "seed 0" in how
    assert {r["text"] for r in learnt} | {r["text"] for r in held} == {r["text"] for r in rows}
    assert hold_out(rows, 0.2, 0, "label")[1] == held != hold_out(rows, 0.2, 1, "label")[1]
    plain = hold_out(rows, 0.2, 0)[1]
    assert len({r["label"] for r in plain}) == 3 and plain == sorted(plain, key=lambda r: int(r["text"][1:]))
    with pytest.raises(InputError, match="too few"):
        hold_out(rows[:1], 0.5, 0)
    with pytest.raises(InputError, match="no row has this field"):
        hold_out(rows, 0.2, 0, "nope")


def test_the_error_of_the_task_s_loss_is_that_of_its_mean(monkeypatch):
    """`ce_task` is nats over tokens; its error was of the mean over rows. Against a bootstrap over rows."""
    rng = np.random.default_rng(0)
    losses = [rng.exponential(1.0 / n, n).astype(np.float32) + 5.0 / n for n in rng.integers(1, 40, 200)]
    monkeypatch.setattr("recursive_jax.collapse.task.example_losses", lambda model, examples: losses)
    rows = [{"q": "a", "a": "b"}] * 200
    answers = real_rows([[1]] * 200, ["b"] * 200)
    from types import SimpleNamespace

    found = task_metrics(SimpleNamespace(tokenizer=ByteTokenizer()), Template("{q}", "{a}"), rows, answers)
    draws = []
    for _ in range(2000):
        pick = rng.integers(0, 200, 200)
        draws.append(sum(losses[i].sum() for i in pick) / sum(len(losses[i]) for i in pick))
    assert found["ce_task"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    assert found["ce_task_stderr"] == pytest.approx(np.std(draws), rel=0.1)  # 2000 draws: 1.6% of their spread
    assert cross_entropy(losses) == (found["ce_task"], found["ce_task_stderr"])


def test_a_missing_value_is_not_the_word_none():
    """It was rendered, and trained on."""
    with pytest.raises(InputError, match="wants 'a', and this row has none"):
        Template("{q}", "{a}").example({"q": "w", "a": None}, ByteTokenizer())
    with pytest.raises(InputError, match="a template is a text"):
        Template(None, "{a}")
