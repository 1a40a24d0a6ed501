"""Rewards: known answers, oracles, compositions, and functions that hang, die or fail in processes of their own."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recursive_jax as rj
from recursive_jax.curate.arithmetic import NotArithmetic, arithmetic
from recursive_jax.curate.judges import Judge, Likelihood
from recursive_jax.curate.outside import run_outside
from recursive_jax.curate.rewards import REWARDS, Function, Grade, Reward, grades
from recursive_jax.curate.verifiers import rouge_l, rouge_tokens
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.parsers import Label, Score
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError

r = rj.rewards


@pytest.mark.parametrize(("reward", "row", "wanted"), [
    (r.exact_match(), {"text": " 7 ", "answer": "7"}, 1),
    (r.exact_match(), {"text": "7.0", "answer": "7"}, 0),
    (r.exact_match(), {"text": "7", "answer": None}, None),
    (r.exact_match("gold", of="said", fold=True), {"said": "New  York", "gold": "new york"}, 1),
    (r.numeric_match(), {"text": "so it is 1,234.0 apples.", "answer": "x\n#### 1234"}, 1),
    (r.numeric_match(), {"text": r"3 or \boxed{4}, not 5", "answer": 4}, 1),
    (r.numeric_match(), {"text": "none", "answer": 4}, 0),
    (r.numeric_match(), {"text": "4", "answer": "four"}, None),
    (r.numeric_match(tolerance=0.01), {"text": "3.14", "answer": math.pi}, 1),
    (r.equation(names="Numbers"), {"text": "- number0 number1", "Numbers": "8.0 2.0", "answer": "6"}, 1),
    (r.equation(), {"text": "x = (8 - 2) * 3 / 4", "answer": 4.5}, 1),
    (r.equation(), {"text": "__import__('os')", "answer": 1}, 0),
    (r.equation(), {"text": "9 ** 9 ** 9 ** 9", "answer": 1}, 0),
    (r.json_valid(), {"text": '{"a": 1}'}, 1),
    (r.json_valid(), {"text": 'Here: {"a": 1}'}, 0),
    (r.json_valid(lenient=True), {"text": 'Here: {"a": 1}'}, 1),
    (r.json_valid({"required": ["b"]}), {"text": '{"a": 1}'}, 0),
    (r.contains(("Red", "blue")), {"text": "a red hat"}, 0.5),
    (r.contains("Red", case=True), {"text": "a red hat"}, 0),
    (r.length(2, 3), {"text": "a b c"}, 1),
    (r.length(high=4, unit="characters"), {"text": "a b c"}, 0),
    (r.rouge_l(), {"text": "the cat sat", "answer": "the cat sat down"}, 6 / 7),
    (r.token_count(2), {"tokens": [1, 2, 3]}, 2),
])  # fmt: skip
def test_rewards_of_known_rows(reward, row, wanted):
    (found,) = reward([row])
    assert found == (None if wanted is None else pytest.approx(wanted))


def test_the_table_names_every_reward_and_a_dataset_is_scored():
    assert {"exact_match", "numeric_match", "math_equal", "equation", "regex", "json_valid", "contains", "length",
            "rouge_l", "likelihood", "judge", "process_reward"} <= set(REWARDS)  # fmt: skip
    assert all(issubclass(getattr(r, name), Reward) for name in REWARDS)
    with pytest.raises(AttributeError, match="there is no reward 'exact'"):
        r.exact  # noqa: B018
    data = Dataset.from_rows([{"text": "7", "answer": "7"}, {"text": "8", "answer": None}])
    assert rj.score(data, r.exact_match()).column("score") == [1.0, None]
    with pytest.raises(InputError, match="no column 'gold'; there are"):
        r.exact_match("gold")(data)
    with pytest.raises(InputError, match=r"regex='\(' is not valid"):
        r.regex("(")


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda x: st.one_of(
            st.tuples(x, st.sampled_from("+-*/"), x).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
            st.tuples(x, st.sampled_from("+-"), x).map(" ".join),
            x.map(lambda t: f"-({t})"),
        ),
        max_leaves=8,
    )
)
def test_arithmetic_is_python_s(text):  # fmt: skip
    try:
        wanted = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))
    except ZeroDivisionError:
        with pytest.raises(NotArithmetic, match="zero"):
            arithmetic(text)
        return
    assert arithmetic(text) == wanted


def test_arithmetic_beyond_its_limits_is_refused():
    assert arithmetic("2 ^ 3 ^ 2") == 512 and arithmetic("-2 ^ 2") == -4 and arithmetic("1,000.5 * 2") == 2001
    assert arithmetic("* number0 + 1 number1", {"number0": 3.0, "number1": "2"}) == 9 and arithmetic("7 % 4") == 3
    assert arithmetic("1 / 3") == Fraction(1, 3)
    for text in (
        "",
        "1 +",
        "1 2",
        "(1",
        "1)",
        "()",
        "a",
        "2 ^ 0.5",
        "2 ^ 99999",
        "1 / 0",
        "0 ^ (-1)",
        "1" * 20_000,
        "x = 1",
    ):
        with pytest.raises(NotArithmetic):
            arithmetic(text)
    begin = time.process_time()
    for text in ("(" * 9_999, "-" * 9_999, "1+" * 4_999 + "1", "2*" * 4_999 + "2"):
        try:
            arithmetic(text)
        except NotArithmetic:
            pass
    assert time.process_time() - begin < 5


words = st.lists(st.sampled_from("abcd"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(one=words, other=words)
def test_rouge_l_is_the_longest_common_subsequence(one, other):
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    length = table[-1, -1]
    wanted = 2 * length / (len(one) + len(other)) if length else 0.0
    assert rouge_l(one, other) == pytest.approx(wanted)
    assert rouge_tokens("It's 3.5 Éa_b") == ["it", "s", "3", "5", "a", "b"]


# Put together.


def test_rewards_are_put_together():
    rows = [{"text": "7", "answer": "7", "q": 1}, {"text": "8 9", "answer": "7", "q": 1},
            {"text": "7", "answer": "7", "q": 2}, {"text": "1", "answer": None, "q": 2}]  # fmt: skip
    right, short = r.exact_match(), r.length(high=1)
    product = right * short * short
    assert product(rows) == [1.0, 0.0, 1.0, None] and len(product.parts) == 3
    assert product.grade(rows)[1].parts == {"exact_match": 0.0, "length_1": 0.0, "length_2": 0.0}
    assert r.minimum(right, short)(rows) == [1.0, 0.0, 1.0, None]
    named = {"right": (right, 0.8), "short": (short, 0.2)}
    assert r.weighted(named)(rows) == [1.0, 0.0, 1.0, None]
    data = rj.score(Dataset.from_rows(rows), r.weighted(named))
    assert data.column("score_right") == [1.0, 0.0, 1.0, None] and data.column("score_short") == [1.0, 0.0, 1.0, 1.0]

    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 12))
    rows = [{"a": a, "b": b, "q": n // 4} for n, (a, b) in enumerate(table.T.tolist())]
    pick = lambda name: rj.named(name, 1)(lambda data: data.column(name))
    parts = {"a": (pick("a"), 0.7), "b": (pick("b"), 0.3)}
    groups = lambda x: ((g := x.reshape(3, 4)) - g.mean(1, keepdims=True)) / (g.std(1, ddof=1, keepdims=True) + 1e-4)
    one = r.weighted(parts, "sum_then_normalize", by="q")(rows)
    np.testing.assert_allclose(one, groups(0.7 * table[0] + 0.3 * table[1]).ravel(), rtol=1e-12)
    other = r.weighted(parts, "normalize_then_sum", by="q")(rows)
    np.testing.assert_allclose(other, (0.7 * groups(table[0]) + 0.3 * groups(table[1])).ravel(), rtol=1e-12)
    assert rj.fingerprint(right * short) != rj.fingerprint(short * right) != rj.fingerprint(r.minimum(short, right))


def test_steps_are_graded_one_by_one():
    rows = [{"text": "a a\nb\n\nc c c"}, {"text": ""}]
    count = rj.named("words", 1)(lambda data: [len(t.split()) for t in data.column("text")])
    for how, wanted in (("min", 1), ("prod", 6), ("last", 3), ("mean", 2)):
        assert r.process_reward(count, how=how)(rows) == [wanted, None]
    before = rj.named("before", 1)(lambda data: [len(b) for b in data.column("before")])
    assert r.process_reward(before, how="last")(rows[:1]) == [len("a a\nb")]
    with pytest.raises(InputError, match="min, prod, last, mean"):
        r.process_reward(count, how="sum")


# In processes of their own.


def behave(row):
    what = row["text"]
    if what == "hang":
        while True:
            pass
    if what == "die":
        os._exit(3)
    if what == "fail":
        raise KeyError("gone")
    if what == "huge":
        return len(bytearray(2**40))
    print("noise on standard output")
    return (float(len(what)), f"{what}!") if what != "none" else None


def test_a_function_that_hangs_or_dies_costs_one_row():
    rows = Dataset.from_rows([{"text": t} for t in ("ok", "hang", "die", "fail", "none", "huge", "fine")])
    begin = time.perf_counter()
    found = rj.score(rows, r.function(behave, seconds=2.0))
    assert time.perf_counter() - begin < 60
    assert found.column("score") == [2.0, None, None, None, None, None, 4.0]
    assert found.column("score_status") == ["ok", "timeout", "died", "error", "ok", "error", "ok"]
    texts = found.column("score_text")
    assert texts[0] == "ok!" and texts[3] == "KeyError: 'gone'"
    with pytest.raises(InputError, match="behave fails on every row: KeyError: 'gone'"):
        r.function(behave, seconds=2.0)([{"text": "fail"}] * 3)


def test_functions_go_over_whole():
    factor = 3
    assert run_outside(lambda x: x * factor, [1, 2, 3], 30.0) == [("ok", 3), ("ok", 6), ("ok", 9)]
    assert run_outside(lambda x: x, [], 1.0) == []
    (status, said), *_ = run_outside(lambda x: (i for i in ()), [1], 30.0)
    assert status == "error" and "pickle" in said
    lock = threading.Lock()
    with pytest.raises(InputError, match="cannot be sent"):
        run_outside(lambda x: lock, [1], 1.0)


def test_a_pattern_that_backtracks_costs_one_row():
    reward = r.regex(r"^(a+)+$", seconds=1.0)
    found = reward.grade([{"text": "aaa"}, {"text": "a" * 60 + "b"}, {"text": "b"}])
    assert [g.score for g in found] == [1.0, None, 0.0] and found[1].status == "timeout"


# Judges.


@dataclasses.dataclass(frozen=True)
class Answers:
    """Stands for `generate`: replies by a function of the row that is asked."""

    reply: object

    def __call__(self, model, data, sampling, *, template, each, constrained, seed):
        from recursive_jax.generate.reading import read_replies

        rows = [row for row in data for _ in range(each)]
        texts = [self.reply(row, n % each) for n, row in enumerate(rows)]
        made = [{**row, "id": f"rows/{n}", "text": text} for n, (row, text) in enumerate(zip(rows, texts, strict=True))]
        return read_replies(Dataset.from_rows(made), template)


@pytest.fixture(scope="module")
def model(mesh):
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=64)
    return rj.transformer(config, ByteTokenizer(), mesh).initialized(0)


def test_a_judge_s_replies_are_averaged_and_what_cannot_be_read_left_out(model, monkeypatch, capsys):
    said = {"a": ["why\nScore: 4", "Score: 2", "no"], "b": ["no", "none", "-"]}
    monkeypatch.setattr("recursive_jax.curate.judges.generate", Answers(lambda row, n: said[row["reply"]][n]))
    judge = Judge(model, Template("Rate: {reply}", parser=Score()), samples=3)
    found = judge.grade([{"text": "a", "model": model.fingerprint}, {"text": "b"}])
    assert [g.score for g in found] == [3.0, None] and found[0].text == "why"
    assert found[1].status == "parse_error:no score"
    assert "the judge wrote 1 of the 2 rows" in capsys.readouterr().err
    with pytest.raises(InputError, match="gives no 'score'"):
        Judge(model, Template("{reply}", parser=Label(("a", "b"))))


def test_both_orders_are_asked_and_a_bias_for_a_place_is_a_tie(model, monkeypatch):
    """A judge that prefers the longer text, and one with a planted bias: the first text, unless the other is far
    longer."""
    asked = []

    def reply(row, n, bias=0):
        asked.append((row["first"], row["second"]))
        gap = len(row["first"]) + bias - len(row["second"])
        return "tie" if gap == 0 else "A" if gap > 0 else "B."

    rows = [{"text": "x" * a, "other": "x" * b} for a, b in ((9, 1), (1, 9), (4, 4), (5, 4), (4, 6))]
    judge = Judge(model, Template("{first} or {second}?"), against="other")
    monkeypatch.setattr("recursive_jax.curate.judges.generate", Answers(reply))
    found = judge.grade(rows)
    assert [g.score for g in found] == [1.0, 0.0, 0.5, 1.0, 0.0] and not any(g.parts["flipped"] for g in found)
    assert asked[0] == ("x" * 9, "x") and asked[5] == ("x", "x" * 9)
    monkeypatch.setattr("recursive_jax.curate.judges.generate", Answers(lambda row, n: reply(row, n, 3)))
    found = rj.score(Dataset.from_rows(rows), judge)
    assert found.column("score") == [1.0, 0.0, 0.5, 0.5, 0.5]  # |gap| of 3 and less: the place decided
    assert found.column("score_flipped") == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_a_small_model_s_judgement_always_parses(model):
    rows = [{"text": "good"}, {"text": "bad"}]
    judge = Judge(model, Template("Rate: {reply}\n", parser=Score(high=3)), samples=2)
    scores = judge(rows)
    assert all(1 <= s <= 3 for s in scores) and scores == judge(rows)


def test_the_likelihood_is_that_of_a_scoring_pass(model):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 255, n).astype(np.int32) for n in (5, 9, 70)]
    rows = [{"prompt": [256, 65], "tokens": tokens[0]}, {"prompt": [], "tokens": tokens[1]},
            {"prompt": [], "tokens": tokens[2]}, {"prompt": [256], "tokens": []}]  # fmt: skip
    found = Likelihood(model)(rows)
    for n, start in ((0, [256, 65]), (1, [256])):
        whole = np.concatenate([start, tokens[n]]).astype(np.int32)
        logits = np.asarray(model.logits(whole[None, :-1]), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        each = logp[np.arange(len(whole) - 1), whole[1:]][-len(tokens[n]) :]
        assert found[n] == pytest.approx(each.mean(), rel=1e-5)
    assert found[2:] == [None, None]  # longer than the context; nothing to judge


def test_a_reward_model_reads_the_last_state(mesh, model):
    """By hand: the last state times the head. A chat, a template, tokens, a text; one that is too long."""
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=64, head="score")
    scorer = rj.transformer(config, ByteTokenizer(), mesh).initialized(1)
    head_D = np.asarray(scorer.params["score"])[0].astype(np.float64)
    wanted = lambda ids: float(np.asarray(scorer.states([ids]), np.float64)[0, -1] @ head_D)
    rows = [{"text": "ab"}, {"text": "x" * 80}, {"tokens": [7, 8], "prompt": [256, 5], "text": "-"}]
    found = r.reward_model(scorer).grade(rows)
    assert [g.status for g in found] == ["ok", "prompt_too_long", "ok"] and found[1].score is None
    assert found[0].score == pytest.approx(wanted([256, 97, 98]), abs=1e-5)
    assert found[2].score == pytest.approx(wanted([256, 5, 7, 8]), abs=1e-5)
    asked = r.reward_model(scorer, Template("{q}", "{text}"))([{"q": "a", "text": "b"}])
    assert asked == [pytest.approx(wanted([256, 97, 98, 257]), abs=1e-5)]
    with pytest.raises(InputError, match="no output head"):
        scorer.logits([[1]])
    with pytest.raises(InputError, match="cannot write"):
        rj.generate(scorer, "x")
    with pytest.raises(InputError, match="no score head"):
        r.reward_model(model)([{"text": "a"}])


def test_a_process_model_reads_the_end_of_every_step(mesh):
    """By hand: the sigmoid of the head behind each step's separator, blank steps aside, taken together; a step of a
    row's prompt is none; what is too long has no score."""
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=48, head="score")
    scorer = rj.transformer(config, ByteTokenizer(), mesh).initialized(1)
    head_D = np.asarray(scorer.params["score"])[0].astype(np.float64)
    at = lambda text: (
        1 / (1 + math.exp(-float(np.asarray(scorer.states([[256, *text.encode()]]), float)[0, -1] @ head_D)))
    )
    prompt = [256, *b"q\n"]
    rows = [{"prompt": prompt, "text": "one\n\ntwo"}, {"text": "x" * 60}, {"text": "alone"}]
    wanted = [at("q\none\n"), at("q\none\ntwo\n")]
    for how, value in (
        ("min", min(wanted)),
        ("prod", math.prod(wanted)),
        ("last", wanted[-1]),
        ("mean", sum(wanted) / 2),
    ):
        found = r.process_model(scorer, how=how).grade(rows)
        assert found[0].score == pytest.approx(value, abs=1e-5) and found[2].score == pytest.approx(
            at("alone\n"), abs=1e-5
        )
        assert (found[1].score, found[1].status) == (None, "prompt_too_long")
    with pytest.raises(InputError, match="how='sum': min, prod, last, mean are there"):
        r.process_model(scorer, how="sum")


