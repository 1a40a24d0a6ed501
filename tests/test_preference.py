"""Learning from preferences: losses by hand, references as columns, and what trainings come to. trl is the oracle in
test_parity_objectives.py."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.config import MeshConfig, ModelConfig, TrainConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.preferences import preferences
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.mesh import make_mesh
from recursive_jax.models.model import transformer
from recursive_jax.objectives import (
    DPO,
    KTO,
    ORPO,
    ListwiseReward,
    PairwiseReward,
    ProcessReward,
    SimPO,
    with_reference,
)
from recursive_jax.objectives.preference_losses import (
    LOSSES,
    dpo_loss,
    kto_loss,
    listwise_reward,
    orpo_loss,
    pairwise_reward,
    simpo_loss,
)
from recursive_jax.train.loop import train

LN2 = np.log(2.0)
SMALL = ModelConfig(layers=1, d_model=16, heads=2, max_length=32)
SETTINGS = TrainConfig(
    steps=12, batch=8, learning_rate=0.03, warmup=1, schedule="constant", log_every=1, tensorboard=False
)
PAIRS = Dataset.from_rows(
    [{"chosen": "yes", "rejected": "nope" if i % 2 else "n", "prompt": [256, 65 + i]} for i in range(8)]
)


def model(mesh, seed=0, **changes):
    return transformer(SMALL.model_copy(update=changes), ByteTokenizer(), mesh).initialized(seed)


def trained(model, data, objective, **changes):
    return train(model, data, objective, SETTINGS.model_copy(update=changes), quiet=True)


# ---- the losses


def test_where_policy_and_reference_agree():
    """Zero log-ratios: what each loss is there, by its formula."""
    zero, many = jnp.zeros(4), {"chosen_count_B": jnp.full(4, 5.0), "rejected_count_B": jnp.full(4, 3.0)}
    wanted = {"sigmoid": LN2, "hinge": 1.0, "ipo": 25.0, "robust": LN2, "nca_pair": 2 * LN2, "bco_pair": 2 * LN2,
              "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0, "aot": LN2, "aot_unpaired": LN2,
              "discopop": (LN2 + 1) / 2, "sigmoid_norm": LN2}  # fmt: skip
    wanted["exo_pair"] = np.log(0.5) - 0.5 * (np.log(0.9) + np.log(0.1))
    assert wanted.keys() == LOSSES.keys()
    for kind, value in wanted.items():
        smoothing = 0.1 if kind == "exo_pair" else 0.0
        found = dpo_loss(zero, zero, zero, zero, loss_type=kind, label_smoothing=smoothing, **many)
        np.testing.assert_allclose(found, np.full(4, value), rtol=1e-6, err_msg=kind)


def test_every_loss_falls_as_the_chosen_answer_gains():
    """Once both have moved as they should; apo_down's is for chosen answers that are to lose too, less."""
    start = [jnp.asarray([x]) for x in (0.3, -0.4, 0.0, 0.0)]
    for kind in LOSSES:
        more = {"chosen_count_B": jnp.ones(1), "rejected_count_B": jnp.ones(1), "beta": 0.5}
        more["label_smoothing"] = 0.05 if kind == "exo_pair" else 0.0
        loss = lambda c, r, kind=kind, more=more: dpo_loss(c, r, *start[2:], loss_type=kind, **more)[0]
        gain, lose = (jax.grad(loss, argnums=i)(*start[:2])[0] for i in (0, 1))
        assert lose > 0, kind
        assert gain < 0 or kind in ("apo_down", "nca_pair"), kind


def test_what_a_loss_wants():
    one = jnp.ones(2)
    for kind in ("ipo", "sigmoid_norm"):
        with pytest.raises(InputError, match="give chosen_count_B"):
            dpo_loss(one, one, one, one, loss_type=kind)
    for refused in (lambda: DPO(loss_type="nope"), lambda: dpo_loss(one, one, one, one, loss_type="nope")):
        with pytest.raises(InputError, match=r"loss_type='nope': sigmoid, hinge"):
            refused()
    with pytest.raises(InputError, match="0 to less than 0.5"):
        DPO(loss_type="robust", label_smoothing=0.5)
    with pytest.raises(InputError, match="needs label_smoothing > 0"):
        DPO(loss_type="exo_pair")
    with pytest.raises(InputError, match="one for each loss_type"):
        DPO(loss_type=("sigmoid", "sft"), loss_weights=(1.0,))
    with pytest.raises(InputError, match="kto or apo_zero_unpaired"):
        kto_loss(one, one > 0, loss_type="no")


