"""The run's real programs, as they would be compiled on a mesh: its train steps, prefills, decode loops and scoring,
with the shapes and layouts of their arguments and no value of any."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P
from jax.sharding import Mesh

from recursive_jax import mesh as meshes
from recursive_jax.config import SamplingConfig
from recursive_jax.generate import engine, programs, score
from recursive_jax.generate.decoder import decoder
from recursive_jax.generate.prefill import PIECE, bucket, cache_slots, prefill_rows, whole_weights
from recursive_jax.generate.sampling import History, Rules, used_rules
from recursive_jax.models.lora import abstract_adapted
from recursive_jax.models.model import Model, abstract_params
from recursive_jax.models.network import Network, TransformerNetwork
from recursive_jax.objectives.base import Extra
from recursive_jax.plan.stand_in import StandIn
from recursive_jax.rounds.work import Reading, Training, Work, Writing
from recursive_jax.train.loop import check_batch, resolved_objective
from recursive_jax.train.optimizer import Hyper
from recursive_jax.train.step import init_program, split, start_program, step_program


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the run. kind: train, prefill, decode or score. function, arguments: what is compiled, and for
    what. calls: how often the run calls it. positions: tokens of one call. flops: of the model in one call, over all
    devices; what is computed twice, to save memory, counts once. parts: bytes per device of what lies in memory, by
    name, as far as they are arguments. loop: how often a loop without a fixed length runs in one call. in_pieces:
    logits are never held whole."""

    kind: str
    name: str
    network: Network
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: float
    positions: float
    flops: float
    parts: dict[str, float]
    dtype: str
    micro_batches: int = 1
    loop: int = 1
    in_pieces: bool = False


def programs_of(work: Sequence[Work], mesh: Mesh, memory: float) -> list[Program]:
    """All of a run, equal ones once. memory: bytes of a device. Raises InputError where a dimension does not fit."""
    found: dict[Any, Program] = {}
    for item in work:
        for program in _PROGRAMS[type(item)](item, mesh, memory):
            key = (program.kind, program.network, program.function, _shape(program.arguments))
            before = found.get(key)
            calls = program.calls + (before.calls if before else 0.0)
            found[key] = dataclasses.replace(before or program, calls=calls)
    return list(found.values())


def _training(item: Training, mesh: Mesh, memory: float) -> list[Program]:
    network, dtype = item.network, meshes.resolve_dtype(item.train.dtype, mesh)
    check_batch(item.train, mesh)
    rows, length = item.train.batch, item.length
    model = Model(network, StandIn(network.vocab), mesh=mesh)
    objective = resolved_objective(item.objective, item.train, model)
    key, hyper = _everywhere(mesh, jax.eval_shape(lambda: (jax.random.key(0), Hyper.of(item.train, 0))))
    params = abstract_adapted(network, mesh) if network.frozen else abstract_params(network, mesh)
    own = lambda key, params: dataclasses.astuple(objective.init(key, dataclasses.replace(model, params=params)))
    extra = Extra(*meshes.abstract(mesh, own, key, params))
    trained, frozen = split(network, params)
    if network.frozen:
        state = meshes.abstract(mesh, start_program(), trained, extra.params, extra.state, hyper)
    else:
        state = meshes.abstract(mesh, init_program(network), key, extra.params, extra.state, hyper)
    batch = {name: _batch(mesh, shape) for name, shape in objective.shapes(rows, length).items()}
    held = {name: abstract_params(other, mesh) for name, other in item.held}
    step = step_program(network, objective.static(), item.train.gradient_accumulation, dtype, item.held)
    parts = {"params": device_bytes((params, extra.params, held)), "optimizer": device_bytes(state.optimizer)}
    sequences = sum(math.prod(s.shape[:-1]) for n, s in batch.items() if n.endswith("tokens"))
    forward = network.train_flops_per_token(length) or 0.0
    frozen_flops = sum((other.train_flops_per_token(length) or 0.0) / 3 for _, other in item.held)
    flops = sequences * length * (forward + frozen_flops)
    name = item.name or "training"
    arguments = (state, batch, frozen, held)
    made = Program("train", name, network, step, arguments, item.steps, sequences * length, flops, parts, dtype)
    pieces = getattr(objective, "pieces", False)
    return [dataclasses.replace(made, micro_batches=item.train.gradient_accumulation, in_pieces=pieces)]


