"""Prompts from a file or a pipe, rows to a file or a pipe, any number of them.

Finished rows go to OUT.partial at once; when all are there they become OUT, in the order of the prompts. The same
command started again goes on from OUT.partial. Only a row's place in the file is kept in memory."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from recursive_jax import environment
from recursive_jax.config import SamplingConfig
from recursive_jax.data import chat, files
from recursive_jax.data.dataset import SCHEMA, Dataset
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError, say
from recursive_jax.generate.engine import slots_for
from recursive_jax.generate.generate import FIRST, stream, writer_name
from recursive_jax.generate.prefill import Row
from recursive_jax.generate.reading import failed, read_record, read_reply
from recursive_jax.generate.remote.journal import Replies, keeping
from recursive_jax.generate.remote.model import Remote
from recursive_jax.generate.request import Draft, Request, own_name
from recursive_jax.identity import describe
from recursive_jax.mesh import resolve_dtype
from recursive_jax.models.model import Model
from recursive_jax.storage import checksum, sync_directory

SUFFIXES = (".jsonl", ".parquet")
GROUP = 1024  # rows of one row group of a Parquet file


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Where prompts come from. path: JSONL, CSV or Parquet with `prompt` (or `text`) or `messages`, a text file with a
    prompt on each line, or `-` for JSONL or lines on standard input; None: the one `prompt`. A row may also
    bring `negative` and, in a file, `sampling`; all its columns stand in the rows written to it, beside theirs. count:
    rows of each. chat: prompts are what a user says; system: before it. field: the column that holds the prompt.
    template: asks each row instead, and reads the replies."""

    path: str | None = None
    prompt: str = ""
    count: int = 1
    chat: bool = False
    system: str = ""
    field: str | None = None
    template: Template | None = None

    @property
    def name(self) -> str:
        return {None: "prompt", "-": "stdin"}.get(self.path) or Path(self.path).name

    def rows(self) -> Iterator[dict[str, Any]]:
        if self.path is None:
            yield {"prompt": self.prompt}
        elif self.path == "-":
            yield from _lines(sys.stdin, "standard input")
        elif not Path(self.path).is_file():
            what = "is not a file" if os.path.exists(self.path) else "there is no such file"
            raise InputError(f"--in={self.path}: {what}")
        elif files.kind_of(self.path) in ("jsonl", *files.TABLES):
            yield from (row for _, row in files.read_rows(self.path))
        else:
            yield from ({"prompt": line} for _, line in files.read_lines(self.path))

    def settings(self, base: SamplingConfig) -> list[SamplingConfig]:
        """The settings that rows of a file bring along."""
        if self.path in (None, "-"):
            return []
        found = {json.dumps(row["sampling"], sort_keys=True) for row in self.rows() if row.get("sampling")}
        return [_merged(base, json.loads(text), self.name) for text in sorted(found)]

    def requests(
        self, tokenizer: Tokenizer, base: SamplingConfig, done: bytearray, tries: bytearray = b""
    ) -> Iterator[Request]:
        """Request `row * count + sample` for each row and sample that is not done. tries: how often each was answered;
        another try has other random numbers."""
        for number, row in enumerate(self.rows()):
            first = number * self.count
            if done[first : first + self.count].count(1) == self.count:
                continue
            own = _merged(base, row["sampling"], f"{self.name}, row {number}") if row.get("sampling") else None
            if own is not None and self.path == "-":
                raise InputError("rows on standard input cannot bring `sampling` of their own: give a file")
            prompt, opened = self._encode(row, tokenizer, number)
            negative = row.get("negative") or None
            if negative is not None and not isinstance(negative, str):
                raise InputError(f"{self.name}, row {number}: `negative` is a {type(negative).__name__}, not a text")
            negative = negative and tokenizer.encode(negative)
            columns = {} if self.path is None else {k: v for k, v in row.items() if k != "sampling"}
            for i in range(first, first + self.count):
                if i >= len(done) or not done[i]:
                    tried = tries[i] if i < len(tries) else 0
                    yield Request(i, prompt, (f"{self.name}/{number}",), opened, own, negative, tried, columns)

    def _encode(self, row: dict[str, Any], tokenizer: Tokenizer, number: int) -> tuple[np.ndarray, bool]:
        if self.template is not None:
            try:
                return self.template.request(row, tokenizer), True
            except InputError as error:
                raise InputError(f"{self.name}, row {number}: {error}") from None
        if self.field:
            value = row.get(self.field)
            prompt, messages = (None, value) if isinstance(value, list) else (value, None)
        else:
            prompt = row["text"] if row.get("prompt") is None and "text" in row else row.get("prompt")
            messages = None if row.get("messages") == "" else row.get("messages")  # an empty cell of a CSV
        if messages is not None and not (
            isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
        ):
            raise InputError(f"{self.name}, row {number}: `messages` is no list of objects with `role` and `content`")
        if messages is not None or self.chat:
            messages = messages or [{"role": "user", "content": prompt}]
            if self.system:
                messages = [{"role": "system", "content": self.system}, *messages]
            if messages[-1].get("content") is not None:
                return np.asarray(chat.encode_prompt(tokenizer, messages), np.int32), True
        if not isinstance(prompt, str):
            wanted = f"`{self.field}`" if self.field else "`prompt`, `text` or `messages` (--field names another)"
            there = ", ".join(map(str, row)) or "no columns"
            raise InputError(f"{self.name}, row {number}: there is no text in {wanted}; there are: {there}")
        return np.asarray(tokenizer.encode(prompt), np.int32), not getattr(tokenizer, "has_bos", True)


