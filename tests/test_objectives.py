"""One seam for every objective: terms with denominators of their own, extra params, state, keys and frozen models go
through micro-batches, meshes, checkpoints and resume; and the objectives against closed forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.config import LoraConfig, MeshConfig, ModelConfig, TrainConfig
from recursive_jax.data.dataset import Dataset, real_rows
from recursive_jax.data.packing import Packed, pack, stack_arrays
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError, Preempted
from recursive_jax.mesh import make_mesh, rows_like
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model, transformer
from recursive_jax.models.vae import VAENetwork
from recursive_jax.objectives import (
    DPO,
    Causal,
    Context,
    Extra,
    InfoNCE,
    Loss,
    Masked,
    NegativeElbo,
    Objective,
    Params,
    Term,
    causal,
    dpo_loss,
    info_nce,
    mask_tokens,
)
from recursive_jax.objectives.causal import targets, token_nll, weighted_sum
from recursive_jax.objectives.variational import elbo
from recursive_jax.train import signals
from recursive_jax.train.loop import train
from recursive_jax.train.step import loss_and_gradients
from tests.helpers import loss_of

MESHES = (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2))
SETTINGS = TrainConfig(steps=6, batch=8, learning_rate=1e-2, warmup=0.0, length=32, checkpoint_every=2)


@dataclasses.dataclass(frozen=True)
class ValueToo(Objective):
    """Everything that an objective may bring: a head of its own, a running mean as state, a draw, two terms of unlike
    denominators, a metric."""

    share: float = 0.5

    def init(self, key, model):
        head_D = jax.random.normal(key, (model.network.states_size,)) * 0.1
        return Extra({"head": head_D}, {"mean": jnp.zeros(()), "seen": jnp.zeros(())})

    def loss(self, ctx, params, batch):
        inputs, segments, labels, weight_BT = targets(batch)
        nll_BT = token_nll(ctx.apply(params, inputs, segments), labels)
        states_BTD = ctx.apply(params, inputs, segments, hidden=True)
        draw_BT = rows_like(jax.random.uniform(ctx.key, inputs.shape), len(inputs))
        drawn_BT = (draw_BT < self.share).astype(jnp.float32) * weight_BT
        error_BT = jnp.square(jnp.einsum("btd,d->bt", states_BTD, params.extra["head"]) - 1.0)
        terms = {
            "nll": Term(weighted_sum(nll_BT, weight_BT), jnp.sum(weight_BT)),
            "value": Term(jnp.sum(error_BT * drawn_BT), jnp.sum(drawn_BT), 0.3),
        }
        seen = ctx.state["seen"] + jnp.sum(weight_BT)
        state = {"mean": ctx.state["mean"] + jnp.sum(error_BT * weight_BT) / 1000, "seen": seen}
        return Loss(terms, {"error": (jnp.sum(error_BT * weight_BT), jnp.sum(weight_BT))}, state)


@pytest.fixture(scope="module")
def rows(language, tokenizer):
    return pack(language.sample(1, 0, 60), 32, tokenizer.bos, tokenizer.pad)


@pytest.fixture(scope="module")
def small():
    return ModelConfig(layers=1, d_model=32, heads=4, kv_heads=2, d_ff=64, max_length=32)


def gradient(objective, model, batch, accumulate=1, extra=None, state=None, others=None, dropout=False):
    """(loss, gradient) of a batch as the train step takes them."""
    bound, key = model.network.bind(), jax.random.key(7)

    def make_context(micro, own):
        at = jax.random.fold_in(key, micro)
        drop = {"key": at} if dropout else {}
        apply = lambda p, *x, **kw: bound({**p.model, **base} if base else p.model, *x, **{**drop, **kw})
        return Context(apply, others or {}, jax.random.fold_in(at, 1), jnp.int32(0), own)

    base = {"base": model.params["base"]} if model.network.frozen else {}
    trained = {k: v for k, v in model.params.items() if k not in base}
    with jax.set_mesh(model.mesh):
        run = jax.jit(lambda p, b: loss_and_gradients(objective, make_context, p, b, state, accumulate))
        return run(Params(trained, {} if extra is None else extra), jax.tree.map(jnp.asarray, batch))


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), **{"rtol": 2e-4, "atol": 2e-6, **tolerance})


def close_sums(a, b):
    """For the gradients of GradCache: entries are sums whose parts are as large as the largest entry beside them (the
    embedding's is 11) and are rounded as those are; in another order they differ by 5e-7 of it (jax 0.12)."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        close(x, y, atol=1e-6 * max(2.0, float(np.abs(y).max())))


# The seam.


def test_terms_keep_their_own_denominators_in_any_micro_batches(small, tokenizer, mesh, rows):
    """value_t = sum_t / count_t over the whole batch, whatever rows a micro-batch holds."""
    model = transformer(small, tokenizer, mesh).initialized(0)
    batch = {k: v[:8] for k, v in rows.columns.items()}
    batch["segments"] = np.where(np.arange(8)[:, None] % 3 == 0, 0, batch["segments"])  # rows of very unlike counts
    batch["segments"][3, :4] = 1

    @dataclasses.dataclass(frozen=True)
    class TwoTerms(Objective):
        def loss(self, ctx, params, batch):
            inputs, segments, labels, weight_BT = targets(batch)
            nll_BT = token_nll(ctx.apply(params, inputs, segments), labels)
            even_BT = weight_BT * (labels % 2 == 0)
            return Loss(
                {
                    "all": Term(weighted_sum(nll_BT, weight_BT), jnp.sum(weight_BT)),
                    "even": Term(weighted_sum(jnp.square(nll_BT), even_BT), jnp.sum(even_BT), 2.0),
                }
            )

    def value(params):
        terms = loss_of(TwoTerms(), model.network.apply, params, jax.tree.map(jnp.asarray, batch)).terms
        return sum(t.weight * t.sum / t.count for t in terms.values())

    with jax.set_mesh(mesh):
        reached, wanted = jax.jit(jax.value_and_grad(value))(model.params)
    reached = float(reached)
    for accumulate in (1, 4):
        loss, found = gradient(TwoTerms(), model, batch, accumulate)
        close(found.model, wanted)
        assert float(sum(t.weight * t.sum / t.count for t in loss.terms.values())) == pytest.approx(reached, rel=1e-5)


def test_extra_params_state_keys_and_metrics_survive_meshes_micro_batches_and_kills(
    small, tokenizer, rows, tmp_path, monkeypatch
):
    def run(mesh_config, accumulate=1, directory=None):
        count = mesh_config.data * mesh_config.fsdp * mesh_config.tensor
        model = transformer(small, tokenizer, make_mesh(mesh_config, jax.devices()[:count]))
        settings = SETTINGS.model_copy(update={"gradient_accumulation": accumulate})
        return train(model, rows, ValueToo(share=1.0), settings, seed=5, quiet=True, directory=directory)

    whole = run(MESHES[0])
    assert float(whole.extra.state["seen"]) > 100 and np.abs(whole.extra.params["head"]).max() > 0.1
    for other in (run(MESHES[1]), run(MESHES[0], accumulate=4)):
        close(other.model.params, whole.model.params, rtol=2e-2, atol=2e-3)  # six Adam steps apart
        close(other.extra.params, whole.extra.params, rtol=2e-2, atol=2e-3)
        assert float(other.extra.state["seen"]) == float(whole.extra.state["seen"])
    asked = iter([False] * 2 + [True] + [False] * 20)
    monkeypatch.setattr(signals, "stop_requested", lambda: next(asked))
    with pytest.raises(Preempted, match="saved at step 3"):
        run(MESHES[0], directory=tmp_path / "t")
    resumed = run(MESHES[0], directory=tmp_path / "t")
    all_of = lambda t: jax.tree.leaves((t.model.params, t.extra.params, t.extra.state))
    for a, b in zip(all_of(whole), all_of(resumed), strict=True):
        assert np.array_equal(a, b)  # bits


def test_a_training_goes_on_on_another_mesh(small, tokenizer, rows, tmp_path, monkeypatch):
    config = SETTINGS.model_copy(update={"steps": 8})
    make = lambda c: transformer(small, tokenizer, make_mesh(c, jax.devices()[: c.data * c.fsdp * c.tensor]))
    whole = train(make(MESHES[0]), rows, config=config, seed=2, quiet=True)
    asked = iter([False] * 3 + [True] + [False] * 20)
    monkeypatch.setattr(signals, "stop_requested", lambda: next(asked))
    with pytest.raises(Preempted):
        train(make(MESHES[0]), rows, config=config, seed=2, quiet=True, directory=tmp_path / "t")
    found = train(make(MESHES[1]), rows, config=config, seed=2, quiet=True, directory=tmp_path / "t")
    close(found.model.params, whole.model.params, rtol=2e-2, atol=2e-3)


def test_a_directory_belongs_to_one_training(small, tokenizer, mesh, rows, tmp_path):
    model, config = transformer(small, tokenizer, mesh), SETTINGS
    train(model, rows, config=config, seed=1, quiet=True, directory=tmp_path / "t")
    again = train(
        model, rows, config=config.model_copy(update={"log_every": 3}), seed=1, quiet=True, directory=tmp_path / "t"
    )
    assert again.summary["steps"] == 6
    others = (
        dict(config=config.model_copy(update={"learning_rate": 2e-3}), says="learning_rate: 0.01 -> 0.002"),
        dict(seed=2, says="seed: 1 -> 2"),
        dict(objective=Causal(truncate=0.5), says="objective.truncate: default -> 0.5"),
        dict(rows=Packed({k: v[1:] for k, v in rows.columns.items()}), says="data"),
    )
    for case in others:
        says = case.pop("says")
        with pytest.raises(InputError, match="half-done training of other settings") as error:
            arguments = {"config": config, "seed": 1, **case}
            data = arguments.pop("rows", rows)
            train(model, data, quiet=True, directory=tmp_path / "t", **arguments)
        assert says in str(error.value)


def test_half_precision_params_stay_so_through_a_resume(small, tokenizer, mesh, rows, tmp_path):
    full = transformer(small, tokenizer, mesh).initialized(0)
    model = full.with_params(jax.tree.map(lambda x: x.astype(jnp.bfloat16), full.params))
    for _ in range(2):  # the second goes on from step 4
        found = train(model, rows, config=SETTINGS, quiet=True, directory=tmp_path / "t").model.params
        assert {str(x.dtype) for x in jax.tree.leaves(found)} == {"bfloat16"}


def test_a_batch_without_a_column_is_refused_before_compiling(small, tokenizer, mesh):
    model = transformer(small, tokenizer, mesh)
    with pytest.raises(
        InputError, match="DPO reads the columns tokens, segments, loss, and the packed data has no loss"
    ):
        rows = Packed({"tokens": np.zeros((8, 2, 9), np.int32), "segments": np.ones((8, 2, 9), np.int32)})
        train(model.initialized(0), rows, DPO(), SETTINGS, quiet=True)
    with pytest.raises(InputError, match="is not an objective"):
        train(model, stack_arrays({"tokens": np.zeros((8, 3))}), lambda apply, params, batch: 0, SETTINGS, quiet=True)


# Masked language modelling.


def test_masks_are_drawn_at_their_shares_and_anew(tokenizer):
    tokens = jnp.asarray(np.random.default_rng(0).integers(10, 90, (200, 100)), jnp.int32)
    special = tokens < 20
    inputs, chosen = mask_tokens(jax.random.key(0), tokens, special, share=0.15, mask_id=5, vocab=100)
    usable = int((~special).sum())
    assert not (chosen & special).any() and (inputs[~chosen] == tokens[~chosen]).all()
    z = lambda n, k, p: abs(k / n - p) / np.sqrt(p * (1 - p) / n)
    assert z(usable, int(chosen.sum()), 0.15) < 4
    picked = np.asarray(inputs)[np.asarray(chosen)], np.asarray(tokens)[np.asarray(chosen)]
    n = len(picked[0])
    assert z(n, (picked[0] == 5).sum(), 0.8 + 0.1 / 100) < 4
    assert z(n, (picked[0] == picked[1]).sum(), 0.1 + 0.1 / 100) < 4
    again, _ = mask_tokens(jax.random.key(1), tokens, special, share=0.15, mask_id=5, vocab=100)
    assert (again != inputs).any()


def test_an_encoder_learns_to_fill_masks(small, language, tokenizer, mesh):
    """Redrawn by step; special tokens are never guessed; the loss falls below that of the frequencies alone."""
    model = transformer(small.model_copy(update={"causal": False}), tokenizer, mesh)
    objective = Masked(mask_id=tokenizer.pad, share=0.3)
    data = real_rows(language.sample(1, 0, 400), [""] * 400)
    config = SETTINGS.model_copy(update={"steps": 60, "learning_rate": 5e-3})
    trained = train(model, data, objective, config, quiet=True)
    first = train(model, data, objective, config.model_copy(update={"steps": 1}), quiet=True)
    assert trained.summary["loss"] < first.summary["loss"] - 0.5
    resolved = objective.resolved(model)
    assert resolved.vocab == tokenizer.vocab and {tokenizer.bos, tokenizer.eos, tokenizer.pad} <= set(resolved.special)
    with pytest.raises(InputError, match="no mask token"):
        Masked().resolved(model)


# Preferences.


def test_dpo_is_its_formula_and_moves_away_from_its_frozen_reference(small, mesh):
    rng = np.random.default_rng(0)
    c, r, rc, rr = rng.normal(-5, 2, (4, 16))
    margin = (c - r) - (rc - rr)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(dpo_loss(c, r, rc, rr, beta=0.3), -np.log(sigmoid(0.3 * margin)), rtol=1e-5)
    smooth = -0.9 * np.log(sigmoid(0.3 * margin)) - 0.1 * np.log(sigmoid(-0.3 * margin))
    np.testing.assert_allclose(dpo_loss(c, r, rc, rr, beta=0.3, label_smoothing=0.1), smooth, rtol=1e-5)
    np.testing.assert_allclose(
        dpo_loss(c, r, rc, rr, beta=0.3, loss_type="hinge"), np.maximum(0, 1 - 0.3 * margin), rtol=1e-5
    )
    with pytest.raises(InputError, match="loss_type"):
        dpo_loss(c, r, rc, rr, loss_type="nope")

    data = Dataset.from_rows([{"chosen": "yes", "rejected": "nope", "prompt": [256, 65 + i]} for i in range(8)])
    model = transformer(small, ByteTokenizer(), mesh).initialized(0)
    before = jax.tree.map(np.asarray, model.params)
    config = SETTINGS.model_copy(update={"steps": 12, "log_every": 1})
    trained = train(model, data, DPO(beta=0.5), config, quiet=True)
    assert trained.summary["loss"] < 0.3 < np.log(2)  # ln 2 where policy and reference agree
    close(model.params, before, rtol=0, atol=0)
    apart = train(
        model, data, DPO(beta=0.5, reference=trained.model), config.model_copy(update={"steps": 1}), quiet=True
    )
    assert apart.summary["loss"] > np.log(2) + 0.3  # this reference knows the answer already
    adapted = train(
        adapted_model(model, LoraConfig(rank=2)), data, DPO(), config.model_copy(update={"steps": 2}), quiet=True
    )
    assert adapted.summary["loss"] == pytest.approx(np.log(2), abs=0.2)
    with pytest.raises(InputError, match="starts from a trained model"):
        train(transformer(small, ByteTokenizer(), mesh), data, DPO(), config, quiet=True)


def test_beta_scales_the_margin_of_dpo(small, mesh):
    """One row, eight times: from the loss at one beta follows the margin, and from it the loss at another."""
    data = Dataset.from_rows([{"chosen": "yes", "rejected": "nope", "prompt": [256, 65]}] * 8)
    policy, reference = (transformer(small, ByteTokenizer(), mesh).initialized(seed) for seed in (0, 1))
    config = SETTINGS.model_copy(update={"steps": 1})
    loss = lambda beta: train(policy, data, DPO(beta=beta, reference=reference), config, quiet=True).summary["loss"]
    margin = -np.log(np.expm1(loss(0.5))) / 0.5  # of -log sigmoid(beta margin)
    assert abs(margin) > 0.05 and loss(2.0) == pytest.approx(np.log1p(np.exp(-2.0 * margin)), rel=1e-4)


def test_an_objective_is_named_by_the_model_it_holds(small, mesh):
    from recursive_jax.identity import fingerprint

    one, two = (transformer(small, ByteTokenizer(), mesh).initialized(s) for s in (0, 1))
    assert fingerprint(DPO(reference=one)) != fingerprint(DPO(reference=two)) != fingerprint(DPO())
    assert fingerprint(DPO(reference=one)) == fingerprint(DPO(reference=one.with_params(one.params)))


# Representations.


def test_info_nce_is_a_softmax_over_all_passages():
    rng = np.random.default_rng(0)
    q, p = rng.normal(size=(4, 8)).astype(np.float32), rng.normal(size=(6, 8)).astype(np.float32)
    positives = np.array([2, 0, 5, 1])
    scores = q @ p.T / 0.1
    wanted = np.log(np.exp(scores).sum(1)) - scores[np.arange(4), positives]
    np.testing.assert_allclose(info_nce(q, p, temperature=0.1, positives_Q=jnp.asarray(positives)), wanted, rtol=1e-5)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(3)
    text = lambda: rng.integers(97, 110, rng.integers(3, 9)).tolist()
    return Dataset.from_rows([{"query": text(), "positive": text(), "negative": text()} for _ in range(8)])


def test_gradcache_is_the_gradient_of_the_whole_batch(small, mesh, pairs):
    model = transformer(small, ByteTokenizer(), mesh).initialized(0)
    objective = InfoNCE(temperature=0.2)
    batch = objective.pack(pairs, model, 16).columns
    whole = gradient(objective, model, batch, 1)
    assert norm(whole[1]) > 1e-2
    for accumulate in (2, 8):
        loss, grads = gradient(objective, model, batch, accumulate)
        close_sums(grads, whole[1])
        assert float(loss.terms["info_nce"].sum) == pytest.approx(float(whole[0].terms["info_nce"].sum), rel=1e-5)
    # A micro-batch alone has fewer passages to tell apart: what accumulating means would give is another gradient.
    halves = [gradient(objective, model, {k: v[i::2] for k, v in batch.items()})[1] for i in (0, 1)]
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *halves)
    difference = jax.tree.map(lambda a, b: a - np.asarray(b), mean, whole[1])
    assert norm(difference) > 0.05 * norm(whole[1])