def test_odds_margins_and_rankings_by_hand():
    rng = np.random.default_rng(0)
    a, b = -rng.uniform(0.05, 3, (2, 6))
    odds = lambda m: np.exp(m) / (1 - np.exp(m))
    np.testing.assert_allclose(orpo_loss(a, b), np.log1p(odds(b) / odds(a)), rtol=1e-5)
    np.testing.assert_allclose(simpo_loss(a, b, beta=2.0, gamma=1.0), np.log1p(np.exp(-(2 * (a - b) - 1))), rtol=1e-5)
    np.testing.assert_allclose(pairwise_reward(a, b), np.log1p(np.exp(b - a)), rtol=1e-5)
    with_all = np.log1p(np.exp(b - a + 0.5)) + 0.1 * (a + b) ** 2
    np.testing.assert_allclose(pairwise_reward(a, b, np.full(6, 0.5), 0.1), with_all, rtol=1e-5)
    np.testing.assert_allclose(listwise_reward(np.stack([a, b], 1)), pairwise_reward(a, b), rtol=1e-5)
    scores = rng.normal(size=(2, 4))
    places = [np.prod([np.exp(s[k]) / np.exp(s[k:]).sum() for k in range(4)]) for s in scores]
    np.testing.assert_allclose(listwise_reward(scores), -np.log(places), rtol=1e-5)
    liked = np.array([True, False] * 3)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    values = np.where(liked, 2 * (1 - sigmoid(0.3 * (a - 0.2))), 1 - sigmoid(0.3 * (0.2 - a)))
    np.testing.assert_allclose(kto_loss(a, liked, 0.2, beta=0.3, desirable_weight=2.0), values, rtol=1e-5)


# ---- the reference


def test_a_reference_in_a_column_is_one_in_the_step(mesh):
    policy, reference = model(mesh, 0), model(mesh, 1)
    step = trained(policy, PAIRS, DPO(reference=reference, reference_in_step=True), steps=3)
    column = trained(policy, PAIRS, DPO(reference=reference), steps=3)
    assert column.summary["loss"] == pytest.approx(step.summary["loss"], rel=1e-5)
    stored = with_reference(PAIRS, policy, DPO(reference=reference))
    assert [len(x) for x in stored.column("reference")[0]] == [4, 2], "a log-probability for each token, the end too"
    again = trained(policy, stored, DPO(reference=model(mesh, 7)), steps=3)
    assert again.summary["loss"] == column.summary["loss"], "the column is what counts"
    with pytest.raises(InputError, match="is not the log-probabilities of its answers"):
        trained(policy, stored.with_column("chosen", ["another"] * 8), DPO(), steps=1)
    with pytest.raises(InputError, match="starts from a trained model"):
        trained(transformer(SMALL, ByteTokenizer(), mesh), PAIRS, DPO())


