"""`Run`: the six verbs made durable. Each stores its result with the fingerprint of its inputs; started again, it
returns the stored result, or goes on in the middle of a half-done one."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax.config import ModelConfig, SamplingConfig, TrainConfig, difference
from recursive_jax.curate.select import Rule, select
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import fingerprint as tokenizer_fingerprint
from recursive_jax.errors import InputError, Preempted, problems
from recursive_jax.generate.generate import Request, generate_batches
from recursive_jax.models.model import Model
from recursive_jax.objectives.causal import Objective, causal
from recursive_jax.rounds import storage
from recursive_jax.rounds.progress import RunProgress
from recursive_jax.rounds.stored import load_stored_model, write_model
from recursive_jax.train import signals
from recursive_jax.train.loop import train

T = TypeVar("T")
FORMAT = 1  # of the run folder; part of every fingerprint
PARTS = 64  # most files a generated dataset is split into


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_fingerprint(data: Dataset) -> str:
    """Of the rows' ids and tokens, in order."""
    digest = hashlib.sha256()
    rows = data.tokens()
    digest.update("\n".join(data.column("id")).encode())
    digest.update(np.fromiter(map(len, rows), np.int64, len(rows)).tobytes())
    digest.update(np.concatenate(rows).tobytes() if rows else b"")
    return digest.hexdigest()[:16]


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
        signals.install()
        with storage.disk_errors(self.path):
            if meshes.is_main():
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock = storage.Lock(self.path) if meshes.is_main() else None
            try:
                self._open(config or {})
            except BaseException:
                self.close()
                raise
        meshes.barrier("run-open")

    def _open(self, config: dict) -> None:
        file = self.path / "run.json"
        resolved = json.loads(json.dumps(config, default=str))
        if file.exists():
            stored = storage.read_json(file, "the run record")
            changes = difference(stored.get("config", {}), resolved)
            if stored.get("seed") != self.seed:
                changes.append(f"seed: {stored.get('seed')} -> {self.seed}")
            if changes:
                raise problems(
                    f"{self.path} holds a run of another config. Give another --workdir, or add `--fork {self.path}` "
                    "with a new --workdir to reuse what is unchanged. The differences:", changes,
                )
        elif meshes.is_main():
            if any(p.name != ".lock" for p in self.path.iterdir()):
                raise InputError(f"{self.path} is not empty and has no run.json; give an empty or new folder as --workdir")
            storage.write_json(file, {
                "format": FORMAT, "seed": self.seed, "config": resolved, "versions": versions(),
                "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "processes": jax.process_count(),
                "forked_from": None if self.fork is None else str(self.fork),
            })

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
        if getattr(self, "_lock", None) is not None:
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class Chain:
    """Rounds that follow from one another; `seed` differs by replicate and is the same for every arm, so that arms
    are compared on common random numbers."""

    def __init__(self, run: Run, arm: str, replicate: int, path: epath.Path):
        self.run, self.arm, self.replicate, self.path = run, arm, replicate, path

    def round(self, number: int) -> Round:
        return Round(self, number)


