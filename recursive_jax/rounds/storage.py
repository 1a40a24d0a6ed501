"""Files of a run folder: whole or absent, never half. Write data, fsync, rename, then the manifest: it is the
commit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from recursive_jax.errors import InputError

#: Of a result's folder, what is no part of the result: the commit itself, logs, parts of an unfinished training.
NOT_RESULTS = ("manifest.json", "pending.json", "training.json", "train.jsonl", "tensorboard", "resume")
_DIGEST_LIMIT = 64 * 2**20  # larger files are checked by size; the formats in them carry checksums of their own


def write_atomic(path: epath.Path, data: bytes) -> None:
    """The file appears with all of `data` or stays as it was, also through a power cut."""
    temporary = f"{os.fspath(path)}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def append_line(path: epath.Path, line: str) -> None:
    """One more line of a text file, on the disk before it returns. A line without an end, torn by a kill, is ended
    first."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_json(path: epath.Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def sync_directory(path: epath.Path) -> None:
    handle = os.open(os.fspath(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: epath.Path) -> None:
    """fsync of everything below a folder: other libraries wrote it and may not have."""
    for folder, _, files in os.walk(path):
        for name in files:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(epath.Path(folder))


def read_json(path: epath.Path, what: str) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{what} {path} is damaged ({error}). Restore it from a copy; or delete its folder to have it made again"
        ) from None


def describe(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Size, and for files up to 64 MiB the SHA-256, of every file below `folder` but the manifest, logs and parts of
    an unfinished training."""
    found = {}
    for file in _walk(folder):
        name = os.path.relpath(os.fspath(file), os.fspath(folder))
        if name.split(os.sep)[0] in NOT_RESULTS:
            continue
        size = file.stat().length
        found[name] = {"bytes": size, **({"sha256": _digest(file)} if size <= _DIGEST_LIMIT else {})}
    return found


def verify(folder: epath.Path, files: dict[str, dict[str, Any]]) -> None:
    """Raises InputError naming the first file that is not as the manifest says."""
    for name, stored in files.items():
        file = folder / name
        if not file.exists():
            raise InputError(
                f"{file} is missing, although {folder / 'manifest.json'} lists it; restore it, or delete {folder} to "
                "make it again"
            )
        changed = file.stat().length != stored["bytes"] or ("sha256" in stored and _digest(file) != stored["sha256"])
        if changed:
            raise InputError(
                f"{file} is damaged: it differs from what {folder / 'manifest.json'} recorded; restore it, or delete "
                f"{folder} to make it again"
            )


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _digest(file: epath.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Lock:
    """One process per run folder. The kernel drops the lock when its holder dies, however it dies."""

    def __init__(self, folder: epath.Path):
        import fcntl

        self._file = open(folder / ".lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            own = ": this one, in a Run that is open" if holder == str(os.getpid()) else ""
            raise InputError(
                f"{folder} is in use by another process (pid {holder}{own}); wait for it, or give another --workdir"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


_DISK = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENOENT: "the place cannot be created",
    errno.EFBIG: "the file would be larger than allowed",
}


def explain_disk_error(error: OSError, folder: Any) -> str | None:
    """One message for an error of the disk, or None if it is of another kind."""
    if error.errno not in _DISK:
        return None
    return (
        f"cannot use {error.filename or folder}: {_DISK[error.errno]}. What was committed under {folder} is kept: "
        "mend this and give the same command again, or give another --workdir"
    )


@contextlib.contextmanager
def disk_errors(folder: Any) -> Iterator[None]:
    """Turns errors of the disk into one message; what was committed stays."""
    try:
        yield
    except OSError as error:
        text = explain_disk_error(error, folder)
        if text is None:
            raise
        raise InputError(text) from None
