"""Rows kept as they finish: an append-only file per start of the process, read back after a kill up to its last whole
frame, and turned into the result's Parquet file at the end. The journal goes only when the result is committed: what
stands in Parquet files before that is made anew from it."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax import storage
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError, say
from recursive_jax.generate.prefill import Row
from recursive_jax.generate.request import Request

EVERY = 0.25  # seconds between writes
ROWS = 65_536  # rows of one Parquet file
BLOCK = 1024  # requests asked for at once
HOPELESS = 256  # empty rows after which a model is taken to write nothing


class Journal:
    """The finished rows of one generation. mark: the fingerprint of the result; `lengths`: tokens of every request that
    has its rows."""

    def __init__(self, folder: epath.Path, mark: str):
        self.folder, self.mark = folder, mark
        self._file: BinaryIO | None = None
        self._waiting: list[Row] = []
        self._make: Callable[[Sequence[Row]], Dataset] | None = None
        self._written = time.perf_counter()
        parts = sorted(folder.glob("partial-" + "[0-9]" * 5 + ".rows"))
        self._next_part = 1 + max((int(p.stem.rpartition("-")[2]) for p in parts), default=-1)
        kept = [data for part in parts for data in _read_part(part, mark)]
        self._made = [_distinct(Dataset.concat(kept, fill=True))]
        self.lengths: dict[int, int] = {}
        for (number, _), tokens in zip(_numbers(self._made[0]), self._made[0].tokens(), strict=True):
            self.lengths[number] = self.lengths.get(number, 0) + len(tokens)
        meshes.barrier("journal-read")

    def check(self, requests: Callable[[int, int], Sequence[Request]] | None, bos: int) -> None:
        """Raises InputError where a kept row was written to another prompt than its request has now."""
        kept = self._made[0]
        if requests is None or not len(kept):
            return
        block: dict[int, Request] = {}
        for (number, _), prompt in zip(_numbers(kept), kept.prompts(), strict=True):
            if number not in block:
                first = number - number % BLOCK
                block = {r.id: r for r in requests(first, BLOCK)}
            if number not in block or not np.array_equal(block[number].tokens(bos), prompt):
                raise InputError(
                    f"{self.folder} is half-done, and request {number} had another prompt then: give the prompts of "
                    "before to "
                    f"go on with it, or delete {self.folder} to have it made anew"
                )

    def append(self, row: Row, make: Callable[[Sequence[Row]], Dataset]) -> None:
        self._waiting.append(row)
        self._make = make
        if row.last and time.perf_counter() - self._written > EVERY:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            data = self._make(self._waiting)
            self._made.append(data)
            if meshes.is_main():
                if self._file is None:
                    self._file = open(self.folder / f"partial-{self._next_part:05d}.rows", "wb")
                    self._next_part += 1
                buffer = io.BytesIO()
                with pa.ipc.new_stream(buffer, data.table.schema) as writer:
                    writer.write_table(data.table)
                storage.write_frame(self._file, self.mark, buffer.getvalue())
        self._waiting, self._written = [], time.perf_counter()

    def close(self) -> None:
        """What is whole is kept: of a request with several rows, none if its last one has not come."""
        while self._waiting and not self._waiting[-1].last:
            self._waiting.pop()
        self._flush()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self, wanted: int) -> Dataset:
        """The rows of the first `wanted` requests in request order, written as the result."""
        self.close()
        made = Dataset.concat(self._made, fill=True)
        numbers = _numbers(made)
        order = sorted((i for i, n in enumerate(numbers) if n[0] < wanted), key=lambda i: numbers[i])
        data = made.take(np.array(order, np.int64))

        def write() -> None:
            for old in self.folder.glob("rows-*"):  # of an earlier try, which may have had more of them
                old.unlink()
            for part, start in enumerate(range(0, max(1, len(data)), ROWS)):
                buffer = io.BytesIO()
                Dataset(data.table.slice(start, ROWS).combine_chunks()).write(buffer)
                storage.write_atomic(self.folder / f"rows-{part:05d}.parquet", buffer.getvalue())

        meshes.on_main(write)
        return data


def _numbers(data: Dataset) -> list[tuple[int, int]]:
    """(request, rank) of each row, from its id."""
    last = [i.rsplit("/", 1)[1].partition(".") for i in data.column("id")]
    return [(int(number), int(rank or 0)) for number, _, rank in last]


def _distinct(data: Dataset) -> Dataset:
    """Without the rows that stand in several parts: of a start whose end was damaged, and of the one after it."""
    first = {name: i for i, name in reversed(list(enumerate(data.column("id"))))}
    return data if len(first) == len(data) else data.take(np.array(sorted(first.values()), np.int64))


def _read_part(path: epath.Path, mark: str) -> list[Dataset]:
    """The rows of one part of the journal, up to what is damaged."""
    frames, wrong = storage.read_frames(path, mark)
    if wrong is not None:
        say(f"{path} is damaged: {wrong}; its rows from there on are made again")
    found = []
    for frame in frames:
        with pa.ipc.open_stream(frame) as reader:
            found.append(Dataset(reader.read_all()))
    return found


class Budget:
    """Requests to be made, in order: those of the first `count`, or as many as it takes until the rows of requests
    0 .. wanted hold `tokens` tokens. An iterator that the engine draws on (None: not now); requests that have their
    rows are left out."""

    def __init__(
        self,
        done: dict[int, int],
        requests: Callable[[int, int], Sequence[Request]],
        count: int | None,
        tokens: int | None,
    ):
        self.lengths, self.count, self.tokens, self._requests = dict(done), count, tokens, requests
        self._begin, self._made = time.perf_counter(), 0
        self._before = sum(done.values())
        self._asked = self._of_request = self._next = 0
        self._block: dict[int, Request] = {}
        self.wanted, self.total = 0, 0
        self.enough = self._enough()

    @property
    def done(self) -> int:
        return len(self.lengths)

    def finished(self, row: Row) -> None:
        self._of_request += len(row.tokens)
        self._made += len(row.tokens)
        if row.last:
            self.lengths[row.request.id], self._of_request = self._of_request, 0
            self._asked -= 1
            self.enough = self._enough()

    def _enough(self) -> bool:
        """Follows the unbroken run of finished requests from 0 on, as far as it is wanted."""
        while True:
            if self.wanted >= self.count if self.count is not None else self.total >= self.tokens:
                return True
            if self.count is None and self.total == 0 and self.wanted >= HOPELESS:
                return True
            if self.wanted not in self.lengths:
                return False
            self.total += self.lengths[self.wanted]
            self.wanted += 1

    def __iter__(self) -> Iterator[Request | None]:
        while not self.enough:
            if self.count is not None and self._next >= self.count:
                return
            if self._next in self.lengths:
                self._next += 1
            elif self._in_work_suffices():
                yield None
            else:
                self._asked += 1
                self._next += 1
                yield self._request(self._next - 1)

    def _in_work_suffices(self) -> bool:
        """Whether the rows in work will do, at the mean length so far: what is made beyond the budget is thrown
        away."""
        if self.count is not None or not self._asked or self.done < 8:
            return False
        held = sum(self.lengths.values())
        return held + self._asked * held / self.done > 1.02 * self.tokens

    def _request(self, number: int) -> Request:
        if number not in self._block:
            size = BLOCK if self.count is None else min(BLOCK, self.count - number)
            self._block = {r.id: r for r in self._requests(number, size)}
        return self._block[number]

    def note(self) -> str:
        held, seconds = self._before + self._made, max(time.perf_counter() - self._begin, 1e-9)
        of = f"{self.done:,}/{self.count:,} rows" if self.count is not None else f"{held:,}/{self.tokens:,} tokens"
        return f"{of}, {self._made / seconds:,.0f} tokens/s"
