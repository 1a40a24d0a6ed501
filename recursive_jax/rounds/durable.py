"""What makes a verb durable: a result is committed once, under the fingerprint of everything it was made from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax.config import difference
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError, problems
from recursive_jax.identity import derived, digest
from recursive_jax.rounds import storage

FORMAT = 2  # of the run folder; part of every fingerprint


class Stored:
    """A committed result: `value` is read when first asked for. Of rows, it selects and joins like the Dataset it
    holds."""

    def __init__(
        self,
        path: epath.Path,
        mark: str,
        read: Callable[[epath.Path], Any],
        manifest: dict,
        value: Any = None,
        origins: tuple[str, ...] = (),
    ):
        self.path, self.fingerprint, self.manifest, self._read, self._value = path, mark, manifest, read, value
        self.origins = origins or (mark,)

    @property
    def value(self) -> Any:
        if self._value is None:
            self._value = self._read(self.path)
            if isinstance(self._value, Dataset):
                self._value = Dataset(self._value.table, self.fingerprint, self.origins)
        return self._value

    def view(self, name: str, part: Callable[[Any], Any]) -> Stored:
        """A part of the value, named: its fingerprint is of the name and of this result."""
        mark = derived("view", name, [self.fingerprint])
        return Stored(self.path, mark, lambda _: part(self.value), self.manifest, None, self.origins)

    def where(self, keep: Callable[[dict[str, Any]], bool] | None = None, **equals: Any) -> Dataset:
        return self.value.where(keep, **equals)

    def take(self, indices: Any) -> Dataset:
        return self.value.take(indices)

    def column(self, name: str) -> list[Any]:
        return self.value.column(name)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def __add__(self, other: Dataset | Stored) -> Dataset:
        return self.value + value_of(other)

    def __radd__(self, other: Dataset) -> Dataset:
        return other + self.value


def value_of(data: Any) -> Any:
    """What a stored result holds; anything else as it is."""
    return data.value if isinstance(data, Stored) else data


class DurableFolder:
    """A folder of named results. Subclasses set `run`, `chain`, `number`, `path` and `label`."""

    run: Any
    chain: Any
    number: int
    path: epath.Path
    label: str

    def durable(
        self,
        verb: str,
        name: str,
        inputs: dict[str, Any],
        config: Any,
        seed: int | None,
        produce: Callable[[epath.Path], Any],
        read: Callable[[epath.Path], Any],
        check: Callable[[dict], None] | None = None,
    ) -> Stored:
        """The result `name` of this round: as stored, or made by `produce(folder)`, which returns its counts, or
        (counts, the value itself) where that need not be read back. inputs: by name, fingerprints or what has one;
        config: what else decides the result, as plain values. check: looks at the manifest of a stored result before it
        is used.

        Raises InputError where a result of other inputs, done or half-done, is in the place.
        """
        folder = self.path / name
        _check_name(name, folder)
        if self.run.closed:
            raise InputError(f"the run {self.run.path} is closed: use its verbs inside `with Run(...) as run:`")
        config = json.loads(json.dumps(config, default=str))
        origins = {k: list(v.origins) for k, v in inputs.items() if getattr(v, "origins", ())}
        inputs = {k: v if isinstance(v, str) else v.fingerprint for k, v in inputs.items()}
        recipe = {"format": FORMAT, "verb": verb, "inputs": inputs, "config": config, "seed": seed}
        mark = digest(json.dumps(recipe, sort_keys=True).encode())
        with storage.disk_errors(self.run.path):
            manifest = _manifest(folder)
            meshes.barrier(f"{verb}-looked")  # before the main process may change what the others look at
            if manifest is None and self.run.fork is not None:
                manifest = self._take_from_fork(folder, mark, recipe, check)
            if manifest is not None:
                if manifest["fingerprint"] != mark:
                    self._refuse(folder, "was made", {k: manifest.get(k) for k in recipe}, recipe)
                storage.verify(folder, manifest["files"])
                if check is not None:
                    check(manifest)
                _drop_resume(folder)
                self.run.progress.finished(f"{self.label} · {name}", manifest, stored=True)
                return Stored(folder, mark, read, manifest)
            self._begin(folder, mark, recipe)
            start = time.time()
            made = produce(folder)
            counts, value = made if isinstance(made, tuple) else (made, None)
            meshes.barrier(f"{verb}-produced")
            manifest = {
                "verb": verb,
                "name": name,
                "fingerprint": mark,
                "inputs": inputs,
                "origins": {k: v for k, v in origins.items() if v != [inputs[k]]},
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
                    self.run.add_metrics(folder)

            meshes.on_main(commit)
            _drop_resume(folder)
            self.run.progress.finished(f"{self.label} · {name}", manifest)
            return Stored(folder, mark, read, manifest, value)

    def _refuse(self, folder: epath.Path, how: str, before: dict, now: dict) -> None:
        plain = lambda recipe: {k: v for k, v in recipe.items() if k != "format"}
        raise problems(
            f"{folder} {how} from other inputs and is not mixed in. Give another --workdir, or add `--fork "
            f"{self.run.path}` "
            f"(fork= in Python) with a new one to reuse what is unchanged; or delete {folder} to have it made again. "
            "The "
            "differences:",
            difference(plain(before), plain(now)) or ["the format of the run folder"],
        )

    def _refuse_half_done(self, folder: epath.Path, mark: str, recipe: dict) -> dict | None:
        """What a half-done folder says of itself. Raises InputError where it is of other inputs and holds work."""
        before = _pending(folder / "pending.json")
        if before is not None and before.get("fingerprint") != mark and _has_work(folder):
            self._refuse(folder, "is half-done", before.get("recipe", {}), recipe)
        return before

    def _begin(self, folder: epath.Path, mark: str, recipe: dict) -> None:
        """Marks a half-done result with what it is made from. One of other inputs is never thrown away unasked."""
        pending = folder / "pending.json"

        def begin() -> None:
            before = self._refuse_half_done(folder, mark, recipe)
            if folder.exists() and (before is None or before.get("fingerprint") != mark):
                folder.rmtree()
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_json(pending, {"fingerprint": mark, "recipe": recipe})

        meshes.on_main(begin)

    def _take_from_fork(self, folder: epath.Path, mark: str, recipe: dict, check: Callable | None) -> dict | None:
        relative = folder.relative_to(self.run.path)
        source = self.run.fork / relative
        manifest = _manifest(source)
        if manifest is None or manifest["fingerprint"] != mark:
            return None
        try:
            if check is not None:
                check(manifest)
        except InputError:
            return None  # of other inputs after all
        storage.verify(source, manifest["files"])

        def take() -> None:
            self._refuse_half_done(folder, mark, recipe)
            copy = folder.parent / f".{folder.name}.copying"
            for old in (folder, copy):
                if old.exists():
                    old.rmtree()
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, copy)
            storage.sync_tree(copy)
            copy.rename(folder)
            if manifest["verb"] == "evaluate":
                self.run.add_metrics(folder)

        meshes.on_main(take)
        return _manifest(folder)


def _check_name(name: str, folder: epath.Path) -> None:
    if not name or name in (".", "..") or "/" in name or name.startswith("."):
        raise InputError(f"a result is a folder, {name!r} is no name for one: letters, digits, '-', '_' and '.' are")


def _has_work(folder: epath.Path) -> bool:
    """Whether a half-done result holds what took time: checkpoints or rows."""
    return any((folder / "resume").glob("*")) or any(folder.glob("partial-*")) or any(folder.glob("rows-*"))


def _pending(pending: epath.Path) -> dict | None:
    """What a half-done folder says of itself; None where there is nothing to go on with."""
    if not pending.exists():
        return None
    try:
        found = json.loads(pending.read_text())
        return found if isinstance(found, dict) else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None  # torn by a kill before anything was made


def _manifest(folder: epath.Path) -> dict | None:
    file = folder / "manifest.json"
    if not file.exists():
        return None
    manifest = storage.read_json(file, "the manifest")
    missing = [k for k in ("verb", "fingerprint", "files") if not isinstance(manifest, dict) or k not in manifest]
    if missing:
        raise InputError(
            f"the manifest {file} is damaged: no {', '.join(missing)} in it. Restore it, or delete {folder} to have it "
            "made again"
        )
    return manifest


def _drop_resume(folder: epath.Path) -> None:
    """In-flight checkpoints go only after the commit; what a kill left of them goes at the next start."""
    if meshes.is_main():
        if (folder / "resume").exists():
            (folder / "resume").rmtree()
        (folder / "training.json").unlink(missing_ok=True)