def test_a_reward_model_begins_as_the_language_model(mesh):
    """The same states, adapters merged, under a head that the seed draws."""
    from recursive_jax.models.lora import adapted_model
    from recursive_jax.models.scoring import scoring_model

    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=64)
    model = rj.transformer(config, ByteTokenizer(), mesh).initialized(3)
    one, same, other = (scoring_model(model, seed) for seed in (0, 0, 1))
    np.testing.assert_allclose(one.states([[1, 2, 3]]), model.states([[1, 2, 3]]), atol=1e-6)
    assert one.fingerprint == same.fingerprint != other.fingerprint and np.shape(one.params["score"]) == (1, 16)
    np.testing.assert_array_equal(one.params["score"], same.params["score"])
    adapted = adapted_model(model, rj.config.LoraConfig(rank=2))
    np.testing.assert_allclose(scoring_model(adapted).states([[1, 2]]), adapted.merged().states([[1, 2]]), atol=1e-6)
    with pytest.raises(InputError, match="begins from a built-in Transformer with params"):
        scoring_model(rj.transformer(config, ByteTokenizer(), mesh))


def test_rewards_that_give_nothing_usable_are_named():
    class Odd(Reward):
        def of_row(self, row):
            return math.inf

    with pytest.raises(InputError, match="Odd gave row 0 'inf'"):
        grades(Odd(), [{"text": "x"}])
    with pytest.raises(InputError, match="not a int"):
        grades(3, [{"text": "x"}])
    with pytest.raises(InputError, match="weights for 1 rewards"):
        rj.rewards.Combined("weighted", (r.length(),), (1.0, 2.0))
    assert Grade(1.0).status == "ok" and Function(behave).seconds == 10.0


