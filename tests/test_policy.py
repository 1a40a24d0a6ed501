"""Policy gradients: advantages and losses by hand, the optimum under a constraint, and rounds of rewards. trl is the
oracle in test_parity_objectives.py."""

from __future__ import annotations

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.config import ModelConfig, TrainConfig
from recursive_jax.curate.rollouts import Rollouts
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError, Preempted
from recursive_jax.models.model import transformer
from recursive_jax.objectives import (
    PolicyGradient,
    gae,
    generalized_jsd,
    group_advantages,
    leave_one_out,
    policy_loss,
    value_loss,
    with_advantages,
)
from recursive_jax.objectives.policy_losses import LOSS_TYPES, kl_estimate
from recursive_jax.train import signals
from recursive_jax.train.loop import train
from tests.conftest import ROOT

NAN = float("nan")


def test_advantages_of_groups():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, NAN, 1.0, NAN], [5.0, NAN, NAN, NAN]])
    found = group_advantages(rewards)
    np.testing.assert_allclose(found[0], (rewards[0] - 0.5) / (np.std(rewards[0], ddof=1) + 1e-4), rtol=1e-6)
    assert not found[1].any() and not found[3].any() and found[2][1] == found[2][3] == 0
    np.testing.assert_allclose(found[2][[0, 2]], np.array([1, -1]) / (np.sqrt(2) + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, scale="none")[2], [1, 0, -1, 0])
    known = rewards[~np.isnan(rewards)]
    whole = group_advantages(rewards, scale="batch")[0, 0]
    assert whole == pytest.approx(0.5 / (known.std(ddof=1) + 1e-4), rel=1e-6)
    np.testing.assert_allclose(leave_one_out(rewards)[0], [1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(leave_one_out(rewards)[2], [2, 0, -2, 0])
    with pytest.raises(InputError, match="group, batch or none"):
        group_advantages(rewards, scale="x")


def test_gae_is_the_discounted_sum_of_its_errors():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 7))
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3, [0, 0, 1, 1, 1, 0, 0]], float)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for b in range(3):
        places = np.flatnonzero(mask[b])
        after = lambda t: values[b, t + 1] if t + 1 in places else 0.0  # noqa: B023
        errors = {t: rewards[b, t] + 0.9 * after(t) - values[b, t] for t in places}
        for t in range(7):
            wanted = sum((0.9 * 0.8) ** (k - t) * errors[k] for k in places if k >= t) if t in places else 0.0
            assert float(advantages[b, t]) == pytest.approx(wanted, abs=1e-5)
            if t in places:
                assert float(returns[b, t]) == pytest.approx(wanted + values[b, t], abs=1e-5)