def norm(tree):
    return np.sqrt(sum(float(np.square(x).sum()) for x in jax.tree.leaves(jax.tree.map(np.asarray, tree))))


@pytest.mark.slow
def test_gradcache_replays_dropout(small, mesh, pairs):
    """The second pass over a micro-batch drops what the first one dropped: the gradient is that of one program in which
    every micro-batch is represented once, under its own key."""
    base = transformer(small, ByteTokenizer(), mesh).initialized(0)
    model = adapted_model(base, LoraConfig(rank=4, dropout=0.5))
    model = model.with_params({**model.params, "lora": jax.tree.map(lambda x: x + 0.05, model.params["lora"])})
    objective = InfoNCE(temperature=0.2)
    batch = objective.pack(pairs, model, 16).columns
    _, cached = gradient(objective, model, batch, 2, dropout=True)

    bound, key = model.network.bind(), jax.random.key(7)

    def value(lora):
        parts = []
        for micro in range(2):
            at = jax.random.fold_in(key, micro)
            apply = lambda p, *x, at=at, **kw: bound(
                {"base": model.params["base"], "lora": p.model["lora"]}, *x, key=at, **kw
            )
            ctx = Context(apply, {}, at, jnp.int32(0), None)
            rows = {k: jnp.asarray(v[micro::2]) for k, v in batch.items()}  # rows are dealt out round-robin
            parts.append(objective.represent(ctx, Params({"lora": lora}, {}), rows))
        whole = jnp.stack(parts, 1).reshape(8, *parts[0].shape[1:])
        term = objective.loss_of(ctx, None, whole, batch).terms["info_nce"]
        return term.sum / term.count

    with jax.set_mesh(mesh):
        reached, wanted = jax.jit(jax.value_and_grad(value))(model.params["lora"])
    close(cached.model["lora"], wanted)
    with_others, _ = gradient(objective, model, batch, 2, dropout=False)
    assert float(with_others.terms["info_nce"].sum) != pytest.approx(8 * float(reached), rel=1e-3)


