"""Rollouts: what is drawn, by which params, for how many steps, and what becomes of the rewards. Losses are in
test_policy.py."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.config import ModelConfig, TrainConfig
from recursive_jax.curate.rollouts import Rollouts
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.models.model import transformer
from recursive_jax.models.read import read_tokens
from recursive_jax.objectives import PolicyGradient, gae, group_advantages, with_advantages
from recursive_jax.train.loop import train

CONFIG = TrainConfig(
    steps=6, batch=16, learning_rate=0.02, warmup=1, schedule="constant", checkpoint_every=1, log_every=1,
    tensorboard=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def policy(mesh):
    return transformer(ModelConfig(layers=1, d_model=16, heads=2, max_length=32), ByteTokenizer(), mesh).initialized(0)


def low_bytes(data):
    return [float(len(text) > 0 and ord(text[0]) % 2) for text in data.column("text")]


def rollouts(policy, objective, **more):
    problems, more = [{"q": f"{n}"} for n in range(6)], {"num_generations": 4, "length": 8, "max_tokens": 3, **more}
    return Rollouts(policy, problems, rj.Template("{q}"), low_bytes, objective, **more)


def lines_of(folder):
    return [json.loads(x) for x in (folder / "train.jsonl").read_text().splitlines()]


def kept(folder):
    return [Dataset.read([str(p)]) for p in sorted(folder.iterdir())]


class Killed(Exception):
    pass


def stopped_at(step, rollouts):
    """The same ones, which end the training before a step."""

    class Stopped(type(rollouts)):
        def next(self, now, params, state):
            if now == step:
                raise Killed
            return super().next(now, params, state)

    rollouts.__class__ = Stopped
    return rollouts


def same(one, other):
    equal = lambda a, b: np.array_equal(np.asarray(a), np.asarray(b))
    return jax.tree.all(jax.tree.map(equal, one, other))


# ---- log-probabilities in pieces


def test_logits_in_pieces_are_the_logits(policy, mesh):
    """Values and gradients; and what the compiler holds falls with the pieces."""
    model = transformer(
        ModelConfig(layers=1, d_model=16, heads=2, max_length=64, vocab=2048, tied=False), ByteTokenizer(), mesh
    )
    params = model.initialized(0).params
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 2000, (8, 62)), jnp.int32)
    apply = model.network.bind()

    def loss(params, tokens, held):
        found = read_tokens(model.network, apply, params, tokens[:, :-1], None, tokens[:, 1:], held=held)
        return jnp.sum(found.logprobs_BT) + 0.1 * jnp.sum(found.entropy_BT)

    with jax.set_mesh(mesh):
        tokens = rj.mesh.put_batch(mesh, tokens)
        program = jax.jit(jax.value_and_grad(loss), static_argnums=2)
        (whole, of_whole), (pieces, of_pieces) = (program(params, tokens, held) for held in (2**24, 2**14))
        logits_BTV = apply(params, tokens[:, :-1])
        held = [program.lower(params, tokens, n).compile().memory_analysis().temp_size_in_bytes for n in (2**24, 2**14)]
    logp_BTV = jax.nn.log_softmax(np.asarray(logits_BTV), axis=-1)
    wanted = np.take_along_axis(np.asarray(logp_BTV), np.asarray(tokens)[:, 1:, None], -1).sum()
    wanted += 0.1 * -(np.exp(logp_BTV) * logp_BTV).sum()
    assert float(whole) == pytest.approx(float(wanted), rel=1e-5) and float(pieces) == pytest.approx(
        float(whole), rel=1e-6
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), of_whole, of_pieces)
    assert held[1] < 0.5 * held[0], held


# ---- what is drawn


def test_a_distribution_that_is_not_the_policys_is_put_right(policy, tmp_path):
    """Of every token its probability over the one it was drawn with, by the logits; no more than the cap."""
    objective = PolicyGradient(importance_sampling_cap=1.5)
    made = rollouts(policy, objective, temperature=0.5, top_k=40, keep=tmp_path)
    made.begin(16, 3)
    params = rj.objectives.Params(policy.params, {})
    columns = made.next(0, params)
    (rows,) = kept(tmp_path)
    seen = 0
    for n, (prompt, tokens) in enumerate(zip(rows.prompts(), rows.tokens(), strict=True)):
        ids = np.concatenate([prompt, tokens])
        logits_TV = np.asarray(policy.logits([ids[:-1].tolist()]))[0][len(prompt) - 1 :, : policy.vocab]
        plain = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))
        cut = np.where(logits_TV >= np.sort(logits_TV, -1)[:, -40:-39], logits_TV / 0.5, -np.inf)
        drawn = np.asarray(jax.nn.log_softmax(cut, axis=-1))
        at = np.arange(len(tokens)), tokens
        place = slice(len(prompt), len(ids))
        np.testing.assert_allclose(columns["sampled"][n, 0, place], drawn[at], atol=1e-4)
        np.testing.assert_allclose(columns["old"][n, 0, place], plain[at], atol=1e-4)
        weight = np.minimum(np.exp(plain[at] - drawn[at]), 1.5)
        np.testing.assert_allclose(columns["importance"][n, 0, place], weight, rtol=1e-3)
        seen += (weight < 1.5).sum()
    assert seen > 10
    for name, value in (("temperature", 0.0), ("min_tokens", 2), ("guidance", 2.0), ("best_of", 2)):
        with pytest.raises(InputError, match=rf"sampling\.{name}={value}: answers are drawn from the policy"):
            rollouts(policy, objective, **{name: value})


def test_several_steps_on_one_writing(policy, tmp_path):
    """Two halves, twice over: each row of a writing is learnt from twice, in an order of its own; a training that is
    killed in the middle goes on from the writing's begin, to the same bits."""
    objective = PolicyGradient(loss_type="grpo", beta=0.02, kl_target=0.5, kl_horizon=64)
    more = {"num_iterations": 2, "steps_per_generation": 2}
    config = CONFIG.model_copy(update={"steps": 8})
    made = rollouts(policy, objective, keep=tmp_path / "rows", **more)
    whole = train(policy, made, objective, config, directory=tmp_path / "whole", quiet=True)
    rows = kept(tmp_path / "rows")
    assert [len(r) for r in rows] == [32, 32] and whole.summary["rollouts"] == 64
    logged = lines_of(tmp_path / "whole")
    gaps = [line["sampling/logp_difference"] for line in logged]
    assert gaps[0] < 1e-4 and gaps[4] < 1e-4 and min(gaps[1:4] + gaps[5:]) > 1e-3
    made.begin(16, 0)
    params = rj.objectives.Params(policy.params, {})
    parts = [made.next(step, params, {}) for step in range(4)]
    for half in (0, 2):
        both = np.concatenate([parts[half]["tokens"], parts[half + 1]["tokens"]])
        assert sorted(map(bytes, both)) == sorted(map(bytes, np.concatenate([p["tokens"] for p in parts[:2]])))
    assert [p["first"].mean() for p in parts] == [1, 1, 0, 0]
    with pytest.raises(InputError, match="step 5 is in the middle of writing 1"):
        made.next(5, params, {})
    # The divergence is far below its target: its weight falls by a fifth of rows / horizon, of rows seen first.
    betas = [line["beta"] for line in logged]
    np.testing.assert_allclose(betas[:3], 0.02 * np.cumprod([1, *[1 - 0.2 * 16 / 64] * 2]), rtol=1e-5)
    assert betas[2] == betas[3] == betas[4]
    for at in (6, 5):
        with pytest.raises(Killed):
            half = stopped_at(at, rollouts(policy, objective, **more))
            train(policy, half, objective, config, directory=tmp_path / str(at), quiet=True)
        again = train(
            policy, rollouts(policy, objective, **more), objective, config, directory=tmp_path / str(at), quiet=True
        )
        assert same(whole.model.params, again.model.params) and same(whole.extra.state, again.extra.state)
    with pytest.raises(InputError, match="kl_target follows the policy as it learns: train on Rollouts"):
        train(policy, rows[0], objective, config, quiet=True)


