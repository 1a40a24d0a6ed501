"""What `shepherd` does with rows: critiques, how well they find errors, and what they are worth as a reward."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from recursive_jax.curate.rewards import Grade, Reward, Row
from recursive_jax.data import fields
from recursive_jax.data.dataset import SCHEMA, Dataset, python_rows
from recursive_jax.data.template import Template, examples_dataset
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.models.model import Model
from recursive_jax.recipes.planted_errors import NONE

CRITIC = Template("Question: {question}\nAnswer: {answer}\nIs there an error?\n", "Error: {error}. {critique}")
SAID = "said"  # the kind of a person's critique that names none: no verdict


def detection(found: Dataset) -> dict[str, Any]:
    """How well planted errors are found: `precision` and `recall` of calling an answer wrong; and of naming each kind.
    What could not be read names nothing."""
    said = [value if value is not None else "" for value in found.column("error")]
    real = found.column("source_error")
    wrong, called = np.array([x != NONE for x in real]), np.array([x not in (NONE, SAID, "") for x in said])
    share = lambda hits, of: float(hits.sum() / of.sum()) if of.any() else None
    numbers: dict[str, Any] = {
        "score": float(np.mean([a == b for a, b in zip(said, real, strict=True)])),
        "precision": share(wrong & called, called),
        "recall": share(wrong & called, wrong),
        "read": float(np.mean([bool(x) for x in said])),
        "rows": len(said),
    }
    kinds = {}
    for kind in dict.fromkeys(real):
        own, named = np.array([x == kind for x in real]), np.array([x == kind for x in said])
        kinds[kind] = {
            "precision": share(own & named, named),
            "recall": share(own & named, own),
            "rows": int(own.sum()),
        }
    return {**numbers, "by_kind": kinds}


def to_criticise(answers: Dataset, question: str) -> Dataset:
    """Answers of a model as rows that a critic reads."""
    rows = []
    for row in python_rows(answers.table):
        asked = row.get(f"source_{question}", row.get(question))
        own = {"id": row["id"], "problem": row["parents"][0], "question": str(asked), "answer": row["text"]}
        rows.append({**own, "was_right": row["score"] == 1.0})
    return Dataset.from_rows(rows)


def found_wrong(criticised: Dataset, problems: Dataset, template: Template) -> Dataset:
    """The problems whose answer the critic calls wrong, with `asked`, `given` and `feedback`."""
    said = {}
    for row in python_rows(criticised.table):
        if row["error"] not in (None, NONE, SAID):
            said[row["problem"]] = {"given": row["answer"], "feedback": f"{row['error']}: {row['critique']}"}
    names = ("tokens", "prompt", "logprobs", "text")
    rows = [{k: v for k, v in row.items() if k not in names} for row in python_rows(problems.table)]
    found = [{**row, "asked": template.asks(row), **said[row["id"]]} for row in rows if row["id"] in said]
    return Dataset.from_rows(found) if found else problems.take([])


def as_a_reward(criticised: Dataset) -> dict[str, Any]:
    """How often the critic's word, right or wrong, is that of the task's check; and what always saying the more
    frequent one would give."""
    both = zip(criticised.column("was_right"), criticised.column("error"), strict=True)
    rows = [(right, said) for right, said in both if said not in (None, SAID)]
    share = sum(right for right, _ in rows) / max(1, len(rows))
    agreed = sum(right == (said == NONE) for right, said in rows) / len(rows) if rows else None
    guess = max(share, 1 - share)
    return {
        "agreement": agreed,
        "agreement_by_guessing": guess,
        "rows": len(rows),
        "unread": len(criticised) - len(rows),
    }


def lessons(planted: Dataset, people: list[dict], tokenizer: Any) -> Dataset:
    """Rows to train a critic on: planted errors, and people's critiques (`feedback`, and `error` where they name
    it)."""
    core = lambda r: {"error": r.get("error") or SAID, "critique": r["feedback"]}
    given = [{**core(r), **{k: r[k] for k in ("question", "answer")}} for r in people]
    parts = [examples_dataset(planted, CRITIC, tokenizer)]
    parts += [examples_dataset(given, CRITIC, tokenizer, "people")] if given else []
    own = [name for name in parts[0].table.column_names if name not in SCHEMA.names]
    return Dataset.concat([part.without(*own) for part in parts])


def columns(template: Template) -> tuple[str, str]:
    """(the question's column, the solution's). Raises InputError where a task has several."""
    asked, given = fields.names(template.prompt), fields.names(template.completion)
    if len(asked) != 1 or len(given) != 1:
        raise InputError(
            "recipe=shepherd: task.prompt and task.completion have one {field} each: question and solution"
        )
    return asked[0], given[0]


@dataclasses.dataclass(frozen=True)
class Critic(Reward):
    """1 where the critic finds no error in the row's `text`, an answer to `question`; its critique is the text."""

    model: Model
    question: str = "question"
    max_tokens: int = 64

    def grade(self, given: Any) -> list[Grade]:
        asked = [{"question": str(row[self.question]), "answer": str(row["text"])} for row in given]
        replies = generate(self.model, Dataset.from_rows(asked), {"temperature": 0.0, "max_tokens": self.max_tokens},
                           template=CRITIC)  # fmt: skip
        found = [row for row in replies if "#" not in row["id"]]
        return [self._grade(row) for row in found]

    def _grade(self, row: Row) -> Grade:
        if row["error"] in (None, SAID):
            return Grade(None, row["text"], row["status"])
        return Grade(float(row["error"] == NONE), f"{row['error']}: {row['critique']}")
