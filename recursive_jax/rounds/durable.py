"""What makes a verb durable: a result is committed once, under the fingerprint of everything it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax.config import ModelConfig, difference
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError, problems
from recursive_jax.models.model import Model, source_mark
from recursive_jax.rounds import storage

FORMAT = 1  # of the run folder; part of every fingerprint


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_fingerprint(data: Dataset) -> str:
    """Of the rows' ids and tokens, in order."""
    digest = hashlib.sha256()
    rows = data.tokens()
    digest.update("\n".join(data.column("id")).encode())
    if "loss" in data.table.column_names:
        digest.update(np.concatenate([np.asarray(r, bool) for r in data.column("loss")] or [np.empty(0)]).tobytes())
    if "weight" in data.table.column_names:
        digest.update(np.asarray(data.column("weight"), np.float32).tobytes())
    digest.update(np.fromiter(map(len, rows), np.int64, len(rows)).tobytes())
    digest.update(np.concatenate(rows).tobytes() if rows else b"")
    return digest.hexdigest()[:16]


class Stored:
    """A committed result: `value` is read when first asked for."""

    def __init__(self, path: epath.Path, mark: str, read: Callable[[epath.Path], Any], manifest: dict):
        self.path, self.fingerprint, self.manifest, self._read, self._value = path, mark, manifest, read, None

    @property
    def value(self) -> Any:
        if self._value is None:
            self._value = self._read(self.path)
        return self._value

    def view(self, part: Callable[[Any], Any]) -> Stored:
        """A part of the value under the same fingerprint."""
        return Stored(self.path, self.fingerprint, lambda _: part(self.value), self.manifest)


class DurableFolder:
    """A folder of named results. Subclasses set `run`, `chain`, `number`, `path` and `label`."""

    run: Any
    chain: Any
    number: int
    path: epath.Path
    label: str

    def durable(self, verb, name, inputs, config, seed, produce, read) -> Stored:
        folder = self.path / name
        config = json.loads(json.dumps(config, default=str))
        recipe = {"format": FORMAT, "verb": verb, "inputs": inputs, "config": config, "seed": seed}
        mark = fingerprint(recipe)
        with storage.disk_errors(self.run.path):
            manifest = _manifest(folder)
            meshes.barrier(f"{verb}-looked")  # before the main process may change what the others look at
            if manifest is None and self.run.fork is not None:
                manifest = self._take_from_fork(folder, mark)
            if manifest is not None:
                if manifest["fingerprint"] != mark:
                    raise problems(
                        f"{folder} was made from other inputs and is not mixed in. Give another --workdir, or `--fork "
                        f"{self.run.path}` with a new one. The differences:",
                        difference(
                            {k: manifest.get(k) for k in recipe if k != "format"},
                            {k: v for k, v in recipe.items() if k != "format"},
                        ),
                    )
                storage.verify(folder, manifest["files"])
                _drop_resume(folder)
                self.run.progress.finished(f"{self.label} · {name}", manifest, stored=True)
                return Stored(folder, mark, read, manifest)
            self._begin(folder, mark)
            start = time.time()
            counts = produce(folder)
            meshes.barrier(f"{verb}-produced")
            manifest = {
                "verb": verb,
                "name": name,
                "fingerprint": mark,
                "inputs": inputs,
                "config": config,
                "seed": seed,
                "arm": self.chain.arm,
                "replicate": self.chain.replicate,
                "round": self.number,
                "counts": counts,
                "seconds": round(time.time() - start, 3),
                "status": "done",
            }

            def commit() -> None:
                storage.sync_tree(folder)
                manifest["files"] = storage.describe(folder)
                storage.write_json(folder / "manifest.json", manifest)
                (folder / "pending.json").unlink(missing_ok=True)
                if verb == "evaluate":
                    self.run.refresh_metrics()

            meshes.on_main(commit)
            _drop_resume(folder)
            self.run.progress.finished(f"{self.label} · {name}", manifest)
            return Stored(folder, mark, read, manifest)

    def _begin(self, folder: epath.Path, mark: str) -> None:
        """Marks a half-done result with its fingerprint; a half-done one of other inputs is thrown away."""
        pending = folder / "pending.json"

        def begin() -> None:
            if folder.exists() and not (pending.exists() and _pending_mark(pending) == mark):
                folder.rmtree()
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_json(pending, {"fingerprint": mark})

        meshes.on_main(begin)

    def _take_from_fork(self, folder: epath.Path, mark: str) -> dict | None:
        relative = folder.relative_to(self.run.path)
        source = self.run.fork / relative
        manifest = _manifest(source)
        if manifest is None or manifest["fingerprint"] != mark:
            return None
        storage.verify(source, manifest["files"])

        def take() -> None:
            copy = folder.parent / f".{folder.name}.copying"
            for old in (folder, copy):
                if old.exists():
                    old.rmtree()
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, copy)
            storage.sync_tree(copy)
            copy.rename(folder)
            if manifest["verb"] == "evaluate":
                self.run.refresh_metrics()

        meshes.on_main(take)
        return _manifest(folder)


def _pending_mark(pending: epath.Path) -> str | None:
    try:
        return json.loads(pending.read_text())["fingerprint"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return None  # torn by a kill before anything was made


def _manifest(folder: epath.Path) -> dict | None:
    file = folder / "manifest.json"
    if not file.exists():
        return None
    manifest = storage.read_json(file, "the manifest")
    missing = [k for k in ("verb", "fingerprint", "files") if not isinstance(manifest, dict) or k not in manifest]
    if missing:
        raise InputError(
            f"the manifest {file} is damaged: no {', '.join(missing)} in it. Restore it, or delete {folder} to have it made again"
        )
    return manifest


def _drop_resume(folder: epath.Path) -> None:
    """In-flight checkpoints go only after the commit; what a kill left of them goes at the next start."""
    if meshes.is_main() and (folder / "resume").exists():
        (folder / "resume").rmtree()


def data_mark(data: Dataset | Stored) -> str:
    return data.fingerprint if isinstance(data, Stored) else data_fingerprint(data)


def model_mark(model: Model) -> str:
    """The fingerprint of a model; of params that no run made, their content."""
    if model.fingerprint or model.params is None:
        return model.fingerprint
    digest = hashlib.sha256(architecture_mark(model.architecture).encode())
    for leaf in jax.tree.leaves(model.params):
        digest.update(np.ascontiguousarray(meshes.fetch(leaf)).tobytes())
    return digest.hexdigest()[:16]


def callable_mark(function: Any) -> str:
    """A function by name and source, so that an edited one is another input."""
    return f"{getattr(function, '__name__', type(function).__name__)}-{source_mark(function)}"


def architecture_mark(architecture: Any) -> Any:
    config: ModelConfig | None = architecture.config
    if config is None:
        return f"{architecture.name}/{architecture.vocab}/{architecture.context}"
    lora = {} if architecture.lora is None else {"lora": architecture.lora.model_dump()}
    return fingerprint({**config.model_dump(), **lora})