def test_a_step_behind(policy, tmp_path):
    """staleness 1: answers are of the params of one writing ago, but for every `refresh`-th; the weight of a token is
    what the policy has become over what it was; killed anywhere, to the same bits."""
    objective = PolicyGradient(loss_type="grpo", importance_sampling_cap=4.0)
    more = {"staleness": 1, "refresh": 3}
    made = rollouts(policy, objective, keep=tmp_path / "rows", **more)
    whole = train(policy, made, objective, CONFIG, directory=tmp_path / "whole", quiet=True)
    written_by = [r.column("model")[0] for r in kept(tmp_path / "rows")]
    fresh = [rj.fingerprint(written_by[n]) for n in (0, 1, 3, 4)]
    assert written_by[0] == written_by[1] and written_by[3] == written_by[4] and len(set(fresh)) == 2
    gaps = [line["sampling/logp_difference"] for line in lines_of(tmp_path / "whole")]
    assert gaps[0] < 1e-4 and gaps[3] < 1e-4 and min(gaps[1], gaps[2], gaps[4], gaps[5]) > 1e-3
    weights = [line.get("sampling/importance") for line in lines_of(tmp_path / "whole")]
    assert weights[0] == pytest.approx(1, abs=1e-4) and weights[3] == pytest.approx(1, abs=1e-4)
    assert all(abs(w - 1) > 1e-4 for n, w in enumerate(weights) if n % 3)
    with pytest.raises(Killed):
        half = stopped_at(5, rollouts(policy, objective, **more))
        train(policy, half, objective, CONFIG, directory=tmp_path / "half", quiet=True)
    again = train(
        policy, rollouts(policy, objective, **more), objective, CONFIG, directory=tmp_path / "half", quiet=True
    )
    assert same(whole.model.params, again.model.params)
    alone = policy.on(rj.make_mesh(devices=jax.devices()[:1]))  # where a thread writes
    found = train(alone, rollouts(alone, objective, **more), objective, CONFIG, directory=tmp_path / "one", quiet=True)
    both = zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "whole"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["reward"] == b["reward"] for a, b in both)
    assert found.summary["rollouts"] == 96
    with pytest.raises(InputError, match="staleness=2: 0 or 1"):
        rollouts(policy, objective, staleness=2)


