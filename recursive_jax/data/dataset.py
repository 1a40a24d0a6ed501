"""`Dataset`: immutable rows with lineage, kept as Parquet. A column has one meaning everywhere:

    id          names the row
    parents     ids of the rows it was made from
    operation   what made it: `real`, `generate`, ...
    model       fingerprint of the params that wrote it; empty for real rows
    round, seed of the run
    synthetic   whether a model wrote it
    status      `ok`, `length` (cut at the token limit), or the name of a failure
    prompt      int32 ids that stand before `tokens` and are never learnt: what the model read, its start token
                included; empty: the start token alone
    tokens      int32 ids of the row itself, no start token: what the model wrote
    logprobs    float32, nats, one for each of `tokens`; empty for real rows
    text        `tokens` as text

Columns that training and selection read, where there are any, and what a row without one means:

    loss        how much each of `tokens` is learnt (bool or float); missing: every token, fully
    weight      of the row's tokens in the loss; missing: 1
    score       a reward; missing: none

All other columns are the user's: they keep their names and types through every verb, and rows generated from a row
carry them on."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recursive_jax.errors import InputError
from recursive_jax.identity import derived, digest

# Offsets of 64 bits: a column may hold more than 2^31 tokens.
SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("parents", pa.large_list(pa.large_string())),
        ("operation", pa.string()),
        ("model", pa.string()),
        ("round", pa.int32()),
        ("seed", pa.int64()),
        ("synthetic", pa.bool_()),
        ("status", pa.string()),
        ("prompt", pa.large_list(pa.int32())),
        ("tokens", pa.large_list(pa.int32())),
        ("logprobs", pa.large_list(pa.float32())),
        ("text", pa.large_string()),
    ]
)
#: What a core column holds where rows are made without it.
BLANK: dict[str, Any] = {
    "parents": [],
    "operation": "real",
    "model": "",
    "round": 0,
    "seed": 0,
    "synthetic": False,
    "status": "ok",
    "prompt": [],
    "tokens": [],
    "logprobs": [],
    "text": "",
}
#: Columns that may be missing on one side of `+`, and the value that its rows then have (None: null).
DECLARED: dict[str, Any] = {"loss": None, "weight": 1.0, "score": None}


class Dataset:
    """An Arrow table of rows. `+` joins, `where` and `take` select; nothing changes in place.

    fingerprint: of the stored result the rows are, where a run gives one; else it is made from what the rows were
    derived from, or of their content. origins: fingerprints of the stored results that they come from."""

    def __init__(self, table: pa.Table, fingerprint: str | None = None, origins: tuple[str, ...] = ()):
        self.table = table
        self._given, self._content = fingerprint, None
        self.origins = origins or (() if fingerprint is None else (fingerprint,))

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Dataset:
        """Rows from dicts of any columns. Core columns that are left out are filled in: real rows with status `ok` and
        ids `row/0`, `row/1`, ... Raises InputError for a column whose values do not have one type."""
        rows = list(rows)
        if not all(isinstance(row, Mapping) for row in rows):
            raise InputError("Dataset.from_rows takes dicts, one for each row: {'text': ...}")
        names = list(dict.fromkeys(name for row in rows for name in row))
        arrays = {}
        for field in SCHEMA:
            blank = lambda i, name=field.name: f"row/{i}" if name == "id" else BLANK[name]
            values = [row[field.name] if field.name in row else blank(i) for i, row in enumerate(rows)]
            arrays[field.name] = _array(field.name, values, field.type)
        for name in names:
            if name not in arrays:
                arrays[name] = _array(name, [row.get(name) for row in rows])
        return cls(pa.table(arrays))

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Any) -> Dataset:
        """A real row for each text: its ids and the end token. Raises InputError for what is no text."""
        texts = list(texts)
        wrong = next((n for n, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise InputError(f"row {wrong} is a {type(texts[wrong]).__name__}: texts are wanted")
        tokens = [np.asarray([*tokenizer.encode(text), tokenizer.eos], np.int32) for text in texts]
        return real_rows(tokens, texts, prefix="row")

    @classmethod
    def from_columns(cls, count: int, /, **columns: Any) -> Dataset:
        """`count` rows. Core columns by name, and any others behind them, of any name; a scalar stands for every
        row."""
        arrays = {}
        for field in SCHEMA:
            value = columns.pop(field.name)
            if isinstance(value, (str, int, bool)):
                arrays[field.name] = pa.repeat(pa.scalar(value, field.type), count)
            elif pa.types.is_large_list(field.type) and not isinstance(value, pa.Array):
                arrays[field.name] = _list_array(value, field.type)
            else:
                arrays[field.name] = value if isinstance(value, pa.Array) else pa.array(value, field.type)
        for name, values in columns.items():
            arrays[name] = values if isinstance(values, pa.Array) else _array(name, values)
        return cls(pa.table(arrays))

    @classmethod
    def empty(cls) -> Dataset:
        return cls(SCHEMA.empty_table())

    @classmethod
    def read(cls, paths: Sequence[str], fingerprint: str | None = None) -> Dataset:
        """Parquet files as one Dataset, columns of the user's included. Raises InputError for a damaged file."""
        parts = []
        for path in paths:
            try:
                parts.append(cls(pq.read_table(path)))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise InputError(f"{path} is damaged and cannot be read as Parquet: {error}") from None
        found = cls.concat(parts)
        return cls(found.table, fingerprint)

    @classmethod
    def concat(cls, parts: Iterable[Dataset], fill: bool = False) -> Dataset:
        """All rows of `parts`, in order. Columns of one name join if their types do (int and float: float). A column
        that a part lacks is filled in where `DECLARED` says with what; else InputError names it."""
        parts = list(parts)
        if not parts:
            return cls.empty()
        if len(parts) == 1:
            return parts[0]
        kept = [p for p in parts if len(p)] or parts[:1]
        mark = None
        if all(p._given for p in parts):
            mark = derived("+", None, [p.fingerprint for p in parts])
        names = list(dict.fromkeys(name for p in kept for name in p.table.column_names))
        types = {name: _common_type(name, kept) for name in names}
        tables = []
        for part in kept:
            columns = {name: _column_as(part, name, types[name], fill) for name in names}
            tables.append(pa.table(columns))
        return cls(pa.concat_tables(tables), mark, tuple(dict.fromkeys(o for p in parts for o in p.origins)))

    @staticmethod
    def concat_schemas(schemas: Iterable[pa.Schema]) -> pa.Schema | None:
        """One schema that rows of all of them fit; None for none. Raises InputError for types that do not join."""
        types: dict[str, pa.DataType] = {}
        for schema in schemas:
            for field in schema:
                joined = _joined(types[field.name], field.type) if field.name in types else field.type
                if joined is None:
                    raise InputError(
                        f"column {field.name!r} holds {types[field.name]} in some rows and {field.type} in others"
                    )
                types[field.name] = joined
        return pa.schema(list(types.items())) if types else None

    def write(self, path: Any) -> None:
        pq.write_table(self.table, path, compression="zstd", use_dictionary=["operation", "model", "status"])

    @property
    def fingerprint(self) -> str:
        """Names the rows by value, in order and with every column."""
        if self._given is not None:
            return self._given
        if self._content is None:
            parts = []
            for name in sorted(self.table.column_names):
                column = self.table[name]
                parts.append(name.encode())
                parts += _content(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
            self._content = digest(*parts)
        return self._content

    def _derived(self, table: pa.Table, operation: str, arguments: Callable[[], Any]) -> Dataset:
        """`table`, made of these rows. Without a fingerprint of their own, the result's is of its content."""
        mark = None if self._given is None else derived(operation, arguments(), [self._given])
        return Dataset(table, mark, self.origins)

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        """Sizes, columns of the user's, and the first rows on a line each."""
        own = [name for name in self.table.column_names if name not in SCHEMA.names]
        more = f"; own columns: {', '.join(own)}" if own else ""
        lines = [f"Dataset({len(self):,} rows, {self.token_count:,} tokens{more})"]
        for row in python_rows(self.table.slice(0, 3)):
            values = [f"{name}={row[name]!r}" for name in own]
            text = f"{row['id']} [{row['status']}] {' '.join([repr(row['text']), *values])}"
            lines.append("  " + textwrap.shorten(text, 108))
        return "\n".join([*lines, f"  ... and {len(self) - 3:,} more"] if len(self) > 3 else lines)

    def __add__(self, other: Dataset) -> Dataset:
        return Dataset.concat([self, other])

    def __getitem__(self, index: int | slice) -> Any:
        """A row as a dict, or with a slice a Dataset."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return python_rows(self.table.slice(index % len(self), 1))[0]

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame. Raises InputError where pandas is not installed."""
        try:
            import pandas  # noqa: F401
        except ImportError:
            raise InputError("to_pandas needs pandas: pip install pandas (`.table` is the Arrow table)") from None
        return self.table.to_pandas()

    def column(self, name: str) -> list[Any]:
        if name not in self.table.column_names:
            raise InputError(f"there is no column {name!r}; there are {', '.join(self.table.column_names)}")
        return python_values(self.table[name])

    def has(self, name: str) -> bool:
        return name in self.table.column_names

    def tokens(self) -> list[np.ndarray]:
        """One int32 array per row."""
        return self.lists("tokens")

    def prompts(self) -> list[np.ndarray]:
        """The ids before each row's tokens, int32; empty: the start token alone."""
        return self.lists("prompt")

    def lists(self, name: str) -> list[np.ndarray]:
        """A per-token column: one array for each row (a missing one: empty)."""
        if len(self) == 0:
            return []
        column = self.table[name].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_null(column.type):
            return [np.empty(0)] * len(self)
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        values = column.flatten()
        flat = values.to_numpy(zero_copy_only=False)
        ends = np.cumsum(lengths)
        return [flat[b - n : b] for b, n in zip(ends.tolist(), lengths.tolist(), strict=True)]

    @property
    def token_count(self) -> int:
        return int(pc.sum(pc.list_value_length(self.table["tokens"])).as_py() or 0)

    def take(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        if chosen.size and (chosen.min() < -len(self) or chosen.max() >= len(self)):
            raise InputError(f"rows {chosen.min()}..{chosen.max()} are asked for, there are {len(self)}")
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        return self._derived(self.table.take(pa.array(chosen)), "take", lambda: chosen)

    def first_tokens(self, budget: int) -> Dataset:
        """The longest prefix of rows with at most `budget` tokens (at least one row)."""
        lengths = pc.list_value_length(self.table["tokens"]).to_numpy()
        count = int(np.searchsorted(np.cumsum(lengths), budget, side="right"))
        return self._derived(self.table.slice(0, max(1, count)), "first_tokens", lambda: budget)

    def where(self, keep: Callable[[dict[str, Any]], bool] | None = None, **equals: Any) -> Dataset:
        """Rows for which `keep(row)` holds, and whose columns equal the given values: `where(status="ok")`.

        Raises InputError for a column that is not there."""
        mask = pa.array(np.ones(len(self), bool))
        for name, value in equals.items():
            if not self.has(name):
                raise InputError(f"there is no column {name!r}; there are {', '.join(self.table.column_names)}")
            column = self.table[name]
            found = pc.is_null(column) if value is None else pc.fill_null(pc.equal(column, value), False)
            mask = pc.and_(mask, found)
        if keep is not None:
            mask = pc.and_(mask, pa.array([bool(keep(row)) for row in python_rows(self.table)], pa.bool_()))
            return Dataset(
                self.table.filter(mask), None, self.origins
            )  # named by its content: a function need not have an identity here
        return self._derived(self.table.filter(mask), "where", lambda: equals)

    def with_column(self, name: str, values: Sequence[Any] | np.ndarray | pa.Array) -> Dataset:
        """With a column put in place, or added behind the others. Core columns keep their type."""
        known = SCHEMA.field(name).type if name in SCHEMA.names else None
        array = values if isinstance(values, pa.Array) else _array(name, values, known)
        if name in self.table.column_names:
            table = self.table.set_column(self.table.column_names.index(name), name, array)
        else:
            table = self.table.append_column(name, array)
        return self._derived(table, "with_column", lambda: [name, digest(*_content(array))])

    def without(self, *names: str) -> Dataset:
        """Without some columns of the user's."""
        gone = [n for n in names if self.has(n) and n not in SCHEMA.names]
        return self._derived(self.table.drop_columns(gone), "without", lambda: gone)


def _array(name: str, values: Any, type_: pa.DataType | None = None) -> pa.Array:
    try:
        if type_ is not None and pa.types.is_large_list(type_) and not any(v is None for v in values):
            return _list_array(values, type_)
        return pa.array(values, type_)
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:
        wanted = f"{type_} is wanted" if type_ is not None else "they are not of one type"
        raise InputError(f"column {name!r} cannot hold these values, {wanted}: {error}") from None


def _list_array(rows: Sequence[Any], type_: pa.DataType) -> pa.Array:
    lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if pa.types.is_large_string(type_.value_type):
        flat = pa.array([x for r in rows for x in r], type_.value_type)
    else:
        dtype = type_.value_type.to_pandas_dtype()
        flat = pa.array(np.concatenate([np.asarray(r, dtype) for r in rows]) if len(rows) else np.empty(0, dtype))
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat)


def _common_type(name: str, parts: Sequence[Dataset]) -> pa.DataType:
    """The type that a column of one name has in all parts. Raises InputError naming the two that do not join."""
    if name in SCHEMA.names:
        return SCHEMA.field(name).type
    found = [p.table.schema.field(name).type for p in parts if p.has(name)]
    type_ = found[0]
    for other in found[1:]:
        joined = _joined(type_, other)
        if joined is None:
            raise InputError(
                f"column {name!r} holds {type_} in some rows and {other} in others: convert or rename it before joining"
            )
        type_ = joined
    return type_


def _joined(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    is_number = lambda t: pa.types.is_integer(t) or pa.types.is_floating(t)
    is_text = lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)
    is_list = lambda t: pa.types.is_list(t) or pa.types.is_large_list(t)
    if is_number(a) and is_number(b):
        if pa.types.is_integer(a) and pa.types.is_integer(b):
            return pa.int64()
        return pa.float32() if {a, b} <= {pa.float16(), pa.float32()} else pa.float64()
    if is_text(a) and is_text(b):
        return pa.large_string()
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        fields = {f.name: f.type for f in a}
        for f in b:
            fields[f.name] = _joined(fields[f.name], f.type) if f.name in fields else f.type
        return None if None in fields.values() else pa.struct(list(fields.items()))
    if is_list(a) and is_list(b):
        kinds = {a.value_type, b.value_type}
        if pa.bool_() in kinds and any(map(pa.types.is_floating, kinds)):  # a mask and weights: both say how much
            return pa.large_list(pa.float32())
        inner = _joined(a.value_type, b.value_type)
        return None if inner is None else pa.large_list(inner)
    return None


def _column_as(part: Dataset, name: str, type_: pa.DataType, fill: bool) -> pa.ChunkedArray | pa.Array:
    if part.has(name):
        column = part.table[name]
        if column.type == type_:
            return column
        bools = pa.types.is_large_list(type_) and pa.types.is_boolean(getattr(column.type, "value_type", pa.null()))
        if bools:  # Arrow casts no list of bools to floats
            rows = [None if row is None else [float(x) for x in row] for row in column.to_pylist()]
            return pa.array(rows, type_)
        if pa.types.is_struct(type_):  # Arrow casts no struct to one with more fields
            return pa.array(column.to_pylist(), type_)
        return column.cast(type_)
    if name in BLANK:
        return pa.array([BLANK[name]] * len(part), type_)
    if name not in DECLARED and not fill:
        raise InputError(
            f"{len(part):,} rows have no column {name!r}, which others have: give it to them with with_column, or drop "
            "it "
            f"with without({name!r}), before joining"
        )
    value = DECLARED.get(name)
    return pa.nulls(len(part), type_) if value is None else pa.array([value] * len(part), type_)


def _content(array: pa.Array | pa.ChunkedArray) -> list[bytes]:
    """Bytes that tell a column from any other: lengths and values; equal for equal values, however they are stored."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [b"list", _lengths(pc.list_value_length(array)), *_content(array.flatten())]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [b"text", _lengths(pc.binary_length(array)), "".join(x for x in array.to_pylist() if x).encode()]
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        nulls = array.is_null().to_numpy(zero_copy_only=False).tobytes() if array.null_count else b""
        filled = pc.fill_null(array, False if pa.types.is_boolean(kind) else 0) if array.null_count else array
        values = filled.to_numpy(zero_copy_only=False)
        return [str(values.dtype).encode(), nulls, np.ascontiguousarray(values).tobytes()]
    return [str(kind).encode(), json.dumps(array.to_pylist(), default=str, sort_keys=True).encode()]


def _lengths(lengths: pa.Array) -> bytes:
    return pc.fill_null(lengths, -1).to_numpy(zero_copy_only=False).astype(np.int64).tobytes()


def real_rows(
    tokens: Sequence[Any], texts: Sequence[str], *, prefix: str = "real", parents=None, prompts=None, **columns: Any
) -> Dataset:
    """Rows that no model wrote. prompts: ids before each row's tokens; columns: of the user's."""
    n = len(tokens)
    return Dataset.from_columns(
        n,
        id=[f"{prefix}/{i}" for i in range(n)],
        parents=parents or [[]] * n,
        operation="real",
        model="",
        round=0,
        seed=0,
        synthetic=False,
        status="ok",
        prompt=[[]] * n if prompts is None else prompts,
        tokens=tokens,
        logprobs=[[]] * n,
        text=list(texts),
        **columns,
    )


def loose_column(values: list[Any], type_: pa.DataType | None = None) -> pa.Array:
    """Values as a column. Those that have no one type (JSON of any form) are kept as their JSON texts."""
    try:
        array = pa.array(values, type_)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        texts = [None if v is None else v if isinstance(v, str) else json.dumps(v, default=str) for v in values]
        return pa.array(texts, pa.large_string())
    return array.cast(pa.large_string()) if pa.types.is_null(array.type) or pa.types.is_string(array.type) else array


def python_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows as dicts, with values as `python_values` gives them."""
    columns = [python_values(column) for column in table.columns]
    names = table.schema.names
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)] if names else []


def python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values in Python. In a conversation (a list of objects with a `role`), keys that hold null are left out,
    `content` apart: Arrow gives every object of a column all keys that one of them has, and a chat template asks
    whether a message *has* a key (`tool_calls`, `name`)."""
    values, kind = array.to_pylist(), array.type
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type) or kind.value_type.get_field_index("role") < 0:
        return values
    return [None if v is None else [_message(m) for m in v] for v in values]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _message(m: dict[str, Any] | None) -> dict[str, Any] | None:
    return m if m is None else {k: _without_nulls(v) for k, v in m.items() if v is not None or k == "content"}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