def test_what_is_beyond_the_shorter_answer_weighs_less(mesh):
    """arXiv:2409.06411, by hand from the token log-probabilities; with alpha 1 it is DPO."""
    policy, reference = model(mesh, 0), model(mesh, 1)
    lists = with_reference(PAIRS, reference, DPO()).column("reference")
    mine = with_reference(PAIRS, policy, DPO()).column("reference")
    sums = lambda row: [sum(x[: min(map(len, row))]) + 0.3 * sum(x[min(map(len, row)) :]) for x in row]
    margins = [np.subtract(*sums(p)) - np.subtract(*sums(r)) for p, r in zip(mine, lists, strict=True)]
    found = trained(policy, PAIRS, DPO(reference=reference, ld_alpha=0.3), steps=1)
    assert found.summary["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-0.1 * np.array(margins)))), rel=1e-5)
    whole, plain = (trained(policy, PAIRS, DPO(reference=reference, ld_alpha=a), steps=1) for a in (1.0, None))
    assert whole.summary["loss"] == pytest.approx(plain.summary["loss"], rel=1e-6)


def test_several_losses_add_up(mesh):
    policy, reference = model(mesh, 0), model(mesh, 1)
    alone = {
        kind: trained(policy, PAIRS, DPO(reference=reference, loss_type=kind), steps=1).summary["loss"]
        for kind in ("sigmoid", "sft", "apo_zero")
    }
    both = DPO(reference=reference, loss_type=("sigmoid", "sft", "apo_zero"), loss_weights=(0.5, 2.0, 1.0))
    wanted = 0.5 * alone["sigmoid"] + 2 * alone["sft"] + alone["apo_zero"]
    assert trained(policy, PAIRS, both, steps=1).summary["loss"] == pytest.approx(wanted, rel=1e-5)
    tokens = [x for row in with_reference(PAIRS, policy, DPO()).column("reference") for x in row[0]]
    assert alone["sft"] == pytest.approx(-np.mean(tokens), rel=1e-5), "the chosen answers, per token"


def test_sorted_losses_are_of_the_whole_batch(mesh):
    policy, reference = model(mesh, 0), model(mesh, 1)
    mine, theirs = (
        np.array([[sum(x) for x in row] for row in with_reference(PAIRS, m, DPO()).column("reference")])
        for m in (policy, reference)
    )
    gap = np.sort(mine[:, 0] - mine[:, 1]) - np.sort(theirs[:, 0] - theirs[:, 1])
    wanted = np.mean(np.log1p(np.exp(-0.1 * gap)))
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    for where, pieces in ((mesh, 1), (one, 1), (one, 4)):
        found = trained(
            policy.on(where), PAIRS, DPO(reference=reference.on(where), loss_type="aot"), steps=1,
            gradient_accumulation=pieces,
        )  # fmt: skip
        assert found.summary["loss"] == pytest.approx(wanted, rel=1e-5)


# ---- trainings


@pytest.mark.parametrize("objective", [DPO(beta=0.5), ORPO(), SimPO(), DPO(loss_type="ipo", beta=0.5)], ids=str)
def test_the_chosen_answer_wins(objective, mesh):
    policy = model(mesh)
    before = with_reference(PAIRS, policy, DPO()).column("reference")
    after = with_reference(PAIRS, trained(policy, PAIRS, objective).model, DPO()).column("reference")
    margin = lambda lists: np.array([np.subtract(*map(sum, row)) for row in lists])
    assert (margin(after) > margin(before) + 1).all()


def test_kto_likes_what_was_liked_and_its_kl_is_of_the_batch(mesh):
    rows = [{"prompt": [256, 65 + i], "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(8)]
    data, policy = Dataset.from_rows(rows), model(mesh)
    lists = lambda m: np.array([sum(r[0]) for r in with_reference(data, m, KTO()).column("reference")])
    change = lists(trained(policy, data, KTO(beta=0.5)).model) - lists(policy)
    assert (change[1::2] > 0).all() and (change[::2] < 0).all()
    one, other = make_mesh(MeshConfig(data=1), jax.devices()[:1]), model(mesh, 1)
    losses = [
        trained(policy.on(where), data, KTO(reference=other.on(where)), steps=1, gradient_accumulation=n).summary[
            "loss"
        ]
        for where, n in ((mesh, 1), (one, 1), (one, 4))
    ]
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-5)] * 2
    mine, theirs = (with_reference(data, m, KTO()).column("reference") for m in (policy, other))
    ratio = np.array([[sum(a) - sum(b) for a, b in zip(p, r, strict=True)] for p, r in zip(mine, theirs, strict=True)])
    kl = ratio[:, 1].mean()
    assert kl > 0.01, "else it is bounded, and nothing is seen of it"
    wanted = kto_loss(ratio[:, 0], np.arange(8) % 2 == 1, kl)
    assert losses[0] == pytest.approx(float(np.mean(wanted)), rel=1e-5)
    with pytest.raises(InputError, match=r"label='x'; true \(liked\) or false"):
        trained(policy, Dataset.from_rows([{**row, "label": "x"} for row in rows]), KTO())


@pytest.mark.slow
def test_reward_models_learn_orders_and_steps(mesh, tmp_path):
    scorer = model(mesh, head="score")
    found = trained(scorer, PAIRS, PairwiseReward(centering=0.01), steps=20)
    assert found.summary["loss"] < 0.2
    reward = rj.rewards.reward_model(found.model)
    good, bad = (
        reward([{"prompt": row["prompt"], "tokens": [*row[side].encode(), 257], "text": ""} for row in PAIRS])
        for side in ("chosen", "rejected")
    )
    assert all(g > b for g, b in zip(good, bad, strict=True)) and abs(np.mean([*good, *bad])) < 1
    margins = PAIRS.with_column("margin", [1.0] * 8)
    more, none = (trained(scorer, d, PairwiseReward(), steps=1).summary["loss"] for d in (margins, PAIRS))
    assert more > none + 0.3

    ranked = [{"prompt": [256, 65 + i], "ranked": ["aaa", "bb", "c", "dd"]} for i in range(8)]
    order = train(
        scorer, Dataset.from_rows(ranked), ListwiseReward(), SETTINGS.model_copy(update={"steps": 20}),
        directory=tmp_path, quiet=True,
    )  # fmt: skip
    assert order.summary["loss"] < np.log(24) / 3
    last = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[-1])
    assert (last["accuracy"], last["best"]) == (1.0, 1.0), "of six pairs each, and of the first"
    steps = [{"prompt": [256], "steps": ["good", "bad", "good"], "labels": [True, False, None]}] * 8
    learnt = trained(scorer, Dataset.from_rows(steps), ProcessReward(), steps=25)
    assert learnt.summary["loss"] < 0.1
    with pytest.raises(InputError, match=r"model\.head=score"):
        trained(model(mesh), PAIRS, PairwiseReward())
    with pytest.raises(InputError, match="lists of one length"):
        trained(scorer, Dataset.from_rows([{**steps[0], "labels": [True]}] * 8), ProcessReward())


