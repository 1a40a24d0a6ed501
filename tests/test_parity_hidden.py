"""Models that fill gaps, beside transformers: one checkpoint with two readings, masks that its pipeline fills,
continued pre-training of its encoders, pseudo-log-likelihoods, and its collator's statistics."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.config import MeshConfig, ModelConfig
from recursive_jax.data.tokenizers import FileTokenizer
from recursive_jax.mesh import make_mesh
from recursive_jax.models.hidden import own_logits
from recursive_jax.models.model import transformer
from recursive_jax.objectives import Hybrid, Masked, mask_tokens

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["the cat sat on the mat", "the dog ran to the cat", "a cat and a dog sat"] * 8
BERT = dict(
    causal=False, block="post", norm="layer", norm_eps=1e-12, final_norm=False, embedding_norm=True, position="learned",
    token_types=2, head="transform", head_bias=True, bias=True, gated=False, activation="gelu",
)  # fmt: skip


@pytest.fixture(scope="module")
def words():
    return FileTokenizer.train_bpe(TEXTS, 290)


def trained(objective, tokenizer, **switches):
    config = ModelConfig(layers=2, d_model=32, heads=4, d_ff=64, max_length=32, **switches)
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    model = transformer(config, tokenizer, one, objective.extra_ids(tokenizer))
    return rj.train(model, TEXTS, objective, steps=30, batch=8, length=32, learning_rate=5e-3, quiet=True).model


def test_one_checkpoint_writes_and_fills(words, tmp_path):
    """A hybrid's export is a Llama: its causal logits and its logits in both directions are ours; read the other way,
    not."""
    model = trained(Hybrid(causal=0.5), words)
    folder = rj.save_huggingface(model, tmp_path / "hybrid")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = np.array([[words.bos, *words.encode("the cat sat on the mat")]])
    with torch.no_grad():
        causal = theirs(torch.tensor(ids)).logits.numpy()
        both = theirs(torch.tensor(ids), is_causal=False).logits.numpy()
    np.testing.assert_allclose(np.asarray(model.logits(ids)), causal, atol=1e-4)
    with jax.set_mesh(model.mesh):
        own = np.asarray(own_logits(model.network.apply, True, model.params, ids, None))[..., : model.vocab]
    np.testing.assert_allclose(own[:, 1:], both[:, :-1], atol=1e-4)
    assert np.abs(causal - both).max() > 0.01


def test_an_encoder_of_our_default_switches_is_a_llama_that_reads_both_ways(words, tmp_path):
    model = trained(Masked(), words, causal=False)
    folder = rj.save_huggingface(model, tmp_path / "encoder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert theirs.config.is_causal is False
    ids = np.array([[words.bos, *words.encode("the dog ran")]])
    with torch.no_grad():
        np.testing.assert_allclose(np.asarray(model.logits(ids)), theirs(torch.tensor(ids)).logits.numpy(), atol=1e-4)
    assert not rj.load_model(folder).network.causal


def test_its_pipeline_fills_our_masks_as_we_do(words, tmp_path):
    model = trained(Masked(share=0.3), words, **BERT)
    folder = rj.save_huggingface(model, tmp_path / "bert")
    pipe = transformers.pipeline("fill-mask", model=str(folder), tokenizer=str(folder))
    assert pipe.tokenizer.mask_token == "<|mask|>"
    text = f"the cat sat on{pipe.tokenizer.mask_token} mat"
    best = pipe(text)[0]
    ids = pipe.tokenizer(text)["input_ids"]
    assert ids.count(words.vocab) == 1
    opened = rj.load_model(folder)
    assert opened.tokenizer.mask == words.vocab
    ((filled, logprobs),) = rj.fill_masks(opened, [ids], {"temperature": 0.0})
    at = ids.index(words.vocab)
    logits = np.asarray(model.logits(np.array([ids])))[0, at]
    assert int(logits.argmax()) == best["token"]
    allowed = [i for i in range(words.vocab) if i not in (words.bos, words.pad)]
    assert filled[at] == allowed[int(logits[allowed].argmax())]
    assert np.exp(logprobs[at]) >= best["score"] - 1e-4 or filled[at] != best["token"]


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_imported_encoders_go_on_learning(kind, words, tmp_path):
    """Two steps of masked modelling on transformers' own models: finite, another model, exported with equal logits."""
    small = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    configs = {
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**small, max_position_embeddings=64)),
        "roberta": lambda: transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(
                **small, max_position_embeddings=67, pad_token_id=2, bos_token_id=0, eos_token_id=1
            )
        ),
        "modernbert": lambda: transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(**small, max_position_embeddings=64, pad_token_id=2, bos_token_id=0,
                                          eos_token_id=1, cls_token_id=0, sep_token_id=1)
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    configs[kind]().save_pretrained(tmp_path / "theirs")
    from recursive_jax.data.tokenizer_files import write_tokenizer

    write_tokenizer(tmp_path / "theirs", words, 64)
    model = rj.load_model(tmp_path / "theirs")
    further = rj.train(model, TEXTS, Masked(mask_id=299), steps=2, batch=8, length=32, learning_rate=1e-2, quiet=True)
    folder = rj.save_huggingface(further.model, tmp_path / "ours")
    again = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = np.array([words.encode("the cat sat on the mat")])
    with torch.no_grad():
        logits = again(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(further.model.logits(ids)), logits, atol=2e-4)
    assert np.abs(np.asarray(model.logits(ids)) - logits).max() > 1e-3


def test_pseudo_likelihoods_are_one_hidden_token_at_a_time(words, tmp_path):
    model = trained(Masked(), words, **BERT)
    folder = rj.save_huggingface(model, tmp_path / "bert")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = words.encode("the dog sat")
    (found,) = rj.pseudo_logprobs(model, [np.array(ids)])
    row = [words.bos, *ids]
    for t in range(1, len(row)):
        hidden = [*row[:t], words.vocab, *row[t + 1 :]]
        with torch.no_grad():
            logp = torch.log_softmax(theirs(torch.tensor([hidden])).logits[0, t], -1)[row[t]]
        assert found[t - 1] == pytest.approx(float(logp), abs=1e-4)


def test_shares_are_the_collators():
    """DataCollatorForLanguageModeling: 15% chosen; of those 80% hidden, 10% random, 10% kept; within four standard
    errors of both draws."""
    tokens = np.random.default_rng(0).integers(5, 1000, (200, 128))
    special = np.zeros_like(tokens, bool)
    inputs, chosen = mask_tokens(jax.random.key(0), tokens, special, mask_id=1000, vocab=1000)
    inputs, chosen = np.asarray(inputs), np.asarray(chosen)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=FileTokenizer.train_bpe(["a b"], 300)._tokenizer, mask_token="<|bos|>", pad_token="<|pad|>"
    )
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, seed=0)
    theirs, labels = collator.torch_mask_tokens(torch.tensor(tokens), torch.tensor(special))
    theirs, picked = theirs.numpy(), labels.numpy() != -100
    n = tokens.size
    assert abs(chosen.mean() - picked.mean()) < 4 * np.sqrt(2 * 0.15 * 0.85 / n)
    kept = lambda x, c: (x == tokens)[c].mean()
    hidden = (inputs[chosen] == 1000).mean(), (theirs[picked] == tokenizer.mask_token_id).mean()
    assert abs(hidden[0] - hidden[1]) < 4 * np.sqrt(2 * 0.8 * 0.2 / (0.15 * n))
    assert abs(kept(inputs, chosen) - kept(theirs, picked)) < 4 * np.sqrt(2 * 0.1 * 0.9 / (0.15 * n)) + 0.002
