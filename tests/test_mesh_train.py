"""The same config on every mesh gives the same losses, and a checkpoint of one mesh restores on any other."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.collapse.exact import exact_kl
from recursive_jax.config import MeshConfig, ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.data.packing import pack
from recursive_jax.errors import InputError
from recursive_jax.generate.decoder import decoder
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import unconditional
from recursive_jax.mesh import fetch, make_mesh, put_batch
from recursive_jax.models.model import abstract_params, transformer
from recursive_jax.models.network import transformer_network
from recursive_jax.models.transformer import unstacked
from recursive_jax.train import checkpoint
from recursive_jax.train.loop import train

MESHES = [MeshConfig(data=1), MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)]


@pytest.fixture(scope="module")
def rows(language, tokenizer):
    return pack(language.sample(1, 0, 400), 32, tokenizer.bos, tokenizer.pad)


def run_on(mesh_config, model_config, tokenizer, rows, **changes):
    mesh = make_mesh(mesh_config, jax.devices()[:1] if mesh_config.data == 1 and mesh_config.fsdp == 1 else None)
    model = transformer(model_config, tokenizer, mesh)
    config = TrainConfig(steps=6, batch=16, learning_rate=1e-2, warmup=0.2, **changes)
    trained = train(model, rows, config=config, seed=3, quiet=True)
    return trained


def test_losses_and_params_agree_on_every_mesh(tiny, tokenizer, rows):
    """Tolerance: float32 sums in another order, 6 Adam steps. Adam divides by the root of a tiny second moment, so a
    difference of 1 ulp in a gradient may move a param by a visible part of the learning rate; losses stay close."""
    tiny = tiny.model_copy(update={"heads": 4, "kv_heads": 2})
    first = run_on(MESHES[0], tiny, tokenizer, rows)
    for mesh_config in MESHES[1:]:
        other = run_on(mesh_config, tiny, tokenizer, rows)
        assert abs(first.summary["loss"] - other.summary["loss"]) < 2e-4, mesh_config


@pytest.mark.slow
def test_accumulation_equals_one_large_batch(tiny, tokenizer, rows):
    whole = run_on(MESHES[0], tiny, tokenizer, rows)
    for config in (MESHES[0], MESHES[3]):
        split = run_on(config, tiny, tokenizer, rows, accumulate=4)
        assert abs(whole.summary["loss"] - split.summary["loss"]) < 2e-4


@pytest.mark.slow
def test_scan_and_remat_change_nothing(tiny, tokenizer, rows):
    first = run_on(MESHES[0], tiny, tokenizer, rows)
    for change in ({"scan": True}, {"remat": "full"}, {"remat": "dots"}, {"scan": True, "remat": "full"}):
        other = run_on(MESHES[0], tiny.model_copy(update=change), tokenizer, rows)
        assert abs(first.summary["loss"] - other.summary["loss"]) < 2e-4, change


def test_checkpoint_moves_between_meshes(tiny, tokenizer, rows, tmp_path):
    trained = run_on(MESHES[3], tiny, tokenizer, rows).model
    checkpoint.save(tmp_path / "ck", trained.params)
    for config in MESHES[:3]:
        mesh = make_mesh(config, jax.devices()[:1] if config.data == 1 and config.fsdp == 1 else None)
        restored = checkpoint.load(tmp_path / "ck", abstract_params(trained.network, mesh))
        same = jax.tree.map(lambda a, b: np.array_equal(fetch(a), fetch(b)), trained.params, restored)
        assert jax.tree.all(same)


def test_restore_says_which_leaves_differ(tiny, tokenizer, rows, tmp_path, mesh):
    trained = run_on(MESHES[0], tiny, tokenizer, rows).model
    checkpoint.save(tmp_path / "ck", trained.params)
    other = transformer(tiny.model_copy(update={"tied": False, "d_ff": 96}), tokenizer, mesh)
    with pytest.raises(InputError) as error:
        checkpoint.load(tmp_path / "ck", abstract_params(other.network, mesh))
    assert "missing: head" in str(error.value) and "blocks/mlp/up: stored (2, 32, 64), expected (2, 32, 96)" in str(
        error.value
    )


def test_generation_agrees_on_every_mesh(tiny, tokenizer, rows):
    model = run_on(MESHES[0], tiny, tokenizer, rows).model
    sampling = SamplingConfig(batch=8, max_tokens=16, top_p=0.95)
    first = generate(model, unconditional(16), sampling, seed=5)
    for config, weights in [*((config, "auto") for config in MESHES[1:]), (MESHES[-1], "whole")]:
        settings = sampling.model_copy(update={"weights": weights})
        other = generate(model.on(make_mesh(config)), unconditional(16), settings, seed=5)
        assert [t.tolist() for t in first.tokens()] == [t.tolist() for t in other.tokens()], config
        np.testing.assert_allclose(
            np.concatenate(first.column("logprobs")), np.concatenate(other.column("logprobs")), atol=1e-4
        )


def test_layers_apart_are_views_on_a_cpu(tiny, tokenizer):
    """On any mesh they are what slicing gives, laid the same, and take no memory of their own."""
    for config in MESHES:
        model = transformer(tiny, tokenizer, make_mesh(config, jax.devices()[: 1 if config == MESHES[0] else 8]))
        params = model.initialized(0).params
        apart = decoder(model.network, "float32").prepare(params)["blocks"]
        with jax.set_mesh(model.mesh):
            sliced = jax.jit(lambda p: unstacked(p, tiny, "float32"))(params)["blocks"]
        for view, other in zip(jax.tree.leaves(apart), jax.tree.leaves(sliced), strict=True):
            assert view.aval == other.aval and (np.asarray(view) == np.asarray(other)).all()
        stacked = params["blocks"]["mlp"]["up"]
        for part, whole in zip(apart[1]["mlp"]["up"].addressable_shards, stacked.addressable_shards, strict=True):
            assert part.data.unsafe_buffer_pointer() == whole.data.unsafe_buffer_pointer() + part.data.nbytes


def test_a_cpu_is_split_into_the_devices_that_the_mesh_names():
    script = (
        "from recursive_jax.config import MeshConfig; from recursive_jax.mesh import make_mesh, split_cpu; import jax\n"
        "config = MeshConfig(fsdp=2, tensor=3); split_cpu(config); print(*make_mesh(config).axis_sizes, "
        "jax.device_count())"
    )
    for said, expected in (({}, "1 2 3 6"), ({"JAX_NUM_CPU_DEVICES": "12"}, "2 2 3 12")):
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"} | said
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_exact_kl_agrees_on_a_tensor_mesh(tiny, tokenizer, language, mesh):
    model = transformer(tiny, tokenizer, mesh).initialized(0)
    documents = language.sample(3, 0, 40)
    one = exact_kl(model, language, documents)
    other = exact_kl(model.on(make_mesh(MESHES[3])), language, documents)
    for key, value in one.items():
        assert other[key] == pytest.approx(value, abs=1e-4), key


def test_bad_meshes_are_refused_together(tiny, tokenizer):
    with pytest.raises(InputError, match="needs 16 devices, 8 are here"):
        make_mesh(MeshConfig(data=16))
    with pytest.raises(InputError, match="does not divide the 8 devices"):
        make_mesh(MeshConfig(data=-1, fsdp=3))
    with pytest.raises(InputError) as error:
        transformer(tiny.model_copy(update={"d_ff": 66}), tokenizer, make_mesh(MeshConfig(data=1, fsdp=1, tensor=8)))
    text = str(error.value)
    assert "model.heads=4" in text and "model.kv_heads=2" in text and "model.d_ff=66" in text


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "tpu_custom_call"), ("cpu", None)])
def test_a_step_is_lowered_for_hardware_that_is_not_here(platform, kernel):
    """The platform is the mesh's: on this CPU a train step for eight TPU chips takes the TPU's kernel and its dtype."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

    from recursive_jax import mesh as meshes
    from recursive_jax.config import ModelConfig
    from recursive_jax.models.network import transformer_network
    from recursive_jax.objectives import causal
    from recursive_jax.train.optimizer import Hyper
    from recursive_jax.train.step import init_program, step_program

    device = AbstractDevice(device_kind="TPU v5 lite" if platform == "tpu" else "cpu", num_cores=1, platform=platform)
    mesh = AbstractMesh((2, 2, 2), meshes.AXES, axis_types=(AxisType.Explicit,) * 3, abstract_device=device)
    network = transformer_network(ModelConfig(vocab=128, layers=1, d_model=256, heads=2, max_length=128))
    with jax.sharding.use_abstract_mesh(mesh):
        dtype = meshes.resolve_dtype("auto")
        start = lambda hyper: init_program(network)(jax.random.key(0), {}, {}, hyper)
        state = jax.eval_shape(start, Hyper.of(TrainConfig()))
        rows = jax.ShapeDtypeStruct((8, 129), np.int32, sharding=NamedSharding(mesh, meshes.spec("batch", "time")))
        step = step_program(network, causal, 1, dtype)
        text = (
            step.trace(state, {"tokens": rows, "segments": rows}, {}, {})
            .lower(lowering_platforms=(platform,))
            .as_text()
        )
    assert ("tpu_custom_call" in text) == (kernel is not None)
    assert ("bf16" in text) == (platform == "tpu") and dtype == ("bfloat16" if platform == "tpu" else "float32")