# ---- what becomes of the rewards


def test_groups_that_teach_nothing_are_asked_anew(policy, capsys):
    """Problems 0 to 2 always have one reward; whole groups of others stand in their place."""

    def graded(data):
        return [
            0.0 if q in "012" else float(len(t) % 2) for q, t in zip(data.column("q"), data.column("text"), strict=True)
        ]

    problems = [{"q": f"{n}"} for n in range(6)]
    objective = PolicyGradient()
    make = lambda again: Rollouts(
        policy, problems, rj.Template("{q}"), rj.named("graded", 1)(graded), objective, num_generations=8, length=8,
        max_tokens=3, dynamic_sampling=again,
    )  # fmt: skip
    params = rj.objectives.Params(policy.params, {})
    shares = []
    for again in (0, 4):
        made = make(again)
        made.begin(48, 1)
        shares.append(made.next(0, params)["even"].mean())
    assert shares[0] >= 0.5 and shares[1] < shares[0]
    none = Rollouts(policy, problems[:3], rj.Template("{q}"), rj.named("graded", 1)(graded), objective, length=8,
                    max_tokens=3, dynamic_sampling=2)  # fmt: skip
    none.begin(8, 1)
    assert none.next(0, params)["even"].all()
    assert "1 of 1 groups have equal rewards after 2 more askings (1 of them 0 throughout)" in capsys.readouterr().err
    with pytest.raises(InputError, match="dynamic_sampling=1: 0 or more is wanted, above 0 only where"):
        rollouts(policy, PolicyGradient(signal="reinforce"), dynamic_sampling=1)


