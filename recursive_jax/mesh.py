"""The one place that knows devices, mesh axes and the logical-to-physical table; and multi-host start-up.

Model code names what a dimension *means* (`spec("batch", None, "heads")`); the table below says where it lives.
Sharding is explicit: every array's type carries its layout, `init` is the only place that declares it, and a
1x1x1 mesh is the laptop running the same code.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import NamedSharding, P
from jax.sharding import AbstractMesh, AxisType, Mesh

from recursive_jax import hosts
from recursive_jax.config import MeshConfig
from recursive_jax.errors import InputError, explain
from recursive_jax.waiting import note

AXES = ("data", "fsdp", "tensor")
CPU_DEVICES = 1024  # that a CPU is split into at most
KEYS = "threefry2x32"  # random numbers that do not depend on the mesh
BATCH = ("data", "fsdp")
LAYOUT: dict[str | None, Any] = {
    None: None,
    "batch": BATCH,
    "time": None,  # positions of a sequence
    "experts": None,
    "layers": None,
    "embed": "fsdp",  # weights are stored split over fsdp and gathered where they are used
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "vocab_rows": ("fsdp", "tensor"),  # the embedding table; splitting its width instead costs a full gather
}


class _Traces(collections.Counter):
    """Counts by name; whoever waits is told what is being compiled."""

    def __setitem__(self, name: str, count: int) -> None:
        note(f"compiling {name}")
        hosts.at(f"compiling {name}")
        super().__setitem__(name, count)


#: How often each jitted program was traced in this process, by name. Tests assert on it: a round that traces
#: again compiles again.
TRACES: collections.Counter[str] = _Traces()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: note("") if event == "/jax/core/compile/backend_compile_duration" else None
)


def platform(mesh: Mesh | AbstractMesh | None = None) -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh (inside traced code, of the one it is traced for), which may be of hardware
    that is not here; of this process's default devices only where there is no mesh."""
    if mesh is not None and not isinstance(mesh, AbstractMesh):
        return mesh.devices.flat[0].platform
    device = getattr(jax.sharding.get_abstract_mesh() if mesh is None else mesh, "abstract_device", None)
    found = getattr(device, "platform", None)
    if found is None and device is not None:
        found = next((p for p in ("cpu", "tpu") if p in device.device_kind.lower()), "gpu")
    return found or jax.default_backend()


def resolve_dtype(asked: str, mesh: Mesh | None = None) -> str:
    """auto: bfloat16 where the hardware of the mesh multiplies it fast (TPU, GPU), float32 on CPU."""
    if asked != "auto":
        return asked
    return "float32" if platform(mesh) == "cpu" else "bfloat16"


def random_key(seed: int) -> jax.Array:
    """A random key from a seed of up to 63 bits (`jax.random.key` drops what is above 32); the same for smaller
    ones."""
    return jax.random.wrap_key_data(seed_words(seed), impl=KEYS)


def seed_words(seed: int) -> np.ndarray:
    """A seed as two uint32, the upper half first: what a key is made of."""
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def spec(*logical: str | None) -> P:
    """Logical dimension names -> PartitionSpec."""
    return P(*(LAYOUT[name] for name in logical))


def reshape(x: jax.Array, shape: tuple[int, ...], *logical: str | None) -> jax.Array:
    """Reshape that says the layout of its result, where there is a mesh: splitting or joining split axes is ambiguous,
    and axes of size 1 would lose theirs."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_auto:
        return x.reshape(shape)
    return jnp.reshape(x, shape, out_sharding=spec(*logical))


def rows_like(x: jax.Array, rows: int) -> jax.Array:
    """`x` split over its first axis like a batch of `rows`, where it has that many and there is a mesh. Where an
    operand of an elementwise operation says nothing of its layout, newer JAX drops the layout of the other one."""
    mesh = jax.sharding.get_abstract_mesh()
    if x.shape[0] != rows or mesh.empty or mesh.are_all_axes_auto:
        return x
    return jax.reshard(x, spec("batch", *(None,) * (x.ndim - 1)))


def local(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` run by every device on its own part of the arguments, which are laid as the specs say (a spec stands
    for a whole subtree)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_auto:
        return function
    run = jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)
    lay = lambda spec, tree: jax.tree.map(lambda x: jax.reshard(x, spec), tree)
    return lambda *args: run(*jax.tree.map(lay, inputs, args, is_leaf=lambda x: isinstance(x, P)))


def unsharded(x: jax.Array) -> jax.Array:
    """An array on every shard of the batch; what is split over the tensor axis stays so."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_auto:
        return x
    kept = lambda axes: tuple(a for a in (axes if isinstance(axes, tuple) else (axes,)) if a not in (None, *BATCH))
    return jax.reshard(x, P(*(kept(axes) or None for axes in jax.typeof(x).sharding.spec)))


def whole(x: jax.Array) -> jax.Array:
    """An array whole on every device of the mesh that a program is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.are_all_axes_auto else jax.reshard(x, P(*(None,) * x.ndim))


def device_memory(device: Any) -> int | None:
    """Bytes that JAX may use of a device; None: it does not say (a CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def all_devices() -> list[Any]:
    """All devices of the job. Raises InputError where the platform that JAX is told to use is not on this machine."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax 0.10 asserts where a platform has no plugin
        asked = f"JAX finds no device (JAX_PLATFORMS={jax.config.jax_platforms})"
        raise InputError(explain(error) or f"{asked}: leave the variable out, or install its extra") from None


def make_mesh(config: MeshConfig | None = None, devices: list[Any] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor) over `devices` (default: all). Raises InputError if it does not fit."""
    devices = devices or all_devices()
    sizes = mesh_sizes(config or MeshConfig(), len(devices), f"here ({devices[0].platform})")
    asked, count = "x".join(map(str, sizes)), math.prod(sizes)
    if count < len(devices) and jax.process_count() > 1:
        raise InputError(f"mesh {asked} uses {count} of {len(devices)} devices; with several processes use all")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices[:count])


