"""Plans: their collectives against a count by hand, their FLOPs against formulas, their memory against the params'
sizes; topologies and what is wrong with them; and real compilations for TPUs that are not here (parity)."""

from __future__ import annotations

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from recursive_jax import cli
from recursive_jax.config import LoraConfig, MeshConfig, ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.mesh import make_mesh
from recursive_jax.models.model import transformer
from recursive_jax.models.network import adapted_network, transformer_network
from recursive_jax.objectives import (
    DPO,
    Causal,
    Denoisers,
    Hybrid,
    Masked,
    MaskedDiffusion,
    PairwiseReward,
    PolicyGradient,
    SelfDistill,
)
from recursive_jax.plan import hlo
from recursive_jax.plan.count import flops
from recursive_jax.plan.figures import figures
from recursive_jax.plan.plan import plan
from recursive_jax.plan.programs import programs_of
from recursive_jax.plan.search import search
from recursive_jax.plan.topology import GIB, topology
from recursive_jax.recipes import load_config
from recursive_jax.rounds.work import Reading, Training, Writing
from tests.conftest import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SMALL = ModelConfig(vocab=512, layers=3, d_model=64, heads=4, kv_heads=2, d_ff=160, max_length=128, scan=True)


def compiled(work, mesh):
    (program,) = programs_of([work], mesh, GIB)
    with jax.set_mesh(mesh):
        return program, program.function.trace(*program.arguments)


# ---- what a compiled program moves


def test_the_collectives_of_fsdp_are_those_counted_by_hand():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    _, traced = compiled(Training("", transformer_network(SMALL), TrainConfig(batch=16)), mesh)
    moved = hlo.Module(traced.lower().compile().as_text()).traffic().collectives
    c, seven_eighths = SMALL, 7 / 8
    layer = 4 * (c.d_model * c.K * (2 * c.heads + 2 * c.G) + 3 * c.d_model * c.F)  # bytes of float32 matrices
    table = 4 * c.V * c.d_model
    norms = 4 * (2 * c.layers + 1) * c.d_model
    # Every matrix of a layer for the pass forward and again for the one back; the table once, for the head.
    assert moved["all-gather"] == pytest.approx(seven_eighths * (2 * c.layers * layer + table))
    # Gradients (on a CPU whole, then cut): the table's as the head's and as the embedding's; scalars are the rest.
    gradients = 2 * seven_eighths * (c.layers * layer + 2 * table + norms)
    assert gradients <= moved["all-reduce"] <= gradients + 1000
    assert set(moved) == {"all-gather", "all-reduce"}


def test_the_collectives_of_tensor_are_those_counted_by_hand():
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    _, traced = compiled(Training("", transformer_network(SMALL), TrainConfig(batch=4)), mesh)
    moved = hlo.Module(traced.lower().compile().as_text()).traffic().collectives
    states = 4 * 4 * SMALL.max_length * SMALL.d_model  # bytes of float32 [4, T, D]; two devices: 2 (n - 1) / n is 1
    # Behind attention and MLP forward; back, what each of query, key, value, gate and up gives (four in all would do,
    # were they added up before they are sent); the embedding's rows, and what the head gives back.
    expected = (7 * SMALL.layers + 2) * states
    assert moved["all-reduce"] == pytest.approx(expected, rel=0.02)  # the rest: sums over the split vocabulary


def test_loops_count_as_often_as_they_run():
    mesh = make_mesh(MeshConfig(data=8))
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", None)))

    def summed(x):
        body = lambda c, _: (c + jax.lax.psum(c * 2.0, "data"), None)
        return jax.lax.scan(body, x, None, length=5)[0]

    def until(x):
        go = lambda c: jnp.sum(c[0]) < 100.0
        return jax.lax.while_loop(go, lambda c: (c[0] + jax.lax.psum(c[0], "data"), c[1]), (x, 0))[0]

    for function, loop, times in ((summed, 1, 5), (until, 7, 7)):
        run = jax.jit(jax.shard_map(function, in_specs=P("data", None), out_specs=P("data", None), check_vma=False))
        with jax.set_mesh(mesh):
            text = run.lower(x).compile().as_text()
        moved = hlo.Module(text).traffic(loop).collectives["all-reduce"]
        assert moved == pytest.approx(times * 2 * 7 / 8 * 128 * 4)


