"""What recipes on instructions do with rows: each step a function of stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recursive_jax.collapse.likelihood import cross_entropy, example_losses
from recursive_jax.collapse.tasks import Task, task_numbers
from recursive_jax.data.dataset import DECLARED, SCHEMA, Dataset, python_rows
from recursive_jax.data.forms import as_conversations
from recursive_jax.data.template import Template, examples_dataset
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model

COLUMNS = ("instruction", "input", "output", "asked")


def as_instructions(rows: Sequence[dict], prefix: str) -> list[dict[str, Any]]:
    """The rows with `instruction`, `input`, `output` and `asked`, all texts, and an id; of a conversation its first
    question and the answer to it. Raises InputError naming the columns of rows of no known form."""
    found = []
    gone = {*SCHEMA.names, *DECLARED, "instances", "messages", "conversations", "completion", "response"}
    for n, row in enumerate(rows):
        own = {k: v for k, v in row.items() if k not in gone}
        if row.get("instances"):
            own |= {key: str(row["instances"][0].get(key) or "") for key in ("input", "output")}
        elif "instruction" not in row:
            ((made,), _) = as_conversations([row])
            said = [m for m in made["messages"] if m["role"] in ("user", "assistant")]
            first = next((k for k, m in enumerate(said) if m["role"] == "user"), len(said))
            texts = [m["content"] for m in said[first : first + 2]]
            own |= dict(zip(("instruction", "output"), [*texts, "", ""][:2], strict=True))
        own |= {key: str(own.get(key) or "").strip() for key in ("instruction", "input", "output")}
        found.append({**own, "asked": asked_of(own), "id": f"{prefix}/{n}"})
    return found


def asked_of(row: dict[str, Any]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def measured(model: Model, task: Task, answers: Dataset, data_rows: int) -> dict[str, Any]:
    """`score`: ROUGE-L F1 with the given answer (arXiv:2212.10560, sec. 4); `ce_task`: nats per token of the given
    ones; `win_rate`: over the answers before, a tie half."""
    losses = example_losses(model, [task.template.example(row, model.tokenizer) for row in task.rows if row["output"]])
    found = {**task_numbers(task, answers), "data_rows": data_rows}
    if losses:
        found["ce_task"], found["ce_task_stderr"] = cross_entropy(losses)
    if answers.has("won"):
        known = [x for x in answers.column("won") if x is not None]
        found |= {"win_rate": sum(known) / len(known) if known else None, "judged": len(known)}
    return found


def with_before(held: Dataset, before: Dataset) -> Dataset:
    return held.with_column("before", before.column("text"))


def readable(row: dict[str, Any]) -> bool:
    """Whether a row was read and has an output."""
    return bool(row["output"]) and row["status"] in ("ok", "length")


def learnt(data: Dataset, template: Template, tokenizer: Any) -> Dataset:
    """Rows with an output, to train on. Raises InputError where there is none."""
    kept = data.take([n for n, output in enumerate(data.column("output")) if output])
    if not len(kept):
        raise InputError("there is no row to learn from: no reply of the teacher was kept; the report says why")
    return examples_dataset(kept, template, tokenizer)


def plain(data: Dataset, names: Sequence[str] = COLUMNS) -> list[dict[str, Any]]:
    """Rows with some columns, who wrote them and where they come from."""
    core = ("id", "parents", "synthetic", "model", "round", "status")
    return [{name: row[name] for name in (*core, *names) if name in row} for row in python_rows(data.table)]


def joined(*parts: Dataset) -> Dataset:
    """The rows of all parts that can be learnt from."""
    rows = [row for part in parts if part.has("output") for row in plain(part) if readable(row)]
    if not rows:
        raise InputError("there is no row to learn from: no reply of the teacher was kept; the report says why")
    return Dataset.from_rows([{**row, "input": row.get("input") or "", "asked": asked_of(row)} for row in rows])


def given(rows: list[dict]) -> Dataset:
    return Dataset.from_rows(rows)


def with_asked(data: Dataset) -> Dataset:
    """The rows that could be read, with `asked`."""
    rows = [n for n, status in enumerate(data.column("status")) if status in ("ok", "length")]
    kept = data.take(rows)
    inputs = kept.column("input") if kept.has("input") else [""] * len(kept)
    asked = [asked_of({"instruction": i, "input": x}) for i, x in zip(kept.column("instruction"), inputs, strict=True)]
    return kept.with_column("asked", asked)
