"""Replies read as rows by the template that asked for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recursive_jax.config import SamplingConfig
from recursive_jax.config.loader import with_settings
from recursive_jax.data.dataset import SCHEMA, Dataset, loose_column, python_rows
from recursive_jax.data.parsers import ParseError
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.generate.request import own_types

READABLE = ("ok", "length")  # the statuses of replies that have a text to read


def read_reply(row: Mapping[str, Any], template: Template) -> tuple[str, list[dict[str, Any]]]:
    """(status, what is read) of a reply, a row with its `text` and the columns of the row that was asked."""
    status = row["status"]
    if status not in READABLE:
        return status, [{}]
    found = template.read(row, row["text"], status == "length")
    return (found.status, [{}]) if isinstance(found, ParseError) else (status, found)


def read_record(row: Mapping[str, Any], template: Template) -> list[dict[str, Any]]:
    """The rows of one reply as `read_replies` gives them, as dicts."""
    status, found = read_reply(row, template)
    names = list(dict.fromkeys([*template.columns, *(name for fields in found for name in fields)]))
    kept = {f"source_{name}": row[name] for name in names if name in row and column_name(name) == name}
    whole = {**row, **kept, "status": status}
    rows = [{**whole, **{column_name(name): fields.get(name) for name in names}} for fields in found]
    for rank, later in enumerate(rows[1:], 1):
        later |= {"id": f"{row['id']}#{rank}", "prompt": [], "tokens": [], "logprobs": []}
        later |= {name: 0 for name in ("reply_input_tokens", "reply_output_tokens") if name in later}
    return rows


def column_name(field: str) -> str:
    """The column of a field that is read: one that is called as a core column is kept as `reply_<name>`."""
    return f"reply_{field}" if field in SCHEMA.names or field in ("loss", "weight") else field


def read_replies(replies: Dataset, template: Template) -> Dataset:
    """What the replies say: 0..n rows of each, with the columns that the template reads.

    A reply that cannot be read is one row, with its text and the reason as its status (`parse_error:<reason>`), and
    null in these columns. Of a reply that gives several rows, the first keeps the reply's id, and its `prompt`,
    `tokens` and `logprobs`; the others are `<id>#1`, `<id>#2`, ... with the same parents. A column that the asked row
    had under the name of one that is read stays as `source_<name>`; what is read under the name of a core column
    (`prompt`, `text`) is `reply_<name>`."""
    origin: list[int] = []
    rank: list[int] = []
    status: list[str] = []
    read: list[dict[str, Any]] = []
    for n, row in enumerate(python_rows(replies.table)):
        state, found = read_reply(row, template)
        origin += [n] * len(found)
        rank += range(len(found))
        status += [state] * len(found)
        read += found
    table = replies.table.take(pa.array(origin, pa.int64()))
    types = template.columns
    names = list(dict.fromkeys([*types, *(name for row in read for name in row)]))
    return _with_columns(Dataset(table), names, types, read, rank, status)


def _with_columns(
    data: Dataset, names: Sequence[str], types: dict[str, Any], read: list[dict[str, Any]], rank: list[int], status: Any
) -> Dataset:
    later = np.asarray(rank, np.int64) > 0
    data = data.with_column("status", status)
    if later.any():
        ids = [f"{name}#{k}" if k else name for name, k in zip(data.column("id"), rank, strict=True)]
        data = data.with_column("id", ids)
        for name in ("reply_input_tokens", "reply_output_tokens"):  # counted once
            if name in data.table.column_names:
                counts = data.column(name)
                data = data.with_column(name, [0 if late else n for n, late in zip(counts, later, strict=True)])
        for name in ("prompt", "tokens", "logprobs"):
            lists = data.lists(name)
            data = data.with_column(name, [lists[i][:0] if later[i] else lists[i] for i in range(len(lists))])
    own = own_types(data)
    for name in names:
        values = [row.get(name) for row in read]
        if name in own:
            data = data.with_column(f"source_{name}", data.table[name].combine_chunks())
        data = data.with_column(column_name(name), loose_column(values, types.get(name)))
    return data


def failed(status: str) -> bool:
    """Whether a row of this status holds nothing that was asked for."""
    return status not in READABLE


def ask(replies: Callable[[int, Sequence[int]], Dataset], count: int, template: Template, attempts: int = 1) -> Dataset:
    """The rows of `count` requests, those that failed asked anew, up to `attempts` times. replies(attempt, which): a
    reply to each of the requests `which`, in their order. Raises InputError where several are given to one."""
    if attempts < 1:
        raise InputError(f"attempts={attempts}: at least 1 is wanted")
    parts: list[Dataset] = []
    place = np.zeros(count, np.int64)  # of the latest reply to each
    which, before = list(range(count)), 0
    for attempt in range(attempts):
        found = replies(attempt, which)
        if len(found) != len(which):
            if attempts > 1:
                raise InputError(f"{len(found)} replies to {len(which)} requests: attempts={attempts} is for n_best=1")
            return read_replies(found, template)
        parts.append(found)
        place[which] = before + np.arange(len(which))
        before += len(which)
        rows = python_rows(found.table)
        which = [n for n, row in zip(which, rows, strict=True) if failed(read_reply(row, template)[0])]
        if not which:
            break
    return read_replies(Dataset.concat(parts).take(place), template)


def constrained_by(template: Template, sampling: SamplingConfig) -> SamplingConfig:
    """Sampling under which every reply that ends can be read. Raises InputError where the template's parser gives no
    constraint."""
    return with_settings(SamplingConfig, sampling, template.constraint())
