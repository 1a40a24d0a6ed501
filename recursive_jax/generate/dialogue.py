"""Templates asked in turn, each of what the ones before gave, until a row is done: self-chat (Baize, arXiv:2304.01196),
answer, critique and refine (arXiv:2303.17651).

    human = Template("{talk}\\n[Human]", "{line}"), {"talk": "{talk}\\n[Human] {line}"}
    ai = Template("{talk}\\n[AI]", "{line}"), {"talk": "{talk}\\n[AI] {line}"}
    rj.generate(model, topics, template=Dialogue((human, ai), most=6, start={"talk": "A talk."}), stop=["["])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from recursive_jax.data import fields
from recursive_jax.data.dataset import SCHEMA, Dataset, loose_column, python_rows
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.generate.reading import failed
from recursive_jax.identity import Value


@dataclasses.dataclass(frozen=True)
class Step(Value):
    """template: asks, and reads fields into columns. then: columns that are written anew afterwards, as texts with the
    row's fields, those just read among them: {"transcript": "{transcript}\\nA: {said}"}."""

    template: Template
    then: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for text in self.then.values():
            fields.parts(text)


@dataclasses.dataclass(frozen=True)
class Dialogue(Value):
    """steps: templates, or (template, then) as in `Step`, asked in turn, over and over. most: replies of a row. until:
    (column, value): a row is done when the column holds it. start: columns that a row has before the first step, where
    it has none of its own."""

    steps: tuple[Step | Template | tuple[Template, Mapping[str, str]], ...]
    most: int
    until: tuple[str, Any] | None = None
    start: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        as_step = lambda s: s if isinstance(s, Step) else Step(*s) if isinstance(s, tuple) else Step(s)
        steps = tuple(map(as_step, self.steps))
        object.__setattr__(self, "steps", steps)
        if not steps or self.most < 1:
            raise InputError("a dialogue has at least one step, and at least one reply")


def repeated(data: Dataset, each: int) -> Dataset:
    """Every row `each` times."""
    return data if each == 1 else data.take(np.repeat(np.arange(len(data)), each))


def hold(talk: Dialogue, data: Dataset, replies: Callable[[int, Dataset, Template], Dataset]) -> Dataset:
    """The rows with what they ended with, one for each row of `data`, in its order. replies(turn, rows, template): one
    read reply for each of the rows. A row whose reply cannot be read keeps that status and is not asked again.

    Columns beside those that the steps give: `turns`, how many replies a row has; `replies`, their texts."""
    rows = [{**talk.start, **_own(row), "id": row["id"]} for row in python_rows(data.table)]
    ended: list[dict[str, Any] | None] = [None] * len(rows)
    said: list[list[str]] = [[] for _ in rows]
    open_rows = list(range(len(rows)))
    for turn in range(talk.most):
        step = talk.steps[turn % len(talk.steps)]
        asked = _table([rows[n] for n in open_rows])
        found = python_rows(replies(turn, asked, step.template).table)
        found = [row for row in found if "#" not in row["id"].rpartition("/")[2]]
        going = []
        for n, reply in zip(open_rows, found, strict=True):
            said[n].append(reply["text"])
            ended[n] = reply
            if failed(reply["status"]):
                continue
            read = {name: reply[name] for name in step.template.columns}
            rows[n] |= read
            rows[n] |= {name: fields.filled(text, rows[n]) for name, text in step.then.items()}
            if talk.until is None or rows[n].get(talk.until[0]) != talk.until[1]:
                going.append(n)
        open_rows = going
        if not open_rows:
            break
    return _ended(data, rows, ended, said)


def _ended(data: Dataset, rows: list[dict], ended: list[Any], said: list[list[str]]) -> Dataset:
    core = {f.name: pa.array([row[f.name] for row in ended], f.type) for f in SCHEMA}
    core["parents"] = pa.array([[name] for name in data.column("id")], core["parents"].type)
    table = pa.table(core)
    for name in dict.fromkeys(name for row in rows for name in row):
        if name not in SCHEMA.names:
            table = table.append_column(name, loose_column([row.get(name) for row in rows]))
    table = table.append_column("turns", pa.array([len(texts) for texts in said], pa.int32()))
    return Dataset(table.append_column("replies", pa.array(said, pa.large_list(pa.large_string()))))


def _own(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in SCHEMA.names}


def _table(rows: list[dict[str, Any]]) -> Dataset:
    """Rows to be asked. Their ids tell where they belong."""
    names = dict.fromkeys(name for row in rows for name in row)
    own = {name: loose_column([row.get(name) for row in rows]) for name in names if name != "id"}
    table = Dataset.from_rows([{"id": row["id"]} for row in rows]).table
    for name, column in own.items():
        table = table.append_column(name, column)
    return Dataset(table)
