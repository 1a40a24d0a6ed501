"""Rows of a supervised task: read from a file, and split into those to learn from and those held out."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recursive_jax.data import files
from recursive_jax.errors import InputError


def read_rows(path: str) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json, .csv or .parquet file. Raises InputError naming the file and line."""
    if not Path(path).is_file():
        raise InputError(f"task file {path} does not exist (.jsonl, .csv or .parquet is wanted)")
    rows = [row for _, row in files.read_rows(path)]
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def texts_of(path: str, field: str = "text") -> list[str]:
    """The texts of a column of a file of rows, or the lines of a .txt file. Raises InputError for a row without it."""
    if path.endswith(".txt"):
        return [line for _, line in files.read_lines(path) if line.strip()]
    rows = read_rows(path)
    for number, row in enumerate(rows):
        if not isinstance(row.get(field), str):
            raise InputError(f"{path}, row {number}: no text under {field!r}, there are: {', '.join(map(str, row))}")
    return [row[field] for row in rows]


def class_field(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str | None:
    """The field that names a row's class, if one of `fields` does: few values (at most a fifth of the rows), each of
    them of several rows."""
    for field in fields:
        values = [json.dumps(row.get(field), sort_keys=True, default=str) for row in rows]
        counts = collections.Counter(values)
        if 1 < len(counts) <= len(rows) / 5 and min(counts.values()) > 1:
            return field
    return None


def hold_out(
    rows: Sequence[dict[str, Any]], share: float, seed: int, by: str | None = None
) -> tuple[list[dict], list[dict], str]:
    """(rows to learn from, held-out rows, how they were chosen): a share drawn by the seed, of every value of the field
    `by` in equal shares. Both keep the order of the file. Raises InputError for too few rows, and a field that no row
    has."""
    if by is not None and not any(by in row for row in rows):
        raise InputError(f"task.stratify={by}: no row has this field; there are: {', '.join(rows[0])}")
    want = max(1, round(len(rows) * share))
    if want >= len(rows):
        raise InputError(f"{len(rows)} rows are too few to hold out {share:.0%}")
    draw = np.random.default_rng([seed, len(rows)])
    classes: dict[str, list[int]] = {}
    for i in draw.permutation(len(rows)).tolist():
        classes.setdefault("" if by is None else json.dumps(rows[i].get(by), sort_keys=True, default=str), []).append(i)
    # Whole numbers first, then the classes with the largest remainders, until there are as many as wanted.
    exact = {name: len(members) * want / len(rows) for name, members in classes.items()}
    taken = {name: int(x) for name, x in exact.items()}
    for name in sorted(classes, key=lambda n: (taken[n] - exact[n], n))[: want - sum(taken.values())]:
        taken[name] += 1
    held = {i for name, members in classes.items() for i in members[: taken[name]]}
    learnt = [row for i, row in enumerate(rows) if i not in held]
    how = f"{want} of {len(rows)} rows held out, drawn with seed {seed}"
    how += f", in equal shares of the {len(classes)} values of {by!r}" if by is not None else ""
    return learnt, [rows[i] for i in sorted(held)], how
