"""What `llm2llm` does with rows: each step a function of stored ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from recursive_jax.collapse.tasks import Task, answered
from recursive_jax.curate.oracle import NumberSlots, oracle_of
from recursive_jax.curate.verifiers import ExactMatch
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.template import Template, examples_dataset, task_rows
from recursive_jax.models.model import Model
from recursive_jax.recipes.llm2llm_config import Llm2llmConfig

VARY = "Here is one example.\n{shown}\nWrite another one of the same kind and in the same form, with other content."


def task_of(config: Llm2llmConfig) -> tuple[list[dict], list[dict]]:
    """(seed rows, held-out rows); problems with number slots get their `question` and `answer`."""
    rows, held_out, _ = task_rows(config.task, config.seed)
    if all(row.get("Equation") and "question" not in row for row in rows + held_out):
        rows, held_out = ([NumberSlots().filled(row) for row in part] for part in (rows, held_out))
    return rows, held_out


def held_out_task(rows: Sequence[dict], template: Template, max_tokens: int) -> Task:
    """Answers are right where every field of the completion is."""
    checks = [ExactMatch(field, of=field) for field in template.fields()]
    reward = reduce(lambda a, b: a * b, checks)
    return Task("held-out", tuple(rows), template, reward, {"temperature": 0.0, "max_tokens": max_tokens})


# ---- rows, each step a function of stored ones


def given(rows: list[dict]) -> Dataset:
    return Dataset.from_rows([{**row, "id": f"seed/{n}"} for n, row in enumerate(rows)])


def plain(data: Dataset, names: Sequence[str]) -> list[dict]:
    """The rows as the task has them, with their ids, and whether a model wrote them. What a reply says under a core
    column's name is `reply_<name>`."""
    own = lambda row: {n: row.get(f"reply_{n}", row.get(n)) for n in names if f"reply_{n}" in row or n in row}
    return [{"id": row["id"], "synthetic": row["synthetic"], **own(row)} for row in python_rows(data.table)]


def learnt(data: Dataset, names: list[str], template: Template, tokenizer: Any) -> Dataset:
    return examples_dataset(Dataset.from_rows(plain(data, names)), template, tokenizer)


def answers_to(data: Dataset, names: list[str], student: Model, task: Task) -> Dataset:
    """A row for each of `data`, with its `score`."""
    rows = tuple({k: v for k, v in row.items() if k != "id"} for row in plain(data, names))
    return answered(student, dataclasses.replace(task, name="train", rows=rows), {})


def chosen(data: Dataset, graded: Dataset, targeted: bool, per: int, count: int | None, seed: int) -> Dataset:
    """The rows to vary, one for each variation: the wrong ones `per` times each, or `count` of them (or of all), as
    evenly as it goes."""
    score = np.array([0.0 if s is None else s for s in graded.column("score")])
    pool = np.flatnonzero(score < 1.0) if targeted else np.arange(len(data))
    if not len(pool):
        return data.take(pool)
    rng = np.random.default_rng(seed)
    if count is None and targeted:
        return data.take(np.repeat(pool, per))
    want = count if count is not None else per * int(np.sum(score < 1.0))
    drawn = np.concatenate([rng.permutation(pool) for _ in range(-(-want // len(pool)))] or [pool[:0]])
    return data.take(drawn[:want])


def computed(picked: Dataset, data: Dataset, names: list[str], seed: int) -> Dataset:
    """The oracle's variations."""
    rows, others = plain(picked, names), plain(data, names)
    found = oracle_of(others).varied(rows, 1, seed, others)
    return Dataset.from_rows(found) if found else picked.take(np.empty(0, np.int64))


def vary_template(template: Template) -> Template:
    """Asks a teacher for another row: all fields of the task, a line each."""
    return Template(VARY, "\n".join(f"{name}: {{{name}}}" for name in all_fields(template)), chat=template.chat)


def all_fields(template: Template) -> list[str]:
    asked = Template("", template.prompt).fields()
    return [*asked, *(name for name in template.fields() if name not in asked)]


def shown(picked: Dataset, names: list[str], template: Template) -> Dataset:
    """The rows with `shown`, what the teacher is shown of them."""
    fields = all_fields(template)
    rows = plain(picked, names)
    lines = ["\n".join(f"{name}: {row[name]}" for name in fields) for row in rows]
    return Dataset.from_rows([{"id": f"{rows[n]['id']}/{n}", "shown": line} for n, line in enumerate(lines)])


def with_asked(new: Dataset, names: list[str], template: Template) -> Dataset:
    """The rows that could be read, with `asked`, what the student is asked of each."""
    new = new.take(np.flatnonzero([s == "ok" for s in new.column("status")]))
    return new.with_column("asked", [template.asks(row) for row in plain(new, names)])


def joined(data: Dataset, kept: Dataset, names: list[str], count: int | None, mark: str) -> Dataset:
    """The rows so far and at most `count` new ones."""
    new = plain(kept, names)[:count]
    rows = [{**row, "id": f"{mark}/{n}", "synthetic": True} for n, row in enumerate(new)]
    return Dataset.from_rows([*plain(data, names), *rows])
