"""Frozen tiny models of every family, with the logits transformers gives for them; errors of files that do not fit."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recursive_jax import load_model, save_huggingface
from recursive_jax.config import MeshConfig
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import Request
from recursive_jax.generate.score import embed
from recursive_jax.mesh import make_mesh
from recursive_jax.models import huggingface
from recursive_jax.models.model import Model, transformer
from recursive_jax.models.network import transformer_network
from recursive_jax.models.transformer import Cache, Transformer
from recursive_jax.models.weights import leaf_paths
from tests.conftest import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "families"
NAMES = sorted(p.name for p in FOLDER.iterdir())
QUICK = ("llama", "gpt2", "bert")  # in the default run; the others are slow tests


def some(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


DECODERS = [n for n in NAMES if not n.endswith("bert") and n != "roberta"]


@pytest.fixture(scope="module")
def opened(mesh):
    """Each family's model and its expected logits, loaded once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load_model(FOLDER / name, mesh), np.load(FOLDER / name / "expected.npz")
        return loaded[name]

    return get


def error(found, expected, mask):
    return np.abs(np.asarray(found) - expected)[mask > 0].max()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, opened):
    """Two float32 implementations of logits of size 5 differ by 2e-5 here; a forgotten bias by 0.1 and more."""
    model, expected = opened(name)
    assert error(model.logits(expected["tokens"], expected["mask"]), expected["logits"], expected["mask"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_export_and_import_again_is_the_same_model(name, opened, mesh, tmp_path):
    model, _ = opened(name)
    again = load_model(save_huggingface(model, tmp_path / "out"), mesh)
    assert again.network.config == model.network.config
    first, second = leaf_paths(model.params), leaf_paths(again.params)
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)


@pytest.mark.parametrize("name", some(["llama", "gemma3_text", "smollm3", "modernbert", "mixtral"]))
def test_scanned_layers_compute_what_unrolled_ones_do(name, opened):
    """Also where layers differ in window, theta, norm and positions."""
    model, expected = opened(name)
    config = model.network.config.model_copy(update={"scan": True, "remat": "full"})
    scanned = Model(transformer_network(config), None, model.params, model.mesh)
    assert error(scanned.logits(expected["tokens"], expected["mask"]), expected["logits"], expected["mask"]) < 1e-4


@pytest.mark.parametrize("name", some(DECODERS))
def test_decoding_with_a_cache_is_the_full_forward(name, opened):
    model, expected = opened(name)
    tokens = jnp.asarray(expected["tokens"])
    module, split = Transformer(model.network.config), 11
    full = np.asarray(model.logits(tokens))
    step = jax.jit(lambda p, t, cache: module.apply({"params": p}, t, cache=cache))
    with jax.set_mesh(model.mesh):
        cache = Cache.empty(model.network.config, 2, 24, jnp.float32)
        logits, cache = module.apply({"params": model.params}, tokens[:, :split], cache=cache, fresh=True)
        found = [logits[:, -1]]
        for t in range(split, 20):
            logits, cache = step(model.params, tokens[:, t : t + 1], cache)
            found.append(logits[:, -1])
    found = np.stack([np.asarray(x)[:, : model.vocab] for x in found], axis=1)
    np.testing.assert_allclose(found, full[:, split - 1 :], atol=1e-4)


@pytest.mark.parametrize("name", some(NAMES))
def test_packed_rows_do_not_see_each_other(name, opened):
    model, expected = opened(name)
    tokens = expected["tokens"][:1]
    packed = model.logits(tokens, np.r_[np.full(12, 1), np.full(8, 2)][None])
    apart = np.concatenate([model.logits(tokens[:, :12]), model.logits(tokens[:, 12:])], axis=1)
    np.testing.assert_allclose(packed, apart, atol=1e-4)


@pytest.mark.parametrize("name", some(["llama", "gemma2", "mixtral", "gpt2", "bert"]))
def test_any_mesh_computes_the_same(name, opened):
    expected = opened(name)[1]
    sharded = load_model(FOLDER / name, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    found = sharded.logits(expected["tokens"], expected["mask"])
    assert error(found, expected["logits"], expected["mask"]) < 1e-4
    query = sharded.params["blocks"]["attention"]["query"]
    assert query.addressable_shards[0].data.size * 4 == query.size  # split over fsdp and tensor


def test_a_prefix_is_seen_from_everywhere_and_the_rest_causally(opened):
    model, expected = opened("llama")
    tokens = jnp.asarray(expected["tokens"])
    module = Transformer(model.network.config)
    with jax.set_mesh(model.mesh):
        run = lambda t, **kw: np.asarray(module.apply({"params": model.params}, t, **kw))
        both = run(tokens, causal=False)
        prefix = run(tokens, prefix_B=jnp.array([20, 8]))
        changed = run(tokens.at[:, 10].add(1), prefix_B=jnp.array([20, 8]))
    np.testing.assert_allclose(prefix[0], both[0], atol=1e-5)  # all of the row is prefix: bidirectional
    np.testing.assert_array_equal(prefix[1, :10], changed[1, :10])  # after the prefix nothing looks ahead
    assert np.abs(prefix[0, :10] - changed[0, :10]).max() > 1e-3


def test_shards_and_half_precision(mesh, tmp_path, monkeypatch, opened):
    model = opened("qwen3_moe")[0]
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    folder = save_huggingface(model, tmp_path / "out", "bfloat16")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 2
    again = load_model(folder, mesh, "bfloat16")
    assert again.params["embedding"].dtype == jnp.bfloat16
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model.params)
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.float32))
    sorted(folder.glob("model-*-of-*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="shard .* is missing"):
        load_model(folder, mesh)


def broken(name, tmp_path, tensors=None, **keys):
    """A copy of a fixture with changed tensors or config keys."""
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | keys).items() if v != "absent"}))
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not known; known: .*llama"),
        ({"hidden_size": "absent"}, "the key hidden_size is missing"),
        ({"hidden_act": "relu2"}, "hidden_act='relu2' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type='longrope' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"intermediate_size": 32}, r"mlp.down_proj.weight has shape \(32, 24\), expected \(32, 32\)"),
        ({"num_hidden_layers": 3}, "missing tensor model.layers.2"),
        ({"num_attention_heads": 5, "head_dim": 8}, "heads=5 is not a multiple of kv_heads=2"),
    ],
)
def test_a_config_that_does_not_fit_is_named(keys, says, mesh, tmp_path):
    with pytest.raises(InputError, match=says):
        load_model(broken("llama", tmp_path, **keys), mesh)


