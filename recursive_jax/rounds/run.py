"""`Run`: a folder that a chain of rounds lives in; one process at a time, one config for ever."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from recursive_jax import environment, storage
from recursive_jax import mesh as meshes
from recursive_jax.config import MeshConfig, Section, difference, grown, without_keys
from recursive_jax.errors import InputError, RecursiveJaxError, explain, machine_errors, problems, say
from recursive_jax.generate.remote.journal import Replies
from recursive_jax.identity import describe
from recursive_jax.rounds.durable import COMMITS, FORMAT, append_copy, committed, read_copies, restore
from recursive_jax.rounds.ledger import write_ledger
from recursive_jax.rounds.lineage import evaluations, read_record
from recursive_jax.rounds.place import place
from recursive_jax.rounds.progress import RunProgress
from recursive_jax.rounds.round import Chain, Round
from recursive_jax.train import signals

REPLIES = "replies.jsonl"  # of the run folder


class Run:
    """A folder that a chain of rounds lives in.

    config: a config section, a frozen dataclass or a dict of plain values; a second start with another one is refused
    with the difference. Keys that only say how (devices, logging) may change, and those that say how many rounds there
    are may grow. fork: another run folder whose results are reused where their fingerprints agree. Raises InputError;
    use as a context manager, or `close`."""

    def __init__(self, path: Any, config: Any = None, *, seed: int = 0, fork: Any = None, quiet: bool = False):
        self.path, self.seed, self.place = epath.Path(path), seed, place()
        config = config if self.place is None else self.place.config
        self.progress = RunProgress(quiet or not meshes.is_main())
        self.fork = epath.Path(fork) if fork is not None else None
        if self.fork is not None and not (self.fork / "run.json").exists():
            raise InputError(f"--fork {self.fork}: there is no run.json in it")
        if "://" in str(path):
            raise InputError(
                f"--workdir {path}: a run folder on a bucket is not supported yet; give a local or mounted path"
            )
        mesh = getattr(config, "mesh", None)
        self.environment = environment.environment(meshes.make_mesh(mesh) if isinstance(mesh, MeshConfig) else None)
        others = [] if self.fork is None else [self.fork / REPLIES]
        self.replies = Replies(self.path / REPLIES, others)  # of remote models
        self.environments: list[dict[str, Any]] = []  # of the run so far, the last is the present one
        self.closed, self._opened = False, False
        self._lock: storage.Lock | None = None
        self._restore_signals = signals.install()
        try:
            with machine_errors(self.path):
                meshes.on_main(self._take_lock)
                meshes.on_main(lambda: self._open({} if config is None else config))
            self._opened = True
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = storage.Lock(self.path)

    def _open(self, config: Any) -> None:
        file = self.path / "run.json"
        resolved = _plain(config)
        identity = describe(config)
        stored = self._record(file)
        if stored is not None:
            more = grown(config, stored["config"], resolved)
            before, now = (without_keys(x, more) for x in (stored["identity"], identity))
            changed = [line.partition(":")[0] for line in difference(before, now)]
            # Said of the resolved configs, where a default has its value.
            changes = [
                x for x in difference(stored["config"], resolved) if x.partition(":")[0].startswith(tuple(changed))
            ]
            changes = changes or difference(before, now)
            if stored.get("seed") != self.seed:
                changes.append(f"seed: {stored.get('seed')} -> {self.seed}")
            if not changes:
                self.environments = stored.get("environments", [])
                self.note_environments([self.environment], str(self.path))  # may refuse, before anything is written
                if more:
                    grew = {**read_record(self.path), "config": resolved, "identity": identity}
                    storage.write_json(file, grew)
                    append_copy(self.path, self.path, "run", grew)
                restore(self.path)
                self.refresh_metrics()  # a kill between a commit and its line
                return
            if any(Path(self.path).rglob("manifest.json")):
                raise problems(
                    f"{self.path} holds a run of another config. Give another --workdir, or add `--fork {self.path}` "
                    "(fork= in Python) with a new one to reuse what is unchanged. The differences:",
                    changes,
                )  # else it failed before anything was made, and the new config takes the folder
        self.note_environments([self.environment], str(self.path))
        record = {
            "format": FORMAT,
            "seed": self.seed,
            "config": resolved,
            "identity": identity,
            "versions": environment.versions(),
            "environments": self.environments,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "forked_from": None if self.fork is None else str(self.fork),
        }
        storage.write_json(file, record)
        append_copy(self.path, self.path, "run", record)

    def note_environments(self, found: Sequence[dict[str, Any]], where: str) -> None:
        """Results made under these, the last of them, are in the run from now on. Says (or refuses, see `environment`)
        what differs: of the run's own, from the last one before; of a fork's, from the present one."""
        for one in found:
            if one == self.environment:
                environment.changed(self.environments, one, where)
                known = environment.continued(self.environments, one)
            else:  # of a fork: it came before the present one, which stays the last
                environment.changed([one], self.environment, where)
                known = self.environments
                known = known if one in known else [*known[:-1], one, self.environment]
            if known != self.environments:
                self.environments = known
                if (self.path / "run.json").exists():
                    stored = read_record(self.path)
                    storage.write_json(self.path / "run.json", {**stored, "environments": known})

    def _record(self, file: epath.Path) -> dict[str, Any] | None:
        """run.json; None where there is none yet. One that was lost or damaged is written anew from the config of this
        start: every result is held against it by its own fingerprint."""
        try:
            if file.exists():
                return read_record(self.path)
            found = f"{file} is missing"
        except storage.Damaged as error:
            found = error.what
        copy = read_copies(self.path).get(".", {}).get("run")
        if copy is not None and copy.get("format") == FORMAT:
            storage.write_json(file, copy)
            say(f"{found}; restored from {self.path / COMMITS}")
            return copy
        if file.is_file():
            file.unlink()
        if (self.path / COMMITS).exists() or any(Path(self.path).rglob("manifest.json")):
            say(f"{found}; it is written anew from this config, and every result is held against it")
            restore(self.path)
            for _, manifest in sorted(committed(self.path), key=lambda pair: pair[1].get("finished", 0)):
                self.environments += [e for e in manifest.get("environments", []) if e not in self.environments]
        elif not file.exists() and any(p.name not in (".lock", "run.json.tmp") for p in self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and has no run.json; give an empty or new folder as --workdir")
        return None

    def round(self, number: int) -> Round:
        """The place of round `number` of the only chain; of the recipe's own, where it is run as one of several arms or
        replicates."""
        return self.chain(*self._here()).round(number)

    def _here(self) -> tuple[str, int, int]:
        p = self.place
        return ("main", 0, 1) if p is None else (p.arm, p.replicate, p.replicates)

    def chain(self, arm: str = "main", replicate: int = 0, replicates: int = 1) -> Chain:
        """A chain of rounds. The arm `main` has them in RUN/rounds, another in RUN/<arm>/rounds; with several
        replicates there is a folder `replicate-<n>` between."""
        folder = self.path if arm == "main" else self.path / arm
        return Chain(self, arm, replicate, folder if replicates == 1 else folder / f"replicate-{replicate}")

    def name_model(self, name: str, round: Round, result: str, default: bool = False) -> None:
        """Names a stored model of this run, so that `load_model("RUN:name")` opens it; the default one is what
        `load_model(RUN)` opens. A name may be given again, to a later round's. Where a recipe is run as several arms or
        replicates, the first has the name, the others `<name>-<arm>`, `<name>-<arm>-<replicate>`."""
        name, default = self.own_name(name), default and (self.place is None or self.place.first)
        path = str((round.path / result).relative_to(self.path))

        def write() -> None:
            file = self.path / "models.json"
            named: dict[str, Any] = {"models": {}}
            try:
                named = storage.read_json(file, "the names of the models") if file.exists() else named
            except storage.Damaged as error:
                say(f"{error.what}; it is written anew as the run names its models")
            before = json.dumps(named)
            named["models"][name] = path
            if default:
                named["default"] = name
            if json.dumps(named) != before:
                storage.write_json(file, named)

        meshes.on_main(write)

    def own_name(self, name: str) -> str:
        """A name of the run for what a recipe makes: with its arm and replicate, but in the first of these."""
        if self.place is None or self.place.first:
            return name
        arm, replicate, replicates = self._here()
        return f"{name}-{arm}" + (f"-{replicate}" if replicates > 1 else "")

    def add_metrics(self, folder: Any) -> None:
        """Appends a committed evaluation to RUN/metrics.jsonl; a line torn by a kill is mended by `refresh_metrics`."""
        record = storage.read_json(folder / "metrics.json", "the evaluation")
        storage.append_line(self.path / "metrics.jsonl", json.dumps(record))

    def refresh_metrics(self) -> list[dict]:
        """Rewrites RUN/metrics.jsonl from the committed evaluations, in the order arm, replicate, round."""
        records = evaluations(self.path)
        if meshes.is_main():
            text = "".join(json.dumps(r) + "\n" for r in records)
            storage.write_atomic(self.path / "metrics.jsonl", text.encode())
        return records

    def close(self) -> None:
        try:
            if self._opened and self._lock is not None and not self.closed:  # a run that was refused stays as it is
                with contextlib.suppress(InputError, OSError):  # what is wrong was said, or will be when it is wanted
                    write_ledger(self.path)
        finally:
            self.closed = True
            if self._lock is not None:
                self._lock.release()
            self._restore_signals()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Errors of the machine leave as one InputError: what was committed is kept."""
        self.close()
        if isinstance(error, Exception) and not isinstance(error, RecursiveJaxError):
            text = explain(error, self.path)
            if text is not None:
                raise InputError(text) from error


def _plain(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values. Raises InputError for what is no mapping."""
    if isinstance(config, Section):
        return config.model_dump(mode="json")
    if dataclasses.is_dataclass(config):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if not isinstance(config, Mapping):
        raise InputError(
            f"the config of a run is a section, a frozen dataclass or a dict, not a {type(config).__name__}"
        )
    nested = lambda v: _plain(v) if isinstance(v, (Section, Mapping)) or dataclasses.is_dataclass(v) else v
    return json.loads(json.dumps({str(k): nested(v) for k, v in config.items()}, default=str))
