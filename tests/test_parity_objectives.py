"""Objectives beside transformers and trl on torch, on the same weights and the same tokens (extra [parity])."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from recursive_jax import load_model, objectives  # noqa: E402
from recursive_jax.objectives import DPO, Causal, Masked  # noqa: E402
from recursive_jax.objectives.base import Context, Params  # noqa: E402
from recursive_jax.objectives.masked import masked_loss  # noqa: E402
from tests.helpers import loss_of  # noqa: E402
from tests.test_families import FOLDER  # noqa: E402

pytestmark = pytest.mark.parity


def embedding_gradient(model):
    return model.get_input_embeddings().weight.grad.numpy()


def close(found, wanted, digits=1e-6):
    """Six digits of the largest value: float32 sums in two orders."""
    np.testing.assert_allclose(
        np.asarray(found), wanted, atol=digits * max(1.0, np.abs(wanted).max()) * 5, rtol=20 * digits
    )


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_masked_language_modelling_is_that_of_transformers(name, mesh):
    """Loss of given masks, and the gradient of the embedding, which is input and output matrix at once."""
    oracle = transformers.AutoModelForMaskedLM.from_pretrained(FOLDER / name, dtype=torch.float32).eval()
    model = load_model(FOLDER / name, mesh)
    rng = np.random.default_rng(0)
    vocab = model.vocab
    tokens = rng.integers(5, vocab, (3, 12))
    inputs, chosen = tokens.copy(), rng.random((3, 12)) < 0.3
    inputs[chosen] = 4
    labels = np.where(chosen, tokens, -100)
    out = oracle(
        input_ids=torch.tensor(inputs), attention_mask=torch.ones(3, 12, dtype=torch.long), labels=torch.tensor(labels)
    )
    out.loss.backward()

    def value(params):
        ctx = Context(
            lambda p, *x, **kw: model.network.apply(p.model, *x, **kw), {}, jax.random.key(0), jnp.int32(0), None
        )
        segments = jnp.ones((3, 12), jnp.int32)
        loss = masked_loss(
            ctx, Params(params, {}), jnp.asarray(inputs), segments, jnp.asarray(tokens), jnp.asarray(chosen)
        )
        (term,) = loss.terms.values()
        return term.sum / term.count, loss.metrics["masked_accuracy"]

    with jax.set_mesh(mesh):
        (loss, (right, count)), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    assert float(loss) == pytest.approx(float(out.loss), rel=2e-6) and int(count) == chosen.sum()
    guessed = out.logits.argmax(-1).numpy()
    assert int(right) == (guessed == tokens)[chosen].sum()
    close(gradient["embedding"][:vocab], embedding_gradient(oracle))


def test_masks_are_drawn_as_transformers_draws_them():
    """The shares of the collator, counted on as many tokens as ours: within four standard errors of their
    difference."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(5, 100, (100, 200))
    tokens[:, 0], tokens[:, -1] = 2, 3
    collate = transformers.DataCollatorForLanguageModeling(fast, mlm=True, mlm_probability=0.15)
    theirs = collate([{"input_ids": row.tolist()} for row in tokens])
    from recursive_jax.data.tokenizers import FileTokenizer
    from recursive_jax.objectives import mask_tokens

    ours_tokenizer = FileTokenizer(inner)
    assert ours_tokenizer.mask == 4
    objective = Masked(mask_id=4, special=(0, 1, 2, 3, 4), vocab=100)
    special = np.isin(tokens, objective.special)
    inputs, chosen = mask_tokens(jax.random.key(0), jnp.asarray(tokens), jnp.asarray(special), mask_id=4, vocab=100)
    inputs, chosen = np.asarray(inputs), np.asarray(chosen)

    def shares(inputs, chosen):
        return np.array([chosen.mean(), (inputs[chosen] == 4).mean(), (inputs[chosen] == tokens[chosen]).mean()])

    other_chosen = theirs["labels"].numpy() != -100
    a, b = shares(inputs, chosen), shares(theirs["input_ids"].numpy(), other_chosen)
    n = np.array([tokens.size, chosen.sum(), chosen.sum()])
    assert (np.abs(a - b) < 4 * np.sqrt(2 * a * (1 - a) / n)).all(), (a, b)
    assert not (chosen & special).any() and not other_chosen[:, 0].any()


