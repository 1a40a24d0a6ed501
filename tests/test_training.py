"""Optimizer, schedule, loss, divergence, and that rounds compile once."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recursive_jax.config import SamplingConfig, TrainConfig
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.packing import pack, pack_tokens
from recursive_jax.errors import InputError, Preempted, TrainingDiverged
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import unconditional
from recursive_jax.mesh import TRACES
from recursive_jax.models.model import transformer
from recursive_jax.objectives.causal import Causal, causal, targets, token_nll
from recursive_jax.train import signals
from recursive_jax.train.loop import train
from recursive_jax.train.optimizer import Hyper, learning_rate, transformation
from tests.helpers import Exploding, sum_and_count


@pytest.fixture(scope="module")
def rows(language, tokenizer):
    return pack(language.sample(1, 0, 300), 32, tokenizer.bos, tokenizer.pad)


def test_token_nll_is_optax_s():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 5, (3, 4, 11)).astype(np.float32))
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 11, (3, 4)))
    np.testing.assert_allclose(
        token_nll(logits, labels), optax.softmax_cross_entropy_with_integer_labels(logits, labels), atol=1e-5
    )


def test_targets_stay_in_their_segment():
    batch = {"tokens": jnp.array([[1, 5, 6, 1, 7, 0]]), "segments": jnp.array([[1, 1, 1, 2, 2, 0]])}
    inputs, _, labels, mask = targets(batch)
    assert [(int(i), int(l)) for i, l, m in zip(inputs[0], labels[0], mask[0], strict=True) if m] == [
        (1, 5),
        (5, 6),
        (1, 7),
    ]


def test_loss_of_packed_rows_is_the_loss_of_the_documents(tiny, tokenizer, language, mesh):
    model = transformer(tiny, tokenizer, mesh).initialized(1)
    documents = [d[:32] for d in language.sample(5, 0, 20)]
    packed = pack(documents, 32, tokenizer.bos, tokenizer.pad)
    with jax.set_mesh(mesh):
        total, count = sum_and_count(
            causal,
            model.network.apply,
            model.params,
            {"tokens": jnp.asarray(packed.columns["tokens"]), "segments": jnp.asarray(packed.columns["segments"])},
        )
    expected = 0.0
    for d in documents:
        inputs = np.concatenate(
            [[tokenizer.bos], d[:-1], np.full(32 - len(d), tokenizer.pad)]
        )  # what follows is not seen
        logits = np.asarray(model.logits(inputs[None]), np.float64)[0, : len(d)]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected -= logp[np.arange(len(d)), d].sum()
    assert int(count) == sum(map(len, documents))
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_update_is_optax_adamw_with_clipping():
    params = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4), "norm": {"scale": jnp.ones((2, 4))}}
    config = TrainConfig(steps=10, learning_rate=0.01, warmup=0.0, schedule="constant", weight_decay=0.2, clip=0.5)
    hyper = Hyper.of(config)
    mine = transformation(hyper, jnp.int32(0)).init(params)
    theirs_tx = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.2, mask={"w": True, "norm": {"scale": False}}),
    )
    theirs, p, q = theirs_tx.init(params), params, params
    for step in range(5):
        grads = jax.tree.map(lambda x, s=step: jnp.sin(x * 10 + s), params)
        updates, mine = transformation(hyper, jnp.int32(step)).update(grads, mine, p)
        p = optax.apply_updates(p, updates)
        updates, theirs = theirs_tx.update(grads, theirs, q)
        q = optax.apply_updates(q, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), p, q)


def test_schedules_are_optax_s():
    base = {"steps": 200, "learning_rate": 0.5, "warmup": 0.1, "final": 0.2}
    cosine = optax.schedules.cosine_decay_schedule(0.5, 180, alpha=0.2)
    hyper = Hyper.of(TrainConfig(schedule="cosine", **base))
    for step in (20, 50, 110, 199):
        assert float(learning_rate(hyper, jnp.int32(step))) == pytest.approx(float(cosine(step - 20)), rel=1e-5)
    assert float(learning_rate(hyper, jnp.int32(9))) == pytest.approx(0.25)
    wsd = Hyper.of(TrainConfig(schedule="wsd", decay=0.25, **base))
    assert float(learning_rate(wsd, jnp.int32(150))) == pytest.approx(0.5)
    assert float(learning_rate(wsd, jnp.int32(175))) == pytest.approx(0.5 * (0.2 + 0.8 * 0.5))
    constant = Hyper.of(TrainConfig(schedule="constant", **base))
    assert float(learning_rate(constant, jnp.int32(199))) == pytest.approx(0.5)


@pytest.mark.slow
def test_training_approaches_the_entropy_rate(tiny, tokenizer, language, mesh):
    """The loss cannot go below the language's entropy rate, and comes near it."""
    rows = pack(language.sample(1, 0, 3000), 32, tokenizer.bos, tokenizer.pad)
    trained = train(
        transformer(tiny, tokenizer, mesh),
        rows,
        config=TrainConfig(steps=300, batch=32, learning_rate=1e-2),
        quiet=True,
    )
    assert language.entropy_rate - 0.1 < trained.summary["loss"] < language.entropy_rate + 0.25


