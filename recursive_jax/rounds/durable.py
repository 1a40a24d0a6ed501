"""What makes a verb durable: a result is committed once, under the fingerprint of everything it was made from.

`manifest.json` in its folder is the commit, with the checksum of each file. RUN/commits.jsonl keeps a second copy of
every manifest, and of what a half-done result is made from: what was lost or damaged is restored from it
(`restore`)."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from recursive_jax import environment, hosts, storage
from recursive_jax import mesh as meshes
from recursive_jax.config import difference
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError, machine_errors, problems, say
from recursive_jax.generate.remote.journal import keeping
from recursive_jax.identity import derived, digest

FORMAT = 3  # of the run folder; part of every fingerprint
COMMITS = "commits.jsonl"  # of the run folder: a copy of every manifest and of every record of half-done work


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
        with machine_errors(self.run.path):
            manifest = _manifest(folder)
            hosts.at(f"{verb} {name}")
            meshes.barrier(f"{verb}-looked")  # before the main process may change what the others look at
            if manifest is None and self.run.fork is not None:
                manifest = self._take_from_fork(folder, mark, recipe, check)
            if manifest is not None:
                if manifest["fingerprint"] != mark:
                    self._refuse(folder, "was made", {k: manifest.get(k) for k in recipe}, recipe)
                storage.verify(folder, manifest["files"])
                if check is not None:
                    check(manifest)
                _drop_parts(folder)
                self.run.progress.finished(f"{self.label} · {name}", manifest, stored=True)
                return Stored(folder, mark, read, manifest)
            environments = self._begin(folder, mark, recipe)
            start = time.time()
            if verb == "train":
                made = produce(folder)  # which says itself what it does
            else:
                with self.run.progress.waiting(f"{self.label} · {name}"), keeping(self.run.replies):
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
                "environments": environments,
                "finished": round(time.time(), 3),
                "status": "done",
            }

            def commit() -> None:
                storage.sync_tree(folder)
                manifest["files"] = storage.describe(folder)
                storage.write_json(folder / "manifest.json", manifest)
                self._enter(folder, manifest)

            meshes.on_main(commit)
            _drop_parts(folder)
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

    def _enter(self, folder: epath.Path, manifest: dict) -> None:
        """A commit in the records of the run."""
        append_copy(self.run.path, folder, "manifest", manifest)
        if manifest["verb"] == "evaluate":
            self.run.add_metrics(folder)

    def _refuse_half_done(self, folder: epath.Path, mark: str, recipe: dict) -> dict:
        """What a half-done folder says of itself, {} if nothing. Raises InputError where it is of other inputs and
        holds work, or holds a finished result that nothing names."""
        file = folder / "pending.json"
        before: dict = {}
        if file.exists():
            remedy = f"delete {folder} to have it made anew"
            before = storage.read_json(file, "the record of the half-done result", remedy)
        elif files := _files_of_work(folder):
            raise InputError(
                f"{folder} holds work ({', '.join(files[:3])}), but neither a manifest.json nor a pending.json that "
                f"says what it is of, and no copy in {self.run.path / COMMITS} fits. Restore manifest.json from a "
                f"copy; or delete {folder} to have it made again"
            )
        if before and before.get("fingerprint") != mark and _has_work(folder):
            self._refuse(folder, "is half-done", before.get("recipe", {}), recipe)
        return before

    def _begin(self, folder: epath.Path, mark: str, recipe: dict) -> list[Any]:
        """Marks a half-done result with what it is made from. One of other inputs is never thrown away unasked. Returns
        the environments that it is made under."""
        pending = folder / "pending.json"
        now = self.run.environment

        def begin() -> None:
            before = self._refuse_half_done(folder, mark, recipe)
            if before and before.get("fingerprint") != mark:
                _remove(folder)
                before = {}
            folder.mkdir(parents=True, exist_ok=True)
            record = {"fingerprint": mark, "recipe": recipe}
            record["environments"] = environment.continued(
                before.get("environments", []) if _has_work(folder) else [], now
            )
            if record != before:
                append_copy(self.run.path, folder, "pending", record)  # first: without work beside it it says nothing
                storage.write_json(pending, record)

        meshes.on_main(begin)
        return storage.read_json(pending, "the record of the half-done result")["environments"]

    def _take_from_fork(self, folder: epath.Path, mark: str, recipe: dict, check: Callable | None) -> dict | None:
        relative = folder.relative_to(self.run.path)
        source = self.run.fork / relative
        manifest = _manifest(source)
        if manifest is None and source.is_dir():  # lost: its copy will do, where the files are still what it says
            manifest = read_copies(self.run.fork).get(str(relative), {}).get("manifest")
        if manifest is None or manifest["fingerprint"] != mark:
            return None
        try:
            if check is not None:
                check(manifest)
        except InputError:
            return None  # of other inputs after all
        storage.verify(source, manifest["files"])

        def take() -> None:
            self.run.note_environments(manifest.get("environments", []), str(source))
            self._refuse_half_done(folder, mark, recipe)
            copy = folder.parent / f".{folder.name}.copying"
            for old in (folder, copy):
                _remove(old)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, copy)
            storage.write_json(copy / "manifest.json", manifest)
            storage.sync_tree(copy)
            copy.rename(folder)
            self._enter(folder, manifest)

        meshes.on_main(take)
        return _manifest(folder)


def _check_name(name: str, folder: epath.Path) -> None:
    if not name or name in (".", "..") or "/" in name or name.startswith("."):
        raise InputError(f"a result is a folder, {name!r} is no name for one: letters, digits, '-', '_' and '.' are")


def _has_work(folder: epath.Path) -> bool:
    """Whether a half-done result holds what took time: checkpoints or rows."""
    return any((folder / "resume").glob("*")) or any(folder.glob("partial-*"))


def _files_of_work(folder: epath.Path) -> list[str]:
    """Names of what a finished or a half-done result left in a folder; none of a start that made nothing."""
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [n for n in found if not n.endswith(".tmp") and n not in ("training.json", "train.jsonl", "tensorboard")]


def _manifest(folder: epath.Path) -> dict | None:
    return read_manifest(folder / "manifest.json") if (folder / "manifest.json").exists() else None


def read_manifest(file: Any) -> dict:
    """A manifest as it was committed. Raises InputError naming the file and the remedy."""
    folder = epath.Path(file).parent
    remedy = (
        f"start the run again, which restores it from RUN/{COMMITS} where it can; else restore it from a copy, or "
        f"delete {folder} to have it made again"
    )
    return storage.read_json(file, "the manifest", remedy)


def append_copy(run: epath.Path, folder: epath.Path, kind: str, value: dict) -> None:
    """A line of RUN/commits.jsonl. kind: `manifest`, `pending` or `run`."""
    record = storage.sealed({"path": os.path.relpath(folder, run), kind: value})
    storage.append_line(run / COMMITS, json.dumps(record))


def read_copies(run: epath.Path) -> dict[str, dict]:
    """The newest line of RUN/commits.jsonl for each path: {path: {kind: value}}. Lines that a kill tore, or that are
    damaged, are left out: what they copy lies in the folder itself."""
    copies: dict[str, dict] = {}
    file = run / COMMITS
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            record = storage.opened(json.loads(line), "a line of", file, "")
            copies[record.pop("path")] = record
        except (ValueError, KeyError, RecursionError, InputError):
            continue
    return {path: copy for path, copy in copies.items() if isinstance(path, str) and len(copy) == 1}


def restore(run: epath.Path) -> None:
    """Writes records that are missing or damaged again, from their copies in RUN/commits.jsonl: a manifest where every
    file of the result is as it says, `pending.json` beside half-done work. Completes the copies after a kill between a
    commit and its line."""
    copies = read_copies(run)
    for path, copy in copies.items():
        folder = run / path
        kind, value = next(iter(copy.items()))
        if kind == "run":
            continue  # `Run` does that, before it looks at results
        other = folder / ("pending.json" if kind == "manifest" else "manifest.json")
        if not folder.is_dir() or other.exists():
            continue  # deleted by somebody, being made again, or committed
        file = folder / f"{kind}.json"
        try:
            if file.exists():
                storage.read_json(file, f"the {kind} record")
                continue
            found = f"{file} is missing"
        except storage.Damaged as error:
            found = error.what
        try:
            if kind == "manifest":
                storage.verify(folder, value["files"])
            elif not _files_of_work(folder):
                continue
        except (InputError, KeyError):
            continue  # said when the result is wanted
        storage.write_json(file, value)
        say(f"{found}; restored from {run / COMMITS}")
    for folder, manifest in committed(run):
        if copies.get(os.path.relpath(folder, run)) != {"manifest": manifest}:
            append_copy(run, folder, "manifest", manifest)


def committed(run: epath.Path) -> Iterator[tuple[epath.Path, dict]]:
    """(folder, manifest) of all committed results of a run."""
    for pattern in ("rounds/*/*/manifest.json", "*/rounds/*/*/manifest.json", "*/replicate-*/rounds/*/*/manifest.json"):
        for file in sorted(run.glob(pattern)):
            if not file.parent.name.startswith("."):  # a copy in the making
                yield file.parent, read_manifest(file)


def mark_of(folder: epath.Path) -> str:
    """The fingerprint of the result that is being made in a folder."""
    return storage.read_json(folder / "pending.json", "the record of the half-done result")["fingerprint"]


def _remove(folder: epath.Path) -> None:
    if os.path.islink(folder):
        raise InputError(
            f"{folder} is a link, and would be replaced: move it away, and keep whole runs elsewhere instead"
        )
    if folder.exists():
        folder.rmtree()


def _drop_parts(folder: epath.Path) -> None:
    """In-flight checkpoints and journals go only after the commit; what a kill left of them goes at the next start."""
    if meshes.is_main():
        if (folder / "resume").exists():
            (folder / "resume").rmtree()
        for part in (folder / "training.json", folder / "pending.json", *folder.glob("partial-*")):
            part.unlink(missing_ok=True)
