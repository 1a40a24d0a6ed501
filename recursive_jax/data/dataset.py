"""`Dataset`: immutable rows with lineage, kept as Parquet.

Columns every row has: `id`, `parents` (ids of the rows it was made from), `operation`, `model` (fingerprint of
the model that wrote it, empty for real rows), `round`, `seed`, `synthetic`, `status` (`ok`, `length`: cut at the
token limit, or the name of a failure), `prompt_tokens`, `tokens` (int32; no start token), `logprobs` (float32,
nats, of the generated tokens; empty for real rows), `text`. Rewards add numeric columns; `loss` (which tokens are learnt) and
`weight` (of a row in the loss) are read by training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recursive_jax.errors import InputError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("parents", pa.list_(pa.string())),
        ("operation", pa.string()),
        ("model", pa.string()),
        ("round", pa.int32()),
        ("seed", pa.int64()),
        ("synthetic", pa.bool_()),
        ("status", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("text", pa.string()),
    ]
)


class Dataset:
    """An Arrow table of rows. `+` joins, `where` and `take` select; nothing changes in place."""

    def __init__(self, table: pa.Table):
        self.table = table

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> Dataset:
        return cls(pa.Table.from_pylist(list(rows), schema=SCHEMA))

    @classmethod
    def from_columns(cls, count: int, **columns: Any) -> Dataset:
        """Columns by name; a scalar stands for every row."""
        arrays = []
        for field in SCHEMA:
            value = columns[field.name]
            if isinstance(value, (str, int, bool)):
                arrays.append(pa.repeat(pa.scalar(value, field.type), count))
            elif pa.types.is_list(field.type) and not isinstance(value, pa.Array):
                arrays.append(_list_array(value, field.type))
            else:
                arrays.append(pa.array(value, field.type) if not isinstance(value, pa.Array) else value)
        return cls(pa.Table.from_arrays(arrays, schema=SCHEMA))

    @classmethod
    def empty(cls) -> Dataset:
        return cls(SCHEMA.empty_table())

    @classmethod
    def read(cls, paths: Sequence[str]) -> Dataset:
        tables = []
        for path in paths:
            try:
                tables.append(pq.read_table(path))
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(f"{path} is damaged and cannot be read as Parquet: {error}") from None
        return cls(pa.concat_tables(tables, promote_options="default") if tables else SCHEMA.empty_table())

    def write(self, path: str) -> None:
        pq.write_table(self.table, path, compression="zstd", use_dictionary=["operation", "model", "status"])

    def __len__(self) -> int:
        return self.table.num_rows

    def __add__(self, other: Dataset) -> Dataset:
        return Dataset(pa.concat_tables([self.table, other.table], promote_options="default"))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table.slice(index, 1).to_pylist()[0]

    def column(self, name: str) -> list[Any]:
        if name not in self.table.column_names:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.table.column_names)}")
        return self.table[name].to_pylist()

    def tokens(self) -> list[np.ndarray]:
        """One int32 array per row."""
        column = self.table["tokens"].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
        if len(self) == 0:
            return []
        values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        return [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]

    @property
    def token_count(self) -> int:
        return int(pc.sum(pc.list_value_length(self.table["tokens"])).as_py() or 0)

    def take(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        return Dataset(self.table.take(pa.array(np.asarray(indices, np.int64))))

    def first_tokens(self, budget: int) -> Dataset:
        """The longest prefix of rows with at most `budget` tokens (at least one row)."""
        lengths = pc.list_value_length(self.table["tokens"]).to_numpy()
        count = int(np.searchsorted(np.cumsum(lengths), budget, side="right"))
        return Dataset(self.table.slice(0, max(1, count)))

    def where(self, keep: Callable[[dict[str, Any]], bool] | None = None, **equals: Any) -> Dataset:
        """Rows for which `keep(row)` holds, or whose columns equal the given values: `where(status="ok")`."""
        mask = pa.array(np.ones(len(self), bool))
        for name, value in equals.items():
            mask = pc.and_(mask, pc.fill_null(pc.equal(self.table[name], value), False))
        if keep is not None:
            mask = pc.and_(mask, pa.array([bool(keep(row)) for row in self.table.to_pylist()], pa.bool_()))
        return Dataset(self.table.filter(mask))

    def with_column(self, name: str, values: Sequence[Any] | np.ndarray) -> Dataset:
        array = pa.array(values)
        if name in self.table.column_names:
            return Dataset(self.table.set_column(self.table.column_names.index(name), name, array))
        return Dataset(self.table.append_column(name, array))


def _list_array(rows: Sequence[Any], type_: pa.DataType) -> pa.Array:
    lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    if pa.types.is_string(type_.value_type):
        flat = pa.array([x for r in rows for x in r], pa.string())
    else:
        dtype = type_.value_type.to_pandas_dtype()
        flat = pa.array(np.concatenate([np.asarray(r, dtype) for r in rows]) if len(rows) else np.empty(0, dtype))
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def real_rows(tokens: Sequence[Any], texts: Sequence[str], *, prefix: str = "real", parents=None) -> Dataset:
    """Rows that no model wrote."""
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
        prompt_tokens=0,
        tokens=tokens,
        logprobs=[[]] * n,
        text=list(texts),
    )
