"""Files that are read back: whole or absent, never half, and checked to the bit before anything is made of them.

Write data, fsync, rename, then the manifest: it is the commit. Every file that this project writes to read it again has
a checksum: JSON in itself (`write_json`), rows that are appended in frames (`write_frame`), everything else in the
manifest, or the seal, of its folder (`describe`, `verify`).

The checksum is XXH3 with 128 bits, through the `xxhash` library: 24 GB/s where SHA-256 has 2.0 (docs/reliability.md).
It finds damage; it is no signature against somebody who forges files.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import xxhash
from etils import epath

from recursive_jax.errors import InputError

#: Of a result's folder, what is no part of the result: the commit itself, logs, parts of an unfinished result.
NOT_RESULTS = ("manifest.json", "pending.json", "training.json", "train.jsonl", "tensorboard", "resume", "partial-")
_BLOCK = 2**20
_HEAD = struct.Struct("<4sQ32s")  # magic, bytes of the payload, what it is part of; behind it the checksums of both
_MAGIC = b"rows"


class Damaged(InputError):
    """A file is not what was written. what: which and how, without what to do about it."""

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(f"{what}; {remedy}" if remedy else what)
        self.what = what


# ---- checksums


def checksum(*parts: bytes | memoryview) -> str:
    """XXH3 with 128 bits of bytes, in hex."""
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def file_checksum(file: Any) -> str:
    """The same of a file, read as a stream."""
    found = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with open(file, "rb", buffering=0) as data:
        while n := data.readinto(block):
            found.update(block[:n])
    return found.hexdigest()


def describe(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file below `folder` but the manifest, logs and parts of an unfinished result."""
    found = {}
    for file in _walk(os.fspath(folder)):
        name = os.path.relpath(file, os.fspath(folder))
        if not name.split(os.sep)[0].startswith(NOT_RESULTS):
            found[name] = {"bytes": os.stat(file).st_size, "xxh3": file_checksum(file)}
    return found


def verify(folder: epath.Path, files: Any, manifest: str = "manifest.json", remedy: str = "") -> None:
    """Raises Damaged naming the first file that is not as the manifest says. remedy: what to do about it."""
    remedy = remedy or f"restore it from a copy, or delete {folder} to have it made again"
    if not isinstance(files, dict):
        raise Damaged(f"{folder / manifest} is damaged: it names no files", remedy)
    for name, stored in files.items():
        file = folder / name
        if not file.is_file():
            raise Damaged(f"{file} is missing, although {folder / manifest} lists it", remedy)
        if os.stat(file).st_size != stored.get("bytes") or file_checksum(file) != stored.get("xxh3"):
            raise Damaged(f"{file} is damaged: it differs from what {folder / manifest} recorded", remedy)


def verify_own(file: Any) -> None:
    """A file that is part of a result, with its manifest beside it, is held against that. Raises Damaged."""
    folder, name = epath.Path(file).parent, os.path.basename(os.fspath(file))
    if not (folder / "manifest.json").is_file():
        return
    try:
        files = read_json(folder / "manifest.json", "the manifest").get("files", {})
    except Damaged:
        return  # of something else, or said where the result itself is wanted
    if isinstance(files, dict) and name in files:
        verify(folder, {name: files[name]})


def _walk(folder: str) -> Iterator[str]:
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir():
            yield from _walk(entry.path)
        else:
            yield entry.path


# ---- writing


def write_atomic(path: Any, data: bytes) -> None:
    """The file appears with all of `data` or stays as it was, also through a power cut."""
    temporary = f"{os.fspath(path)}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    os.replace(temporary, path)
    sync_directory(os.path.dirname(os.fspath(path)) or ".")


def append_line(path: Any, line: str) -> None:
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


def sync_directory(path: Any) -> None:
    handle = os.open(os.fspath(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Any) -> None:
    """fsync of everything below a folder: other libraries wrote it and may not have."""
    for folder, _, files in os.walk(path):
        for name in files:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(folder)


# ---- JSON with a checksum of its own


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A mapping of plain values with its own `checksum`."""
    plain = json.loads(json.dumps({k: v for k, v in value.items() if k != "checksum"}))
    return {**plain, "checksum": _json_checksum(plain)}


def opened(value: Any, what: str, path: Any, remedy: str) -> dict[str, Any]:
    """A sealed mapping without its checksum. Raises Damaged where it is none, or is not what was written."""
    if not isinstance(value, dict) or "checksum" not in value:
        raise Damaged(f"{what} {path} is damaged: it is no mapping with a checksum", remedy)
    plain = {k: v for k, v in value.items() if k != "checksum"}
    if value["checksum"] != _json_checksum(plain):
        raise Damaged(f"{what} {path} is damaged: it differs from what was written, by its checksum", remedy)
    return plain


def write_json(path: Any, value: dict[str, Any]) -> None:
    """Atomically, with a checksum of the values beside them (white space may change)."""
    write_atomic(path, (json.dumps(sealed(value), indent=1) + "\n").encode())


def read_json(path: Any, what: str, remedy: str = "") -> dict[str, Any]:
    """What `write_json` wrote. Raises Damaged naming the file, what it is and what to do."""
    remedy = remedy or "restore it from a copy, or delete its folder to have it made again"
    return opened(plain_json(path, what, remedy), what, path, remedy)


def plain_json(path: Any, what: str, remedy: str = "") -> Any:
    """The value of a JSON file that has no checksum, or may have none. Raises InputError where it is not JSON."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise Damaged(f"{what} {path} is not a file", remedy)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, no end
        raise Damaged(f"{what} {path} is damaged ({error})", remedy) from None


def _json_checksum(value: dict[str, Any]) -> str:
    return checksum(json.dumps(value, sort_keys=True).encode())


# ---- rows that are appended


def write_frame(file: BinaryIO, mark: str, payload: bytes) -> None:
    """Appends bytes that `read_frames` gives back. mark: what they are part of, in at most 32 characters."""
    head = _HEAD.pack(_MAGIC, len(payload), mark.encode().ljust(32))
    file.write(head + checksum(head).encode() + checksum(payload).encode() + payload)
    file.flush()


def read_frames(path: Any, mark: str) -> tuple[list[bytes], str | None]:
    """(payloads up to the first damaged frame, what is wrong with that one). A last frame that a kill cut off is no
    damage. Raises InputError where a whole frame is part of something else."""
    found: list[bytes] = []
    with open(path, "rb") as file:
        while block := file.read(_HEAD.size + 64):
            if len(block) < _HEAD.size + 64:
                return found, None  # cut off
            head, sums = block[: _HEAD.size], block[_HEAD.size :]
            if checksum(head).encode() != sums[:32]:
                return found, f"the head of its part {len(found) + 1} differs from what was written"
            _, length, owner = _HEAD.unpack(head)
            if owner.rstrip() != mark.encode():
                raise InputError(f"{path} holds rows of another result: remove it to go on without them")
            payload = file.read(length)
            if len(payload) < length:
                return found, None
            if checksum(payload).encode() != sums[32:]:
                return found, f"its part {len(found) + 1} differs from what was written"
            found.append(payload)
    return found, None


class Lock:
    """One process per run folder. The kernel drops the lock when its holder dies, however it dies."""

    def __init__(self, folder: epath.Path):
        import fcntl

        self._file = open(folder / ".lock", "a+", encoding="utf-8", errors="replace")
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