@pytest.mark.slow
def test_dpo_reaches_the_optimum_under_its_constraint(mesh):
    """pi0 exp(r / beta) / Z on three answers (arXiv:2305.18290, eq. 4), from pairs in the shares that Bradley and Terry
    give to these rewards."""
    policy, tokens, rewards = model(mesh, 3), [65, 66, 67], np.array([0.0, 0.5, 1.0])
    rows = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        first = round(40 / (1 + np.exp(rewards[b] - rewards[a])))
        for n in range(40):
            chosen, rejected = (a, b) if n < first else (b, a)
            rows.append({"prompt": [256], "chosen": [tokens[chosen]], "rejected": [tokens[rejected]]})
    share = lambda m: np.exp(np.asarray(m.logits([[256]]), np.float64)[0, -1, tokens])
    start = share(policy)
    found = share(
        trained(policy, Dataset.from_rows(rows), DPO(beta=0.5), steps=150, batch=120, learning_rate=0.02).model
    )
    wanted = start * np.exp(rewards / 0.5)
    assert 0.5 * np.abs(found / found.sum() - wanted / wanted.sum()).sum() < 0.03


# ---- rows as people write them


class Speaking(ByteTokenizer):
    chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def test_texts_and_conversations_become_prompts_and_answers():
    plain = {"prompt": "ask ", "chosen": "good", "rejected": "bad", "source": "x"}
    row = preferences([plain], ("chosen", "rejected"), ByteTokenizer())[0]
    assert row["prompt"] == [256, *b"ask "] and (row["chosen"], row["rejected"], row["source"]) == ("good", "bad", "x")
    joined = {"chosen": "H: hi A: good", "rejected": "H: hi A: bad"}
    row = preferences([joined], ("chosen", "rejected"), ByteTokenizer())[0]
    assert row["prompt"] == [256, *b"H: hi A:"] and (row["chosen"], row["rejected"]) == (" good", " bad")
    user, said = {"role": "user", "content": "hi"}, lambda text: {"role": "assistant", "content": text}
    for given in (
        {"prompt": [user], "chosen": [said("good")], "rejected": [said("bad")]},
        {"prompt": [user], "chosen": "good", "rejected": "bad"},
        {"prompt": "hi", "chosen": [said("good")], "rejected": [said("bad")]},
        {"chosen": [user, said("good")], "rejected": [user, said("bad")]},
    ):
        row = preferences([given], ("chosen", "rejected"), Speaking())[0]
        assert bytes(row["prompt"]).decode() == "<user>hi|<assistant>"
        assert [bytes(row[name]).decode() for name in ("chosen", "rejected")] == ["good|", "bad|"]
    ids = preferences([{"prompt": [5, 6], "chosen": [7], "rejected": [8]}], ("chosen", "rejected"), ByteTokenizer())[0]
    assert (ids["prompt"], ids["chosen"]) == ([5, 6], [7])
    with pytest.raises(InputError, match="row 1: there is nothing in `rejected`; it has prompt, chosen"):
        preferences([plain, {"prompt": "a", "chosen": "b"}], ("chosen", "rejected"), ByteTokenizer())
    with pytest.raises(InputError, match="rows .dicts. with `prompt` and `chosen`, `rejected` are wanted"):
        preferences(["a text"], ("chosen", "rejected"), ByteTokenizer())
    with pytest.raises(InputError, match="row 0: .*no chat template"):
        preferences([{"prompt": [user], "chosen": "a", "rejected": "b"}], ("chosen", "rejected"), ByteTokenizer())


