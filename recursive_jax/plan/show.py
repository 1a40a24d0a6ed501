"""A plan as a page for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from recursive_jax.plan.figures import Figures
from recursive_jax.plan.plan import Plan
from recursive_jax.plan.search import Candidate
from recursive_jax.plan.topology import GIB


def text_of(plan: Plan) -> str:
    """What `recursive-jax plan` prints."""
    place, mesh = plan.topology, " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
    estimated = all(p.estimated for p in plan.programs)
    how = "estimated by formulas, nothing was compiled" if estimated else "compiled for it; no device was needed"
    lines = [f"{place.name}: {place.devices} devices of {place.chip.name}, mesh {mesh}; {how}"]
    for program in plan.programs:
        lines += ["", *_program(program)]
    lines += ["", f"{'whole run':<12} {_time(plan.hours * 3600)} at the roofline, {plan.hours * place.chips:,.2f} "
              f"{'GPU' if place.chip.platform == 'gpu' else 'chip'}-hours"]  # fmt: skip
    too_large = [p for p in plan.programs if not p.fits]
    if not too_large:
        lines.append(f"{'memory':<12} fits: at most {max(p.total / p.limit for p in plan.programs):.0%} of a device")
    for p in too_large:
        over = f"{_size(p.total - p.limit)} too much" if p.total != float("inf") else "too large"
        lines.append(f"{'memory':<12} {p.kind} ({p.name}) does not fit: {over}")
        lines += [f"{'':<12} {buffer}" for buffer in p.buffers]
    if too_large and plan.sought:
        lines.append(f"{'remedy':<12} {plan.remedy or 'none of the changes that were tried makes it fit'}")
    return "\n".join(lines)


def _program(p: Figures) -> list[str]:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in p.parts.items() if size)
    moved = ", ".join(f"{kind} {_size(size)}" for kind, size in p.collectives.items()) or "none"
    bounds = ", ".join(f"{name} {_time(seconds)}" for name, seconds in p.bounds.items())
    rate = f"{p.positions / p.seconds:,.0f} tokens/s" if p.seconds else ""
    mark = " (estimated)" if p.estimated else f" (compiled in {p.compile_seconds:.0f} s)"
    lines = [f"  {'note':<12} {p.note}"] if p.note else []
    return [
        f"{p.kind}: {p.name}{mark}",
        f"  {'memory':<12} {_size(p.total)} of {_size(p.limit)} a device: {parts}",
        f"  {'FLOPs':<12} {p.flops:.3g} a device, {p.model_flops:.3g} without those done again",
        f"  {'collectives':<12} {moved} received by a device",
        f"  {'roofline':<12} {_time(p.seconds)}, by {p.bound} ({bounds})",
        f"  {'at most':<12} {p.mfu_ceiling:.0%} MFU, {rate}; {p.calls:,.0f} calls, {_time(p.run_seconds)}",
        *lines,
    ]


def table_of(found: Sequence[Candidate], most: int = 12) -> str:
    """What `recursive-jax plan --search` prints."""
    lines = [f"{'mesh':<44} {'hours':>10}  {'':<10} how"]
    for c in found[:most]:
        fits = "fits" if c.fits else "too large"
        how = "compiled" if c.compiled is not None else "estimated"
        lines.append(f"{c.words:<44} {c.hours:>10.3g}  {fits:<10} {how}")
    if len(found) > most:
        lines.append(f"... and {len(found) - most} more")
    return "\n".join(lines)


def _size(n: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:,.2f} {unit}" if n < 100 * size else f"{n / size:,.0f} {unit}"
    return f"{n:,.0f} B"


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds * 1e6:,.3g} us"
