"""Hardware that need not be here: its devices, as JAX compiles for them, and what a data sheet says of one.

    v5e:4x4  v5e-16  v5p:2x2x4  v6e:8x8  tpu7x:4x4x4     TPU slices: compiled for, by libtpu
    gpu-h100:8  gpu-h200:8x4                             GPUs of one machine, and of four: estimated
    here                                                 what this process has: compiled for

A name is read by `topology`; what is known of a kind of device stands in CHIPS."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from recursive_jax import mesh as meshes
from recursive_jax.config import MeshConfig
from recursive_jax.errors import InputError
from recursive_jax.models.flops import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them. peak: bfloat16 FLOP/s; memory: bytes that a program may use; bandwidth: of it,
    bytes/s; link: bytes/s that a device receives from those of its slice (or machine), all its links together; network:
    from beyond; cores: devices of a chip; dimensions: of a slice."""

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    platform: str = "tpu"
    cores: int = 1
    dimensions: int = 2

    def peak_of(self, dtype: str) -> float:
        """FLOP/s in a dtype: TPUs multiply float32 in a bfloat16 pass by default."""
        return self.peak / 2 if self.platform == "gpu" and dtype != "bfloat16" else self.peak


#: From the vendors' pages (cloud.google.com/tpu/docs/system-architecture-tpu-vm; NVIDIA's data sheets of A100, H100,
#: H200 and B200 SXM); links in one direction. Memory of a TPU: what libtpu 0.0.42.1 says is available when a program is
#: too large. Of a GPU: the three quarters that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION).
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1228e9, 300e9, 6.2e9, dimensions=3),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 3.1e9),
    "v5p": Chip("TPU v5p", 459e12, 95.73 * GIB, 2765e9, 600e9, 6.2e9, dimensions=3),
    "v6e": Chip("TPU v6e", 918e12, 31.24 * GIB, 1640e9, 400e9, 12.5e9),
    "tpu7x": Chip("TPU7x", 1153.5e12, 94.74 * GIB, 3685e9, 300e9, 6.2e9, cores=2, dimensions=3),
    "gpu-a100": Chip("NVIDIA A100", 312e12, 59 * GIB, 2039e9, 300e9, 25e9, "gpu"),
    "gpu-h100": Chip("NVIDIA H100", 989e12, 59 * GIB, 3350e9, 450e9, 50e9, "gpu"),
    "gpu-h200": Chip("NVIDIA H200", 989e12, 105 * GIB, 4800e9, 450e9, 50e9, "gpu"),
    "gpu-b200": Chip("NVIDIA B200", 2250e12, 134 * GIB, 8000e9, 900e9, 50e9, "gpu"),
}
#: What JAX calls them, the longer names first.
JAX_KINDS = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v4": "v4", "TPU v5": "v5p", "TPU7x": "tpu7x"}
OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "ironwood": "tpu7x", "v7x": "tpu7x"}
COUNTS_CORES = ("v4", "v5p", "tpu7x")  # Google's names of these count two cores a chip: v5p-128 is 64 chips
GPUS = 8  # of a machine
#: Without these libtpu asks a cloud that is not there, for minutes, and lets one process at a time plan.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or machines. shape: chips along each dimension (GPUs of a machine, machines)."""

    name: str
    chip: Chip
    kind: str
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.chip.cores

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def compiles(self) -> bool:
        """Whether programs are compiled for it, or only estimated."""
        return self.kind == "here" or self.chip.platform == "tpu"

    @property
    def per_machine(self) -> int:
        """Devices that reach one another by `chip.link`."""
        return self.shape[0] if self.chip.platform == "gpu" else self.devices

    def mesh(self, config: MeshConfig) -> Mesh | AbstractMesh:
        """The mesh of a config over it. Raises InputError where it does not fit, or libtpu is missing or refuses."""
        sizes = meshes.mesh_sizes(config, self.devices, f"in {self.name}")
        if math.prod(sizes) < self.devices:
            raise InputError(
                f"mesh {'x'.join(map(str, sizes))} uses {math.prod(sizes)} of the {self.devices} devices of "
                f"{self.name}: name a smaller slice, or leave one axis at -1"
            )
        kinds = (AxisType.Explicit,) * len(sizes)
        if not self.compiles:
            device = AbstractDevice(self.chip.name, None, self.chip.platform)
            return AbstractMesh(tuple(sizes), meshes.AXES, axis_types=kinds, abstract_device=device)
        return Mesh(np.array(self._devices()).reshape(sizes), meshes.AXES, axis_types=kinds)

    def _devices(self) -> list[Any]:
        if self.kind == "here":
            return meshes.all_devices()
        shape = "x".join(map(str, self.shape))
        return _tpu_devices(f"{self.kind}:{shape}", math.prod(self.shape) == 1, self.kind == "v4")