def test_dicts_are_learnt_from_as_they_are(mesh):
    rows = [{"prompt": "A", "chosen": "yes", "rejected": "no"}] * 8
    asked = Dataset.from_rows([{"prompt": [256, 65], "chosen": "yes", "rejected": "no"}] * 8)
    for objective in (DPO(), SimPO()):
        texts, ids = (trained(model(mesh), data, objective, steps=2).summary["loss"] for data in (rows, asked))
        assert texts == ids
    liked = [
        {"prompt": "A", "completion": "yes", "label": True},
        {"prompt": "A", "completion": "no", "label": False},
    ] * 4
    assert trained(model(mesh), liked, KTO(beta=0.5)).summary["loss"] < 0.4
    steps = [{"prompt": "q", "steps": ["a", "b"], "labels": [True, False]}] * 8
    assert trained(model(mesh, head="score"), steps, ProcessReward()).summary["loss"] < LN2


def test_a_head_is_for_its_objectives(mesh):
    scorer = model(mesh, head="score")
    for objective in (DPO(), rj.objectives.causal):
        with pytest.raises(InputError, match="trains a model that writes, and this one has model.head=score"):
            trained(scorer, PAIRS, objective)
    with pytest.raises(InputError, match="no log-probabilities"):
        rj.evaluate(scorer, ["a text"])
    with pytest.raises(InputError, match="has no params"):
        rj.rewards.reward_model(transformer(SMALL.model_copy(update={"head": "score"}), ByteTokenizer(), mesh))(
            [{"text": "a"}]
        )
    with pytest.raises(InputError, match="learnt from by an objective of preferences"):
        rj.train(model(mesh), [{"prompt": "a", "chosen": "b", "rejected": "c"}], steps=1, batch=8)
    with pytest.raises(InputError, match="beta=-1: more than 0"):
        DPO(beta=-1)
    with pytest.raises(InputError, match="reference='smollm2': a model is wanted"):
        trained(model(mesh), PAIRS, DPO(reference="smollm2"))
    asked = rj.rewards.reward_model(scorer)
    texts, ids = ({"prompt": p, "text": "b"} for p in ("a", [256, 97]))
    assert asked([texts]) == asked([ids]) == asked([{"tokens": [97, 98, 257], "prompt": [256], "text": ""}])
    assert asked([{"text": "b"}]) != asked([texts])
