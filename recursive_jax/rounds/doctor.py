"""`recursive-jax doctor`: what this machine offers and whether the installation works, by doing it once, small."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import jax

from recursive_jax import mesh as meshes
from recursive_jax.config import ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.language import Language
from recursive_jax.data.tokenizers import LanguageTokenizer
from recursive_jax.environment import vector_width, versions
from recursive_jax.errors import RecursiveJaxError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import unconditional
from recursive_jax.models.attention import chosen
from recursive_jax.models.flops import peak_flops
from recursive_jax.models.model import transformer
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.writing import save_imported
from recursive_jax.train.loop import train


def doctor() -> tuple[str, bool]:
    """(text, everything works)."""
    devices = meshes.all_devices()
    dtype = meshes.resolve_dtype("auto")
    lines = [f"{name:<18} {version}" for name, version in versions().items()]
    lines.append(
        f"{'devices':<18} {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} "
        "process(es)"
    )
    if devices[0].platform == "cpu":
        lines.append(f"{'vectors':<18} {vector_width()}")
    peak = peak_flops(dtype)
    lines.append(
        f"{'peak':<18} " + (f"{peak / 1e9:,.0f} GFLOP/s {dtype}" if peak else "unknown device: MFU is not shown")
    )
    with jax.set_mesh(meshes.make_mesh()):
        paths = {f"{n:,} tokens": chosen(n, 64, dtype) for n in (16, 256, 2048)}
    kernels = ", ".join(f"{rows} by {path}" for rows, path in paths.items())
    lines.append(f"{'attention':<18} rows of {kernels} ({dtype})")
    memory = meshes.device_memory(devices[0])
    if memory is not None:
        lines.append(f"{'device memory':<18} {memory / 2**30:.1f} GiB")
    cache = jax.config.jax_compilation_cache_dir
    lines.append(f"{'compile cache':<18} {cache or 'off'}")
    lines.append(f"{'free disk here':<18} {shutil.disk_usage(os.getcwd()).free / 2**30:.1f} GiB")
    healthy = True
    for name, check in _CHECKS.items():
        start = time.perf_counter()
        try:
            note = check()
        except (RecursiveJaxError, RuntimeError, ValueError, OSError) as error:
            healthy, note = False, f"FAILED: {error}"
        lines.append(f"{name:<18} {note} ({time.perf_counter() - start:.1f} s)")
    return "\n".join(lines), healthy


def _small():
    language = Language()
    model = transformer(
        ModelConfig(layers=1, d_model=32, heads=2, max_length=32), LanguageTokenizer(language), meshes.make_mesh()
    )
    rows = language.sample(0, 0, 64)
    batch = 8 * meshes.batch_divisor(model.mesh)
    return train(model, rows_as_dataset(rows), config=TrainConfig(steps=5, batch=batch), quiet=True)


def rows_as_dataset(rows):
    return real_rows(rows, [""] * len(rows))


def _check_train() -> str:
    return f"ok, loss {_small().summary['loss']:.3f} after 5 steps"


def _check_generate() -> str:
    rows = generate(_small().model, unconditional(4), SamplingConfig(batch=4, max_tokens=8))
    return f"ok, {rows.token_count} tokens"


def _check_checkpoint() -> str:
    model = _small().model
    with tempfile.TemporaryDirectory() as folder:
        save_imported(model, Path(folder))
        loaded = load_model(folder, model.mesh)
    same = jax.tree.all(
        jax.tree.map(lambda a, b: bool((meshes.fetch(a) == meshes.fetch(b)).all()), model.params, loaded.params)
    )
    if not same:
        raise RuntimeError("the params read back differ from those written")
    return "ok, params read back bit-equal"


_CHECKS = {"train": _check_train, "generate": _check_generate, "checkpoint": _check_checkpoint}