def test_answers_that_were_cut():
    rows = Dataset.from_rows(
        [
            {"id": f"r/{n}", "parents": ["p"], "prompt": [256], "tokens": [66] * size, "logprobs": [-1.0] * size,
             "text": "B", "status": status, "score": 1.0 + n}
            for n, (size, status) in enumerate([(2, "ok"), (7, "ok"), (9, "ok"), (10, "length"), (1, "failed")])
        ]
    )  # fmt: skip
    of = lambda **more: with_advantages(rows, scale_rewards="none", **more).column("advantage")
    away = lambda x: np.asarray(x) - np.mean(x)
    np.testing.assert_allclose(of(), away([1, 2, 3, 4]), atol=1e-6)
    np.testing.assert_allclose(of(truncated="zero"), away([1, 2, 3, 0]), atol=1e-6)
    soft = of(truncated="soft", max_length=10, overlong_buffer=4)
    np.testing.assert_allclose(soft, away([1, 2 - 0.25, 3 - 0.75, 4 - 1]), atol=1e-6)
    np.testing.assert_allclose(of(truncated="mask"), away([1, 2, 3, 4])[:3], atol=1e-6)
    with pytest.raises(InputError, match="overlong_buffer=0 tokens before max_length=None: give both"):
        of(truncated="soft")
    with pytest.raises(InputError, match="truncated='drop': keep, zero, soft, mask are there"):
        of(truncated="drop")
    with pytest.raises(InputError, match="trunkated is no setting of a Credit"):
        of(trunkated="zero")
    with pytest.raises(InputError, match="gives tokens their advantages, with a value head: Rollouts"):
        of(signal="gae")