@pytest.mark.parity
def test_math_equal_knows_equal_forms_and_survives_a_planted_hang():
    pytest.importorskip("math_verify")
    rows = [
        {"text": r"so it is $\frac{1}{2}$", "answer": "0.5"},
        {"text": r"\boxed{1 + x}", "answer": "x + 1"},
        {"text": "$3$", "answer": "4"},
        {"text": r"$\{2, 1\}$", "answer": r"$\{1, 2\}$"},
        {"text": "$7$", "answer": None},
        {"text": "$9^{9^{9^{9}}} + 1$", "answer": r"$9^{9^{9^{9}}}$"},
    ]
    begin = time.perf_counter()
    found = r.math_equal(seconds=20.0).grade(rows)
    assert [g.score for g in found[:5]] == [1.0, 1.0, 0.0, 1.0, None]
    assert found[5].score in (None, 0.0) and time.perf_counter() - begin < 120


@pytest.mark.parity
def test_rouge_l_is_that_of_the_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    rng = np.random.default_rng(0)
    vocabulary = ["the", "The", "cat", "it's", "3.5", "Über", "-", "sat", "a_b", "x9"]
    for _ in range(200):
        one, other = (" ".join(rng.choice(vocabulary, rng.integers(0, 12))) for _ in range(2))
        wanted = scorer.score(one, other)["rougeL"].fmeasure
        assert rouge_l(rouge_tokens(one), rouge_tokens(other)) == pytest.approx(wanted), (one, other)
