"""Replies that are paid for are kept at once, by what was asked: the same question is never asked twice, after a kill,
of a fork, or by another verb of a run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from recursive_jax import storage
from recursive_jax.errors import InputError, say


class Replies:
    """An append-only file of replies, JSON lines with a checksum each. others: files of other runs, which are read
    only. Nothing is opened before it is asked for. Two processes may append to one file: a line is one write."""

    def __init__(self, path: Any, others: Sequence[Any] = ()):
        self.path, self.others = os.fspath(path), [os.fspath(p) for p in others]
        self._place: dict[str, tuple[str, int]] | None = None  # of each question: file, offset
        self._spent: dict[str, tuple[int, int]] = {}
        self._file: BinaryIO | None = None

    def _index(self) -> dict[str, tuple[str, int]]:
        if self._place is None:
            self._place = {}
            for path in [*self.others, self.path]:
                for at, record in _records(path):
                    self._place[record["key"]] = (path, at)
                    if path == self.path:
                        self._count(record["model"], record["reply"])
        return self._place

    def _count(self, model: str, reply: dict[str, Any]) -> None:
        read, written = self._spent.get(model, (0, 0))
        self._spent[model] = read + reply["input_tokens"], written + reply["output_tokens"]

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply to a question; None: it was not asked yet, or its line is damaged."""
        place = self._index().get(key)
        if place is None:
            return None
        with open(place[0], "rb") as file:
            file.seek(place[1])
            record = _record(file.readline())
        return None if record is None or record["key"] != key else record["reply"]

    def add(self, key: str, model: str, reply: dict[str, Any]) -> None:
        """Keeps a reply: after this a kill does not lose it."""
        index = self._index()
        line = json.dumps(storage.sealed({"key": key, "model": model, "reply": reply})).encode() + b"\n"
        if self._file is None:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            self._file = open(self.path, "ab+", buffering=0)
            if self._file.tell():
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":  # torn by a kill
                    line = b"\n" + line
        self._file.seek(0, os.SEEK_END)
        begin = self._file.tell() + line.startswith(b"\n")
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: a reply was not written whole")
        index[key] = (self.path, begin)
        self._count(model, reply)

    def spent(self, model: str) -> tuple[int, int]:
        """Tokens (read, written) of the replies that this file, not the others, got from a model."""
        self._index()
        return self._spent.get(model, (0, 0))

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        return storage.opened(json.loads(line), "a line of", "the replies", "")
    except (ValueError, RecursionError, InputError):
        return None


def _records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if not os.path.isfile(path):
        return
    at = damaged = 0
    with open(path, "rb") as file:
        for line in file:
            record = _record(line)
            if record is not None:
                yield at, record
            elif line.endswith(b"}\n"):  # others were torn by a kill
                damaged += 1
            at += len(line)
    if damaged:
        say(f"{path}: {damaged:,} damaged lines; what they held is asked again")


_kept: list[Replies] = []


@contextlib.contextmanager
def keeping(replies: Replies | None) -> Iterator[None]:
    """Replies are looked up in, and added to, this file meanwhile (the innermost, where there are several)."""
    if replies is None:
        yield
        return
    _kept.append(replies)
    try:
        yield
    finally:
        _kept.remove(replies)
        replies.close()


def current() -> Replies | None:
    return _kept[-1] if _kept else None