def test_ppo_is_that_of_torchtune():
    """Its numbers, frozen (it is maintained no more): returns, whitened advantages, policy and value loss."""
    given = json.loads((ROOT / "tests/fixtures/ppo_torchtune.json").read_text())
    mask, old, new, values, old_values, rewards, wanted, returns = (
        np.array(given[name], np.float32)
        for name in ("mask", "old", "new", "values", "old_values", "rewards", "advantages", "returns")
    )
    advantages, found = gae(rewards * mask, values * mask, mask, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(found * mask, returns * mask, atol=2e-6)
    own = np.asarray(advantages)[mask > 0]
    whitened = (np.asarray(advantages) - own.mean()) / np.sqrt(own.var(ddof=1) + 1e-8) + own.mean()  # it keeps the mean
    np.testing.assert_allclose(whitened * mask, wanted * mask, atol=5e-6)
    _, policy, value, _, clipped = given["loss"]
    loss, metrics = policy_loss(new, old, wanted, mask, loss_type="ppo")
    assert float(loss) == pytest.approx(policy, rel=2e-6)
    assert float(metrics["clip_ratio"]) == pytest.approx(clipped, rel=1e-6)
    assert float(value_loss(values, old_values, returns, mask)) == pytest.approx(value, rel=2e-6)


def by_hand(new, old, advantage, mask, kind, low, high, delta=None, sequence=False):
    """Row by row and token by token."""
    total, rows, tokens = 0.0, 0.0, mask.sum()
    for b in range(len(new)):
        gap = (new[b] - old[b]) * mask[b]
        ratio = np.exp(np.full(len(gap), gap.sum() / mask[b].sum()) if sequence or kind == "gspo" else gap)
        if kind == "cispo":
            each = -np.minimum(ratio, high) * advantage[b] * new[b]
        else:
            free = ratio if delta is None else np.minimum(ratio, delta)
            each = -np.minimum(free * advantage[b], np.clip(ratio, 1 - low, 1 + high) * advantage[b])
        row = (each * mask[b]).sum()
        total, rows = total + row, rows + row / mask[b].sum()
    found = {"grpo": rows / len(new), "gspo": rows / len(new), "dr_grpo": total / (len(new) * 16)}
    return found.get(kind, total / tokens)


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_policy_losses_by_hand(kind):
    rng = np.random.default_rng(1)
    new, old = rng.normal(-2, 0.6, (2, 4, 9)).astype(np.float32)
    mask = (np.arange(9) < np.array([[9], [4], [6], [1]])).astype(np.float32)
    advantage = np.array([1.5, -0.7, 0.3, -2.0], np.float32)
    for more in ({}, {"epsilon_high": 0.6}, {"delta": 1.3}, {"importance_sampling_level": "sequence"}):
        found, metrics = policy_loss(new, old, advantage[:, None], mask, loss_type=kind, max_length=16, **more)
        high, sequence = more.get("epsilon_high", 0.2), "importance_sampling_level" in more
        wanted = by_hand(new, old, advantage, mask, kind, 0.2, high, more.get("delta"), sequence)
        assert float(found) == pytest.approx(wanted, rel=2e-5), more
        assert 0 <= float(metrics["clip_ratio"]) <= 1
    most = {"epsilon_high": 5.0} if kind == "cispo" else {}
    same, metrics = policy_loss(new, new, advantage[:, None], mask, loss_type=kind, max_length=16, **most)
    assert float(metrics["clip_ratio"]) == 0 and float(metrics["ratio"]) == 1
    if kind in ("grpo", "gspo"):
        assert float(same) == pytest.approx(-advantage.mean(), rel=1e-6)


def test_divergences():
    rng = np.random.default_rng(2)
    new, reference = rng.normal(-2, 0.5, (2, 3, 5)).astype(np.float32)
    gap = reference - new
    np.testing.assert_allclose(kl_estimate(new, reference, "k1"), -gap)
    np.testing.assert_allclose(kl_estimate(new, reference, "k2"), gap**2 / 2)
    np.testing.assert_allclose(kl_estimate(new, reference), np.exp(gap) - gap - 1, rtol=1e-4, atol=1e-6)
    ones, zero = np.ones((3, 5), np.float32), np.zeros((3, 1), np.float32)
    more = {"beta": 0.3, "reference_logprobs_BT": reference}
    found, metrics = policy_loss(new, new, zero, ones, **more)
    assert float(found) == pytest.approx(0.3 * float(metrics["kl"])) and float(metrics["kl"]) > 0
    with pytest.raises(InputError, match="give reference_logprobs_BT"):
        policy_loss(new, new, zero, ones, beta=0.1)
    with pytest.raises(InputError, match="k1, k2 or k3"):
        kl_estimate(new, reference, "k4")
    student, teacher = rng.normal(size=(2, 3, 5, 4))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
    kl = lambda a, b: (a * np.log(a / b)).sum(-1)
    mask = np.array([[1, 1, 0, 0, 0]] * 3, float)
    mean = lambda x: (x * mask).sum() / mask.sum()
    m = 0.3 * p + 0.7 * q
    for beta, wanted in ((0.0, kl(p, q)), (1.0, kl(q, p)), (0.3, 0.3 * kl(p, m) + 0.7 * kl(q, m))):
        assert float(generalized_jsd(student, teacher, mask, beta=beta)) == pytest.approx(mean(wanted), rel=1e-4)
    values, old, returns = rng.normal(size=(3, 3, 5))
    held = np.clip(values, old - 0.2, old + 0.2)
    worse = np.maximum((values - returns) ** 2, (held - returns) ** 2)
    assert float(value_loss(values, old, returns, mask)) == pytest.approx(0.5 * mean(worse), rel=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "ppo", "rloo"])