def test_several_rewards_normalised_apart_are_those_of_trl():
    """`multi_objective_aggregation="normalize_then_sum"` of trl's GRPOTrainer, by its formula."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(12, 2)) * [1.0, 20.0]
    rows = Dataset.from_rows(
        [{"id": f"r/{n}", "parents": [f"p/{n // 4}"], "text": "B", "status": "ok", "a": a, "b": b}
         for n, (a, b) in enumerate(table)]
    )  # fmt: skip
    column = lambda name: rj.named(name, 1)(lambda data: data.column(name))
    both = {"a": (column("a"), 1.0), "b": (column("b"), 0.5)}
    graded = rj.score(rows, rj.rewards.weighted(both, how="normalize_then_sum"))
    found = with_advantages(graded, scale_rewards="batch").column("advantage")
    grouped = table.reshape(3, 4, 2)
    apart = (grouped - grouped.mean(1, keepdims=True)) / (grouped.std(1, ddof=1, keepdims=True) + 1e-4)
    total = (apart.reshape(12, 2) * [1.0, 0.5]).sum(1)
    np.testing.assert_allclose(found, (total - total.mean()) / (total.std(ddof=1) + 1e-4), atol=2e-6)


@pytest.mark.slow
def test_a_value_head_and_the_divergence_in_the_reward(policy, tmp_path):
    """Advantages and returns of the batch are those of `gae` on rewards at the last token, less beta times the
    log-ratio at every one; the head trains along, is kept, and comes to expect the reward."""
    objective = PolicyGradient(
        signal="gae", loss_type="ppo", beta=0.1, kl_in_reward=True, lam=0.9, scale_rewards="none", value_coef=1.0
    )
    made = rollouts(policy, objective, keep=tmp_path / "rows", num_generations=1, num_iterations=2)
    trained = train(policy, made, objective, CONFIG, directory=tmp_path / "a", quiet=True)
    value = trained.extra.params["value"]
    assert np.abs(np.asarray(value["weight"])).max() > 0.01
    logged = lines_of(tmp_path / "a")
    assert {"loss/policy", "loss/value", "kl"} <= logged[0].keys()
    with pytest.raises(Killed):
        half = stopped_at(3, rollouts(policy, objective, num_generations=1, num_iterations=2))
        train(policy, half, objective, CONFIG, directory=tmp_path / "b", quiet=True)
    more = rollouts(policy, objective, num_generations=1, num_iterations=2)
    again = train(policy, more, objective, CONFIG, directory=tmp_path / "b", quiet=True)
    assert same(trained.model.params, again.model.params) and same(value, again.extra.params["value"])

    params = rj.objectives.Params(trained.model.params, {"value": value})
    made = rollouts(policy, objective, keep=tmp_path / "rows", num_generations=1)
    made.begin(16, 5)
    columns = made.next(0, params)
    rows = kept(tmp_path / "rows")[0]
    mask = columns["loss"][:, 0].astype(np.float32)
    assert mask.sum() == sum(len(t) for t in rows.tokens())
    for n, tokens in enumerate(rows.tokens()):
        ids, place = columns["tokens"][n, 0], np.flatnonzero(mask[n])
        states_TD = np.asarray(_states(trained.model, ids[:-1]))
        values = states_TD[place - 1] @ np.asarray(value["weight"]) + float(value["bias"])
        np.testing.assert_allclose(columns["value"][n, 0, place], values, atol=1e-4)
        first = -next(rj.token_logprobs(policy, [ids[: place[-1] + 1]], opened=True))[-len(tokens) :]
        reward = -0.1 * (np.asarray(rows.lists("logprobs")[n]) + first)
        reward[-1] += rows.column("score")[n]
        advantage, returns = gae(reward[None], values[None], np.ones((1, len(tokens))), lam=0.9)
        np.testing.assert_allclose(columns["advantage"][n, 0, place], advantage[0], atol=2e-4)
        np.testing.assert_allclose(columns["return"][n, 0, place], returns[0], atol=2e-4)
    whitened = PolicyGradient(signal="gae").of_tokens(np.ones(4), np.zeros((4, 3)), np.eye(4, 3), np.ones((4, 3)))[0]
    assert whitened.mean() == pytest.approx(0, abs=1e-6) and whitened.std(ddof=1) == pytest.approx(1, abs=1e-5)


def _states(model, ids):
    with jax.set_mesh(model.mesh):
        tokens = rj.mesh.put_batch(model.mesh, np.tile(ids, (8, 1)).astype(np.int32))
        return model.network.apply(model.params, tokens, hidden=True)[0]


def test_the_divergence_in_the_reward_of_a_group(policy, tmp_path):
    objective = PolicyGradient(signal="rloo", beta=0.5, kl_in_reward=True, reference=policy)
    moved = policy.with_params(jax.tree.map(lambda x: x * 1.1, policy.params), "moved")
    made = rollouts(moved, objective, keep=tmp_path)
    made.begin(16, 2)
    columns = made.next(0, rj.objectives.Params(moved.params, {}))
    (rows,) = kept(tmp_path)
    away = [
        np.sum(np.asarray(own) - columns["reference"][n, 0, columns["loss"][n, 0]])
        for n, own in enumerate(rows.lists("logprobs"))
    ]
    less = (np.asarray(rows.column("score")) - 0.5 * np.asarray(away)).reshape(4, 4)
    wanted = group_advantages(less, scale="none") * 4 / 3
    np.testing.assert_allclose(columns["advantage"].reshape(4, 4), wanted, atol=1e-5)
    assert np.abs(away).max() > 0.01
    with pytest.raises(InputError, match="kl_target and kl_in_reward want a weight"):
        PolicyGradient(kl_in_reward=True)
    with pytest.raises(InputError, match="reference_in_step: with kl_in_reward"):
        PolicyGradient(beta=0.1, kl_in_reward=True, reference_in_step=True)


def test_an_answer_is_not_right_by_being_itself(policy):
    """A template reads the reply as `answer`; the problem's own answer, under the same name, is what it is held to."""
    rows = Dataset.from_rows([{"q": "1+1=", "answer": "no such answer", "n": "7"}])
    answers = rj.generate(policy, rows, template=rj.Template("{q}"), each=3, max_tokens=3)
    assert answers.column("answer") == answers.column("text") and set(answers.column("source_answer")) == {
        "no such answer"
    }
    for reward in (rj.rewards.exact_match("answer"), rj.rewards.rouge_l("answer")):
        assert reward(answers) == [0.0] * 3
    same = Dataset.from_rows([{"text": "12", "answer": "12", "source_answer": "12"}])
    for name in ("exact_match", "numeric_match", "rouge_l"):
        assert getattr(rj.rewards, name)("answer")(same) == [1.0]