def test_a_counter_may_go_by_two_and_a_step_shown_twice_counts_once():
    """As libtpu writes products that go with their collectives (an excerpt of such a program, shortened)."""
    text = """\
HloModule jit_step, num_partitions=16

%body (p: (bf16[36,1536], u32[])) -> (bf16[36,1536], u32[]) {
  %p = (bf16[36,1536]{1,0}, u32[]{:T(128)}) parameter(0)
  %w = bf16[36,1536]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=0
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %start = (bf16[36,1536]{1,0}, bf16[36,1536]{1,0:S(1)}) collective-permute-start(%w), source_target_pairs={{0,1}}
  %done = bf16[36,1536]{1,0} collective-permute-done(%start)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (bf16[36,1536]{1,0}, u32[]) tuple(%done, %next)
}

%condition (q: (bf16[36,1536], u32[])) -> pred[] {
  %q = (bf16[36,1536]{1,0}, u32[]{:T(128)}) parameter(0)
  %limit = u32[]{:T(128)} constant(8)
  %at = u32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%part.1 (a: bf16[8,4]) -> bf16[8,64] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %g = bf16[8,64]{1,0} all-gather(%a), channel_id=7, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={1}
}

%part.2 (b: bf16[8,4]) -> bf16[8,64] {
  %b = bf16[8,4]{1,0} parameter(0)
  ROOT %h = bf16[8,64]{1,0} all-gather(%b), channel_id=7, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={1}
}

ENTRY %main (w0: bf16[36,1536], x: bf16[8,4]) -> bf16[8,64] {
  %w0 = bf16[36,1536]{1,0} parameter(0)
  %x = bf16[8,4]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %t = (bf16[36,1536]{1,0}, u32[]) tuple(%w0, %zero)
  %loop = (bf16[36,1536]{1,0}, u32[]) while(%t), condition=%condition, body=%body
  %f = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%part.1
  ROOT %g2 = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%part.2
}
"""
    found = hlo.Module(text).traffic()
    assert found.collectives == {"collective-permute": 4 * 36 * 1536 * 2, "all-gather": 15 * 8 * 4 * 2}
    assert found.loops == 0
    with pytest.raises(ValueError, match="unknown form"):
        hlo.Module(text.replace("mesh['axis_0'=16] {'axis_0'}", "all")).traffic()


def test_sizes_of_shapes():
    assert hlo.size("bf16[2,3]{1,0}") == 12
    assert hlo.size("(f8e4m3fn[4], pred[3]{0}, s4[4], u32[])") == 4 + 3 + 2 + 4
    assert hlo.size("f32[4]{0:T(128)S(1)}", scratch=False) == 0


# ---- FLOPs and memory


@pytest.mark.parametrize(
    "changes",
    [{}, {"gated": False, "tied": False, "kv_heads": 4}, {"experts": 4, "remat": "full"}],
    ids=["gated", "plain", "experts"],
)
def test_flops_are_those_counted_by_hand(changes, mesh):
    c = SMALL.model_copy(update={"attention": "reference", **changes})
    B, T = 4, c.max_length
    program, traced = compiled(Training("", transformer_network(c), TrainConfig(batch=B)), mesh)
    attention = 2 * 2 * T * c.heads * c.K  # both products of a token with all T keys
    projections = 2 * c.d_model * c.K * (2 * c.heads + 2 * c.G)
    mlp = 2 * (3 if c.gated else 2) * c.d_model * c.F * max(1, c.experts) + 2 * c.d_model * c.experts
    blocks, head = c.layers * (attention + projections + mlp), 2 * c.d_model * c.V
    again = blocks - c.layers * 2 * c.d_model * c.F * max(1, c.experts) if c.remat == "full" else 0
    # Layers run again to save memory leave out their last product, which no gradient needs.
    assert flops(traced.jaxpr) == pytest.approx(B * T * (3 * blocks + again + 3 * head), rel=0.01)
    # The model's own: causal attention sees half of the keys, a token its own experts, and nothing is done twice.
    unused = 2 * 3 * c.d_model * c.F * max(0, c.experts - c.experts_per_token) if c.experts else 0
    own = blocks - c.layers * (attention / 2 + unused)
    assert program.flops == pytest.approx(3 * B * T * (own + head), rel=0.01)


