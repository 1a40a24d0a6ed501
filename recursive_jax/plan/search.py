"""Which mesh is fastest: every split of the devices over data, fsdp and tensor, ranked by estimate; the best ones are
compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

from recursive_jax.config import MeshConfig
from recursive_jax.errors import InputError
from recursive_jax.plan.figures import estimated
from recursive_jax.plan.plan import Plan, Progress, plan, work_of
from recursive_jax.plan.programs import programs_of
from recursive_jax.plan.topology import Topology, topology

COMPILED = 3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh, the hours that the run would take on it, whether it would fit; compiled: what the compiler says of it."""

    mesh: MeshConfig
    hours: float
    fits: bool
    compiled: Plan | None = None

    @property
    def words(self) -> str:
        return f"mesh.data={self.mesh.data} mesh.fsdp={self.mesh.fsdp} mesh.tensor={self.mesh.tensor}"


def search(
    config: Any, where: str | Topology, *, compiled: int = COMPILED, progress: Progress = lambda line: None
) -> list[Candidate]:
    """Meshes for the run of a config, the best first: those that are compiled, then those that would fit, then the
    others. compiled: how many of the best are compiled; of a GPU none is. Raises InputError as `plan`, and where no
    mesh divides the model."""
    place = topology(where) if isinstance(where, str) else where
    work = work_of(config)
    found = [c for c in (_estimated(work, mesh, place) for mesh in _meshes(place.devices)) if c is not None]
    if not found:
        raise InputError(f"no mesh of {place.devices} devices divides this run's model and batches")
    found.sort(key=lambda c: (not c.fits, c.hours))
    best = found[: compiled if place.compiles else 0]
    tried = []
    for candidate in best:
        progress(candidate.words)
        made = plan(config.model_copy(update={"mesh": candidate.mesh}), place, remedy=False, progress=progress)
        tried.append(dataclasses.replace(candidate, hours=made.hours, fits=made.fits, compiled=made))
    tried.sort(key=lambda c: (not c.fits, c.hours))
    return [*tried, *found[len(best) :]]


def _meshes(devices: int) -> list[MeshConfig]:
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [
        MeshConfig(data=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
        for fsdp in divisors
        for tensor in divisors
        if devices % (fsdp * tensor) == 0
    ]


def _estimated(work: list[Any], mesh: MeshConfig, place: Topology) -> Candidate | None:
    """None: the model or a batch is not divided by it."""
    device = place.mesh(mesh)
    if any(item.network.mesh_problems(device) for item in work):
        return None
    try:
        programs = programs_of(work, device, place.chip.memory)
    except InputError:
        return None
    found = [estimated(program, device, place) for program in programs]
    return Candidate(mesh, sum(f.run_seconds for f in found) / 3600, all(f.fits for f in found))