def test_the_optimum_under_a_constraint(kind):
    """pi0 exp(r / beta) / Z on four answers: every answer counted at its probability, gradients on the policy's own
    terms (arXiv:1910.00177, eq. 3). rloo: the divergence is in the reward (arXiv:2402.14740, eq. 4)."""
    start, rewards, beta = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 0.3, 0.1, 0.6]), 0.4
    logits = jnp.log(jnp.asarray(start, jnp.float32))

    @jax.jit
    def gradient(theta):
        p = jax.nn.softmax(theta)

        def loss(theta):
            logp = jax.nn.log_softmax(theta)[:, None]
            old, reference = jax.lax.stop_gradient(logp), jnp.log(jnp.asarray(start, jnp.float32))[:, None]
            rewarded = jnp.asarray(rewards, jnp.float32)[:, None]
            inside = kind == "rloo"
            rewarded = rewarded - beta * (old - reference) if inside else rewarded
            advantage = rewarded - jnp.sum(p[:, None] * rewarded)
            settings = {"loss_type": "ppo"} if inside else {"loss_type": kind, "beta": beta}
            each = [
                policy_loss(logp[a : a + 1], old[a : a + 1], advantage[a : a + 1], jnp.ones((1, 1)), **settings,
                            reference_logprobs_BT=reference[a : a + 1])[0]
                for a in range(4)
            ]  # fmt: skip
            return jnp.sum(jax.lax.stop_gradient(p) * jnp.stack(each))

        return jax.grad(loss)(theta)

    for _ in range(3000):
        logits = logits - 0.2 * gradient(logits)
    wanted = start * np.exp(rewards / beta)
    assert 0.5 * np.abs(np.asarray(jax.nn.softmax(logits)) - wanted / wanted.sum()).sum() < 0.01


# ---- rows


def rows_of(scores, each):
    return Dataset.from_rows(
        [
            {"id": f"r/{n}", "parents": [f"p/{n // each}"], "prompt": [256, 65], "tokens": [66, 257],
             "logprobs": [-1.0, -2.0], "text": "B", "status": "ok", "score": s}
            for n, s in enumerate(scores)
        ]
    )  # fmt: skip


def test_advantages_stand_with_the_rows(capsys):
    data = with_advantages(rows_of([1.0, 0.0, 1.0, 1.0, None, 3.0, 1.0, 5.0], 2), scale_rewards="none")
    assert data.column("id") == ["r/0", "r/1", "r/2", "r/3", "r/5", "r/6", "r/7"]
    assert data.column("advantage") == [0.5, -0.5, 0.0, 0.0, 0.0, -2.0, 2.0]
    assert "2 of 4 groups have rewards that are all equal" in capsys.readouterr().err
    loo = with_advantages(rows_of([1.0, 0.0], 2), signal="rloo").column("advantage")
    mean = with_advantages(rows_of([1.0, 0.0, 0.0, 1.0], 2), signal="reinforce").column("advantage")
    assert loo == [1.0, -1.0] and mean == [0.5, -0.5, -0.5, 0.5]
    with pytest.raises(InputError, match="no group has two different rewards .2 of them 1 throughout."):
        with_advantages(rows_of([1.0] * 4, 2))
    with pytest.raises(InputError, match="no column 'reward'"):
        with_advantages(rows_of([1.0, 0.0], 2), "reward")
    with pytest.raises(InputError, match="grpo, rloo, reinforce"):
        with_advantages(rows_of([1.0, 0.0], 2), signal="x")


@pytest.fixture(scope="module")
def policy(mesh):
    return transformer(ModelConfig(layers=1, d_model=16, heads=2, max_length=32), ByteTokenizer(), mesh).initialized(0)


def one(policy, data, objective, **settings):
    config = TrainConfig(steps=1, batch=8, learning_rate=1e-9, log_every=1, tensorboard=False, **settings)
    return train(policy, data, objective, config, quiet=True).summary["loss"]


