"""What can change the bits of a result beside its inputs: versions, compiler flags, devices.

A run notes it, and every result says under which it was made. On a change the work goes on (a preempted machine must
come back by itself), the change is said, and what is made from there on is marked; `require_same` refuses instead.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from recursive_jax.config import difference
from recursive_jax.errors import problems, say
from recursive_jax.mesh import all_devices

#: Settings of JAX that change numbers.
_SETTINGS = (
    *("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_disable_most_optimizations", "jax_disable_jit", "jax_numpy_dtype_promotion"),
)
#: Variables of JAX that say where and how it runs, which the devices tell, or what it prints and caches.
_ELSEWHERE = (
    *("JAX_PLATFORM", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_ENABLE_COMPILATION"),
    *("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOG", "JAX_DEBUG_LOG", "JAX_TRACEBACK"),
    *("JAX_EXPLAIN", "JAX_CPU_COLLECTIVES", "JAX_CAPTIVE", "JAX_DUMP"),
)
#: Flags that say how many devices there are, which `devices` holds, or what is printed.
_HARMLESS = ("--xla_force_host_platform_device_count", "--xla_dump", "--xla_hlo_profile")
_strict = False
_told: set[str] = set()


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, this package and what it computes with."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "recursive-jax")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}


def environment(mesh: Mesh | None = None) -> dict[str, Any]:
    """Versions of what computes, XLA's flags, JAX's settings, devices, mesh and (on CPU) what the processor can: two
    equal ones compute equal bits from equal inputs."""
    found = {name: versions()[name] for name in ("jax", "jaxlib", "flax", "optax", "numpy", "recursive-jax")}
    flags = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}".split()
    found["xla_flags"] = " ".join(sorted(f for f in flags if not f.startswith(_HARMLESS)))
    settings = {name: getattr(jax.config, name, None) for name in _SETTINGS}
    variables = {k: v for k, v in os.environ.items() if k.startswith("JAX_") and not k.startswith(_ELSEWHERE)}
    said = [*settings.items(), *sorted(variables.items())]
    found["settings"] = " ".join(f"{k.removeprefix('jax_')}={v}" for k, v in said)
    device = all_devices()[0]
    found["devices"] = f"{jax.device_count()} x {device.device_kind}, {jax.process_count()} process(es)"
    if mesh is not None:
        found["mesh"] = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if device.platform == "cpu":
        found["processor"] = f"{platform.machine()} {vector_width()}"
    return found


def vector_width() -> str:
    """The widest vectors of this processor that XLA compiles for."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return "unknown"
    order = ("avx512f", "avx2", "avx", "sve", "asimd")
    return next((name for name in order if name in flags), "unknown")


def require_same(on: bool = True) -> None:
    """From now on a changed environment is refused in this process, not only said."""
    global _strict
    _strict = on


def changed(before: Sequence[Any], now: dict[str, Any], where: str) -> bool:
    """Whether `now` differs from the last of the environments before it; says in which keys. Raises InputError with
    them after `require_same`."""
    last = before[-1] if before and isinstance(before[-1], dict) else now
    lines = [line.replace(": default ->", ": not recorded ->") for line in difference(last, now)]
    if lines and _strict:
        raise problems(
            f"{where} was made in another environment, and --same-environment is given. Go back to it, or leave that "
            "out to go on (what is made from here on is marked). The differences:",
            lines,
        )
    told = "; ".join(lines)
    if lines and told not in _told:  # a run's results need not repeat it
        _told.add(told)
        say(
            f"{where} was made in another environment ({told}): what is made from here on may differ in "
            "its last bits, and is marked so"
        )
    return bool(lines)


def continued(before: Sequence[Any], now: dict[str, Any]) -> list[Any]:
    """The environments that something was made under, in order, `now` the last."""
    return [*before] if before and before[-1] == now else [*before, now]