def test_causal_loss_and_gradient_are_those_of_transformers(mesh):
    oracle = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32).eval()
    model = load_model(FOLDER / "llama", mesh)
    tokens = np.random.default_rng(1).integers(3, model.vocab, (2, 10))
    labels = tokens.copy()
    labels[:, :4] = -100  # a prompt
    loss = oracle(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss
    loss.backward()
    batch = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "segments": jnp.ones((2, 10), jnp.int32),
        "loss": jnp.asarray(labels >= 0),
    }

    def value(params):
        (term,) = loss_of(Causal(), model.network.apply, params, batch).terms.values()
        return term.sum / term.count

    with jax.set_mesh(mesh):
        found, gradient = jax.jit(jax.value_and_grad(value))(model.params)
    assert float(found) == pytest.approx(float(loss), rel=2e-6)
    close(gradient["embedding"][: model.vocab], embedding_gradient(oracle))


ALL = [("sigmoid",), ("hinge",), ("ipo",), ("exo_pair",), ("nca_pair",), ("robust",), ("bco_pair",), ("sppo_hard",),
       ("aot",), ("aot_unpaired",), ("apo_zero",), ("apo_down",), ("discopop",), ("sigmoid_norm",), ("sft",),
       ("sigmoid", "sft", "bco_pair")]  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