# ---- in a run


def test_a_run_keeps_its_rollouts_and_its_report_shows_them(policy, tmp_path):
    """Rows are files of the training's result, checked as any; a second start makes nothing anew; the page has the
    curves, the answers over time, and what a reward of length does."""
    objective = PolicyGradient(loss_type="grpo", beta=0.01)
    problems = [{"q": f"{n}"} for n in range(4)]

    def chain():
        with rj.Run(tmp_path / "run", {"name": "rewards"}, quiet=True) as run:
            model = policy
            for number in (1, 2):
                made = Rollouts(model, problems, rj.Template("{q}"), low_bytes, objective, num_generations=4, length=8,
                                max_tokens=3)  # fmt: skip
                model = run.round(number).train("student", model, made, CONFIG, objective)
        return model.fingerprint

    first = chain()
    folder = tmp_path / "run/rounds/0001/student"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    names = sorted(n for n in files if n.startswith("rollouts/"))
    assert len(names) == 6 and len(kept(folder / "rollouts")) == 6
    made = [(p.stat().st_mtime_ns, p.name) for p in sorted((folder / "rollouts").iterdir())]
    assert (
        chain() == first and [(p.stat().st_mtime_ns, p.name) for p in sorted((folder / "rollouts").iterdir())] == made
    )
    page = rj.write_report(tmp_path / "run").read_text()
    for title in ("Learning from rewards", "Divergence from the reference", "Different answers to one prompt",
                  "Answers of student 1 over time", "No sign that the reward is gamed"):  # fmt: skip
        assert title in page, title
    (folder / "rollouts" / "rollouts-000002.parquet").write_bytes(b"rubbish")
    with pytest.raises(InputError, match=r"rollouts-000002\.parquet is damaged"):
        chain()


def test_signs_that_a_reward_is_gamed():
    from recursive_jax.rounds.report.rewards import gaming

    line = lambda low, high: [(float(n), low + (high - low) * n / 19) for n in range(20)]
    grows = {"length": line(10, 40), "length_reward": line(0.0, 0.8), "distinct": line(0.9, 0.9)}
    (sign,) = gaming("student 1", grows)
    assert "answers grow (13.2 to 36.8 tokens) and longer ones are rewarded (correlation 0.72)" in sign
    (sign,) = gaming("s", {"length": line(10, 10), "length_reward": line(0.8, 0.8), "distinct": line(0.9, 0.1)})
    assert "grow alike (82% of a group differ at first, 18% at last)" in sign
    assert gaming("s", {"length": line(40, 10), "length_reward": line(0.8, 0.8), "distinct": line(0.5, 0.6)}) == []
    assert gaming("s", {"length": [], "length_reward": [], "distinct": []}) == []


# ---- what a reader found


@pytest.mark.slow
def test_rollouts_are_of_the_model_that_is_trained(policy, mesh, tmp_path):
    """One object serves trainings of two models, and rounds of a run, each with its own rows, policy and reference."""
    objective = PolicyGradient(loss_type="grpo", beta=0.1)
    made = rollouts(policy, objective)
    other = transformer(ModelConfig(layers=2, d_model=16, heads=2, max_length=32), ByteTokenizer(), mesh).initialized(1)
    adapted = rj.adapted_model(policy, rj.LoraConfig(rank=2))
    for n, model in enumerate((other, adapted)):
        train(model, made, objective, CONFIG.model_copy(update={"steps": 1}), directory=tmp_path / str(n), quiet=True)
        (line,) = lines_of(tmp_path / str(n))
        assert line["sampling/logp_difference"] < 1e-4 and abs(line["kl"]) < 1e-6

    def chain():
        with rj.Run(tmp_path / "run", {"name": "rewards"}, quiet=True) as run:
            model = policy
            for number in (1, 2):
                settings = CONFIG.model_copy(update={"steps": 2})
                model = run.round(number).train("student", model, made, settings, objective)
        return model.fingerprint

    assert chain() == chain()
    for number in (1, 2):
        folder = tmp_path / f"run/rounds/000{number}/student"
        assert len(kept(folder / "rollouts")) == 2 and abs(lines_of(folder)[0]["kl"]) < 1e-6
    assert made.keep is None and made.model is policy


