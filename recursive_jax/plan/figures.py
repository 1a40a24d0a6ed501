"""What one program takes on one device of a topology: compiled for it, or estimated."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from typing import Any

import jax

from recursive_jax.plan import estimate
from recursive_jax.plan.count import flops
from recursive_jax.plan.hlo import Module
from recursive_jax.plan.programs import Program, device_bytes
from recursive_jax.plan.topology import GIB, Topology, other_flags_hidden


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one call, per device, in bytes, FLOPs and seconds. parts: what the memory holds, by name; total against limit
    says whether it fits. flops: executed ones, model_flops: without those done again to save memory. memory: bytes read
    and written. collectives: received, by kind. estimated: not compiled. buffers: the largest ones of a program that
    does not fit. note: what of it is less sure."""

    kind: str
    name: str
    calls: float
    positions: float
    parts: dict[str, float]
    arguments: float
    temporaries: float
    total: float
    limit: float
    flops: float
    model_flops: float
    memory: float
    collectives: dict[str, float]
    bounds: dict[str, float]
    peak: float
    estimated: bool
    compile_seconds: float = 0.0
    buffers: tuple[str, ...] = ()
    note: str = ""

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    @property
    def seconds(self) -> float:
        """The roofline: what is slowest, if all else hides behind it."""
        return max(self.bounds.values())

    @property
    def bound(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def mfu_ceiling(self) -> float:
        """The most of the peak that the model's own FLOPs can be."""
        return self.model_flops / (self.seconds * self.peak) if self.seconds else 0.0

    @property
    def run_seconds(self) -> float:
        return self.calls * self.seconds


def figures(program: Program, mesh: Any, where: Topology) -> Figures:
    """Compiles a program for a topology and reads it, or estimates it where nothing can be compiled."""
    if not where.compiles:
        return estimated(program, mesh, where)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = program.function.trace(*program.arguments)
        lowered = traced.lower()
    done = flops(traced.jaxpr, program.network.causal, program.loop) / where.devices
    hidden = other_flags_hidden() if where.kind != "here" else contextlib.nullcontext()
    try:
        with hidden:
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        too_large = _too_large(str(error))
        if too_large is None:
            raise
        total, buffers = too_large
        seconds, found = time.perf_counter() - start, estimated(program, mesh, where, done)
        rest = max(total - found.arguments, 0.0)
        parts = {**program.parts, "activations": rest}
        return dataclasses.replace(
            found, parts=parts, temporaries=rest, total=total, compile_seconds=seconds, buffers=buffers
        )
    stats = compiled.memory_analysis()
    moved, note = _traffic(compiled, program, mesh, where)
    arguments = float(stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes)
    temporaries = float(stats.temp_size_in_bytes + stats.generated_code_size_in_bytes)
    made = _made(program, where, done, moved, where.chip.link, arguments, temporaries)
    parts = {**program.parts, "activations": float(stats.temp_size_in_bytes)}
    return dataclasses.replace(made, parts=parts, compile_seconds=time.perf_counter() - start, note=note)


def estimated(program: Program, mesh: Any, where: Topology, done: float | None = None) -> Figures:
    """By formulas. done: FLOPs of a device, where they were counted."""
    moved = estimate.traffic(program, dict(mesh.shape), where)
    if done is None:
        done = estimate.done_again(program) * program.flops / where.devices
    made = _made(program, where, done, moved, moved.link, device_bytes(program.arguments), moved.temporaries)
    return dataclasses.replace(made, estimated=True)


def _made(
    program: Program, where: Topology, done: float, moved: Any, link: float, arguments: float, temporaries: float
) -> Figures:
    """moved: bytes by `collectives` and of `memory`; link: bytes/s that a device receives."""
    chip, collectives = where.chip, {kind: size for kind, size in sorted(moved.collectives.items()) if size}
    peak = chip.peak_of(program.dtype)
    bounds = {
        "compute": done / peak,
        "memory": moved.memory / chip.bandwidth,
        "collectives": sum(collectives.values()) / link,
    }
    return Figures(
        program.kind, program.name, program.calls, program.positions, {**program.parts, "activations": temporaries},
        arguments, temporaries, arguments + temporaries, chip.memory, done, min(program.flops / where.devices, done),
        moved.memory, collectives, bounds, peak, estimated=False,
    )  # fmt: skip


def _traffic(compiled: Any, program: Program, mesh: Any, where: Topology) -> tuple[Any, str]:
    """What it moves, read from the compiled program; or, where this jaxlib cannot read it, estimated."""
    try:
        return Module(compiled.as_text()).traffic(program.loop), ""
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        note = f"collectives and traffic are estimated: the compiled program cannot be read ({str(error)[:120]})"
        return estimate.traffic(program, dict(mesh.shape), where), note


_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40, "": 1}


def _too_large(message: str) -> tuple[float, tuple[str, ...]] | None:
    """(bytes that a program wants, its largest buffers) from libtpu's refusal of it; None: it refuses otherwise."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    number = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {number} of {number} hbm|\({number}\) exceeds available", message)
    amount, unit = (found[1] or found[5], found[2] or found[6]) if found else ("inf", "")
    wanted = float(amount) * _UNITS[unit]
    sizes = re.findall(r"Size: ([^\n]+)", message)
    shapes = re.findall(r"Shape: ([^\n]+)", message)
    names = re.findall(r'op_name="([^"]*)"', message)
    rows = zip(sizes, shapes, [*names, *[""] * len(sizes)], strict=False)
    return wanted, tuple(f"{size.strip()}  {shape.strip()}  {name}".rstrip() for size, shape, name in list(rows)[:5])
