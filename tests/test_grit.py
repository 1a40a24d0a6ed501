"""GRIT: GradCache over two kinds of rows, batches of one source, instructions that are read and not pooled, exact
retrieval, and documents whose memory is kept."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.collapse.retrieval import embed_texts, evaluate_retrieval, nearest, retrieval_metrics
from recursive_jax.config import MeshConfig, ModelConfig
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.request import Request
from recursive_jax.mesh import TRACES, make_mesh
from recursive_jax.models.model import transformer
from recursive_jax.objectives import Grit, info_nce
from tests.test_objectives import close_sums, gradient


@pytest.fixture(scope="module")
def words():
    rng = np.random.default_rng(1)
    return ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(40)]


@pytest.fixture(scope="module")
def rows(words):
    """Words find their mirror image; and texts to go on writing."""
    pairs = [{"query": ["mirror", w], "positive": w[::-1], "source": "ab"[i % 2]} for i, w in enumerate(words)]
    return [*pairs, *({"text": f"{w} is a word"} for w in words[:16])]


@pytest.fixture(scope="module")
def model(mesh):
    config = ModelConfig(layers=2, d_model=32, heads=4, kv_heads=2, d_ff=64, max_length=64)
    return transformer(config, ByteTokenizer(), mesh).initialized(2)


def batch_of(objective, model, rows, size=8):
    batches = objective.pack(objective.rows(rows, model.tokenizer), model, 48)
    batches.begin(size, 0)
    return batches.next(0), batches


def test_the_gradient_is_the_whole_batchs_in_any_micro_batches(model, rows):
    """Both kinds of rows; with half as many written ones."""
    objective = Grit(temperature=0.2, dimensions=(8,), generative_batch=4)
    batch, _ = batch_of(objective, model, rows)
    assert len(batch["write/tokens"]) == 4 and len(batch["embed/tokens"]) == 8
    whole = gradient(objective, model, batch)
    for n in (2, 4):
        micro = gradient(objective, model, batch, accumulate=n)
        close_sums(whole[1], micro[1])
        for name in ("rep", "gen"):
            assert float(micro[0].terms[name].sum) == pytest.approx(float(whole[0].terms[name].sum), rel=1e-5)


def test_the_loss_by_hand(model, rows):
    """From the model's own states: read both ways, the mean over what stands behind the frame, InfoNCE at two
    widths."""
    objective = Grit(temperature=0.2, dimensions=(8,))
    batch, _ = batch_of(objective, model, rows)
    vectors = []
    for g in range(2):
        tokens, segments = (jnp.asarray(batch[f"embed/{k}"][:, g]) for k in ("tokens", "segments"))
        with jax.set_mesh(model.mesh):
            states = np.asarray(model.network.apply(model.params, tokens, segments, hidden=True, causal=False))
        pool = batch["embed/pool"][:, g].astype(float)
        vectors.append((states * pool[..., None]).sum(1) / pool.sum(1, keepdims=True))
    wanted = 0.0
    for size in (32, 8):
        q, p = (v[:, :size] / np.linalg.norm(v[:, :size], axis=1, keepdims=True) for v in vectors)
        wanted += float(info_nce(q, p, temperature=0.2, positives_Q=jnp.arange(8)).mean()) / 2
    loss = gradient(objective, model, batch)[0]
    assert float(loss.terms["rep"].sum) / 8 == pytest.approx(wanted, rel=1e-4)
    text = bytes(int(t) for t in batch["embed/tokens"][0, 0] if t < 256).decode()
    pooled = bytes(int(t) for t in batch["embed/tokens"][0, 0][batch["embed/pool"][0, 0] > 0]).decode()
    assert text.startswith("<|user|>\nmirror\n<|embed|>\n") and text.endswith(pooled) and len(pooled) == 4


def test_batches_have_one_source_and_go_on_where_they_were(model, rows, words):
    _, batches = batch_of(Grit(), model, rows)
    other = Grit().pack(Grit().rows(rows, model.tokenizer), model, 48)
    other.begin(8, 0)
    sources = set()
    for step in range(6):
        batch = batches.next(step)
        texts = [bytes(int(t) for t in row if t < 256).decode() for row in batch["embed/tokens"][:, 0]]
        found = {"ab"[words.index(t[-4:]) % 2] for t in texts}
        assert len(found) == 1
        sources |= found
        assert all(np.array_equal(batch[k], v) for k, v in other.next(step).items())
    assert sources == {"a", "b"}


@pytest.mark.slow
def test_training_finds_mirrors_and_stays_one_device_on_eight(model, rows, words):
    run = {"steps": 60, "batch": 8, "learning_rate": 5e-3, "length": 48, "quiet": True}
    trained = rj.train(model, rows, Grit(), **run)
    before, after = (
        evaluate_retrieval(m, words, [w[::-1] for w in words], range(40), instruction="mirror")["mrr"]
        for m in (model, trained.model)
    )
    assert after > before + 0.2
    wide = model.on(make_mesh(MeshConfig(data=4, tensor=2)))
    losses = [rj.train(m, rows, Grit(), **{**run, "steps": 3}).summary["loss"] for m in (model, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_an_index_is_exact_and_metrics_are_their_definitions():
    rng = np.random.default_rng(0)
    queries, passages = rng.normal(size=(5, 8)), rng.normal(size=(30, 8))
    numbers, products = nearest(queries, passages, 4)
    wanted = np.argsort(-(queries @ passages.T), axis=1)[:, :4]
    np.testing.assert_array_equal(numbers, wanted)
    np.testing.assert_allclose(products, np.take_along_axis(queries @ passages.T, wanted, 1), rtol=1e-5)
    found = retrieval_metrics([[3, 1, 2], [0, 1, 2], [5, 6, 7]], [1, [0, 2], 9], k=3)
    assert found["mrr"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert found["recall_1"] == pytest.approx((0 + 0.5 + 0) / 3) and found["recall_3"] == pytest.approx(2 / 3)
    ideal = 1 + 1 / np.log2(3)
    assert found["ndcg_3"] == pytest.approx((1 / np.log2(3) + (1 + 0.5) / ideal) / 3)
    with pytest.raises(InputError, match="no passages"):
        nearest(queries, passages[:0])


def test_rows_that_grit_cannot_learn_from(model):
    with pytest.raises(InputError, match="`query` and `positive`"):
        rj.train(model, ["only text"], Grit(), steps=1, quiet=True)
    with pytest.raises(InputError, match="leaves nothing"):
        rj.train(model, [{"query": "a", "positive": "b"}] * 8, Grit(), steps=1, batch=8, length=8, quiet=True)
    with pytest.raises(InputError, match="pair 1 has no 'negative'"):
        Grit().rows(
            [{"query": "a", "positive": "b", "negative": "c"}, {"query": "a", "positive": "b"}], model.tokenizer
        )
    with pytest.raises(InputError, match="rows would stand in it twice"):
        rj.train(model, [{"query": "a", "positive": "b"}] * 4, Grit(), steps=1, batch=8, length=48, quiet=True)
    both = Grit().rows(iter([{"query": "a", "positive": "b"}, "a text"]), model.tokenizer)
    assert len(both) == 2
    wide = model.on(make_mesh(MeshConfig(data=8)))
    with pytest.raises(InputError, match="write=4 is not divisible by 8"):
        rows = [*({"query": f"q{n}", "positive": "b"} for n in range(8)), "a text"]
        rj.train(wide, rows, Grit(generative_batch=4), steps=1, batch=8, length=48, quiet=True)


# Documents whose memory is kept.


def prefix_lm(model, ids, both, count):
    """Greedy tokens after a prompt whose first `both` tokens see each other, one whole pass for each."""
    ids = list(ids)
    run = prefix_program(model.network)
    for _ in range(count):
        row = np.zeros((1, 64), np.int32)  # what stands behind is not seen
        row[0, : len(ids)] = ids
        with jax.set_mesh(model.mesh):
            logits = run(model.params, row, np.array([both], np.int32))
        ids.append(int(np.argmax(np.asarray(logits)[0, len(ids) - 1, :256])))
    return ids[-count:]


@functools.cache
def prefix_program(network):
    return jax.jit(lambda params, row, both: network.apply(params, row, None, prefix_B=both))


def test_a_kept_document_is_a_prefix_pass_token_by_token(model):
    """And is read once for all that ask about it; two documents, and a prompt without one, in one call."""
    tokenizer = model.tokenizer
    documents = [tokenizer.encode("the cat sat on the mat"), tokenizer.encode("a dog ran")]
    asked = [Request(i, np.array([*documents[i % 2], *tokenizer.encode(f" q{i}")]), both_ways=1 + len(documents[i % 2]))
             for i in range(6)]  # fmt: skip
    plain = Request(6, np.asarray(tokenizer.encode("the cat sat on the mat q0")))
    settings = {"temperature": 0.0, "max_tokens": 5, "batch": 4, "stop_tokens": []}
    before = TRACES["document"]
    rows = rj.generate(model, [*asked, plain], settings)
    assert TRACES["document"] - before <= 2
    for request, tokens in zip(asked, rows.tokens(), strict=False):
        wanted = prefix_lm(model, request.tokens(tokenizer.bos), request.both_ways, 5)
        length = len(tokens)
        assert tokens.tolist()[: length - 1] == wanted[: length - 1]
    both, one = (np.array(rows.lists("logprobs")[n]) for n in (0, 6))
    assert not np.allclose(both[:1], one[:1], atol=1e-4)  # read both ways it is another text
    with pytest.raises(InputError, match="both_ways=3"):
        rj.generate(model, [Request(0, np.array([1, 2]), both_ways=3)], settings)


def test_instructions_are_read_and_not_pooled(model):
    bare, told = (embed_texts(model, ["abcd"], instruction=i)[0] for i in ("", "mirror"))
    assert not np.allclose(bare, told, atol=1e-3)
    assert np.linalg.norm(told) == pytest.approx(1.0, rel=1e-5)
    causal = rj.embed(model, ["abcd"])[0]
    assert not np.allclose(bare, causal, atol=1e-3)


@pytest.mark.parity
def test_embeddings_are_gritlms_states(model, tmp_path):
    """transformers' Llama with `is_causal=False`, as gritlm 1.0.2 runs it: the mean state behind the instruction."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = rj.save_huggingface(dataclasses.replace(model), tmp_path / "hf")
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    from recursive_jax.objectives.grit import framed

    ids, before = framed("abcd", "mirror", model.tokenizer)
    with torch.no_grad():
        states = theirs(torch.tensor([ids]), is_causal=False).last_hidden_state[0, before:].mean(0).numpy()
    np.testing.assert_allclose(embed_texts(model, ["abcd"], "mirror")[0], states / np.linalg.norm(states), atol=2e-5)
