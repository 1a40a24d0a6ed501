"""A task before and after: how many answers are right, how many are formed, and the loss of the right ones."""

from __future__ import annotations

from typing import Any

from recursive_jax.collapse.intervals import proportion
from recursive_jax.collapse.likelihood import cross_entropy, example_losses
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.template import ParseError, Template
from recursive_jax.models.model import Model


def graded(template: Template, rows: list[dict], answers: Dataset) -> tuple[list[bool], list[bool]]:
    """(which answers are right, which have the completion's form and ended by themselves)."""
    right, formed = [], []
    for row, text, status in zip(rows, answers.column("text"), answers.column("status"), strict=True):
        found, wanted = template.read(row, text, status == "length"), template.wanted(row)
        well = not isinstance(found, ParseError) and status == "ok"
        formed.append(well)
        right.append(well and bool(wanted) and found == [wanted])
    return right, formed


def task_metrics(
    model: Model,
    template: Template,
    rows: list[dict],
    answers: Dataset,
    grades: tuple[list[bool], list[bool]] | None = None,
) -> dict[str, Any]:
    """accuracy: every field of the completion right. format: the answer has the completion's form and ended by itself;
    both with Wilson intervals (`proportion`). ce_task: nats per token of the right completions. Standard errors are
    over rows. grades: of `graded`, where they are known."""
    right, formed = grades or graded(template, rows, answers)
    losses = example_losses(model, [template.example(row, model.tokenizer) for row in rows])
    ce_task, ce_task_stderr = cross_entropy(losses)  # of the same ratio: all nats over all tokens
    shown = [
        {"prompt": template.asks(row), "answer": text, "right": bool(ok)}
        for row, text, ok in zip(rows[:8], answers.column("text"), right, strict=False)
    ]
    return {
        **proportion("accuracy", sum(right), len(rows)),
        **proportion("format", sum(formed), len(rows)),
        "ce_task": ce_task,
        "ce_task_stderr": ce_task_stderr,
        "rows": len(rows),
        "shown": shown,
    }
