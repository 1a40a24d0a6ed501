"""`Run`: a folder that a chain of rounds lives in; one process at a time, one config for ever."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import jax
from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax.config import difference
from recursive_jax.errors import InputError, problems
from recursive_jax.rounds import storage
from recursive_jax.rounds.durable import FORMAT
from recursive_jax.rounds.progress import RunProgress
from recursive_jax.rounds.round import Chain, Round
from recursive_jax.train import signals


class Run:
    """A folder that a chain of rounds lives in.

    config: anything JSON; a second start with another one is refused with the difference. fork: another run folder
    whose results are reused where their fingerprints agree. Raises InputError; use as a context manager, or `close`.
    """

    def __init__(self, path: Any, config: dict | None = None, *, seed: int = 0, fork: Any = None, quiet: bool = False):
        self.path, self.seed = epath.Path(path), seed
        self.progress = RunProgress(quiet or not meshes.is_main())
        self.fork = epath.Path(fork) if fork is not None else None
        if self.fork is not None and not (self.fork / "run.json").exists():
            raise InputError(f"--fork {self.fork}: there is no run.json in it")
        if "://" in str(path):
            raise InputError(
                f"--workdir {path}: a run folder on a bucket is not supported yet; give a local or mounted path"
            )
        self._lock: storage.Lock | None = None
        self._restore_signals = signals.install()
        try:
            with storage.disk_errors(self.path):
                meshes.on_main(self._take_lock)
                meshes.on_main(lambda: self._open(config or {}))
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = storage.Lock(self.path)

    def _open(self, config: dict) -> None:
        file = self.path / "run.json"
        resolved = json.loads(json.dumps(config, default=str))
        if file.exists():
            stored = storage.read_json(file, "the run record")
            changes = difference(stored.get("config", {}), resolved)
            if stored.get("seed") != self.seed:
                changes.append(f"seed: {stored.get('seed')} -> {self.seed}")
            if not changes:
                return
            if any(Path(self.path).rglob("manifest.json")):
                raise problems(
                    f"{self.path} holds a run of another config. Give another --workdir, or add `--fork {self.path}` "
                    "with a new --workdir to reuse what is unchanged. The differences:",
                    changes,
                )  # else it failed before anything was made, and the new config takes the folder
        elif any(p.name not in (".lock", "run.json.tmp") for p in self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and has no run.json; give an empty or new folder as --workdir")
        storage.write_json(
            file,
            {
                "format": FORMAT,
                "seed": self.seed,
                "config": resolved,
                "versions": versions(),
                "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                "processes": jax.process_count(),
                "forked_from": None if self.fork is None else str(self.fork),
            },
        )

    def round(self, number: int) -> Round:
        """The place of round `number` of the only chain."""
        return self.chain().round(number)

    def chain(self, arm: str = "main", replicate: int = 0, replicates: int = 1) -> Chain:
        """A chain of rounds. The arm `main` has them in RUN/rounds, another in RUN/<arm>/rounds; with several replicates
        there is a folder `replicate-<n>` between."""
        folder = self.path if arm == "main" else self.path / arm
        return Chain(self, arm, replicate, folder if replicates == 1 else folder / f"replicate-{replicate}")

    def refresh_metrics(self) -> list[dict]:
        """Rewrites RUN/metrics.jsonl from the committed evaluations, in the order arm, replicate, round."""
        from recursive_jax.rounds.lineage import evaluations

        records = evaluations(self.path)
        if meshes.is_main():
            text = "".join(json.dumps(r) + "\n" for r in records)
            storage.write_atomic(self.path / "metrics.jsonl", text.encode())
        return records

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._restore_signals()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "recursive-jax")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}