def _lines(pipe: TextIO, name: str) -> Iterator[dict[str, Any]]:
    """One row a line of a pipe, UTF-8 whatever the locale. If the first is a JSON object, they all are."""
    jsonl = None
    for number, line in enumerate(getattr(pipe, "buffer", pipe), 1):
        where = f"{name}, line {number}"
        try:
            line = line.decode("utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError as error:
            raise files.wrong_byte(where, error) from None
        line = line.removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")
        jsonl = line.lstrip().startswith("{") if jsonl is None else jsonl
        if not jsonl:
            yield {"prompt": line}
        elif line.strip():
            row = files.parse_json(line, where)
            if not isinstance(row, dict):
                raise InputError(f"{where}: a JSON object is wanted, it is a {type(row).__name__}")
            yield row


def _merged(base: SamplingConfig, own: Any, where: str) -> SamplingConfig:
    if not isinstance(own, dict):
        raise InputError(
            f"{where}: `sampling` is a {type(own).__name__}; an object is wanted, as {{'temperature': 0.7}}"
        )
    own = {key: value for key, value in own.items() if value is not None}  # null is absent, as Parquet writes it
    try:
        return SamplingConfig(**{**base.model_dump(exclude_unset=True), **own})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: sampling.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def generate_file(
    model: Model,
    prompts: Prompts,
    out: str,
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    draft: Draft | None = None,
    attempts: int = 1,
    progress: bool = False,
    stopped: Any = lambda: False,
) -> bool:
    """Writes a row for every prompt to `out` (.jsonl, .parquet, or `-` for JSONL on standard output, rows as they
    finish). With a template, what the replies say (`read_replies`); attempts: how often a reply that failed is asked
    anew, at most.

    Returns whether all are there; False: `stopped()` said so, and the same call goes on from what is kept. Raises
    InputError for input that cannot be read, an `out` that exists, or an OUT.partial of another command."""
    sampling = sampling or SamplingConfig()
    if out == "-":
        for row in _rows(model, prompts, sampling, seed, draft, progress, bytearray()):
            for record in _read(_record(row, model, seed), prompts.template):
                print(json.dumps(record, default=str), flush=True)
        return True
    if Path(out).suffix not in SUFFIXES:
        raise InputError(f"--out={out}: a name ending in {' or '.join(SUFFIXES)}, or -, is wanted")
    if os.path.exists(out):
        raise InputError(f"--out={out} is there already: remove it, or give another name")
    now = environment.environment(model.mesh)
    if attempts > 1 and (sampling.beams > 1 or sampling.best_of > 1):
        raise InputError(f"attempts={attempts} is for one row of a request: beams and best_of keep the best of several")
    partial = _Partial(out, _mark(model, prompts, sampling, seed), now, prompts.template)
    replies = Replies(f"{out}.replies") if isinstance(model, Remote) else None
    try:
        with keeping(replies):
            whole = _all(partial, model, prompts, sampling, seed, draft, attempts, progress, stopped)
    finally:
        partial.close()
    if whole:
        partial.become(out)
        if replies is not None and os.path.exists(replies.path):
            os.remove(replies.path)
    return whole


def _all(partial, model, prompts, sampling, seed, draft, attempts, progress, stopped) -> bool:
    """Rows until all are there, what failed asked anew; False: `stopped()` said so."""
    while True:
        for row in _rows(model, prompts, sampling, seed, draft, progress, partial.done, partial.tries):
            partial.append(_record(row, model, seed), row)
            if stopped():
                return False
        if not partial.ask_again(attempts):
            return True


def _rows(model, prompts, sampling, seed, draft, progress, done, tries=b"") -> Iterator[Row]:
    if prompts.path == "-":
        requests, like = prompts.requests(model.tokenizer, sampling, done), []
    else:
        like = [r for r, _ in zip(prompts.requests(model.tokenizer, sampling, bytearray()), range(FIRST), strict=False)]
        like += [Request(-1, like[0].prompt, sampling=s) for s in prompts.settings(sampling)] if like else []
        requests = prompts.requests(model.tokenizer, sampling, done, tries)
        sampling = slots_for(sampling, len(like)) if len(like) < FIRST else sampling
    return stream(model, requests, sampling, seed=seed, draft=draft, like=like, progress=progress)


def _read(record: dict[str, Any], template: Template | None) -> list[dict[str, Any]]:
    return [record] if template is None else read_record(record, template)


def _record(row: Row, model: Model, seed: int) -> dict[str, Any]:
    """A row as the columns of a Dataset, those of its prompt's row among them."""
    values = {
        "id": f"rows/{row.request.id}" + (f".{row.rank}" if row.rank else ""),
        "parents": list(row.request.parents),
        "operation": "generate",
        "model": writer_name(model),
        "round": 0,
        "seed": seed,
        "synthetic": True,
        "status": row.status,
        "prompt": [int(t) for t in row.prompt],
        "tokens": [int(t) for t in row.tokens],
        "logprobs": [float(x) for x in row.logprobs],
        "text": row.text,
    }
    own = {own_name(name): value for name, value in row.request.columns.items()}
    return {**{name: values[name] for name in SCHEMA.names}, **own}


def _mark(model: Model, prompts: Prompts, sampling: SamplingConfig, seed: int) -> str:
    """What the rows depend on."""
    decided = sampling.model_copy(update={"dtype": resolve_dtype(sampling.dtype, model.mesh)})
    what = [describe(decided), seed, describe(prompts), writer_name(model) or model.source]
    digest = hashlib.sha256(json.dumps(what).encode())
    if prompts.path not in (None, "-") and os.path.isfile(prompts.path):
        with open(prompts.path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


class _Partial:
    """Rows as JSON lines in the order they finished, behind a line that names the command; each line ends with a tab
    and its checksum."""

    def __init__(self, out: str, mark: str, now: dict[str, Any], template: Template | None = None):
        self.path = f"{out}.partial"
        self._now, self._template = now, template
        self.done = bytearray()
        self.tries = bytearray()  # replies to each request so far, and whether the last one failed
        self._failed = bytearray()
        self._changed = False
        self._place = array.array("q")  # request, rank, where its line begins
        self._end = self._kept = 0
        if os.path.exists(self.path):
            self._read(mark)
        self._file = open(self.path, "r+b" if self._end else "wb")
        if not self._end:
            self._write({"command": mark, "environments": [now]})
        self._file.seek(self._end)
        self._file.truncate()
        if self._changed:
            self._write({"environment": now})

    def _read(self, mark: str) -> None:
        """Takes up what an earlier start left; a torn last line, what is damaged and all behind it, and rows of a
        request that is not whole, are dropped."""
        with open(self.path, "rb") as file:
            head = file.readline()
            first = file.readline()
            file.seek(len(head))
            command = _checked(head)
            if command is None and head and not (b'{"command"'.startswith(head[:11]) and not first):
                raise InputError(
                    f"{self.path} is damaged, or no rows of a `generate --out`: remove it to have its rows made again"
                )
            if not first.endswith(b"\n"):
                return  # it came to no row (bad input, say): nothing is lost
            if command.get("command") != mark:
                raise InputError(
                    f"{self.path} holds rows of another command (model, prompts, settings or seed differ): remove it, "
                    "or "
                    "give another --out"
                )
            environments = command.get("environments", [])
            self._end = file.tell()
            for line in file:
                if not line.endswith(b"\n"):
                    break
                record = _checked(line)
                if record is not None and "id" not in record:
                    environments = [*environments, record["environment"]]
                    self._end += len(line)
                    continue
                if record is None:
                    say(f"{self.path} is damaged at byte {self._end:,}: the rows from there on are made again")
                    break
                self._note(record, record.pop("_last"))
                self._end += len(line)
        self._changed = environment.changed(environments, self._now, self.path)

    def _note(self, record: dict[str, Any], last: bool) -> None:
        number, _, rank = record["id"].rsplit("/", 1)[1].partition(".")
        number = int(number)
        self._place.extend((number, int(rank or 0), self._end))
        if not last:
            return
        for marks in (self.done, self.tries, self._failed):
            marks.extend(bytes(max(0, number + 1 - len(marks))))
        self.done[number] = 1
        self.tries[number] = min(255, self.tries[number] + 1)
        status = record["status"] if self._template is None else read_reply(record, self._template)[0]
        self._failed[number] = failed(status)

    def ask_again(self, attempts: int) -> int:
        """Takes what failed, and was tried less than `attempts` times, as not done; how many these are."""
        again = [n for n, was in enumerate(self._failed) if was and self.tries[n] < attempts]
        for number in again:
            self.done[number] = self._failed[number] = 0
        return len(again)

    def _write(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, default=str).encode()
        line = text + b"\t" + checksum(text).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._end += len(line)

    def append(self, record: dict[str, Any], row: Row) -> None:
        self._note(record, row.last)
        self._write({**record, "_last": row.last})

    def close(self) -> None:
        self._file.close()

    def become(self, out: str) -> None:
        """The rows in the order of their requests, as the finished file."""
        place = np.frombuffer(self._place, np.int64).reshape(-1, 3)
        place = place[np.lexsort((place[:, 2], place[:, 1], place[:, 0]))]
        latest = np.r_[np.any(place[1:, :2] != place[:-1, :2], axis=1), True] if len(place) else np.empty(0, bool)
        temporary = f"{out}.tmp"
        with open(self.path, "rb") as file:
            lines = lambda: (_line_at(file, at) for at in place[latest, 2].tolist())
            _write_rows(temporary, out, lambda: (row for line in lines() for row in _read(line, self._template)))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, out)
        sync_directory(os.path.dirname(os.path.abspath(out)))
        os.remove(self.path)


def _checked(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it differs from what was written."""
    text, _, stored = line.rstrip(b"\n").rpartition(b"\t")
    return json.loads(text) if checksum(text).encode() == stored else None


def _line_at(file: Any, at: int) -> dict[str, Any]:
    file.seek(at)
    record = _checked(file.readline())
    if record is None:
        raise InputError(f"{file.name} was changed while it was read; the same command goes on from what is whole")
    del record["_last"]
    return record


def _write_rows(path: str, name: str, records: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """records: gives them anew at every call."""
    if name.endswith(".jsonl"):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records())
        return
    empty = Dataset.empty().table
    schema = Dataset.concat_schemas(Dataset.from_rows(group).table.schema for group in _groups(records()))
    with pq.ParquetWriter(path, schema or empty.schema, compression="zstd") as writer:
        for group in _groups(records()):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
        if schema is None:
            writer.write_table(empty)


def _groups(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    source = iter(records)
    while group := list(itertools.islice(source, GROUP)):
        yield group