def test_grouped_experts_run_on_their_own_tokens_alone(mesh):
    """Forward, and back to the tokens; the gradient of their weights is a product over all of them."""
    c = SMALL.model_copy(update={"attention": "reference", "experts": 8, "experts_per_token": 2})
    work = [
        Reading("", transformer_network(c.model_copy(update={"experts_path": p})), 4 * c.max_length, c.max_length)
        for p in ("dense", "grouped")
    ]
    dense, grouped = (flops(compiled(item, mesh)[1].jaxpr) for item in work)
    B = compiled(work[0], mesh)[0].positions / c.max_length
    assert dense - grouped == pytest.approx(B * c.max_length * c.layers * 2 * 3 * c.d_model * c.F * (8 - 2), rel=0.01)


@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(data=8), MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=2, tensor=4)]
)
def test_memory_is_that_of_the_params_and_the_compiler_s(mesh_config):
    c = SMALL.model_copy(update={"kv_heads": 4})
    place = topology("here")
    mesh = place.mesh(mesh_config)
    (program,) = programs_of([Training("", transformer_network(c), TrainConfig(batch=16))], mesh, GIB)
    found = figures(program, mesh, place)
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    matrices = c.layers * (c.d_model * c.K * (2 * c.heads + 2 * c.G) + 3 * c.d_model * c.F) + c.V * c.d_model
    norms = (2 * c.layers + 1) * c.d_model
    by_hand = 4 * (matrices / split + norms)
    assert found.parts["params"] == pytest.approx(by_hand, rel=0.1)
    assert found.parts["optimizer"] == pytest.approx(2 * by_hand, rel=0.1)
    rows = 2 * 4 * 16 * (c.max_length + 1) / (mesh.shape["data"] * mesh.shape["fsdp"])
    assert found.arguments == pytest.approx(3 * by_hand + rows, rel=0.1)
    assert found.total == found.arguments + found.temporaries < found.limit


def test_an_adapter_has_no_optimizer_for_its_base(mesh):
    base = transformer_network(SMALL)
    adapted = adapted_network(base, LoraConfig(rank=2))
    whole, low = (
        programs_of([Training("", n, TrainConfig(batch=4))], mesh, GIB)[0].parts["optimizer"] for n in (base, adapted)
    )
    assert low < whole / 10


def test_weights_are_whole_on_every_shard_where_they_fit(mesh):
    """Writing gathers them anew for every token otherwise."""
    c = SMALL.model_copy(update={"layers": 1, "kv_heads": 4})
    place, writing = topology("gpu-h100:8"), Writing("", transformer_network(c), SamplingConfig(batch=8), 64, 16, 32)
    device = place.mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    fits, not_ = (programs_of([writing], device, memory)[1] for memory in (GIB, 1000))
    assert fits.parts["params"] == pytest.approx(4 * not_.parts["params"], rel=0.05)
    assert figures(fits, device, place).collectives.keys() == {"all-reduce"}
    assert figures(not_, device, place).collectives.keys() == {"all-reduce", "all-gather"}


# ---- batches before there is data


