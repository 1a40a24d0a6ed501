"""What `wizardmath` does with rows: each step a function of stored ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recursive_jax import rewards
from recursive_jax.curate.arithmetic import NotArithmetic, arithmetic
from recursive_jax.curate.rewards import Grade, Reward, Row, cut_in_steps
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model


def as_asked(problems: Dataset, column: str) -> Dataset:
    """The problems as a pool: `asked`, and `family`, the problem that all its versions come from."""
    rows = python_rows(problems.table)
    return Dataset.from_rows([{"id": row["id"], "asked": str(row[column]), "family": row["id"]} for row in rows])


def evolved_problems(new: Dataset) -> Dataset:
    """The evolved problems that could be read."""
    rows = []
    for row in python_rows(new.table):
        text = (row["evolved"] or "").strip()
        if row["status"] in ("ok", "length") and text and "#" not in row["id"]:
            family = row["parents"][0]
            rows.append({"id": row["id"], "asked": text, "family": family, "synthetic": True, "model": row["model"]})
    return Dataset.from_rows(rows) if rows else Dataset.empty()


def next_problems(pool: Dataset, evolved: Dataset) -> Dataset:
    """Of each problem what it became last, or itself."""
    became = dict(zip(evolved.column("family"), evolved.column("asked"), strict=True)) if len(evolved) else {}
    return Dataset.from_rows([{**row, "asked": became.get(row["id"], row["asked"])} for row in _plain(pool)])


def all_problems(column: str, *parts: Dataset) -> Dataset:
    """The given problems and all evolved ones, each once, under the task's own column."""
    rows: dict[str, dict] = {}
    for part in parts:
        for row in _plain(part):
            rows.setdefault(row["asked"], {"id": row["id"], column: row["asked"], "family": row["family"]})
    return Dataset.from_rows(list(rows.values()))


def _plain(data: Dataset) -> list[dict[str, Any]]:
    return (
        [{key: row[key] for key in ("id", "asked", "family")} for row in python_rows(data.table)] if len(data) else []
    )


def ranked(rated: Dataset, column: str, versions: int) -> Dataset:
    """`ranked`: the versions of a problem, the best first, of those with as many as are wanted whose ratings are not
    all equal; of more the first. Raises InputError where no problem has."""
    families: dict[str, list[tuple[float, str]]] = {}
    for row in python_rows(rated.table):
        if row["score"] is not None:
            families.setdefault(row["family"], []).append((row["score"], row[column]))
    rows = []
    for name, found in families.items():
        own = found[:versions]
        if len(own) == versions and len({score for score, _ in own}) > 1:
            rows.append(
                {"id": f"ranked/{name}", "prompt": [], "ranked": [t for _, t in sorted(own, key=lambda x: -x[0])]}
            )
    if not rows:
        raise InputError(
            f"no problem has {versions} versions that the teacher rates differently, of {len(families)}: another "
            "teacher, or fewer `versions`"
        )
    return Dataset.from_rows(rows)


def in_steps(answers: Dataset, template: Template, separator: str) -> Dataset:
    """A row for every step of every solution: `problem`, `before`, `step`."""
    rows = []
    for row in python_rows(answers.table):
        asked = template.asks({k.removeprefix("source_"): v for k, v in row.items()})
        steps = cut_in_steps(row["text"], separator)
        for n, step in enumerate(steps):
            before = "".join(s + separator for s in steps[:n])
            core = {"id": f"{row['id']}/{n}", "solution": row["id"], "problem": asked}
            rows.append({**core, "before": before, "step": step})
    return Dataset.from_rows(rows)


def marked_by_equation(steps: Dataset) -> Dataset:
    """`mark`: Right where all equations of the step hold, Wrong where one does not; none without an equation."""
    return steps.with_column("mark", pa.array([marked(step) for step in steps.column("step")], pa.large_string()))


_MARKED = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_EQUATION = re.compile(
    r"(?<![\w%$.,])\(*\d[-+*/^().,\d\s×÷]{0,200}[-+*/×÷][-+*/^().,\d\s×÷]{0,200}=\s*-?[\d,]+(?:\.\d+)?(?![\w%.,]*\d)"
)


def marked(step: str) -> str | None:
    """Right or Wrong by the equations in `<<...>>`, where there are some; else by those that stand alone: an operator
    between numbers, no letter, `%` or `$` before them. Equal is within a thousandth, as in RFT's released code."""
    found = []
    equations = _MARKED.findall(step) or [m[0].rsplit("=", 1) for m in _EQUATION.finditer(step)]
    for left, right in equations:
        try:
            one, other = arithmetic(left.strip()), arithmetic(right.strip())
            found.append(abs(one - other) <= max(abs(one), abs(other)) / 1000)
        except (NotArithmetic, ZeroDivisionError):
            continue
    return None if not found else "Right" if all(found) else "Wrong"


def with_labels(answers: Dataset, marked: Dataset, separator: str) -> Dataset:
    """The solutions as `steps` and `labels`. Raises InputError where no step is marked."""
    labels: dict[str, list[bool | None]] = {}
    for name, mark in zip(marked.column("solution"), marked.column("mark"), strict=True):
        labels.setdefault(name, []).append(None if mark is None else mark == "Right")
    rows = []
    for row in python_rows(answers.table):
        own = labels.get(row["id"], [])
        if any(x is not None for x in own):
            steps = cut_in_steps(row["text"], separator)
            rows.append({"id": row["id"], "prompt": row["prompt"], "steps": steps, "labels": own})
    if not rows:
        raise InputError("no step of any solution is marked right or wrong: see `marks`, and `separator`")
    return Dataset.from_rows(rows)


@dataclasses.dataclass(frozen=True)
class Instructed(Reward):
    """The probability that a reward model of problems gives to the row's own, whatever the answer."""

    model: Model
    column: str

    def grade(self, given: Sequence[Row]) -> list[Grade]:
        start = [self.model.tokenizer.bos]  # as rankings without a prompt are learnt
        asked = [{"prompt": start, "text": str(row[self.column])} for row in given]
        scored = rewards.reward_model(self.model).grade(asked)
        return [g if g.score is None else Grade(float(1 / (1 + np.exp(-g.score)))) for g in scored]