def topology(text: str) -> Topology:
    """Reads a name. Raises InputError that says what is known."""
    if text.strip().lower() == "here":
        return _here()
    found = re.fullmatch(r"([a-z0-9-]*?[a-z][a-z0-9]*)[:-](\d+(?:x\d+)*)", text.strip().lower().replace("×", "x"))
    kind = OTHER_NAMES.get(found[1], found[1]) if found else ""
    if kind not in CHIPS:
        known = ", ".join(CHIPS)
        raise InputError(
            f"--topology {text}: KIND:SHAPE or KIND-COUNT is wanted, as v5e:4x4, v5p-128, gpu-h100:8; kinds: {known}"
        )
    chip, sizes = CHIPS[kind], tuple(int(n) for n in found[2].split("x"))
    if 0 in sizes:
        raise InputError(f"--topology {text}: sizes are positive")
    if chip.platform == "gpu":
        if len(sizes) > 2 or sizes[0] > GPUS:
            raise InputError(f"--topology {text}: GPUS or GPUSxMACHINES, at most {GPUS} GPUs a machine ({kind}:8x4)")
        return Topology(text, chip, kind, sizes)
    if len(sizes) == 1:
        sizes = _slice(text, sizes[0] // 2 if kind in COUNTS_CORES else sizes[0], chip.dimensions)
    if len(sizes) != chip.dimensions:
        example = "4x4" if chip.dimensions == 2 else "2x2x4"
        raise InputError(f"--topology {text}: a slice of {kind} has {chip.dimensions} dimensions ({kind}:{example})")
    return Topology(text, chip, kind, sizes)


def _here() -> Topology:
    """The devices of this process. What no data sheet is known of bounds nothing but its compute and its memory."""
    devices = meshes.all_devices()
    kind = devices[0].device_kind
    known = next((CHIPS[name] for jax_kind, name in JAX_KINDS.items() if kind.startswith(jax_kind)), None)
    known = known or next((c for c in CHIPS.values() if kind.startswith(c.name)), None)
    peak = peak_flops("bfloat16") or float("inf")
    limit = meshes.device_memory(devices[0])
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    base = known or Chip(kind, peak, limit, float("inf"), float("inf"), float("inf"), devices[0].platform)
    return Topology("here", dataclasses.replace(base, memory=float(limit), cores=1), "here", (len(devices),))


def _slice(text: str, chips: int, dimensions: int) -> tuple[int, ...]:
    """The usual shape of so many chips: powers of two, the last dimensions the larger ones."""
    if chips < 1 or chips & (chips - 1):
        raise InputError(
            f"--topology {text}: {chips} chips are no usual slice; give its shape ({'x'.join('4' * dimensions)})"
        )
    sizes, power = [1] * dimensions, chips.bit_length() - 1
    for i in range(power):
        sizes[-1 - i % dimensions] *= 2
    if dimensions == 3 and chips == 4:
        return (2, 2, 1)
    return tuple(sorted(sizes))


@contextlib.contextmanager
def other_flags_hidden() -> Iterator[None]:
    """Without XLA_FLAGS: libtpu ends the process, without a word, at a flag of another platform. Its own are in
    LIBTPU_INIT_ARGS."""
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


@functools.cache
def _tpu_devices(name: str, single: bool, megacore: bool) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for a TPU needs libtpu: pip install 'recursive-jax[plan]'")
    for key, value in ALONE.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
    if megacore:  # JAX sees a v4 chip as one device
        options["chip_config_name"] = "megacore"
    try:
        with other_flags_hidden():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu raises what JAX wraps as a RuntimeError, of several kinds
        raise InputError(f"--topology {name}: libtpu refuses it: {str(error).splitlines()[0][:300]}") from None
    return list(found.devices)