@pytest.mark.parametrize(("batch", "accumulate", "mesh_config"), [
    (1, 1, MeshConfig(data=1)), (4, 4, MeshConfig(data=1)), (8, 1, MeshConfig(data=4, fsdp=2)),
    (8, 4, MeshConfig(data=1, fsdp=2)),
])  # fmt: skip
def test_the_smallest_batches_train(batch, accumulate, mesh_config, tiny, tokenizer, rows):
    """One row, one row in a micro-batch, one row on a device: the same numbers as any other split of the batch."""
    count = max(1, mesh_config.data) * mesh_config.fsdp
    settings = TrainConfig(steps=3, batch=batch, learning_rate=1e-2, warmup=0.0, length=32)
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    plain = train(transformer(tiny, tokenizer, one), rows, config=settings, quiet=True).summary["loss"]
    model = transformer(tiny, tokenizer, make_mesh(mesh_config, jax.devices()[:count]))
    split = settings.model_copy(update={"gradient_accumulation": accumulate})
    assert train(model, rows, config=split, quiet=True).summary["loss"] == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("config", [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_grouped_experts_are_the_dense_ones(config, tokenizer):
    """Logits and gradients, where tokens choose unevenly and some experts get none."""
    devices = jax.devices()[: 1 if config.data == 1 else 8]
    c = ModelConfig(layers=2, d_model=32, heads=4, d_ff=16, max_length=32, experts=8, experts_per_token=2)
    mesh = make_mesh(config, devices)
    model = transformer(c, tokenizer, mesh).initialized(0)
    params = jax.tree.map(lambda x: x, model.params)
    params["blocks"]["mlp"]["router"] = params["blocks"]["mlp"]["router"] * jnp.arange(8.0)  # most to the last ones
    tokens = np.random.default_rng(0).integers(0, tokenizer.vocab, (8, 32)).astype(np.int32)
    found = []
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, tokens)
        for path in ("dense", "grouped"):
            apply = transformer_network(model.network.config.model_copy(update={"experts_path": path})).bind("float32")

            def loss(params, apply=apply):
                logits = apply(params, batch)
                return jnp.sum(jax.nn.logsumexp(logits, -1)), logits

            found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    ((_, dense), dense_grads), ((_, grouped), grads) = found
    np.testing.assert_allclose(np.asarray(grouped), np.asarray(dense), atol=2e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(dense_grads), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-4 * float(np.abs(b).max() + 1e-3))