def _writing(item: Writing, mesh: Mesh, memory: float) -> list[Program]:
    network, sampling = item.network, item.sampling
    if isinstance(network, TransformerNetwork):
        network = network.plain  # an adapter is merged before it writes
    sampling = engine.slots_for(sampling, max(1, math.ceil(item.rows)))
    dtype, divisor = meshes.resolve_dtype(sampling.dtype, mesh), meshes.batch_divisor(mesh)
    B = sampling.batch + (-sampling.batch % divisor)
    params = abstract_params(network, mesh)
    whole = whole_weights(sampling.weights, params, dtype, mesh, memory)
    prepared = meshes.abstract(mesh, lambda p: decoder(network, dtype).prepare(p, whole), params)
    width = min(PIECE, bucket(item.prompt))
    pieces = -(-item.prompt // width)
    U = prefill_rows(width, B, divisor)
    slots = cache_slots(min(item.prompt + item.new, network.max_length), network.layers, network.max_length)
    begin = cache_slots(width * pieces, network.layers, network.max_length)
    read = programs.prefill_program(network, dtype, U, begin, True)
    piece = (prepared, None, _batch(mesh, jax.ShapeDtypeStruct((U, width), jnp.int32)), _batch(mesh, _rows(U)))
    terms = jax.tree.map(lambda x: _batch(mesh, x), terms_of(sampling, B, programs.padded_vocab(network)))
    state = meshes.abstract(mesh, programs.empty_program(network, None, dtype, B, slots), terms)
    most = sampling.chunk * engine.LAST
    decode = programs.decode_program(network, None, dtype, most, None, meshes.platform(mesh))
    keep = _batch(mesh, jax.ShapeDtypeStruct((B,), jnp.bool_))
    ids = _everywhere(mesh, jax.ShapeDtypeStruct((1,), jnp.int32))
    arguments = (prepared, None, state, keep, jax.ShapeDtypeStruct((), jnp.int32), ids)
    per_token = (network.train_flops_per_token(slots) or 0.0) / 3
    weights = {"params": device_bytes(prepared)}
    cache = {**weights, "cache": device_bytes(state.memory)}
    calls = math.ceil(item.rows / B) * math.ceil(item.new / most)
    head = 2.0 * network.config.E * network.config.V if isinstance(network, TransformerNetwork) else 0.0
    model_flops = U * width * per_token - head * U * (width - 1)  # of a prompt only the last position needs it
    reads, tokens, written = math.ceil(item.rows / U) * pieces, U * width, B * most
    prefill = Program("prefill", item.name, network, read, piece, reads, tokens, model_flops, weights, dtype)
    flops = written * per_token
    return [
        prefill,
        Program("decode", item.name, network, decode, arguments, calls, written, flops, cache, dtype, loop=most),
    ]


def terms_of(sampling: SamplingConfig, B: int, V: int) -> programs.Terms:
    """The terms of B rows of the same settings, as shapes."""
    uses = used_rules([sampling])
    rules = Rules.of([sampling] * B, [[]] * B).replace(uses=uses)
    history = History.of([np.zeros(1, np.int32)] * B, V, uses, 0)
    number = lambda kind: np.zeros(B, kind)
    return programs.Terms(
        key_BX=np.zeros((B, 2), np.uint32),
        position_B=number(np.int32),
        length_B=number(np.int32),
        limit_B=number(np.int32),
        stops_BK=np.zeros((B, 1), np.int32),
        weight_B=number(np.float32),
        done_B=number(bool),
        rules=rules,
        history=history,
    )


def _reading(item: Reading, mesh: Mesh, memory: float) -> list[Program]:
    network = item.network
    if isinstance(network, TransformerNetwork):
        network = network.plain
    dtype = "float32"  # of `rj.token_logprobs`, wherever it runs
    params = abstract_params(network, mesh)
    B, T = score.rows_at_once(item.length, network.vocab, meshes.batch_divisor(mesh)), item.length
    rows = _batch(mesh, jax.ShapeDtypeStruct((B, T + 1), jnp.int32))
    flops = B * T * (network.train_flops_per_token(T) or 0.0) / 3
    parts = {"params": device_bytes(params)}
    program = score.logprob_program(network, dtype)
    calls = math.ceil(item.tokens / (B * T))
    return [
        Program("score", item.name, network, program, (params, rows, rows, True), calls, B * T, flops, parts, dtype)
    ]


_PROGRAMS: dict[type, Callable[[Any, Mesh, float], list[Program]]] = {
    Training: _training,
    Writing: _writing,
    Reading: _reading,
}


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of shapes on one device."""
    total = 0.0
    for x in (x for x in jax.tree.leaves(tree) if hasattr(x, "shape")):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        total += math.prod(shape) * x.dtype.itemsize
    return total


def _shape(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(
        (x.shape, str(x.dtype), getattr(x, "sharding", None)) for x in leaves if hasattr(x, "shape")
    )


def _rows(n: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((n,), jnp.int32)


def _batch(mesh: Mesh, x: Any) -> jax.ShapeDtypeStruct:
    """As `put_batch` lays it."""
    layout = NamedSharding(mesh, P(meshes.BATCH, *(None,) * (len(x.shape) - 1)))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)


def _everywhere(mesh: Mesh, tree: Any) -> Any:
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
    return jax.tree.map(place, tree)