class Round:
    """One round's durable verbs. Every call names its result; results are stored under `rounds/<number>/<name>`."""

    def __init__(self, chain: Chain, number: int):
        self.chain, self.run, self.number = chain, chain.run, number
        self.path = chain.path / "rounds" / f"{number:04d}"
        self.label = f"{chain.arm} · " if chain.arm != "main" else ""
        self.label += f"round {number}"
        if chain.path.name.startswith("replicate-"):
            self.label = self.label.replace(" ·", f" {chain.replicate} ·", 1)

    def seed(self, name: str) -> int:
        """A seed for one use in this round: a hash, so that no two uses share random numbers."""
        key = [self.run.seed, self.chain.replicate, self.number, name]
        return int(hashlib.sha256(json.dumps(key).encode()).hexdigest()[:7], 16)

    # The verbs.

    def dataset(self, name: str, make: Callable[[], Dataset], inputs: dict[str, str] | None = None, config: Any = None) -> Stored:
        """Rows made by a function of the given inputs: read from disk, composed, imported."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            data = make()
            if meshes.is_main():
                data.write(str(folder / "rows-00000.parquet"))
            return _counts(data)

        return self._durable("data", name, inputs or {}, config, None, produce, _read_rows)

    def train(
        self, name: str, model: Model, data: Dataset | Stored, config: TrainConfig | None = None, objective: Objective = causal,
    ) -> Model:
        """A new model: `model` (or, without params, its fresh initialisation) trained on `data`."""
        config = config or TrainConfig()
        seed = self.seed(name)
        architecture = model.architecture
        inputs = {
            "model": model.fingerprint if model.params is not None else f"init:{_describe(architecture)}",
            "data": _fingerprint_of(data), "tokenizer": tokenizer_fingerprint(model.tokenizer),
        }

        def produce(folder: epath.Path) -> dict[str, Any]:
            label = f"{self.label} · train {name}"
            rows = data.value if isinstance(data, Stored) else data
            trained = train(model, rows, objective, config, seed=seed, directory=folder, label=label, quiet=self.run.progress.quiet)
            write_model(folder, trained.model)
            meshes.barrier("model-written")
            if meshes.is_main() and (folder / "resume").exists():
                (folder / "resume").rmtree()
            return trained.summary

        settings = {"train": config.model_dump(), "objective": getattr(objective, "__name__", str(objective))}
        stored = self._durable(
            "train", name, inputs, settings, seed, produce, lambda folder: load_stored_model(folder, model)
        )
        return stored.value.with_params(stored.value.params, stored.fingerprint)

    def generate(
        self, name: str, model: Model, requests: Callable[[int, int], Sequence[Request]], sampling: SamplingConfig | None = None,
        *, count: int | None = None, tokens: int | None = None, inputs: dict[str, str] | None = None,
    ) -> Stored:
        """Rows from `model`: `count` of them, or batches until they hold `tokens` tokens (then cut to the budget).

        requests(first, n) gives the requests with ids first .. first + n. Parts are committed as they are done.
        """
        sampling = sampling or SamplingConfig()
        seed = self.seed(name)
        if (count is None) == (tokens is None):
            raise ValueError("give either count or tokens")

        def produce(folder: epath.Path) -> dict[str, Any]:
            expected = count or max(1, tokens // 8)
            per_part = sampling.batch * max(1, -(-expected // (sampling.batch * PARTS)))
            parts: list[Dataset] = []
            made = total = 0
            while made < count if count is not None else total < tokens:
                file = folder / f"rows-{len(parts):05d}.parquet"
                ask = per_part if count is None else min(per_part, count - made)
                if file.exists():
                    part = Dataset.read([str(file)])
                else:
                    part = self._generate_part(name, model, requests(made, ask), sampling, seed)
                    if meshes.is_main():
                        _write_rows(part, file)
                    meshes.barrier("rows-written")
                parts.append(part)
                made, total = made + ask, total + part.token_count
                self.run.progress.working(
                    f"{self.label} · {name}", f"{made:,}/{count:,} rows" if count is not None else f"{total:,}/{tokens:,} tokens"
                )
                if signals.stop_requested():
                    raise Preempted(f"{self.label} · {name}: stopped by a signal after {made} rows, all kept; the same command goes on from there")
            data = sum(parts[1:], parts[0])
            return {**_counts(data), "budget_tokens": tokens}

        def read(folder: epath.Path) -> Dataset:
            data = _read_rows(folder)
            return data if tokens is None else data.first_tokens(tokens)

        ins = {"model": model.fingerprint, **(inputs or {})}
        settings = {"sampling": sampling.model_dump(), "count": count, "tokens": tokens}
        return self._durable("generate", name, ins, settings, seed, produce, read)

    def _generate_part(self, name, model, requests, sampling, seed) -> Dataset:
        prefix = "/".join([*([self.chain.arm] if self.chain.arm != "main" else []),
                           *([str(self.chain.replicate)] if self.chain.replicate else []), str(self.number), name])
        parts = list(generate_batches(model, requests, sampling, seed=seed, round=self.number, name=prefix))
        return sum(parts[1:], parts[0])

    def select(self, name: str, data: Stored, rules: Sequence[Rule]) -> Stored:
        """The rows every rule keeps, and for each rule how many it dropped."""
        kept: dict[str, int] = {}

        def produce(folder: epath.Path) -> dict[str, Any]:
            chosen, dropped = select(data.value, rules)
            kept.update(dropped)
            if meshes.is_main():
                chosen.write(str(folder / "rows-00000.parquet"))
            return {**_counts(chosen), "proposed": len(data.value), "dropped": dropped}

        settings = {"rules": [r.name for r in rules]}
        return self._durable("select", name, {"data": data.fingerprint}, settings, None, produce, _read_rows)

    def score(self, name: str, data: Stored, reward: Callable[[Dataset], Sequence[float]], column: str = "score") -> Stored:
        """The rows with a number per row in `column`."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            scored = data.value.with_column(column, [float(x) for x in reward(data.value)])
            if meshes.is_main():
                scored.write(str(folder / "rows-00000.parquet"))
            return _counts(scored)

        settings = {"reward": getattr(reward, "__name__", type(reward).__name__), "column": column}
        return self._durable("score", name, {"data": data.fingerprint}, settings, None, produce, _read_rows)

    def evaluate(self, name: str, model: Model, measure: Callable[[], dict[str, Any]], inputs: dict[str, str] | None = None, config: Any = None) -> dict[str, Any]:
        """Numbers about `model`, stored and added to RUN/metrics.jsonl."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            metrics = measure()
            if meshes.is_main():
                record = {
                    "arm": self.chain.arm, "round": self.number, "replicate": self.chain.replicate, "name": name,
                    "model": model.fingerprint, "metrics": metrics,
                }
                storage.write_json(folder / "metrics.json", record)
            return {"metrics": len(metrics)}

        def read(folder: epath.Path) -> dict[str, Any]:
            return storage.read_json(folder / "metrics.json", "the evaluation")["metrics"]

        return self._durable("evaluate", name, {"model": model.fingerprint, **(inputs or {})}, config, None, produce, read).value

    # What makes a verb durable.

    def _durable(self, verb, name, inputs, config, seed, produce, read) -> Stored:
        folder = self.path / name
        config = json.loads(json.dumps(config, default=str))
        recipe = {"format": FORMAT, "verb": verb, "inputs": inputs, "config": config, "seed": seed}
        mark = fingerprint(recipe)
        with storage.disk_errors(self.run.path):
            manifest = _manifest(folder)
            if manifest is None and self.run.fork is not None:
                manifest = self._take_from_fork(folder, mark)
            if manifest is not None:
                if manifest["fingerprint"] != mark:
                    raise problems(
                        f"{folder} was made from other inputs and is not mixed in. Give another --workdir, or `--fork "
                        f"{self.run.path}` with a new one. The differences:",
                        difference({k: manifest.get(k) for k in recipe if k != "format"}, {k: v for k, v in recipe.items() if k != "format"}),
                    )
                storage.verify(folder, manifest["files"])
                self.run.progress.finished(f"{self.label} · {name}", manifest, stored=True)
                return Stored(folder, mark, read, manifest)
            self._begin(folder, mark)
            start = time.time()
            counts = produce(folder)
            meshes.barrier(f"{verb}-produced")
            manifest = {
                "verb": verb, "name": name, "fingerprint": mark, "inputs": inputs, "config": config, "seed": seed,
                "arm": self.chain.arm, "replicate": self.chain.replicate, "round": self.number, "counts": counts,
                "seconds": round(time.time() - start, 3), "status": "done",
            }
            if meshes.is_main():
                storage.sync_tree(folder)
                manifest["files"] = storage.describe(folder)
                storage.write_json(folder / "manifest.json", manifest)
                (folder / "pending.json").unlink(missing_ok=True)
                if verb == "evaluate":
                    self.run.refresh_metrics()
            meshes.barrier(f"{verb}-committed")
            self.run.progress.finished(f"{self.label} · {name}", manifest)
            return Stored(folder, mark, read, manifest)

    def _begin(self, folder: epath.Path, mark: str) -> None:
        """Marks a half-done result with its fingerprint; a half-done one of other inputs is thrown away."""
        pending = folder / "pending.json"
        if meshes.is_main():
            if folder.exists():
                same = pending.exists() and _pending_mark(pending) == mark
                if not same:
                    folder.rmtree()
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_json(pending, {"fingerprint": mark})
        meshes.barrier("begin")

    def _take_from_fork(self, folder: epath.Path, mark: str) -> dict | None:
        relative = folder.relative_to(self.run.path)
        source = self.run.fork / relative
        manifest = _manifest(source)
        if manifest is None or manifest["fingerprint"] != mark:
            return None
        storage.verify(source, manifest["files"])
        if meshes.is_main():
            if folder.exists():
                folder.rmtree()
            folder.parent.mkdir(parents=True, exist_ok=True)
            copy = folder.parent / f"{folder.name}.copying"
            if copy.exists():
                copy.rmtree()
            shutil.copytree(source, copy)
            storage.sync_tree(copy)
            copy.rename(folder)
            if manifest["verb"] == "evaluate":
                self.run.refresh_metrics()
        meshes.barrier("forked")
        return _manifest(folder)


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
        raise InputError(f"the manifest {file} is damaged: no {', '.join(missing)} in it. Restore it, or delete {folder} to have it made again")
    return manifest


def _fingerprint_of(data: Dataset | Stored) -> str:
    return data.fingerprint if isinstance(data, Stored) else data_fingerprint(data)


def _describe(architecture: Any) -> Any:
    config: ModelConfig | None = architecture.config
    return fingerprint(config.model_dump()) if config is not None else f"{architecture.name}/{architecture.vocab}/{architecture.context}"


def _counts(data: Dataset) -> dict[str, Any]:
    status: dict[str, int] = {}
    for s in data.column("status"):
        status[s] = status.get(s, 0) + 1
    real = data.where(synthetic=False)
    return {
        "rows": len(data), "tokens": data.token_count, "synthetic_rows": len(data) - len(real), "real_rows": len(real),
        "real_tokens": real.token_count, "status": status,
    }


def _write_rows(data: Dataset, file: epath.Path) -> None:
    """Parquet, whole or absent."""
    import io

    buffer = io.BytesIO()
    data.write(buffer)
    storage.write_atomic(file, buffer.getvalue())


def _read_rows(folder: epath.Path) -> Dataset:
    return Dataset.read([str(p) for p in sorted(folder.glob("rows-*.parquet"))])


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "recursive-jax")
    return {"python": platform.python_version(), **{n: version(n) for n in names}}
