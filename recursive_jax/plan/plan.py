"""`plan(config, "v5e:4x4")`: what a run would take on hardware that is not here; whether it fits, how long it would
take at best, and what would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from recursive_jax.config import MeshConfig
from recursive_jax.errors import InputError
from recursive_jax.models.network import TransformerNetwork, check_mesh, transformer_network
from recursive_jax.objectives.causal import Causal, causal
from recursive_jax.plan.figures import Figures, figures
from recursive_jax.plan.programs import programs_of
from recursive_jax.plan.topology import Topology, topology
from recursive_jax.recipes import recipe_of
from recursive_jax.rounds.work import Training, Work, Writing


@dataclasses.dataclass(frozen=True)
class Plan:
    """programs: the figures of each. remedy: the cheapest change that makes it fit, as key=value words; None: it fits,
    or nothing that was tried helps. sought: whether one was looked for."""

    topology: Topology
    mesh: dict[str, int]
    programs: tuple[Figures, ...]
    remedy: str | None = None
    sought: bool = True

    @property
    def fits(self) -> bool:
        return all(p.fits for p in self.programs)

    @property
    def hours(self) -> float:
        """Of the whole run on its devices at the roofline; compiling, evaluation on the host and checkpoints come on
        top."""
        return sum(p.run_seconds for p in self.programs) / 3600

    def to_json(self) -> dict[str, Any]:
        """Of each program by kind (a second one of a kind by kind and name): all per device."""
        named: dict[str, Figures] = {}
        for program in self.programs:
            named[program.kind if program.kind not in named else f"{program.kind}: {program.name}"] = program
        return {
            "topology": self.topology.name,
            "chip": self.topology.chip.name,
            "devices": self.topology.devices,
            "mesh": self.mesh,
            "fits": self.fits,
            "programs": {name: _program_json(p) for name, p in named.items()},
            "hours": self.hours,
            "chip_hours": self.hours * self.topology.chips,
            "remedy": self.remedy,
        }


def _program_json(p: Figures) -> dict[str, Any]:
    parts = {name: round(size) if math.isfinite(size) else None for name, size in p.parts.items()}
    memory = {"arguments": p.arguments, "temporaries": p.temporaries, "total": p.total, "limit": p.limit}
    whole = lambda n: round(n) if math.isfinite(n) else None  # the compiler may refuse without a number
    return {
        "name": p.name,
        "bytes": {**{k: whole(v) for k, v in memory.items()}, "parts": parts},
        "flops": p.flops,
        "memory_bytes": p.memory,
        "collectives": {kind: round(size) for kind, size in p.collectives.items()},
        "seconds": p.seconds,
        "bound": p.bound,
        "mfu_ceiling": p.mfu_ceiling,
        "tokens_per_second": p.positions / p.seconds if p.seconds else None,
        "calls": p.calls,
        "estimated": p.estimated,
        "compile_seconds": round(p.compile_seconds, 1),
        "buffers": list(p.buffers),
        "note": p.note,
    }


Progress = Callable[[str], None]


def plan(config: Any, where: str | Topology, *, remedy: bool = True, progress: Progress = lambda line: None) -> Plan:
    """The plan of a run's config (see `rj.load_config`) on a topology (`v5e:4x4`, `gpu-h100:8`). remedy: look for what
    makes it fit, if it does not: each try compiles. progress: told what is compiled.

    Raises InputError for a topology that is unknown or that the mesh does not fill, a recipe that does not say what it
    does, and a model that the mesh does not divide."""
    place = topology(where) if isinstance(where, str) else where
    work = work_of(config)
    found = dataclasses.replace(_planned(work, config.mesh, place, progress), sought=remedy)
    if remedy and not found.fits:
        words = next(_remedies(work, config, place, found, progress), None)
        found = dataclasses.replace(found, remedy=words)
    return found


def work_of(config: Any) -> list[Work]:
    """What the run of a config does on its devices. Raises InputError where its recipe does not say."""
    recipe = recipe_of(config)
    found = [item for item in recipe.cost(config) if not isinstance(item, str)]
    if not found:
        raise InputError(f"recipe {recipe.name} does not say what it does on its devices (its `cost` gives no work)")
    return found


def _planned(work: list[Work], mesh_config: MeshConfig, place: Topology, progress: Progress) -> Plan:
    mesh = place.mesh(mesh_config)
    for network in dict.fromkeys(item.network for item in work):
        check_mesh(network, mesh)
    found = []
    for program in programs_of(work, mesh, place.chip.memory):
        progress(f"{program.kind} ({program.name})")
        found.append(figures(program, mesh, place))
    return Plan(place, dict(mesh.shape), tuple(found))


@dataclasses.dataclass(frozen=True)
class _Change:
    """A change of a run, as words for the command line, and what becomes of its work and mesh."""

    words: str
    work: Callable[[list[Work]], list[Work]] = lambda work: work
    mesh: MeshConfig | None = None


def _remedies(work: list[Work], config: Any, place: Topology, first: Plan, progress: Progress) -> Iterator[str]:
    """Changes that make the run fit, the cheapest first; each is seen to."""
    large = {p.kind for p in first.programs if not p.fits}
    for change in _changes(work, config, place, large):
        try:
            progress(f"with {change.words}")
            tried = _planned(change.work(work), change.mesh or config.mesh, place, progress)
        except InputError:
            continue
        if tried.fits:
            yield change.words


def _changes(work: list[Work], config: Any, place: Topology, large: set[str]) -> Iterator[_Change]:
    trainings = [item for item in work if isinstance(item, Training)]
    shape = dict(place.mesh(config.mesh).shape)
    spread = MeshConfig(data=1, fsdp=-1, tensor=shape["tensor"])
    if shape["data"] > 1:
        yield _Change(f"mesh.data=1 mesh.fsdp={shape['data'] * shape['fsdp']}", mesh=spread)
    steps: list[_Change] = []
    if "train" in large:
        if any(getattr(getattr(t.network, "config", None), "remat", "full") != "full" for t in trainings):
            steps.append(_Change("model.remat=full model.scan=true", _with_remat))
        if any(_is_causal(t) and t.network.vocab > 8192 for t in trainings):
            steps.append(_Change("'train.objective={name: causal, pieces: true}'", _in_pieces))
        most = min((t.train.batch // (shape["data"] * shape["fsdp"]) for t in trainings), default=1)
        for n in (2, 4, 8, 16, 32):
            if n <= most:
                steps.append(_Change(f"train.gradient_accumulation={n}", lambda work, n=n: _accumulating(work, n)))
    if large & {"decode", "prefill"}:
        for rows in (128, 64, 32, 16, 8):
            steps.append(_Change(f"sampling.batch={rows}", lambda work, rows=rows: _with_rows(work, rows)))
    yield from steps
    for change in steps:
        if shape["data"] > 1:
            yield _Change(f"mesh.data=1 mesh.fsdp={shape['data'] * shape['fsdp']} {change.words}", change.work, spread)
    for tensor in (2, 4, 8):
        if place.devices % tensor == 0 and tensor > shape["tensor"]:
            for change in (_Change(""), *steps):
                words = f"mesh.data=1 mesh.fsdp={place.devices // tensor} mesh.tensor={tensor} {change.words}".strip()
                yield _Change(words, change.work, MeshConfig(data=1, fsdp=-1, tensor=tensor))


def _networks(work: list[Work], change: Callable[[Any], Any]) -> list[Work]:
    def of(network: Any) -> Any:
        if not isinstance(network, TransformerNetwork):
            return network
        return transformer_network(network.config.model_copy(update=change(network.config)), network.lora)

    return [dataclasses.replace(item, network=of(item.network)) for item in work]


def _with_remat(work: list[Work]) -> list[Work]:
    return _networks(work, lambda config: {"remat": "full", "scan": True})


def _is_causal(item: Training) -> bool:
    return item.objective == causal and not item.train.objective and item.train.truncate == 1.0


def _in_pieces(work: list[Work]) -> list[Work]:
    pieces = lambda t: dataclasses.replace(t, objective=Causal(pieces=True)) if _is_causal(t) else t
    return [pieces(item) if isinstance(item, Training) else item for item in work]


def _accumulating(work: list[Work], n: int) -> list[Work]:
    more = lambda t: dataclasses.replace(t, train=t.train.model_copy(update={"gradient_accumulation": n}))
    return [more(item) if isinstance(item, Training) else item for item in work]


def _with_rows(work: list[Work], rows: int) -> list[Work]:
    fewer = lambda w: dataclasses.replace(w, sampling=w.sampling.model_copy(update={"batch": rows}))
    return [fewer(item) if isinstance(item, Writing) and item.sampling.batch > rows else item for item in work]
