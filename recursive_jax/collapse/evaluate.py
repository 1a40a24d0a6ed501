"""`evaluate`: what a model knows of rows, in numbers, with the rows that say it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from recursive_jax.collapse.likelihood import cross_entropy, example_losses
from recursive_jax.collapse.task import graded, task_metrics
from recursive_jax.collapse.tasks import Choices, Task, answered, choices_numbers, task_numbers
from recursive_jax.config import SamplingConfig
from recursive_jax.config.loader import with_settings
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.given import as_dataset
from recursive_jax.data.packing import Example
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import Request, own_columns
from recursive_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """metrics: numbers by name. rows: those they are of, one result each."""

    metrics: dict[str, Any]
    rows: Dataset

    def __repr__(self) -> str:
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in self.metrics.items() if k != "shown"}
        return f"Evaluated({shown}, {len(self.rows):,} rows)"


def evaluate(
    model: Model,
    data: Any,
    template: Template | None = None,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    *,
    n: int = 1,
    seed: int = 0,
    **settings: Any,
) -> Evaluated:
    """How well `model` knows `data`, without training on it.

    Without a template: how probable the rows are. data: whatever `train` takes. metrics: `cross_entropy` (nats per
    token that counts), its standard error over rows, `perplexity`, `tokens`; rows: with `nats`, the mean of each.

    With one: the rows are asked through it, and the answers compared with what the rows hold. metrics: `accuracy`,
    `format` (answers that can be read), `ce_task` (nats per token of the right ones), standard errors; rows: the
    answers with a `score`, 1 where right, so that `rows.where(score=0.0)` are those to learn again. sampling, settings:
    how answers are drawn; greedy, at most 64 tokens, if nothing else is said.

    A task (`rj.tasks`, `tasks.Task`): its rows asked, read and graded; n: answers of each row, for `pass_at_k` and
    `majority`.

    Raises InputError for no rows, and as `train`, `generate` and the template do."""
    if isinstance(data, Choices):
        metrics, rows = choices_numbers(model, data)
        return Evaluated(metrics, Dataset.from_rows(rows))
    if isinstance(data, Task):
        asked = {
            **(sampling.model_dump(exclude_unset=True) if isinstance(sampling, SamplingConfig) else sampling or {})
        }
        answers = answered(model, data, asked | settings, n, seed)
        return Evaluated(task_numbers(data, answers, n), answers)
    if n != 1:
        raise InputError("n is for tasks: evaluate(model, rj.tasks.Task(...), n=8)")
    if template is None:
        return _likelihood(model, as_dataset(data, model.tokenizer))
    rows = python_rows(data.table) if isinstance(data, Dataset) else list(data)
    if not rows:
        raise InputError("there are no rows to evaluate on")
    sampling = with_settings(SamplingConfig, sampling, {"temperature": 0.0, "max_tokens": 64} | settings)
    names = data.column("id") if isinstance(data, Dataset) else [f"row/{i}" for i in range(len(rows))]
    own = own_columns(data) if isinstance(data, Dataset) else rows
    requests = [
        Request(i, template.request(row, model.tokenizer), (name,), opened=True, columns=columns)
        for i, (row, name, columns) in enumerate(zip(rows, names, own, strict=True))
    ]
    answers = generate(model, requests, sampling, seed=seed)
    grades = graded(template, rows, answers)
    answers = answers.with_column("score", np.asarray(grades[0], float))
    return Evaluated(task_metrics(model, template, rows, answers, grades), answers)


def _likelihood(model: Model, data: Dataset) -> Evaluated:
    start = np.array([model.tokenizer.bos], np.int32)
    prompts = [p if len(p) else start for p in data.prompts()]
    tokens = data.tokens()
    learnt = data.lists("loss") if data.has("loss") else [np.ones(len(t), bool) for t in tokens]
    learnt = [loss if len(loss) == len(t) else np.ones(len(t), bool) for loss, t in zip(learnt, tokens, strict=True)]
    examples = [
        Example(np.concatenate([p, t]).astype(np.int32), np.concatenate([np.zeros(len(p), bool), loss > 0]))
        for p, t, loss in zip(prompts, tokens, learnt, strict=True)
    ]
    losses = example_losses(model, examples)
    mean, stderr = cross_entropy(losses)
    metrics = {
        "cross_entropy": mean,
        "cross_entropy_stderr": stderr,
        "perplexity": math.exp(min(mean, 700.0)),
        "tokens": sum(map(len, losses)),
        "rows": len(data),
    }
    nats = [float(x.mean(dtype=np.float64)) if len(x) else None for x in losses]
    return Evaluated(metrics, data.with_column("nats", nats))