def test_sampler_and_trainer_agree_and_the_loss_is_that_of_the_function(policy, tmp_path):
    """The rows' own log-probabilities are the trainer's: the ratio is 1, and the loss minus the mean advantage."""
    rows = rj.generate(policy, [f"row {n}" for n in range(8)], max_tokens=6, seed=1)
    data = rows.with_column("advantage", [0.5, -1.0, 2.0, 0.0, 1.0, -0.5, 0.25, -2.0])
    config = TrainConfig(steps=1, batch=8, log_every=1, tensorboard=False)
    train(policy, data, PolicyGradient(loss_type="grpo", beta=0.1), config, directory=tmp_path, quiet=True)
    (line,) = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert line["sampling/logp_difference"] < 1e-4 and line["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert line["kl"] == pytest.approx(0.0, abs=1e-6) and line["clip_ratio"] == 0 and 0 < line["entropy"] < np.log(259)
    assert line["loss"] == pytest.approx(-np.mean(data.column("advantage")), abs=1e-4)

    moved = data.with_column("logprobs", [(np.asarray(x) - 0.4).tolist() for x in data.lists("logprobs")])
    new = [np.asarray(x) for x in rows.lists("logprobs")]
    width = max(map(len, new))
    pad = lambda lists: np.stack([np.pad(x, (0, width - len(x))) for x in lists])
    mask = pad([np.ones(len(x)) for x in new])
    for kind in LOSS_TYPES:
        wanted, _ = policy_loss(
            pad(new), pad([x - 0.4 for x in new]), np.array(data.column("advantage"))[:, None], mask, loss_type=kind,
            max_length=6,
        )  # fmt: skip
        found = one(policy, moved, PolicyGradient(loss_type=kind, max_length=6))
        assert found == pytest.approx(float(wanted), rel=1e-3, abs=1e-4), kind
    pieces = one(policy, moved, PolicyGradient(), gradient_accumulation=1)
    assert pieces == pytest.approx(one(policy, moved, PolicyGradient()), rel=1e-5)


def test_answers_that_were_cut_may_be_left_out(policy):
    rows = rj.generate(policy, ["a", "b"] * 4, max_tokens=3, min_tokens=3, seed=1).with_column(
        "advantage", [1.0, -1.0] * 4
    )
    assert set(rows.column("status")) == {"length"}
    assert one(policy, rows, PolicyGradient(truncated="mask")) == 0.0
    with pytest.raises(InputError, match="no column `advantage`"):
        one(policy, rj.generate(policy, ["a"], max_tokens=2), PolicyGradient())
    with pytest.raises(InputError, match="row 0 has no log-probability"):
        one(policy, rows.with_column("logprobs", [[]] * 8), PolicyGradient())
    with pytest.raises(InputError, match="a policy learns from rows"):
        one(policy, ["a text"], PolicyGradient())
    with pytest.raises(InputError, match="wants max_length"):
        PolicyGradient(loss_type="dr_grpo")


def starts_with_a_vowel(data):
    return [float(text[:1] in "aeiou") for text in data.column("text")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
def test_rounds_of_rewards_raise_the_reward(kind, policy, tmp_path):
    """Three durable rounds: answers in groups, graded, compared, learnt from; by chance 5 of 256 bytes are vowels.
    epsilon_high: at 0.2 a rare answer gains little in a round."""
    ask = rj.Template("{q}", parser=None)
    problems = [{"q": f"{n}"} for n in range(8)]
    rates = []
    with rj.Run(tmp_path, {"a": 1}, quiet=True) as run:
        model = policy
        config = {"steps": 12, "batch": 32, "learning_rate": 0.02, "warmup": 1, "schedule": "constant"}
        for number in range(1, 4):
            round = run.round(number)
            rows = round.generate("rollouts", model, problems, {"max_tokens": 1}, template=ask, each=64)
            graded = round.score("graded", rows, starts_with_a_vowel)
            rates.append(np.mean(graded.column("score")))
            groups = round.dataset("groups", with_advantages, graded)
            model = round.train("student", model, groups, config, PolicyGradient(loss_type=kind, epsilon_high=5.0))
    final = rj.generate(model, [p["q"] for p in problems] * 16, max_tokens=1, seed=9)
    assert rates[0] < 0.06 and np.mean(starts_with_a_vowel(final)) > 0.5, rates


# ---- rollouts on the live params


def rollouts(policy, objective, **more):
    problems, more = [{"q": f"{n}"} for n in range(6)], {"num_generations": 8, "length": 8, "max_tokens": 2, **more}
    return Rollouts(policy, problems, rj.Template("{q}"), starts_with_a_vowel, objective, **more)


def lines_of(folder):
    return [json.loads(x) for x in (folder / "train.jsonl").read_text().splitlines()]


def test_rollouts_are_written_by_the_params_that_learn_from_them(policy, tmp_path):
    """Sampler and trainer agree at every step; a training that stops half-way ends with the same bits; its rows are
    kept, with rewards and advantages."""
    objective = PolicyGradient(loss_type="grpo", beta=0.01)
    config = TrainConfig(
        steps=4, batch=32, learning_rate=0.05, warmup=1, schedule="constant", checkpoint_every=2, log_every=1,
        tensorboard=False,
    )  # fmt: skip
    made = rollouts(policy, objective, keep=tmp_path / "rows")
    whole = train(policy, made, objective, config, directory=tmp_path / "whole", quiet=True)
    logged = lines_of(tmp_path / "whole")
    assert [line["sampling/logp_difference"] < 1e-4 for line in logged] == [True] * 4
    wanted = {
        "reward",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "kl",
        "entropy",
        "clip_ratio",
    }
    assert all(wanted <= line.keys() for line in logged)
    kept = [Dataset.read([str(p)]) for p in sorted((tmp_path / "rows").iterdir())]
    assert [len(d) for d in kept] == [32] * 4 and len({d.column("model")[0] for d in kept}) == 4
    for line, data in zip(logged, kept, strict=True):
        assert line["reward"] == pytest.approx(np.mean(data.column("score")), abs=1e-6)
        table = np.array(data.column("score")).reshape(4, 8)
        np.testing.assert_allclose(np.array(data.column("advantage")).reshape(4, 8), group_advantages(table), atol=1e-6)
        assert all(len({p[0] for p in data.column("parents")[8 * n : 8 * n + 8]}) == 1 for n in range(4))

    class Stopped(Rollouts):
        def next(self, step, params, state):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next(step, params, state)

    made = rollouts(policy, objective)
    made.__class__ = Stopped
    restore = signals.install()
    try:
        with pytest.raises(Preempted):
            train(policy, made, objective, config, directory=tmp_path / "parts", quiet=True)
    finally:
        restore()
        signals.clear()
    again = train(policy, rollouts(policy, objective), objective, config, directory=tmp_path / "parts", quiet=True)
    equal = lambda a, b: np.array_equal(np.asarray(a), np.asarray(b))
    same = jax.tree.map(equal, whole.model.params, again.model.params)
    assert jax.tree.all(same)


def test_what_rollouts_want(policy):
    objective = PolicyGradient()
    with pytest.raises(InputError, match=r"sampling\.repetition_penalty=1\.2: answers are drawn from the policy"):
        rollouts(policy, objective, repetition_penalty=1.2)
    with pytest.raises(InputError, match="no multiple of num_generations=8"):
        rollouts(policy, objective).begin(12, 0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["grpo", "rloo"])
def test_rollouts_raise_the_reward(way, policy, tmp_path):
    """arXiv:2402.03300: the mean reward of a step goes from chance (5 in 256) to nearly 1 in 40 steps."""
    objective = PolicyGradient(signal=way, loss_type="grpo" if way == "grpo" else "ppo")
    config = {"steps": 40, "batch": 256, "learning_rate": 0.02, "warmup": 1, "schedule": "constant", "log_every": 1}
    problems = [{"q": f"{n}"} for n in range(6)]
    made = Rollouts(policy, problems, rj.Template("{q}"), starts_with_a_vowel, objective, num_generations=64, length=4,
                    max_tokens=1)  # fmt: skip
    train(policy, made, objective, config, directory=tmp_path, quiet=True)
    logged = lines_of(tmp_path)
    assert np.mean([line["reward"] for line in logged[:3]]) < 0.1
    assert np.mean([line["reward"] for line in logged[-3:]]) > 0.8
