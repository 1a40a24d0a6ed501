"""What `broad_to_narrow` does with rows: each step a function of stored ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from recursive_jax.collapse.paired import two_sided_p
from recursive_jax.collapse.tasks import Task, answered, task_numbers
from recursive_jax.data import fields
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.parsers import Numbered, Sections
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError, say
from recursive_jax.generate.generate import generate
from recursive_jax.identity import Value
from recursive_jax.models.model import Model, parameter_count
from recursive_jax.recipes.narrow_config import BroadToNarrowConfig
from recursive_jax.rounds.writing import save_huggingface

ROW = "\n\n"  # between rows that a teacher is shown whole


@dataclasses.dataclass(frozen=True)
class Asking(Value):
    """How a task's rows are asked for. by: the field of the class, where the completion has one of few values: new
    texts of one class are written behind a numbered list of seed texts of it; else whole rows behind whole rows. Called
    with the seed rows and a seed: a row for each request."""

    columns: tuple[str, ...]
    by: str | None
    about: str
    rows: int
    per_request: int
    shots: int

    @classmethod
    def of(cls, config: BroadToNarrowConfig, by: str | None) -> Asking:
        asked = fields.names(config.task.prompt)
        columns = (*asked, *(name for name in fields.names(config.task.completion) if name not in asked))
        about = f"{config.description.strip()}\n\n" if config.description else ""
        by = by if len(asked) == 1 and columns == (*asked, by) else None
        return cls(columns, by, about, config.rows, config.per_request, config.shots)

    @property
    def text(self) -> str:
        return self.columns[0]

    def template(self, chat: bool) -> Template:
        if self.by:
            prompt = self.about + f"{self.by}: {{{self.by}}}\nDifferent examples of {self.text}:\n{{shown}}\n{{next}}."
            return Template(prompt, parser=Numbered(self.text, opened=True), chat=chat)
        parser = Sections({c: f"{c}:" for c in self.columns}, separator=ROW, opened=True)
        return Template(self.about + "{shown}" + ROW + f"{self.text}:", parser=parser, chat=chat)

    def __call__(self, seed: Dataset, draw: int) -> Dataset:
        """All classes equally often."""
        rng, rows = np.random.default_rng(draw), python_rows(seed.table)
        classes = list(dict.fromkeys(row[self.by] for row in rows)) if self.by else [None]
        made = []
        for n in range(-(-self.rows // self.per_request)):
            label = classes[n % len(classes)]
            own = [row for row in rows if label is None or row[self.by] == label]
            drawn = [own[i] for i in rng.permutation(len(own))[: self.shots]]
            if self.by:
                shown = "\n".join(f"{k}. {row[self.text]}" for k, row in enumerate(drawn, 1))
                more = {self.by: label, "next": str(len(drawn) + 1)}
            else:
                shown, more = ROW.join("\n".join(f"{c}: {row[c]}" for c in self.columns) for row in drawn), {}
            made.append({"id": f"ask/{draw}/{n}", "shown": shown, **more})
        return Dataset.from_rows(made)


def readable(new: Dataset, columns: tuple[str, ...]) -> Dataset:
    """The rows that could be read, the first line of each text."""
    rows = []
    for row in python_rows(new.table):
        if row["status"] in ("ok", "length"):
            core = {key: row[key] for key in ("id", "parents", "model", "round")}
            said = {c: row.get(f"reply_{c}", row[c]) for c in columns}  # what a reply says under a core column's name
            rows.append({**core, "synthetic": True, **{c: str(x).split("\n")[0].strip() for c, x in said.items()}})
    return Dataset.from_rows(rows) if rows else new.take(np.empty(0, np.int64))


def joined(columns: tuple[str, ...], template: Template, *parts: Dataset) -> Dataset:
    """The seed rows and the kept ones of every round, with `asked`."""
    core = ("id", "parents", "synthetic", "model", "round")
    rows = [row for part in parts for row in python_rows(part.table)]
    found = [{**{c: row[c] for c in core}, **{c: str(row[c]) for c in columns}} for row in rows]
    return Dataset.from_rows([{**row, "asked": template.asks(row)} for row in found])


def verified(kept: Dataset, judge: Any, task: Task) -> Dataset:
    """The rows with a score: 1 where the judge answers as the row is labelled."""
    own = [{name: row[name] for name in task.rows[0] if name in row} for row in kept.table.to_pylist()]
    answers = answered(judge, dataclasses.replace(task, rows=tuple(own)), {"stop": ("\n",)})
    return kept.with_column("score", [s or 0.0 for s in answers.column("score")])


def narrow_numbers(task: Task, answers: Dataset, data_rows: int, by: str | None, before: Dataset | None) -> dict:
    """Of the held-out rows; by class, and where there are answers of the seed's student the paired test with them."""
    found = {**task_numbers(task, answers), "data_rows": data_rows}
    scores = np.array([s or 0.0 for s in answers.column("score")])
    if by:
        labels = [str(row[by]) for row in task.rows]
        found["by_class"] = {c: float(scores[[x == c for x in labels]].mean()) for c in dict.fromkeys(labels)}
    if before is not None:
        old = np.array([s or 0.0 for s in before.column("score")])
        change = scores - old
        found |= {"gain": float(change.mean()), "gain_stderr": float(change.std(ddof=1) / np.sqrt(len(change)))}
        found["p"] = two_sided_p(scores, old)
    return found


def speed(model: Model, template: Template, rows: Sequence[dict], max_tokens: int) -> dict[str, Any]:
    """Params, and held-out rows that are answered in a second, once everything is compiled."""
    data = Dataset.from_rows([{k: v for k, v in row.items() if k != "id"} for row in rows[:32]])
    ask = lambda: generate(model, data, {"temperature": 0.0, "max_tokens": max_tokens, "batch": 32}, template=template)
    ask()
    begun = time.perf_counter()
    ask()
    seconds = time.perf_counter() - begun
    return {"params": parameter_count(model.network), "rows_per_second": len(data) / seconds}


def export(student: Model, folder: Any) -> None:
    """A student of a kind that Hugging Face has no form for is not written, and that is said."""
    try:
        if not folder.exists():
            save_huggingface(student, folder)
    except InputError as error:
        say(f"the student is not exported: {error}")
