"""What a program moves and holds, by formulas: where nothing is there to compile for, and to rank meshes before any is
compiled. A Transformer's; of other networks the params alone."""

from __future__ import annotations

import dataclasses
import math

from recursive_jax.models.flops import matmul_parameters
from recursive_jax.models.network import TransformerNetwork
from recursive_jax.models.read import HELD
from recursive_jax.plan.programs import Program, device_bytes
from recursive_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Per device and call, in bytes: received, by kind; read from memory and written; temporaries. link: bytes/s that a
    device receives, over the axes in use."""

    collectives: dict[str, float]
    memory: float
    temporaries: float
    link: float


def traffic(program: Program, shape: dict[str, int], where: Topology) -> Estimate:
    """shape: devices along data, fsdp and tensor."""
    data, fsdp, tensor = shape["data"], shape["fsdp"], shape["tensor"]
    width = 2 if program.dtype == "bfloat16" else 4
    others = lambda n: (n - 1) / n
    link = where.chip.link if math.prod(shape.values()) <= where.per_machine else where.chip.network
    network = program.network
    stored = device_bytes(program.arguments)
    if not isinstance(network, TransformerNetwork):
        return Estimate({}, 2 * stored, stored, link)
    c = network.config
    weights = matmul_parameters(c) + (0 if c.tied else c.E * c.V)
    layer = (matmul_parameters(c) - c.E * c.V) / c.layers
    rows = program.positions / (data * fsdp)
    moved: dict[str, float] = {}
    if program.kind == "train":
        micro = max(1, program.micro_batches)
        passes = 3 if c.remat == "full" else 2
        states = rows * c.d_model * width
        moved["all-gather"] = others(fsdp) * weights / tensor * 2 * passes * micro
        moved["reduce-scatter"] = others(fsdp) * weights / tensor * 4
        moved["all-reduce"] = 2 * others(data) * weights * 4 / (fsdp * tensor)
        moved["all-reduce"] += 2 * others(tensor) * states * c.layers * 2 * passes
        kept = {"none": 12 * c.d_model + 4 * c.F, "dots": 5 * c.d_model + 3 * c.F, "full": 1 * c.d_model}[c.remat]
        at_once = rows / micro
        values = min(HELD, at_once * c.V / tensor) if program.in_pieces else at_once * c.V / tensor
        logits = values * 10  # in float32, in the compute dtype, and their gradient
        activations = at_once * c.layers * kept * width / (1 if c.remat == "full" else tensor)
        gathered = 2 * layer / tensor * width
        gradients = weights * 4 / (fsdp * tensor)
        held = activations + max(logits, at_once * (16 * c.d_model + 6 * c.F / tensor) * width) + gathered + gradients
        memory = passes * micro * weights / tensor * width + 7 * gradients + 3 * logits * micro
        memory += passes * rows * c.layers * (14 * c.d_model + 5 * c.F / tensor) * width
        return Estimate(_some(moved), memory, held, link)
    states = rows * c.d_model * width
    whole = program.parts["params"] > 1.5 * weights * width / (fsdp * tensor)  # on every shard, while it writes
    loop = program.loop
    moved["all-gather"] = 0.0 if whole else loop * others(fsdp) * weights / tensor * width
    moved["all-reduce"] = 2 * others(tensor) * states * c.layers * 2
    gathered = 0.0 if whole else weights / tensor * width
    memory = loop * (stored + gathered) + rows * c.layers * (10 * c.d_model + 3 * c.F / tensor) * width
    rows /= loop
    held = 2 * layer / tensor * width + rows * (12 * c.d_model + 4 * c.F / tensor + c.V / tensor * 2) * 4
    return Estimate(_some(moved), memory, held, link)


def done_again(program: Program) -> float:
    """FLOPs of a training over the model's own: layers run once more to save memory."""
    remat = getattr(getattr(program.network, "config", None), "remat", "none")
    return 4 / 3 if program.kind == "train" and remat == "full" else 1.0


def _some(moved: dict[str, float]) -> dict[str, float]:
    return {kind: size for kind, size in moved.items() if size}
