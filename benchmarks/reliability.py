"""What the checksums cost: GB/s of the hashes that were compared, and loading a stored model with and without them,
side by side.

    python benchmarks/reliability.py [--megabytes 512]

XXH3 (`xxhash`) is what the project uses; SHA-256 is the standard library's, BLAKE3 is timed where its package is
installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from recursive_jax import storage
from recursive_jax.train import checkpoint

REPEATS = 7


def seconds(function: Any) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def stream(file: Path, make: Any) -> None:
    digest, block = make(), memoryview(bytearray(2**20))
    with open(file, "rb", buffering=0) as data:
        while n := data.readinto(block):
            digest.update(block[:n])


def hashes(file: Path) -> dict[str, float]:
    """GB/s of each, the fastest of several runs, from the page cache."""
    kinds = {"xxh3-128": xxhash.xxh3_128, "sha256": hashlib.sha256, "blake2b": hashlib.blake2b}
    try:
        kinds["blake3"] = importlib.import_module("blake3").blake3
    except ImportError:
        pass
    size = file.stat().st_size / 1e9
    return {name: size / min(seconds(lambda m=make: stream(file, m)) for _ in range(3)) for name, make in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    asked = parser.parse_args().megabytes
    rng = np.random.default_rng(0)
    leaves = {f"w{i}": rng.standard_normal((asked, 2**15), dtype=np.float32) for i in range(8)}  # 1/8 MiB a row
    tree = {name: jnp.asarray(x) for name, x in leaves.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        checkpoint.save(path, tree)
        files = storage.describe(path)
        largest = max(path.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
        for name, rate in hashes(largest).items():
            print(f"{name:<10} {rate:6.1f} GB/s")
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        load = lambda: jax.block_until_ready(checkpoint.load(path, target))
        verify = lambda: storage.verify(path, files)
        seconds(load)
        pairs = [(seconds(load), seconds(verify)) for _ in range(REPEATS)]
        plain, checked = (statistics.median(x) for x in zip(*pairs, strict=True))
        size = sum(f["bytes"] for f in files.values()) / 1e9
        print(f"checkpoint {size:6.2f} GB: loaded in {plain:.3f} s, verified in {checked:.3f} s: {checked / plain:.1%}")


if __name__ == "__main__":
    main()