def mesh_sizes(config: MeshConfig, devices: int, where: str) -> list[int]:
    """Devices along each axis; -1 becomes what is left of `devices`, which are `where`. Raises InputError if it does
    not fit."""
    sizes = [config.data, config.fsdp, config.tensor]
    asked = "x".join(map(str, sizes))
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise InputError(f"mesh {asked} (data x fsdp x tensor): sizes are positive, at most one is -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes:
        if devices % known:
            raise InputError(
                f"mesh {asked} does not divide the {devices} devices {where}; change mesh.fsdp or mesh.tensor"
            )
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) > devices:
        raise InputError(
            f"mesh {asked} needs {math.prod(sizes)} devices, {devices} are {where}; "
            "make it smaller, or on a CPU set JAX_NUM_CPU_DEVICES before JAX starts"
        )
    return sizes


def mesh_config_problems(config: MeshConfig) -> list[str]:
    """Why the devices here cannot make up the mesh, as lines."""
    try:
        make_mesh(config)
        return []
    except InputError as error:
        return [str(error)]


def batch_divisor(mesh: Mesh) -> int:
    """Rows of a batch must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(mesh: Mesh, rows: Any) -> Any:
    """Host arrays `[B, ...]`, equal on every process -> device arrays split over the batch axes."""

    return _put(rows, jax.tree.map(lambda x: NamedSharding(mesh, P(BATCH, *(None,) * (x.ndim - 1))), rows))


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Host values -> arrays present on every device."""

    everywhere = NamedSharding(mesh, P())
    tree = jax.tree.map(np.asarray, tree)
    return _put(tree, jax.tree.map(lambda _: everywhere, tree))


def _put(tree: Any, shardings: Any) -> Any:
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)  # one call for all leaves: each costs a third of a millisecond
    place = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(place, tree, shardings)


def fetch(tree: Any) -> Any:
    """Device arrays -> NumPy arrays, whole on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def abstract(mesh: Mesh, function: Callable[..., Any], *args: Any) -> Any:
    """Shapes, dtypes and shardings of `function(*args)` on `mesh`: the target of a restore on any mesh."""

    def fix(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        layout = x.sharding.spec if x.sharding is not None else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, layout))

    with under(mesh):
        return jax.tree.map(fix, jax.eval_shape(function, *args))


def under(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager[Any]:
    """The mesh as the one that programs are traced for; one of hardware that nobody has may be abstract."""
    return jax.sharding.use_abstract_mesh(mesh) if isinstance(mesh, AbstractMesh) else jax.set_mesh(mesh)


def split_cpu(config: MeshConfig) -> None:
    """Lets the CPU count as so many devices as a mesh names, unless JAX_NUM_CPU_DEVICES or XLA_FLAGS say how many, or
    there are several processes. Before any device is touched; later, and on other platforms, it changes nothing."""
    asked = math.prod(max(1, size) for size in (config.data, config.fsdp, config.tensor))
    said = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if 1 < asked <= CPU_DEVICES and not said and not _several_processes():
        with contextlib.suppress(RuntimeError):  # devices are in use already
            jax.config.update("jax_num_cpu_devices", asked)


def _several_processes() -> bool:
    return hosts.places() is not None or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1


def start_distributed() -> None:
    """Joins the processes of a multi-host job, once, before any device is touched; with a roll call and a watch where
    it is known who they are (`hosts.py`).

    On TPU pods, SLURM and GKE, JAX finds the coordinator by itself; elsewhere set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single process does nothing. Raises Preempted where some do not come."""
    if not _several_processes():
        return
    where = hosts.places()
    if where is not None:
        hosts.begin(where)
    if where is not None and where.source == "JAX_COORDINATOR_ADDRESS":
        jax.distributed.initialize(where.coordinator, where.processes, where.process)
    else:
        jax.distributed.initialize()


def is_main() -> bool:
    """The process that writes files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for every process; what the main process wrote before it is visible after it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def on_main(action: Callable[[], Any]) -> None:
    """Runs `action` on the main process while the others wait. An error there is raised on all of them: none is left
    waiting for a process that gave up."""
    if jax.process_count() == 1:
        action()
        return
    from jax.experimental import multihost_utils

    failure: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as error:  # handed on below, whatever it is
            failure = error
    text = "" if failure is None else f"{getattr(failure, 'errno', None) or 0}|{failure}"
    padded = np.zeros(2048, np.uint8)
    raw = text.encode()[:2048]
    padded[: len(raw)] = np.frombuffer(raw, np.uint8)
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b"\0").decode(errors="replace")
    if failure is not None:
        raise failure
    if told:
        raise InputError(f"the main process stopped: {told.partition('|')[2]}")


def use_compilation_cache(directory: str | None = None) -> str | None:
    """Turns the persistent compilation cache on (RECURSIVE_JAX_CACHE=off leaves it off). Returns its folder."""
    chosen = (
        os.environ.get("RECURSIVE_JAX_CACHE")
        or directory
        or os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "recursive_jax", "xla")
    )
    if chosen == "off":
        return None
    jax.config.update("jax_compilation_cache_dir", chosen)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return chosen