def test_three_rounds_with_other_settings_compile_each_program_once(tiny, tokenizer, rows, mesh):
    # No other test has these shapes: what one in the same process traced would not be traced, and counted, again.
    config = tiny.model_copy(update={"max_length": 31, "d_ff": 88})
    model = transformer(config, tokenizer, mesh)
    before = TRACES.copy()
    for k, (steps, rate, temperature, schedule) in enumerate(
        [(3, 1e-3, 1.0, "cosine"), (5, 3e-3, 0.7, "wsd"), (4, 2e-3, 1.3, "constant")]
    ):
        settings = TrainConfig(
            steps=steps, learning_rate=rate, batch=8, schedule=schedule, weight_decay=0.01 * k, length=31
        )
        model = train(model, rows, config=settings, seed=k, quiet=True).model
        generate(model, unconditional(8), SamplingConfig(temperature=temperature, batch=8, max_tokens=4), seed=k)
    traced = TRACES - before
    training, engine = ("init", "start", "step"), ("empty", "prefill", "insert", "generate")
    assert traced == {**{f"train_{name}": 1 for name in training}, **dict.fromkeys(engine, 1)}, traced


def test_nan_stops_with_the_last_good_checkpoint(tiny, tokenizer, rows, mesh, tmp_path):
    config = TrainConfig(steps=50, batch=8, learning_rate=1e-4, warmup=0.5, checkpoint_every=2)
    with pytest.raises(TrainingDiverged) as error:
        train(transformer(tiny, tokenizer, mesh), rows, Exploding(), config, directory=tmp_path, quiet=True)
    text = str(error.value)
    assert "became" in text and "the last good checkpoint is step" in text and "learning_rate" in text
    assert error.value.exit_code == 1
    steps = sorted(int(p.name) for p in (tmp_path / "resume").iterdir() if p.name.isdigit())
    logged = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert steps and all(np.isfinite(r["loss"]) for r in logged)


def test_resumed_training_has_the_same_bits(tiny, tokenizer, rows, mesh, tmp_path):
    model = transformer(tiny, tokenizer, mesh)
    config = TrainConfig(steps=12, batch=8, checkpoint_every=5, log_every=1, tensorboard=False)
    whole = train(model, rows, config=config, seed=1, directory=tmp_path / "whole", quiet=True)
    signals._requested.set()
    try:
        with pytest.raises(Preempted, match="saved at step 1"):
            train(model, rows, config=config, seed=1, directory=tmp_path / "cut", quiet=True)
    finally:
        signals.clear()
    resumed = train(model, rows, config=config, seed=1, directory=tmp_path / "cut", quiet=True)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), whole.model.params, resumed.model.params))
    assert whole.summary == resumed.summary
    logs = [
        [(r["step"], r["loss"]) for r in map(json.loads, (tmp_path / n / "train.jsonl").read_text().splitlines())]
        for n in ("whole", "cut")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 12


def test_the_input_model_stays_as_it_was(tiny, tokenizer, rows, mesh):
    model = transformer(tiny, tokenizer, mesh).initialized(0)
    before = jax.tree.map(np.array, model.params)
    train(model, rows, config=TrainConfig(steps=2, batch=8), quiet=True)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), before, model.params))


def test_indivisible_batch_is_refused(tiny, tokenizer, rows, mesh):
    with pytest.raises(InputError, match="batch=7 is not divisible by 2"):
        train(transformer(tiny, tokenizer, mesh), rows, config=TrainConfig(steps=1, batch=7, accumulate=2), quiet=True)


def test_truncated_loss_leaves_out_what_the_model_is_sure_of():
    """arXiv:2509.08972: cross-entropy over the tokens with p at most the threshold, and no gradient from the others."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (2, 5, 7)), jnp.float32)
    drawn = rng.integers(0, 7, (2, 6))
    drawn[0, 1:] = np.asarray(logits[0]).argmax(-1)  # tokens the model is sure of, beside random ones it is not
    tokens = jnp.asarray(drawn)
    batch = {"tokens": tokens, "segments": jnp.ones((2, 6), jnp.int32)}
    apply = lambda params, inputs, segments: params
    p = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(tokens)[:, 1:, None], 2)[..., 0]
    kept = p < 0.5
    assert 0 < kept.sum() < kept.size
    loss, count = sum_and_count(Causal(truncate=0.5), apply, logits, batch)
    assert float(count) == kept.sum() and float(loss) == pytest.approx(-np.log(p[kept]).sum(), rel=1e-5)
    gradient = np.asarray(jax.grad(lambda x: sum_and_count(Causal(truncate=0.5), apply, x, batch)[0])(logits))
    assert (np.abs(gradient[~kept]).max() == 0) and (np.abs(gradient[kept]).max(axis=-1) > 0).all()
    whole = sum_and_count(causal, apply, logits, batch)
    assert float(sum_and_count(Causal(truncate=1.0 - 1e-9), apply, logits, batch)[0]) == pytest.approx(
        float(whole[0]), rel=1e-5
    )


def test_a_weight_of_rows_is_their_weight_in_the_loss():
    """w times the loss of one set plus 1 - w times that of the other, over the weighted count (arXiv:2502.18049)."""
    rng = np.random.default_rng(0)
    real, written = (real_rows([rng.integers(3, 7, 5) for _ in range(4)], ["x"] * 4, prefix=p) for p in "rs")
    logits_V = jnp.asarray(rng.normal(0, 1, 7), jnp.float32)
    apply = lambda params, inputs, segments: jnp.broadcast_to(params, (*inputs.shape, 7))
    tokenizer = SimpleNamespace(bos=1, pad=0)

    def loss(data):
        rows = pack_tokens(data, 11, tokenizer)
        batch = {"tokens": rows.columns["tokens"], "segments": rows.columns["segments"]}
        batch |= {} if "loss" not in rows.columns else {"loss": rows.columns["loss"]}
        return np.array(sum_and_count(causal, apply, logits_V, jax.tree.map(jnp.asarray, batch)))

    weigh = lambda data, w: data.with_column("weight", [w] * len(data))
    both = loss(weigh(real, 0.7) + weigh(written, 0.3))
    np.testing.assert_allclose(both, 0.7 * loss(real) + 0.3 * loss(written), rtol=1e-5)
    assert both[1] == pytest.approx(20.0)