@pytest.mark.parametrize(("kinds", "ld_alpha"), [*((kinds, None) for kinds in ALL), (("sigmoid",), 0.4)], ids=str)
def test_dpo_is_that_of_trl(kinds, ld_alpha, mesh, tmp_path):
    """The trainer's own loss, on its own model and frozen reference: value, gradient, rewards and margin."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tokenizers

    policy = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    reference.save_pretrained(tmp_path / "reference")
    words = {f"w{i}": i for i in range(policy.config.vocab_size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", eos_token="w2", bos_token="w1"
    )
    rows = datasets.Dataset.from_dict({"prompt": ["w5 w6"], "chosen": [" w7"], "rejected": [" w8"]})
    smoothing, weights = 0.1 if kinds[0] in SMOOTHED else 0.0, (0.7, 2.0, 0.3)[: len(kinds)]
    settings = trl.DPOConfig(
        str(tmp_path / "out"),
        beta=0.3,
        loss_type=list(kinds),
        loss_weights=list(weights),
        label_smoothing=smoothing,
        ld_alpha=ld_alpha,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
    )
    trainer = trl.DPOTrainer(policy, reference, settings, train_dataset=rows, processing_class=tokenizer)
    rng = np.random.default_rng(2)
    B, T, start = 3, 11, 4
    tokens = rng.integers(3, policy.config.vocab_size, (2, B, T))
    tokens[:, :, :start] = tokens[0, :, :start]  # one prompt for both answers
    lengths = rng.integers(start + 2, T + 1, (2, B))
    valid = np.arange(T) < lengths[..., None]
    learnt = valid & (np.arange(T) >= start)
    flat = lambda x: torch.tensor(x.reshape(2 * B, T))
    inputs = {
        "input_ids": flat(np.where(valid, tokens, 0)),
        "attention_mask": flat(valid.astype(np.int64)),
        "completion_mask": flat(learnt.astype(np.int64)),
    }
    trainer.model.train()
    wanted = trainer.compute_loss(trainer.model, inputs)
    wanted.backward()
    logged = {k: float(np.mean(v)) for k, v in trainer._metrics["train"].items()}

    model, frozen = load_model(FOLDER / "llama", mesh), load_model(tmp_path / "reference", mesh)
    stack = lambda x, dtype: jnp.asarray(np.stack([x[0], x[1]], axis=1), dtype)
    batch = {
        "tokens": stack(np.where(valid, tokens, 0), jnp.int32),
        "segments": stack(valid, jnp.int32),
        "loss": stack(learnt, bool),
    }
    more = {"label_smoothing": smoothing, "ld_alpha": ld_alpha, "reference_in_step": True}
    objective = DPO(beta=0.3, loss_type=kinds, loss_weights=weights, **more)
    others = {"reference": lambda _, *x, **kw: frozen.network.apply(frozen.params, *x, **kw)}

    def value(params):
        loss = loss_of(objective, model.network.apply, params, batch, others)
        return sum(term.weight * term.sum / term.count for term in loss.terms.values()), loss.metrics

    with jax.set_mesh(mesh):
        (found, metrics), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    assert float(found) == pytest.approx(float(wanted), rel=2e-6, abs=1e-6)
    digits = 2e-5 if "discopop" in kinds else 1e-6  # it divides log-ratios by 0.05: their rounding grows twentyfold
    close(gradient["embedding"][: model.vocab], embedding_gradient(trainer.model), digits)
    for ours, theirs in (
        ("rewards/chosen", "rewards/chosen"),
        ("rewards/rejected", "rewards/rejected"),
        ("rewards/margin", "rewards/margins"),
        ("rewards/accuracy", "rewards/accuracies"),
    ):
        total, count = metrics[ours]
        assert float(total / count) == pytest.approx(logged[theirs], rel=2e-5, abs=2e-5), ours


def test_odds_and_margins_are_those_of_trl():
    """ORPO's and SimPO's losses as trl's trainers compute them, with their gradients."""
    pytest.importorskip("trl")
    from types import SimpleNamespace

    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    cpu = SimpleNamespace(device="cpu")
    given = -np.random.default_rng(0).uniform(0.05, 4, (2, 9)).astype(np.float32)
    leaves = lambda: [torch.tensor(x, requires_grad=True) for x in given]
    orpo = SimpleNamespace(beta=1.0, accelerator=cpu)
    simpo = SimpleNamespace(
        beta=2.0, simpo_gamma=0.7, alpha=0.0, loss_type="simpo", label_smoothing=0.1, accelerator=cpu
    )
    ours_simpo = lambda a, b: objectives.simpo_loss(a, b, beta=2.0, gamma=0.7, label_smoothing=0.1)
    for ours, call, sign in (
        (objectives.orpo_loss, lambda a, b: ORPOTrainer.odds_ratio_loss(orpo, a, b)[0], -1.0),
        (ours_simpo, lambda a, b: CPOTrainer.cpo_loss(simpo, a, b)[0], 1.0),
    ):
        chosen, rejected = leaves()
        wanted = sign * call(chosen, rejected)
        wanted.sum().backward()
        np.testing.assert_allclose(ours(*given), wanted.detach().numpy(), rtol=2e-5, atol=1e-6)
        gradients = jax.grad(lambda a, b, ours=ours: jnp.sum(ours(a, b)), argnums=(0, 1))(*map(jnp.asarray, given))
        for mine, theirs in zip(gradients, (chosen, rejected), strict=True):
            np.testing.assert_allclose(mine, theirs.grad.numpy(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto_is_that_of_trl(kind, mesh, tmp_path):
    """The trainer's own loss, on its own model and frozen reference: value, gradient, divergence and rewards."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tokenizers

    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32) for _ in range(2)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.02 * torch.randn_like(p))
    reference.save_pretrained(tmp_path / "reference")
    words = {f"w{i}": i for i in range(policy.config.vocab_size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", eos_token="w2", bos_token="w1"
    )
    rows = datasets.Dataset.from_dict({"prompt": ["w5 w6"] * 2, "completion": [" w7", " w8"], "label": [True, False]})
    settings = trl.KTOConfig(
        str(tmp_path / "out"), beta=0.3, loss_type=kind, desirable_weight=1.3, undesirable_weight=0.6, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=2, disable_dropout=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = trl.KTOTrainer(policy, reference, settings, train_dataset=rows, processing_class=tokenizer)
    rng = np.random.default_rng(2)
    B, T, start = 4, 11, 4
    tokens = rng.integers(3, policy.config.vocab_size, (2, B, T))  # the answers, and others to the same prompts
    tokens[:, :, :start] = tokens[0, :, :start]
    lengths = rng.integers(start + 2, T + 1, (2, B))
    valid = np.arange(T) < lengths[..., None]
    learnt = valid & (np.arange(T) >= start)
    label = np.array([True, False, True, True])
    inputs = {"label": torch.tensor(label)}
    for g, before in enumerate(("", "KL_")):
        inputs |= {
            f"{before}input_ids": torch.tensor(np.where(valid, tokens, 0)[g]),
            f"{before}attention_mask": torch.tensor(valid[g].astype(np.int64)),
            f"{before}completion_mask": torch.tensor(learnt[g].astype(np.int64)),
        }
    trainer.model.train()
    wanted = trainer._compute_loss(trainer.model, inputs, False)
    wanted.backward()
    model, frozen = load_model(FOLDER / "llama", mesh), load_model(tmp_path / "reference", mesh)
    stack = lambda x, dtype: jnp.asarray(np.stack([x[0], x[1]], axis=1), dtype)
    batch = {
        "tokens": stack(np.where(valid, tokens, 0), jnp.int32), "segments": stack(valid, jnp.int32),
        "loss": stack(learnt, bool), "label": jnp.asarray(label, jnp.float32),
    }  # fmt: skip
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    objective = objectives.KTO(beta=0.3, loss_type=kind, reference_in_step=True, **weights)
    others = {"reference": lambda _, *x, **kw: frozen.network.apply(frozen.params, *x, **kw)}

    def value(params):
        loss = loss_of(objective, model.network.apply, params, batch, others)
        return loss.terms["kto"].sum / loss.terms["kto"].count, loss.metrics

    with jax.set_mesh(mesh):
        (found, metrics), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    assert float(found) == pytest.approx(float(wanted), rel=2e-6, abs=1e-6)
    close(gradient["embedding"][: model.vocab], embedding_gradient(trainer.model))
    if kind == "kto":
        (kl,) = trainer._metrics["train"]["kl"]
        assert float(metrics["kl"][0] / metrics["kl"][1]) == pytest.approx(kl, rel=2e-5, abs=2e-5)


def test_rewards_and_divergences_are_those_of_trl():
    """RewardTrainer's loss with margin and centring, GKDTrainer's generalised Jensen-Shannon divergence: values and
    gradients."""
    from collections import defaultdict
    from types import SimpleNamespace

    pytest.importorskip("trl")
    from trl import RewardTrainer
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(size=(3, 5)).astype(np.float32)
    same = lambda x: x
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=0.1),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same), _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    scores = torch.tensor(np.concatenate([chosen, rejected])[:, None], requires_grad=True)
    given = {"margin": torch.tensor(margin), "attention_mask": torch.ones(10, 1)}
    wanted = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), given)
    wanted.backward()
    ours = lambda c, r: jnp.mean(objectives.pairwise_reward(c, r, margin, centering=0.1))
    assert float(ours(chosen, rejected)) == pytest.approx(float(wanted), rel=2e-6)
    gradients = np.concatenate(jax.grad(ours, argnums=(0, 1))(chosen, rejected))
    np.testing.assert_allclose(gradients, scores.grad.numpy()[:, 0], rtol=2e-5, atol=1e-7)

    student, teacher = rng.normal(size=(2, 3, 6, 11)).astype(np.float32)
    mask = (np.arange(6) < np.array([[6], [2], [4]])).astype(np.float32)
    for beta in (0.0, 0.3, 1.0):
        logits = torch.tensor(student, requires_grad=True)
        labels = torch.tensor(np.where(mask > 0, 1, -100))
        wanted = GKDTrainer.generalized_jsd_loss(logits, torch.tensor(teacher), labels, beta=beta, temperature=0.9)
        wanted.backward()
        ours = lambda x: objectives.generalized_jsd(x, teacher, mask, beta=beta, temperature=0.9)  # noqa: B023
        assert float(ours(student)) == pytest.approx(float(wanted), rel=2e-5)
        np.testing.assert_allclose(jax.grad(ours)(jnp.asarray(student)), logits.grad.numpy(), rtol=2e-4, atol=1e-6)


def test_what_a_layer_attends_to_is_what_transformers_says(mesh):
    """Attention by heads and the states after every layer, which distillation compares."""
    from recursive_jax.models.read import attention_logprobs

    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER / "llama", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.random.default_rng(0).integers(3, oracle.config.vocab_size, (8, 9)).astype(np.int32)
    wanted = oracle(torch.tensor(tokens), output_attentions=True, output_hidden_states=True)
    model = load_model(FOLDER / "llama", mesh)
    with jax.set_mesh(mesh):
        _, taps = model.network.apply(model.params, jnp.asarray(tokens), jnp.ones_like(tokens), taps=True)
        for layer, tap in enumerate(taps):
            found = attention_logprobs(model.network.config, layer, tap, jnp.ones_like(tokens))
            np.testing.assert_allclose(jnp.exp(found), wanted.attentions[layer].detach().numpy(), atol=2e-6)
            if layer < len(taps) - 1:  # transformers' last states are behind the final norm
                np.testing.assert_allclose(tap.states_BTD, wanted.hidden_states[layer + 1].detach().numpy(), atol=2e-5)


GRPO = [({"loss_type": kind}, {}) for kind in ("grpo", "bnpo", "dr_grpo", "dapo")]
GRPO += [
    ({"loss_type": "cispo", "epsilon_high": 1.2}, {}),
    ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"loss_type": "gspo"}),
    ({"loss_type": "dapo", "delta": 1.1, "epsilon": 0.1, "epsilon_high": 0.3}, {}),
    ({"loss_type": "grpo", "beta": 0.3}, {}),
    ({"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False}, {}),
]


@pytest.mark.parametrize(("settings", "ours"), GRPO, ids=str)
def test_policy_losses_are_those_of_trl(settings, ours, mesh, tmp_path):
    """GRPOTrainer's own loss on its own model: value, gradient, clipped share and divergence."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tokenizers

    policy = transformers.AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32)
    words = {f"w{i}": i for i in range(policy.config.vocab_size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", eos_token="w2", bos_token="w1"
    )
    rng = np.random.default_rng(3)
    B, before, T = 4, 4, 7
    config = trl.GRPOConfig(
        str(tmp_path / "out"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=B, num_generations=2, max_completion_length=T, steps_per_generation=1,
        **settings,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": ["w5 w6"] * B})
    trainer = trl.GRPOTrainer(policy, lambda **k: [0.0] * B, config, train_dataset=rows, processing_class=tokenizer)
    prompt = rng.integers(3, policy.config.vocab_size, (B, before))
    answer = rng.integers(3, policy.config.vocab_size, (B, T))
    lengths = np.array([T, 3, 5, 1])
    mask = (np.arange(T) < lengths[:, None]).astype(np.int64)
    with torch.no_grad():
        logits = policy(torch.tensor(np.concatenate([prompt, answer], 1))).logits[:, before - 1 : -1]
        now = torch.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[..., None])[..., 0].numpy()
    old, reference = (now + 0.3 * rng.normal(size=now.shape)).astype(np.float32), (now - 0.2).astype(np.float32)
    advantages = np.array([1.0, -0.5, 0.7, -1.2], np.float32)
    inputs = {
        "prompt_ids": torch.tensor(prompt), "prompt_mask": torch.ones(B, before, dtype=torch.long),
        "completion_ids": torch.tensor(answer), "completion_mask": torch.tensor(mask),
        "advantages": torch.tensor(advantages), "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(reference), "num_items_in_batch": torch.tensor(float(mask.sum())),
    }  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    wanted = trainer._compute_loss(trainer.model, inputs)
    wanted.backward()

    model = load_model(FOLDER / "llama", mesh)
    width = before + T
    place = lambda x: np.concatenate([np.zeros((B, before), np.float32), x * mask], 1)[:, None].astype(np.float32)
    valid = np.arange(width) < before + lengths[:, None]
    batch = {
        "tokens": jnp.asarray(np.where(valid, np.concatenate([prompt, answer], 1), 0)[:, None], jnp.int32),
        "segments": jnp.asarray(valid[:, None], jnp.int32),
        "loss": jnp.asarray((valid & (np.arange(width) >= before))[:, None]),
        "old": place(old), "reference": place(reference), "advantage": advantages,
    }  # fmt: skip
    objective = objectives.PolicyGradient(max_length=T, **{**settings, **ours})

    def value(params):
        loss = loss_of(objective, model.network.apply, params, batch, {})
        return loss.terms["policy"].sum / loss.terms["policy"].count, loss.metrics

    with jax.set_mesh(mesh):
        (found, metrics), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    assert float(found) == pytest.approx(float(wanted), rel=2e-5, abs=2e-6)
    close(gradient["embedding"][: model.vocab], embedding_gradient(trainer.model))
    logged = {k: float(np.mean(v)) for k, v in trainer._metrics["train"].items()}
    # What is logged is the same but where trl logs something else: shares of rows, ratios that delta has bounded, the
    # divergence times the ratio.
    names = {"entropy": "entropy"}
    if settings.get("importance_sampling_level") != "sequence" and "delta" not in settings:
        names["clip_ratio"] = "cispo_clip_ratio" if settings["loss_type"] == "cispo" else "clip_ratio/region_mean"
    if not settings.get("use_bias_correction_kl", True):
        names["kl"] = "kl"
    for mine, theirs in names.items():
        total, count = metrics[mine]
        assert float(total / count) == pytest.approx(logged[theirs], rel=1e-4, abs=1e-5), mine