def test_tensors_that_do_not_fit_are_named(mesh, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float16)

    with pytest.raises(InputError) as caught:
        load_model(broken("llama", tmp_path, change), mesh)
    assert "missing tensor model.norm.weight" in str(caught.value)
    assert "unexpected tensor model.layers.0.self_attn.q_norm.weight" in str(caught.value)


def test_damaged_and_foreign_files(mesh, tmp_path):
    folder = broken("llama", tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_model(folder, mesh)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="is a pickle"):
        load_model(folder, mesh)
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "nothing", mesh)


def test_names_without_the_base_prefix_are_found(mesh, tmp_path, opened):
    """GPT-2's own file has no `transformer.` in its names; a bare encoder has no output head."""

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    expected = opened("gpt2")[1]
    model = load_model(broken("gpt2", tmp_path, strip), mesh)
    assert error(model.logits(expected["tokens"], expected["mask"]), expected["logits"], expected["mask"]) < 1e-4

    def bare(tensors):
        for name in list(tensors):
            value = tensors.pop(name)
            if name.startswith("bert."):
                tensors[name.removeprefix("bert.")] = value

    shutil.rmtree(tmp_path / "model")
    encoder = load_model(broken("bert", tmp_path, bare), mesh)
    assert encoder.network.config.head == "none"
    states = np.asarray(encoder.states(expected["tokens"]))
    whole = opened("bert")[0]
    config = whole.network.config.model_copy(update={"head": "none", "head_bias": False})
    headless = Model(transformer_network(config), None, whole.params, mesh)
    np.testing.assert_array_equal(states, np.asarray(headless.states(expected["tokens"])))
    with pytest.raises(InputError, match="no output head"):
        encoder.logits(expected["tokens"])
    with pytest.raises(InputError, match="cannot write"):
        generate(encoder, [Request(0, np.array([3]))])


def test_our_own_model_becomes_a_llama(tiny, tokenizer, mesh, tmp_path):
    from recursive_jax import transformer

    model = transformer(tiny, tokenizer, mesh).initialized(3)
    folder = save_huggingface(model, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    again = load_model(folder, mesh)
    tokens = np.random.default_rng(0).integers(3, 30, (2, 9))
    np.testing.assert_allclose(again.logits(tokens), model.logits(tokens), atol=1e-6)
    text = tokenizer.decode(tokens[0])
    assert again.tokenizer.encode(text) == tokens[0].tolist()
    roles = lambda t: (t.bos, t.eos, t.pad)
    assert roles(again.tokenizer) == roles(tokenizer)
    with pytest.raises(InputError, match="not an empty folder"):
        save_huggingface(model, folder)
    odd = transformer(tiny.model_copy(update={"score_cap": 5.0}), tokenizer, mesh).initialized(0)
    with pytest.raises(InputError, match="no Hugging Face family"):
        save_huggingface(odd, tmp_path / "odd")


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_states_of_a_masked_model_are_those_of_its_encoder(name, opened):
    """They came out after the dense layer of the masked-language head."""
    whole = opened(name)[0]
    tokens = opened(name)[1]["tokens"]
    config = whole.network.config.model_copy(update={"head": "none", "head_bias": False})
    bare = Model(transformer_network(config), whole.tokenizer, whole.params, whole.mesh)
    np.testing.assert_array_equal(np.asarray(whole.states(tokens)), np.asarray(bare.states(tokens)))
    assert whole.network.config.head == "transform"  # there is one to stop before
    np.testing.assert_allclose(embed(whole, list(tokens)), embed(bare, list(tokens)), atol=1e-6)


def test_states_have_the_width_of_the_model_where_embeddings_are_narrower(mesh, tokenizer, tiny):
    """OPT-350m: embeddings of 512, states of 1,024."""
    model = transformer(tiny.model_copy(update={"embedding_width": 16}), tokenizer, mesh).initialized(0)
    assert model.states([[3, 4, 5]]).shape == (1, 3, tiny.d_model) and model.network.states_size == tiny.d_model
    assert embed(model, [np.array([3, 4])]).shape == (1, tiny.d_model)