def given(objective):
    text = [
        {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3"},
        {"prompt": "2 + 1 = ", "chosen": "3", "rejected": "1"},
    ]
    if isinstance(objective, DPO | PairwiseReward):
        return text
    return ["some text to learn from", "and some more of it"]


@pytest.mark.parametrize(
    "objective",
    [
        Causal(),
        Masked(),
        Masked(whole_words=True),
        Hybrid(),
        MaskedDiffusion(),
        Denoisers(sentinels=4),
        DPO(),
        PairwiseReward(),
    ],
    ids=lambda o: type(o).__name__,
)
def test_the_shapes_of_a_batch_are_those_that_data_has(objective, mesh):
    head = "score" if isinstance(objective, PairwiseReward) else "plain"
    config = ModelConfig(vocab=300, layers=1, d_model=16, heads=2, max_length=64, head=head)
    model = transformer(config, ByteTokenizer(), mesh).initialized()
    objective = objective.resolved(model)
    batches = objective.pack(objective.rows(given(objective), ByteTokenizer()), model, 64)
    batches.begin(2, 0)
    found = batches.next(0, model.params, None)
    said = objective.shapes(2, 64)
    assert {k: v.shape for k, v in said.items() if k in found} == {k: np.shape(v) for k, v in found.items()}
    assert set(said) - set(found) <= {"loss"}  # weights, where not every token counts
    getattr(batches, "close", lambda: None)()


@pytest.mark.parametrize("objective", [PolicyGradient(beta=0.1), PolicyGradient(signal="gae"), SelfDistill()])
def test_policies_and_self_distillation_compile_without_data(objective, mesh):
    work = Training("", transformer_network(SMALL), TrainConfig(batch=4), 1.0, objective)
    _, traced = compiled(work, mesh)
    assert flops(traced.jaxpr) > 0


# ---- topologies and the command


def test_topologies_by_shape_and_by_count():
    sizes = {"v5e:4x4": 16, "v5e-256": 256, "v5p-128": 64, "v5p:2x2x4": 16, "v6e-8": 8, "tpu7x:4x4x4": 128,
             "v4-16": 8, "gpu-h100:8": 8, "gpu-h200:8x4": 32, "v5litepod-16": 16}  # fmt: skip
    assert {name: topology(name).devices for name in sizes} == sizes
    assert topology("v5e-256").shape == (16, 16) and topology("v5p-128").shape == (4, 4, 4)
    assert topology("gpu-h200:8x4").per_machine == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "kinds: v4, v5e"),
        ("v5e", "KIND:SHAPE"),
        ("v5e-7", "7 chips are no usual slice"),
        ("v5p:2x2", "3 dimensions"),
        ("gpu-h100:9", "at most 8 GPUs"),
        ("v5e:0x4", "positive"),
    ],
)
def test_what_is_no_topology_says_so(name, message):
    with pytest.raises(InputError, match=message):
        topology(name)