def test_answers_without_a_reward_count_for_nothing(policy, capsys):
    """They are learnt by nothing, the value head neither; a step without any reward is no end of a training."""
    half = rj.named("half", 1)(lambda data: [1.0 if n % 2 else None for n in range(len(data))])
    none = rj.named("none", 1)(lambda data: [None] * len(data))
    for signal in ("grpo", "gae"):
        objective = PolicyGradient(signal=signal)
        for reward, learnt in ((half, 8), (none, 0)):
            made = Rollouts(
                policy, [{"q": "1"}], rj.Template("{q}"), reward, objective, num_generations=8, max_tokens=3
            )
            made.begin(16, 0)
            params = rj.objectives.Params(policy.params, objective.init(jax.random.key(0), policy).params)
            columns = made.next(0, params)
            assert (columns["loss"].any(axis=(1, 2))).sum() == learnt
            assert np.isfinite(columns["advantage"]).all()
            config = CONFIG.model_copy(update={"steps": 1})
            assert np.isfinite(train(policy, made, objective, config, quiet=True).summary["loss"])
    assert "no answer of a step can be learnt from" in capsys.readouterr().err


def test_an_adapting_weight_is_one_for_all_micro_batches(policy):
    objective = PolicyGradient(loss_type="grpo", beta=0.4, kl_target=0.5, kl_horizon=16)
    found = []
    for pieces in (1, 2):
        made = rollouts(policy, objective)
        config = CONFIG.model_copy(update={"steps": 2, "gradient_accumulation": pieces})
        trained = train(policy, made, objective, config, quiet=True)
        found.append((float(objective.settled(trained.extra.state)), trained.summary["loss"]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)  # a loss near 0, of float32 sums in two orders


def test_what_is_no_rollout_says_so(policy):
    objective, ask = PolicyGradient(beta=0.1), rj.Template("{q}")
    make = lambda **more: Rollouts(
        **{"model": policy, "problems": [{"q": "1", "reference": "1"}], "template": ask, "reward": low_bytes,
           "objective": objective, "max_tokens": 3, "num_generations": 4, **more}
    )  # fmt: skip
    assert np.isfinite(train(policy, make(), objective, CONFIG, quiet=True).summary["loss"])
    for more, message in (
        ({"objective": rj.objectives.DPO()}, "Rollouts are for a PolicyGradient"),
        ({"template": "{q}"}, r"rj\.Template\(\.\.\.\) is wanted"),
        ({"num_generations": "4"}, "num_generations='4': a whole number"),
        ({"reward": None}, "reward=None"),
        ({"length": 2}, "length=2: the longest prompt with its answer needs 4"),
    ):
        with pytest.raises(InputError, match=message):
            make(**more)
    for more, message in (
        ({"kl": "k4"}, "kl='k4': k1 or k2 or k3"), ({"beta": -1}, "beta=-1: a number of 0 or more"),
        ({"epsilon": "a"}, "epsilon='a': a number above 0"), ({"lam": 7}, "lam=7: between 0 and 1"),
        ({"beta": 0.1, "kl_target": 0}, "kl_target=0: a number above 0"), ({"kl_horizon": 0}, "kl_horizon=0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            PolicyGradient(**more)
    rows = Dataset.from_rows([{"id": f"{n}", "score": float(n % 3), "text": "x"} for n in range(6)])
    assert len(with_advantages(rows, signal="reinforce")) == 6
    with pytest.raises(InputError, match="every prompt has one answer"):
        with_advantages(rows)
    with pytest.raises(InputError, match="credit='rloo': a Credit is wanted"):
        with_advantages(rows, "score", "rloo")
    with pytest.raises(InputError, match="column 'text' holds 'x': numbers"):
        with_advantages(rows, "text")
    with pytest.raises(InputError, match="no rows to compare"):
        with_advantages(rows.take(np.empty(0, np.int64)))
