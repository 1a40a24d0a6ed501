"""The world of a run, stored once in `rounds/0000/real`: real rows, held-out rows and the tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax import storage
from recursive_jax.config import DataConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.sources import World, open_world, source_files
from recursive_jax.data.tokenizers import fingerprint as tokenizer_fingerprint
from recursive_jax.data.tokenizers import tokenizer_from_json
from recursive_jax.errors import InputError
from recursive_jax.identity import describe
from recursive_jax.models.model import Model
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.run import Run

_HASHED = 256 * 2**20  # bytes of a source file that count in its digest


def stored_world(run: Run, data: DataConfig, row_tokens: int, held_out_rows: int, base: Model | None = None) -> Stored:
    """Reads and tokenizes the real data, or, on a second start, what the first one stored. A source file that changed
    since is an input that changed: refused. row_tokens: the most that a row holds. base: an imported model, whose
    tokenizer is taken."""
    files = source_files(data)
    if base is None and data.resolved_kind != "language" and data.tokenizer not in ("byte", "bpe"):
        files.append(Path(data.tokenizer))
    inputs = {f"file {i}: {f.name}": _digest(f) for i, f in enumerate(files)}
    settings = {"data": describe(data), "row_tokens": row_tokens}
    if base is not None:
        settings["tokenizer"] = tokenizer_fingerprint(base.tokenizer)
    if data.resolved_kind == "language":
        settings["held_out_rows"] = held_out_rows

    def produce(folder: epath.Path) -> dict[str, Any]:
        world = open_world(data, row_tokens, held_out_rows, None if base is None else base.tokenizer)

        def write() -> None:
            storage.write_json(folder / "tokenizer.json", world.tokenizer.to_json())
            world.train.write(str(folder / "rows-00000.parquet"))
            world.held_out.write(str(folder / "held-out.parquet"))

        meshes.on_main(write)
        return {
            "rows": len(world.train),
            "tokens": world.train.token_count,
            "real_rows": len(world.train),
            "synthetic_rows": 0,
            "real_tokens": world.train.token_count,
            "held_out_rows": len(world.held_out),
            "held_out_tokens": world.held_out.token_count,
        }

    def read(folder: epath.Path) -> World:
        tokenizer = tokenizer_from_json(storage.read_json(folder / "tokenizer.json", "the tokenizer"))
        train, held_out = (Dataset.read([str(folder / f)]) for f in ("rows-00000.parquet", "held-out.parquet"))
        return World(tokenizer, train, held_out, getattr(tokenizer, "language", None))

    return run.round(0).durable("data", "real", inputs, settings, None, produce, read)


def _digest(file: Path) -> str:
    file = file / "tokenizer.json" if file.is_dir() else file
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    with file.open("rb") as data:
        digest.update(data.read(_HASHED))
    return digest.hexdigest()[:16]


def check_data(config: DataConfig) -> list[str]:
    """Problems of the data section that can be seen without reading the data."""
    try:
        files = source_files(config)
    except InputError as error:
        return [str(error)]
    lines = [f"{f} is empty" for f in files if Path(f).stat().st_size == 0]
    if (
        config.resolved_kind != "language"
        and config.tokenizer not in ("byte", "bpe")
        and not Path(config.tokenizer).exists()
    ):
        lines.append(
            f"data.tokenizer={config.tokenizer} does not exist; give byte, bpe, or the path of a tokenizer.json"
        )
    return lines