def test_a_plan_for_gpus_on_the_command_line(capsys):
    assert cli.main(["plan", str(QUICKSTART), "--topology", "gpu-h100:8", "mesh.fsdp=2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["devices"] == 8 and made["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1} and made["fits"] is True
    assert set(made["programs"]) >= {"train", "prefill", "decode", "score"}
    train = made["programs"]["train"]
    assert train["estimated"] is True and train["bytes"]["total"] < train["bytes"]["limit"]
    assert 0 < train["mfu_ceiling"] <= 1 and train["flops"] > 0
    seconds = sum(p["seconds"] * p["calls"] for p in made["programs"].values())
    assert made["hours"] == pytest.approx(seconds / 3600)
    assert cli.main(["plan", str(QUICKSTART), "--topology", "gpu-h100:8"]) == 0
    text = capsys.readouterr().out
    assert "estimated by formulas" in text and "GPU-hours" in text and "fits" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "gpu-h100:9"], "at most 8"),
        (
            ["--topology", "gpu-h100:8", "mesh.data=1", "mesh.tensor=8"],
            "model.heads=2 is not divisible by mesh.tensor=8",
        ),
        (["--topology", "gpu-h100:8", "mesh.data=3"], "needs|uses 3 of the 8"),
        (["--topology", "gpu-h100:8", "mesh.tensor=16"], "does not divide the 8 devices in gpu-h100:8"),
    ],
)
def test_bad_plans_are_one_message(words, message, capsys):
    assert cli.main(["plan", str(QUICKSTART), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_what_does_not_fit_says_what_would():
    config = load_config(
        str(ROOT / "configs" / "scale" / "llama-3-8b.yaml"),
        ["mesh.data=-1", "mesh.fsdp=1", "mesh.tensor=1", "train.batch=64"],
    )
    found = plan(config, "gpu-h100:8")
    assert not found.fits and "mesh.data=1 mesh.fsdp=8" in found.remedy
    words = found.remedy.split()
    again = plan(
        load_config(str(ROOT / "configs" / "scale" / "llama-3-8b.yaml"), ["mesh.tensor=1", "train.batch=64", *words]),
        "gpu-h100:8",
    )
    assert again.fits
    too_much = load_config(
        str(ROOT / "configs" / "scale" / "llama-3-70b.yaml"), ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1"]
    )
    assert plan(too_much, "gpu-h100:1").remedy is None


def test_an_estimate_knows_of_logits_in_pieces():
    """By its objective, or by the key of the config that says the same."""
    c, place = SMALL.model_copy(update={"vocab": 65536}), topology("gpu-h100:1")
    mesh, network = place.mesh(MeshConfig()), transformer_network(c)
    key = TrainConfig(batch=64, objective={"name": "causal", "pieces": True})
    work = [
        Training("", network, TrainConfig(batch=64)),
        Training("", network, key),
        Training("", network, TrainConfig(batch=64), 1.0, Causal(pieces=True)),
    ]
    whole, by_key, pieces = (figures(programs_of([w], mesh, GIB)[0], mesh, place).temporaries for w in work)
    assert by_key == pieces < whole / 4


def test_meshes_are_ranked():
    config = load_config(str(ROOT / "configs" / "scale" / "llama-3-8b.yaml"), ["train.gradient_accumulation=8"])
    found = search(config, "gpu-h100:8")
    assert found[0].fits and found[0].hours <= found[1].hours
    assert all(c.mesh.data * c.mesh.fsdp * c.mesh.tensor == 8 for c in found)
    assert not next(c for c in found if c.mesh.data == 8).fits  # 8 B in float32 with its moments on every GPU


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-3-70b", "qwen3-30b-a3b"])
def test_the_scale_configs_have_the_size_of_their_names(name):
    from recursive_jax.models.model import parameter_count
    from recursive_jax.plan.plan import work_of

    sizes = {"smollm2-135m": 134.5e6, "llama-3.2-1b": 1.236e9, "llama-3-8b": 8.03e9, "llama-3-70b": 70.55e9,
             "qwen3-30b-a3b": 30.5e9}  # fmt: skip
    work = work_of(load_config(str(ROOT / "configs" / "scale" / f"{name}.yaml"), []))
    assert parameter_count(work[0].network) == pytest.approx(sizes[name], rel=0.005)
    assert any(isinstance(item, Reading) for item in work)


# ---- hardware that is not here, compiled for


@pytest.mark.parity
def test_a_run_compiles_for_a_tpu():
    pytest.importorskip("libtpu")
    c = ModelConfig(vocab=1024, layers=2, d_model=256, heads=4, kv_heads=2, max_length=256, scan=True, remat="full")
    place = topology("v5e:2x2")
    mesh = place.mesh(MeshConfig(data=1, fsdp=-1))
    network = transformer_network(c)
    work = [Training("", network, TrainConfig(batch=16)), Writing("", network, SamplingConfig(batch=64), 64, 16, 64)]
    train, prefill, decode = (figures(p, mesh, place) for p in programs_of(work, mesh, place.chip.memory))
    assert not train.estimated and all(p.fits for p in (train, prefill, decode))
    layer = 2 * (c.d_model * c.K * (2 * c.heads + 2 * c.G) + 3 * c.d_model * c.F)  # bytes of bfloat16 matrices
    passes = sum(train.collectives.values()) / (3 / 4 * c.layers * layer)
    assert 2 <= passes <= 8  # gathered for two or three passes, gradients in bfloat16 or float32, and the table's
    assert decode.collectives.get("all-gather", 0) == 0  # its weights are whole
    assert train.flops == pytest.approx(train.model_flops * 4 / 3, rel=0.1)


@pytest.mark.parity
def test_what_is_too_large_for_a_tpu_says_by_how_much():
    pytest.importorskip("libtpu")
    c = ModelConfig(vocab=256, layers=1, d_model=4096, heads=32, d_ff=400_000, max_length=128)
    place = topology("v5e-1")
    mesh = place.mesh(MeshConfig(data=1))
    (program,) = programs_of([Training("", transformer_network(c), TrainConfig(batch=8))], mesh, place.chip.memory)
    found = figures(program, mesh, place)
    assert not found.fits and found.total > 12 * 4.9e9 and math.isfinite(found.total)
