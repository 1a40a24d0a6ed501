"""Adapters: what trains, what stays, what they merge to, and their files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from recursive_jax import LoraConfig, TrainConfig, adapted_model, load_adapter, load_model, save_adapter, train
from recursive_jax.config import MeshConfig
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.packing import pack_tokens
from recursive_jax.errors import InputError
from recursive_jax.mesh import make_mesh
from recursive_jax.models import nf4
from recursive_jax.models.weights import leaf_paths
from recursive_jax.objectives.base import Params
from recursive_jax.train.step import new_state, split
from tests.test_families import FOLDER

KINDS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "nf4": {"quantization": "nf4"},
}


@pytest.fixture(scope="module")
def llama(mesh):
    return load_model(FOLDER / "llama", mesh)


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    examples = [draw.integers(3, 48, 14).astype(np.int32) for _ in range(24)]
    data = real_rows([e[6:] for e in examples], [""] * 24, prompts=[e[:6] for e in examples])
    return pack_tokens(data, 28, SimpleNamespace(bos=1, pad=None))


def moved(model, size=0.2):
    draw = np.random.default_rng(1)
    change = lambda x: x + size * draw.standard_normal(x.shape).astype(np.float32)
    return model.with_params({**model.params, "lora": jax.tree.map(change, model.params["lora"])})


TOKENS = np.random.default_rng(2).integers(3, 48, (2, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_merges_to_itself(kind, llama):
    model = adapted_model(llama, LoraConfig(rank=4, **KINDS[kind]))
    if kind != "nf4":
        np.testing.assert_allclose(model.logits(TOKENS), llama.logits(TOKENS), atol=2e-5)
    model = moved(model)
    apart = np.abs(np.asarray(model.logits(TOKENS)) - np.asarray(llama.logits(TOKENS))).max()
    assert apart > 0.1
    np.testing.assert_allclose(model.merged().logits(TOKENS), model.logits(TOKENS), atol=1e-4)


def test_training_moves_the_adapter_alone(llama, rows):
    before = {p: np.asarray(x).tobytes() for p, x in leaf_paths(llama.params).items()}
    model = adapted_model(llama, LoraConfig(rank=2, dropout=0.1, targets=("attention/query", "mlp/down")))
    result = train(model, rows, config=TrainConfig(steps=30, batch=4, learning_rate=1e-2, length=28), quiet=True)
    after = leaf_paths(result.model.params["base"])
    assert all(np.asarray(after[p]).tobytes() == before[p] for p in before)  # bit-identical
    assert np.abs(result.model.params["lora"]["blocks"]["attention"]["query"]["b"]).max() > 0
    plain = train(model, rows, config=TrainConfig(steps=1, batch=4, learning_rate=1e-9, length=28), quiet=True)
    assert result.summary["loss"] < plain.summary["loss"] - 0.1


def test_the_optimizer_holds_what_trains(llama):
    """Rank r on [in, out]: r (in + out) numbers per layer, and two moments of each."""
    model = adapted_model(llama, LoraConfig(rank=2, targets=("attention/query", "mlp/down")))
    trained, frozen = split(model.network, model.params)
    from recursive_jax.train.optimizer import Hyper

    state = new_state(Params(trained, {}), {}, Hyper.of(TrainConfig()))
    c = llama.network.config
    wanted = 2 * c.layers * ((c.d_model + c.heads * c.K) + (c.F + c.d_model))
    assert sum(x.size for x in jax.tree.leaves(state.params)) == wanted
    assert sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim) == 2 * wanted
    assert set(frozen) == {"base"}


@pytest.mark.slow
def test_dropout_is_of_training_only_and_depends_on_the_seed(llama, rows):
    model = moved(adapted_model(llama, LoraConfig(rank=2, dropout=0.5)))
    np.testing.assert_array_equal(model.logits(TOKENS), model.logits(TOKENS))
    config = TrainConfig(steps=1, batch=8, length=28)
    losses = [train(model, rows, config=config, seed=s, quiet=True).summary["loss"] for s in (0, 0)]
    assert losses[0] == losses[1]
    none = moved(adapted_model(llama, LoraConfig(rank=2)))
    assert losses[0] != train(none, rows, config=config, seed=0, quiet=True).summary["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "nf4"])
def test_an_adapter_on_a_mesh_computes_the_same(kind, llama, rows):
    one = moved(adapted_model(llama, LoraConfig(rank=4, **KINDS[kind])))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    many = moved(adapted_model(llama.on(mesh), LoraConfig(rank=4, **KINDS[kind])))
    np.testing.assert_allclose(many.logits(TOKENS), one.logits(TOKENS), atol=1e-4)
    config = TrainConfig(steps=3, batch=8, learning_rate=1e-2, length=28)
    losses = [train(m, rows, config=config, quiet=True).summary["loss"] for m in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "bert"])
def test_files_of_peft_there_and_back(name, mesh, tmp_path):
    """Fused projections (GPT-2, Pythia, Phi-3) become one module of a larger rank, and equal logits."""
    base = load_model(FOLDER / name, mesh)
    model = moved(adapted_model(base, LoraConfig(rank=3, alpha=5, rslora=True)))
    again = load_adapter(base, save_adapter(model, tmp_path / "adapter"))
    np.testing.assert_allclose(again.logits(TOKENS), model.logits(TOKENS), atol=1e-4)


def test_adapters_that_do_not_fit_are_named(llama, mesh, tmp_path):
    model = adapted_model(llama, LoraConfig(rank=3))
    folder = save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"c_attn|do not fit|no weight to adapt"):
        load_adapter(load_model(FOLDER / "gpt2", mesh), folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": ["lm_head"]}))
    with pytest.raises(InputError, match="modules_to_save"):
        load_adapter(llama, folder)
    with pytest.raises(InputError, match="names no weight; there are: .*attention/query"):
        adapted_model(llama, LoraConfig(targets=("q_proj",)))
    with pytest.raises(InputError, match="has an adapter already"):
        adapted_model(model, LoraConfig())
    with pytest.raises(InputError, match="no adapter"):
        save_adapter(llama, tmp_path / "none")


def test_four_bits_round_to_the_nearest_of_sixteen():
    draw = np.random.default_rng(0)
    values = draw.standard_normal(64 * 50).astype(np.float32)
    codes, scale = nf4.quantize(values)
    assert codes.dtype == np.uint8 and codes.size * 2 == values.size and scale.size == 50
    np.testing.assert_array_equal(scale, np.abs(values.reshape(50, 64)).max(1))
    index = np.stack([codes >> 4, codes & 15], -1).reshape(-1)
    unit = values / np.repeat(scale, 64)
    nearest = np.abs(unit[:, None] - nf4.CODEBOOK).min(1)
    np.testing.assert_allclose(np.abs(unit - nf4.CODEBOOK[index]), nearest, atol=1e-7)
    weight = draw.standard_normal((2, 16, 4, 8)).astype(np.float32)  # [L, in, heads, width]
    packed = nf4.quantized(weight, 1)
    for i in range(2):
        layer = nf4.NF4(packed.codes[i], packed.scale[i], packed.shape, packed.inner)
        assert np.abs(np.asarray(nf4.dequantize(layer)) - weight[i]).max() < 0.16 * np.abs(weight).max()
    zeros, _ = nf4.quantize(np.zeros(64, np.float32))
    assert set(zeros) == {0x77}


def test_four_bit_weights_stay_four_bits_in_training_and_are_split_over_fsdp():
    """The backward pass kept the opened base: 98% of the float32 weights; and every device had all of it."""
    from recursive_jax.config import ModelConfig
    from recursive_jax.data.tokenizers import ByteTokenizer
    from recursive_jax.models.model import transformer
    from recursive_jax.models.nf4 import NF4

    config = ModelConfig(layers=6, d_model=256, heads=4, d_ff=512, max_length=16)
    base = transformer(config, ByteTokenizer(), make_mesh(MeshConfig(data=1), jax.devices()[:1])).initialized(0)
    model = adapted_model(base, LoraConfig(rank=2, quantization="nf4"))
    tokens = np.full((1, 8), 65, np.int32)

    def temporaries(model):
        loss = lambda lora, frozen: model.network.apply({"base": frozen, "lora": lora}, tokens).sum()
        with jax.set_mesh(model.mesh):
            run = jax.jit(jax.grad(loss))
            return run.lower(model.params["lora"], model.params["base"]).compile().memory_analysis().temp_size_in_bytes

    blocks = sum(x.size * 4 for p, x in leaf_paths(base.params).items() if p.startswith("blocks/"))
    assert temporaries(model) < 0.5 * blocks
    plain = np.asarray(model.merged_base().logits(tokens))
    split_mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    spread = adapted_model(base.on(split_mesh), LoraConfig(rank=2, quantization="nf4"))
    is_nf4 = lambda x: isinstance(x, NF4)
    codes = [x.codes for x in jax.tree.leaves(spread.params["base"], is_leaf=is_nf4) if is_nf4(x)]
    assert codes and all(c.addressable_shards[0].data.size * 4 == c.size for c in codes)
    np.testing.assert_allclose(np.asarray(spread.merged_base().logits(tokens)), plain, atol=2e-5)
    np.testing.assert_allclose(np.asarray(spread.logits(tokens)), plain, atol=2e-5)