def test_gradcache_s_memory_is_that_of_a_micro_batch(small, mesh, pairs):
    model = transformer(small, ByteTokenizer(), mesh).initialized(0)
    objective = InfoNCE()
    one = objective.pack(pairs, model, 16).columns
    make = lambda micro, own: Context(
        lambda p, *x, **kw: model.network.apply(p.model, *x, **kw), {}, jax.random.key(0), jnp.int32(0), None
    )

    def temporaries(rows, accumulate):
        batch = {k: jnp.asarray(np.tile(v, (rows // 8, 1, 1))) for k, v in one.items()}
        with jax.set_mesh(mesh):
            run = jax.jit(lambda p, b: loss_and_gradients(objective, make, p, b, None, accumulate))
            return run.lower(Params(model.params, {}), batch).compile().memory_analysis().temp_size_in_bytes

    small_batch, cached, direct = temporaries(8, 1), temporaries(128, 16), temporaries(128, 1)
    assert cached < 2 * small_batch < direct / 4, (small_batch, cached, direct)


@pytest.mark.slow
def test_info_nce_trains_the_same_on_a_mesh(small, pairs):
    results = []
    for config, accumulate in ((MESHES[0], 1), (MESHES[1], 2)):
        model = transformer(
            small, ByteTokenizer(), make_mesh(config, jax.devices()[: config.data * config.fsdp * config.tensor])
        )
        settings = SETTINGS.model_copy(update={"gradient_accumulation": accumulate, "length": 16})
        results.append(train(model, pairs, InfoNCE(0.2), settings, seed=1, quiet=True))
    assert results[0].summary["loss"] == pytest.approx(results[1].summary["loss"], rel=1e-2)
    assert results[0].summary["loss"] < 1.0 < np.log(16)


# Images.


@pytest.mark.slow
def test_a_vae_trains_through_the_same_loop(mesh, tmp_path):
    rng = np.random.default_rng(0)
    images = (rng.random((64, 64)) < np.linspace(0.05, 0.95, 64)).astype(np.float32)
    network = VAENetwork(side=8, channels=4, latent=4)
    model = Model(network, None, mesh=mesh)
    config = TrainConfig(steps=80, batch=16, learning_rate=1e-2, weight_decay=0.0, checkpoint_every=30)
    trained = train(
        model, stack_arrays({"images": images}), NegativeElbo(), config, seed=1, quiet=True, directory=tmp_path / "t"
    )
    p = np.clip(images.mean(0), 1e-6, 1 - 1e-6)
    floor = -(images * np.log(p) + (1 - images) * np.log(1 - p)).sum(1).mean()  # independent pixels at their rates
    assert 0.9 * floor < trained.summary["loss"] < 1.35 * floor
    again = train(
        model, stack_arrays({"images": images}), NegativeElbo(), config, seed=1, quiet=True, directory=tmp_path / "t"
    )
    for a, b in zip(jax.tree.leaves(again.model.params), jax.tree.leaves(trained.model.params), strict=True):
        assert np.array_equal(a, b)  # resumed from step 60
    eight = Model(network, None, mesh=make_mesh(MeshConfig(data=4, fsdp=2), jax.devices()))
    other = train(eight, stack_arrays({"images": images}), NegativeElbo(), config, seed=1, quiet=True)
    assert other.summary["loss"] == pytest.approx(trained.summary["loss"], rel=0.05)


def test_the_elbo_is_its_closed_form():
    """Of a code that is exactly N(0, I) and pixels of known odds; and KL against its integral."""
    pixels = jnp.asarray([[1.0, 0.0, 1.0]])
    logits = jnp.asarray([[0.3, -0.7, 2.0]])
    bernoulli = float((pixels * jax.nn.log_sigmoid(logits) + (1 - pixels) * jax.nn.log_sigmoid(-logits)).sum())
    assert float(elbo(jnp.zeros((1, 2)), jnp.zeros((1, 2)), logits, pixels)[0]) == pytest.approx(bernoulli, rel=1e-6)
    z = np.linspace(-12, 12, 200001)
    density = lambda m, s: np.exp(-((z - m) ** 2) / (2 * s * s)) / (s * np.sqrt(2 * np.pi))
    q = density(0.8, 0.5)
    kl = np.trapezoid(q * (np.log(np.maximum(q, 1e-300)) - np.log(density(0.0, 1.0))), z)
    found = float(elbo(jnp.asarray([[0.8]]), jnp.asarray([[2 * np.log(0.5)]]), logits, pixels)[0])
    assert bernoulli - found == pytest.approx(kl, rel=1e-4)


def test_the_default_objective_is_supervised_on_prompts_with_completions(small, mesh):
    """A prompt is context: its tokens get no gradient of their own."""
    model = transformer(small, ByteTokenizer(), mesh).initialized(0)
    data = real_rows([[65, 66]], ["AB"], prompts=[[256, 70, 71]])
    batch = causal.pack(data, model, 8).columns
    with jax.set_mesh(mesh):
        (term,) = loss_of(causal, model.network.apply, model.params, jax.tree.map(jnp.asarray, batch)).terms.values()
    logits = np.asarray(model.logits([[256, 70, 71, 65]]), np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert float(term.count) == 2 and float(term.sum) == pytest.approx(-(logp[2, 65] + logp[3, 66]), rel=1e-5)


def test_a_term_s_weight_counts_alone_too_and_in_any_micro_batches(small, mesh, pairs):
    """One term: the gradient is weight times that of sum / count; also through GradCache."""
    model = transformer(small, ByteTokenizer(), mesh).initialized(0)

    @dataclasses.dataclass(frozen=True)
    class Half(InfoNCE):
        def loss_of(self, ctx, params, represented, batch):
            found = super().loss_of(ctx, params, represented, batch)
            return Loss({n: t.replace(weight=0.5) for n, t in found.terms.items()})

    @dataclasses.dataclass(frozen=True)
    class HalfCausal(Objective):
        def loss(self, ctx, params, batch):
            found = causal.loss(ctx, params, batch)
            return Loss({n: t.replace(weight=0.5) for n, t in found.terms.items()})

    batch = InfoNCE(temperature=0.2).pack(pairs, model, 16).columns
    whole = gradient(InfoNCE(temperature=0.2), model, batch)[1]
    for accumulate in (1, 4):
        half = gradient(Half(temperature=0.2), model, batch, accumulate)[1]
        close_sums(jax.tree.map(lambda x: 2 * x, half), whole)
    tokens = {"tokens": np.full((4, 9), 65, np.int32), "segments": np.ones((4, 9), np.int32)}
    whole = gradient(causal, model, tokens)[1]
    for accumulate in (1, 2):
        close(jax.tree.map(lambda x: 2 * x, gradient(HalfCausal(), model, tokens, accumulate)[1]), whole)
    settings = SETTINGS.model_copy(update={"steps": 1})
    rows = Packed({k: np.tile(v, (2, 1)) for k, v in tokens.items()})
    full, part = (train(model, rows, o, settings, quiet=True).summary["loss"] for o in (causal, HalfCausal()))
    assert part == pytest.approx(full / 2, rel=1e-5)


def test_objectives_that_are_none_say_what_is_wrong(small, mesh):
    model = transformer(small, ByteTokenizer(), mesh)
    rows = Packed({"tokens": np.zeros((8, 9), np.int32), "segments": np.ones((8, 9), np.int32)})

    class NoDataclass(Objective):
        pass

    @dataclasses.dataclass(frozen=True)
    class NoLoss(Objective):
        pass

    @dataclasses.dataclass(frozen=True)
    class Scalar(Objective):
        def loss(self, ctx, params, batch):
            return jnp.float32(0)

    @dataclasses.dataclass(frozen=True)
    class Listed(Objective):
        values: list = dataclasses.field(default_factory=list)

    for objective, says in (
        (NoDataclass(), "not an objective"),
        (NoLoss(), "has no loss"),
        (Scalar(), "a Loss of terms is wanted"),
        (Listed(), "give tuples, not lists"),
    ):
        with pytest.raises(InputError, match=says):
            train(model, rows, objective, SETTINGS, quiet=True)
    with pytest.raises(InputError, match="texts, dicts or a Dataset"):
        train(model, 3, causal, SETTINGS, quiet=True)
    with pytest.raises(InputError, match="longer than the model reads"):
        train(model, rows, causal, SETTINGS.model_copy(update={"length": 64}), quiet=True)


def test_a_prompt_is_read_and_not_masked(small, mesh):
    model = transformer(small.model_copy(update={"causal": False}), ByteTokenizer(), mesh).initialized(0)
    data = real_rows([[65] * 10], [""], prompts=[[256] + [70] * 10])
    objective = Masked(mask_id=258, share=1.0, replaced=1.0, random=0.0).resolved(model)
    batch = jax.tree.map(jnp.asarray, objective.pack(data, model, 24).columns)
    with jax.set_mesh(mesh):
        (term,) = loss_of(objective, model.network.apply, model.params, batch).terms.values()
    assert float(term.count) == 10


def test_training_on_two_devices_shows_its_utilisation(small, tokenizer, rows, capsys):
    """The CPU's peak was measured inside of the mesh: every shown training on more than one device was a traceback."""
    from recursive_jax.models import flops

    flops._measured_cpu_peak.cache_clear()
    model = transformer(small, tokenizer, make_mesh(MeshConfig(data=2), jax.devices()[:2]))
    assert train(model, rows, config=SETTINGS, quiet=False).summary["steps"] == 6


def test_logits_in_pieces_are_the_whole_ones_in_less_memory(small, tokenizer, mesh, rows, monkeypatch):
    """Loss and gradient; and the compiler's own count of what it holds."""
    from recursive_jax.models import read
    from recursive_jax.models.network import transformer_network
    from recursive_jax.plan.programs import programs_of
    from recursive_jax.rounds.work import Training

    monkeypatch.setattr(read, "HELD", 2**16)
    model = transformer(small, tokenizer, mesh)
    settings = TrainConfig(steps=3, batch=8, learning_rate=1e-2)
    whole, pieces = (train(model, rows, o, settings, quiet=True) for o in (Causal(), Causal(pieces=True)))
    assert whole.summary["loss"] == pytest.approx(pieces.summary["loss"], abs=1e-5)
    for a, b in zip(jax.tree.leaves(whole.model.params), jax.tree.leaves(pieces.model.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4)
    wide = transformer_network(ModelConfig(vocab=16384, layers=1, d_model=32, heads=2, max_length=64))
    held = []
    for objective in (Causal(), Causal(pieces=True)):
        (program,) = programs_of([Training("", wide, TrainConfig(batch=8), 1.0, objective)], mesh, 2**30)
        with jax.set_mesh(mesh):
            compiled = program.function.trace(*program.arguments).lower().compile()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
    assert held[1] < held[0] / 2
