"""Distillation: from distributions, stored or asked, from states and heads, and from the model itself when it is shown
more."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.config import ModelConfig
from recursive_jax.curate.student_texts import StudentTexts
from recursive_jax.curate.teachers import with_teacher
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.models.model import transformer
from recursive_jax.objectives import Distill, DistillTopK, SelfDistill, generalized_jsd

SETTINGS = {"steps": 25, "batch": 8, "learning_rate": 0.03, "warmup": 1, "schedule": "constant"}


@pytest.fixture(scope="module")
def policy(mesh):
    return transformer(ModelConfig(layers=1, d_model=16, heads=2, max_length=32), ByteTokenizer(), mesh).initialized(0)


@pytest.fixture(scope="module")
def teacher(mesh):
    config = ModelConfig(layers=2, d_model=24, heads=2, d_ff=32, max_length=32)
    fresh = transformer(config, ByteTokenizer(), mesh).initialized(1)
    return rj.train(fresh, ["abracadabra"] * 16, rj.objectives.causal, SETTINGS, quiet=True).model


def at_once(model, rows, objective):
    """The loss before the first step."""
    return rj.train(model, rows, objective, {**SETTINGS, "steps": 1}, quiet=True).summary["loss"]


def test_the_two_divergences_have_their_optima():
    """A student of one hump, a teacher of two: KL(teacher || student) spreads over both, KL(student || teacher) takes
    one (arXiv:2306.13649, fig. 2)."""
    x = jnp.linspace(-4, 4, 81)
    hump = lambda mean, log_width: -0.5 * ((x - mean) / jnp.exp(log_width)) ** 2
    teacher = jnp.logaddexp(hump(-2.0, -1.0), hump(2.0, -1.0))[None, None]

    def fitted(beta):
        loss = lambda p: generalized_jsd(hump(*p)[None, None], teacher, jnp.ones((1, 1)), beta=beta)
        step = jax.jit(lambda p: p - 0.03 * jax.grad(loss)(p))
        p = jnp.array([1.0, -0.5])  # of the two humps the second is nearer
        for _ in range(4000):
            p = step(p)
        share = np.asarray(jax.nn.softmax(hump(*p)), np.float64)
        mean = share @ np.asarray(x)
        return mean, np.sqrt(share @ (np.asarray(x) - mean) ** 2)

    assert fitted(0.0) == pytest.approx((0.0, np.sqrt(4 + np.exp(-2.0))), abs=0.02), "the moments of the mixture"
    assert fitted(1.0) == pytest.approx((2.0, np.exp(-1.0)), abs=0.02), "one hump, as it is"


def test_a_student_comes_to_its_teacher(policy):
    """By both divergences, on what the teacher wrote; the teacher is its own student at no loss."""
    settings = {"steps": 25, "batch": 8, "learning_rate": 0.03, "warmup": 1, "schedule": "constant"}
    teacher = rj.train(policy, ["abracadabra"] * 16, rj.objectives.causal, settings).model
    rows = rj.generate(teacher, ["ab"] * 16, max_tokens=9, seed=3)
    logits = lambda m: jax.nn.log_softmax(jnp.asarray(m.logits([[256, *b"abra"]]), jnp.float32)[0, -1])
    far = lambda m: float(jnp.sum(jnp.exp(logits(teacher)) * (logits(teacher) - logits(m))))
    assert far(policy) > 2
    for more in ({}, {"beta": 1.0, "temperature": 2.0}, {"beta": 0.5, "hard": 0.1}):
        nearer = far(rj.train(policy, rows, Distill(teacher, **more), settings).model)
        assert nearer < 0.5 * far(policy), more  # 25 steps: 0.17, 0.36 and 0.30 of the way are left
    at_once = lambda model, objective: rj.train(model, rows, objective, {**settings, "steps": 1}).summary["loss"]
    both = at_once(policy, Distill(teacher, hard=2.0))
    assert both == pytest.approx(
        at_once(policy, Distill(teacher)) + 2 * at_once(policy, rj.objectives.causal), rel=1e-4
    )
    assert at_once(teacher, Distill(teacher)) == pytest.approx(0, abs=1e-6)


def test_who_can_teach(policy, mesh):
    class Other(ByteTokenizer):
        def to_json(self):
            return {"kind": "other"}

    config = ModelConfig(layers=1, d_model=16, heads=2, max_length=32)
    stranger = transformer(config, Other(), mesh).initialized(0)
    with pytest.raises(InputError, match="tokenizers of their own"):
        rj.train(policy, ["a text"], Distill(stranger), steps=1, batch=8)
    with pytest.raises(InputError, match="a teacher that has params"):
        rj.train(policy, ["a text"], Distill(), steps=1, batch=8)
    with pytest.raises(InputError, match="beta=2"):
        Distill(beta=2)
    with pytest.raises(InputError, match="temperature=0"):
        Distill(temperature=0)


# ---- stored


@pytest.mark.slow
def test_what_a_teacher_said_once(policy, teacher):
    """The best tokens of each place and their log-probabilities; with all of them the divergence is the whole one, with
    fewer it is less, and it is learnt from without the teacher."""
    rows = rj.generate(policy, [f"row {n}" for n in range(8)], max_tokens=6, seed=1)
    taught = with_teacher(rows, teacher, 5)
    ids, prompt = taught.column("teacher_ids")[3], rows.prompts()[3]
    whole = np.concatenate([prompt, rows.tokens()[3]])
    logits_TV = np.asarray(teacher.logits([whole[:-1].tolist()]))[0][len(prompt) - 1 :, : teacher.vocab]
    logp_TV = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))
    np.testing.assert_allclose(taught.column("teacher_logprobs")[3], -np.sort(-logp_TV, axis=-1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(logp_TV, np.array(ids), -1), np.sort(logp_TV, -1)[:, :-6:-1], atol=1e-5
    )
    full = with_teacher(rows, teacher, 10_000)
    assert len(full.column("teacher_ids")[0][0]) == teacher.vocab
    for beta in (0.0, 0.5):
        wanted = at_once(policy, rows, Distill(teacher, beta=beta))
        assert at_once(policy, full, DistillTopK(beta=beta)) == pytest.approx(wanted, rel=2e-3, abs=2e-5)
        assert 0 < at_once(policy, taught, DistillTopK(beta=beta)) < wanted
    nearer = rj.train(policy, taught, DistillTopK(hard=0.1), SETTINGS, quiet=True).model
    assert at_once(nearer, rows, Distill(teacher)) < 0.7 * at_once(policy, rows, Distill(teacher))
    with pytest.raises(InputError, match="no column 'teacher_ids'"):
        at_once(policy, rows, DistillTopK())
    with pytest.raises(InputError, match="row 0: the column `teacher_ids` does not belong"):
        at_once(policy, taught.with_column("teacher_ids", [ids[:1]] * 8), DistillTopK())
    with pytest.raises(InputError, match="top_k=0"):
        with_teacher(rows, teacher, 0)


# ---- states and heads


@pytest.mark.slow
def test_states_and_heads_are_drawn_to_the_teachers(policy, teacher, mesh):
    """A model is its own teacher at no loss; of another the distances fall; widths may differ, heads may not."""
    rows = rj.generate(teacher, [f"row {n}" for n in range(16)], max_tokens=8, seed=1)
    both = {"hidden": 1.0, "attention": 1.0}
    assert at_once(teacher, rows, Distill(teacher, **both, layers=((0, 0), (1, 1)))) == pytest.approx(0, abs=1e-5)
    objective = Distill(teacher, hidden=10.0, attention=10.0, layers=((0, 0), (-1, -1)))
    trained = rj.train(policy, rows, objective, {**SETTINGS, "steps": 40}, quiet=True)
    assert {name: x.shape for name, x in trained.extra.params.items()} == {"project_0": (16, 24), "project_1": (16, 24)}
    assert trained.summary["loss"] < 0.5 * at_once(policy, rows, objective)
    for more, message in (
        ({"layers": ((1, 0),)}, "the student has 1 layers, no layer 1"),
        ({"layers": ((0, 2),)}, "the teacher has 2 layers, no layer 2"),
    ):
        with pytest.raises(InputError, match=message):
            at_once(policy, rows, Distill(teacher, **both, **more))
    one = transformer(ModelConfig(layers=1, d_model=16, heads=4, max_length=32), ByteTokenizer(), mesh).initialized(0)
    with pytest.raises(InputError, match="the student has 4 heads, the teacher 2"):
        at_once(one, rows, Distill(teacher, attention=1.0))


# ---- from itself


def shown_more(policy):
    """Rows of the policy, with what it reads as its own teacher."""
    rows = rj.generate(policy, [f"{n}=" for n in range(8)], max_tokens=4, seed=2)
    return rows.with_column("teacher_prompt", [[256, *f"{n}={n}. {n}=".encode()] for n in range(8)])


@pytest.mark.slow
def test_a_model_is_its_own_teacher_when_it_is_shown_more(policy):
    """The loss is the divergence after the two prompts, token by token; the teacher follows by its share of a step, and
    only once where a step has several micro-batches."""
    rows = shown_more(policy)
    total, count = 0.0, 0
    for prompt, shown, tokens in zip(rows.prompts(), rows.column("teacher_prompt"), rows.tokens(), strict=True):
        after = lambda before: policy.logits([[*before, *tokens][:-1]])[0][len(before) - 1 :, : policy.vocab]  # noqa: B023
        both = [jnp.asarray(after(list(p)))[None] for p in (prompt, shown)]
        total += float(generalized_jsd(*both, jnp.ones((1, len(tokens))), beta=1.0)) * len(tokens)
        count += len(tokens)
    assert at_once(policy, rows, SelfDistill()) == pytest.approx(total / count, rel=1e-4)
    for pieces in (1, 2):
        settings = {**SETTINGS, "steps": 1, "batch": 16, "gradient_accumulation": pieces}
        trained = rj.train(policy, Dataset.concat([rows, rows]), SelfDistill(ema=0.75), settings, quiet=True)
        held = trained.extra.state["params"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), held, policy.params)
    plain = {**SETTINGS, "warmup": 0, "clip": 1e9}
    one, two = (rj.train(policy, rows, SelfDistill(ema=0.75), {**plain, "steps": n}, quiet=True) for n in (1, 2))
    wanted = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, policy.params, one.model.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), two.extra.state["params"], wanted)
    with pytest.raises(InputError, match="no column `teacher_prompt`"):
        at_once(policy, rows.without("teacher_prompt"), SelfDistill())
    with pytest.raises(InputError, match="ema=2"):
        SelfDistill(ema=2)


def test_a_students_own_texts(policy, teacher, tmp_path):
    """lmbda 1: the student's, by its params of the moment; 0: the problems' own; between: each in its turn. A training
    that is stopped goes on to the same bits."""
    problems = [{"q": f"{n}", "answer": "yes"} for n in range(6)]
    ask, objective = rj.Template("{q}: "), Distill(teacher, beta=1.0)
    make = lambda lmbda, objective=objective, **more: StudentTexts(
        policy, problems, ask, objective, lmbda=lmbda, length=16, max_tokens=4, **more
    )
    settings = {**SETTINGS, "steps": 6, "checkpoint_every": 3}
    whole = rj.train(policy, make(0.5, keep=tmp_path / "rows"), objective, settings, quiet=True)
    kept = [Dataset.read([str(p)]) for p in sorted((tmp_path / "rows").iterdir())]
    given = [set(r.column("text")) == {"yes"} for r in kept]
    assert len(kept) == 6 and 0 < sum(given) < 6
    row = kept[given.index(True)]
    assert row.tokens()[0].tolist() == [*b"yes", policy.tokenizer.eos]
    assert bytes(row.prompts()[0][1:].astype(np.uint8)).decode() == f"{row.column('parents')[0][0].split('/')[-1]}: "
    made = make(0.5)

    class Stopped(StudentTexts):
        def next(self, step, *more):
            if step == 4:
                raise KeyError
            return super().next(step, *more)

    made.__class__ = Stopped
    with pytest.raises(KeyError):
        rj.train(policy, made, objective, settings, directory=tmp_path / "half", quiet=True)
    again = rj.train(policy, make(0.5), objective, settings, directory=tmp_path / "half", quiet=True)
    equal = lambda a, b: np.array_equal(np.asarray(a), np.asarray(b))
    assert jax.tree.all(jax.tree.map(equal, whole.model.params, again.model.params))
    with pytest.raises(InputError, match="the StudentTexts were made for Distill"):
        rj.train(policy, make(1.0), SelfDistill(), settings, quiet=True)
    shown = make(1.0, SelfDistill(), shown=rj.Template("{q}: {answer}. {q}: "))
    trained = rj.train(policy, shown, SelfDistill(), {**SETTINGS, "steps": 2}, quiet=True)
    assert trained.summary["rollouts"] == 16
    with pytest.raises(InputError, match="lmbda=0.5: the other texts are the problems' column 'right'"):
        make(0.5, completion="right")
    with pytest.raises(InputError, match="Causal does not learn from what the model writes"):
        rj.train(policy, StudentTexts(policy, problems, ask, rj.objectives.causal, max_tokens=2, length=16),
                 rj.objectives.causal, {**SETTINGS, "steps": 1}, quiet=True)  # fmt: skip


def test_what_distillation_wants(teacher):
    for more, message in (
        ({"layers": ()}, "pairs .the student's, the teacher's. are wanted"),
        ({"layers": ((0,),)}, "pairs .the student's"),
        ({"layers": (0, 0)}, "pairs .the student's"),
        ({"hidden": -1.0}, "hidden=-1.0: 0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            Distill(teacher, **more)
    assert Distill(teacher, layers=[[0, -1]]).layers == ((0, -1),)
    rows = Dataset.from_rows([{"id": f"{n}", "prompt": [256, 65], "tokens": [66] * n} for n in range(3)])
    ragged = Dataset.concat([with_teacher(rows, teacher, k) for k in (1, 4)])
    columns = DistillTopK().pack(ragged, teacher, 8).columns
    assert columns["teacher_ids"].shape == (6, 9, 4)
    assert np.isfinite(columns["teacher_logprobs"]).sum() == 3 * (1 + 4)
