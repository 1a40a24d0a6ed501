"""The config of `broad_to_narrow`, and what it does with rows: each step a function of stored ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from recursive_jax.collapse.paired import two_sided_p
from recursive_jax.collapse.tasks import Task, answered, task_numbers
from recursive_jax.config import ModelConfig, TaskConfig
from recursive_jax.data import fields
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.parsers import Numbered, Sections
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from recursive_jax.errors import InputError, say
from recursive_jax.generate.generate import generate
from recursive_jax.identity import Value
from recursive_jax.models.model import Model, parameter_count
from recursive_jax.recipes.recipe import RecipeConfig
from recursive_jax.rounds.writing import save_huggingface

ROW = "\n\n"  # between rows that a teacher is shown whole


class BroadToNarrowConfig(RecipeConfig):
    """A broad teacher writes data for one task; a narrow student learns it."""

    recipe: str = "broad_to_narrow"

    teacher: str = Field("", description="who writes: a model, or openai:MODEL@URL")
    teacher_chat: bool | None = Field(
        None, description="ask the teacher in its chat form, not as a text that goes on; default: a remote one"
    )
    task: TaskConfig
    profile: bool = Field(True, description="the collapse profile of the generated rows: RUN/profiles, the report")
    description: str = Field("", description="the task in words, before what the teacher is asked")
    model: ModelConfig = Field(ModelConfig(), description="the student")
    tokenizer: str = Field("byte", description="of the student: byte, bpe (of the seed rows), or a tokenizer.json")
    vocab_size: PositiveInt = Field(1024, description="of a bpe")
    largest: float = Field(0.1, gt=0.0, description="the student's params over the teacher's, at most")
    rounds: PositiveInt = Field(1, description="of writing and training; rows of all rounds are learnt from")
    rows: PositiveInt = Field(700, description="rows that are asked for in a round, over all classes")
    per_request: PositiveInt = Field(8, description="rows that one request asks for")
    shots: PositiveInt = Field(5, description="seed rows of the class that a request shows")
    novelty: float = Field(0.7, gt=0.0, lt=1.0, description="ROUGE-L of a new row with any other, at most")
    verify: Literal["none", "student", "teacher"] = Field(
        "none", description="who must answer a new row as it is labelled: the last student, the teacher with examples"
    )
    teacher_shots: int = Field(8, ge=0, description="seed rows that the teacher is shown when it answers itself")

    @model_validator(mode="before")
    @classmethod
    def _must(cls, raw: Any) -> Any:
        missing = [key for key in ("teacher", "task") if isinstance(raw, dict) and not raw.get(key)]
        if missing:
            raise ValueError("\n".join(f"recipe=broad_to_narrow needs {key}" for key in missing))
        return raw


def tokenizer_of(config: BroadToNarrowConfig, texts: Sequence[str]) -> Any:
    """The student's."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    return FileTokenizer.train_bpe(texts, config.vocab_size) if config.tokenizer == "bpe" else FileTokenizer.open(
        config.tokenizer)  # fmt: skip


def check_size(student: Model, teacher: Any, largest: float) -> None:
    """Raises InputError for a student that is not narrow; of a remote teacher the size is not known."""
    if not isinstance(teacher, Model):
        return
    own, broad = parameter_count(student.network), parameter_count(teacher.network)
    if own > largest * broad:
        raise InputError(
            f"the student has {own:,} params, {own / broad:.2f} of the teacher's {broad:,}: at most {largest:g} is "
            "narrow; make `model` smaller, or raise `largest`"
        )


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
        by = by if len(asked) == 1 and len(columns) == 2 else None
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


@dataclasses.dataclass(frozen=True)
class Fits(Value):
    """Whether a row and its answer fit a row of the student's training."""

    template: Template
    tokenizer: Any
    length: int

    def __call__(self, data: Dataset) -> list[bool]:
        sizes = [len(self.template.example(row, self.tokenizer).tokens) for row in python_rows(data.table)]
        return [size <= self.length for size in sizes]


def joined(columns: tuple[str, ...], template: Template, *parts: Dataset) -> Dataset:
    """The seed rows and the kept ones of every round, with `asked`."""
    core = ("id", "parents", "synthetic", "model", "round")
    rows = [{name: row[name] for name in (*core, *columns)} for part in parts for row in python_rows(part.table)]
    return Dataset.from_rows([{**row, "asked": template.asks(row)} for row in rows])


def verified(kept: Dataset, judge: Any, task: Task) -> Dataset:
    """The rows with a score: 1 where the judge answers as the row is labelled."""
    own = [{name: row[name] for name in task.rows[0] if name in row} for row in kept.table.to_pylist()]
    answers = answered(judge, dataclasses.replace(task, rows=tuple(own)), {"stop": ("\n",)})
    return kept.with_column("score", [s or 0.0 for s in answers.column("score")])


def export(student: Model, folder: Any) -> None:
    try:
        if not folder.exists():
            save_huggingface(student, folder)
    except InputError as error:
        say(f"the student is not exported: {error}")


def given(seed_rows: list[dict]) -> Dataset:
    return Dataset.from_rows([{**row, "id": f"seed/{n}"} for n, row in enumerate(seed_rows)])


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
    data = Dataset.from_rows([dict(row) for row in rows[:32]])
    ask = lambda: generate(model, data, {"temperature": 0.0, "max_tokens": max_tokens, "batch": 32}, template=template)
    ask()
    begun = time.perf_counter()
    ask()
    seconds = time.perf_counter() - begun
    return {"params": parameter_count(model.network), "rows_per_second": len(data) / seconds}
