"""What `shepherd` does with rows: errors planted in right solutions, critiques of them, and how well they are found."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recursive_jax.curate.rewards import Grade, Reward, Row
from recursive_jax.data import fields
from recursive_jax.data.dataset import SCHEMA, Dataset, python_rows
from recursive_jax.data.template import Template, examples_dataset
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.models.model import Model

CRITIC = Template("Question: {question}\nAnswer: {answer}\nIs there an error?\n", "Error: {error}. {critique}")
NONE = "none"
SAID = "said"  # the kind of a person's critique
_RESULT = re.compile(r"=\s*(-?\d[\d,]*(?:\.\d+)?)")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def arithmetic_error(question: str, steps: list[str], rng: np.random.Generator) -> tuple[list[str], str] | None:
    """The result of one equation, and what follows from it in the text, is another number."""
    places = [(n, m) for n, step in enumerate(steps) for m in _RESULT.finditer(step)]
    if not places:
        return None
    n, m = places[int(rng.integers(len(places)))]
    wrong = str(int(float(m[1].replace(",", ""))) + int(rng.choice([-10, -2, -1, 1, 2, 10])))
    own = steps[n][: m.start(1)] + wrong + steps[n][m.end(1) :]
    changed = [*steps[:n], own, *(re.sub(rf"(?<![\d.,]){re.escape(m[1])}(?![\d.,])", wrong, s) for s in steps[n + 1 :])]
    return changed, f"the result of “{steps[n][: m.start()].strip()[-40:]}” is {m[1]}, not {wrong}"


def context_error(question: str, steps: list[str], rng: np.random.Generator) -> tuple[list[str], str] | None:
    """A number of the question is read as another one."""
    asked = set(_NUMBER.findall(question))
    places = [(n, m) for n, step in enumerate(steps) for m in _NUMBER.finditer(step) if m[0] in asked]
    if not places:
        return None
    n, m = places[int(rng.integers(len(places)))]
    wrong = str(int(float(m[0].replace(",", ""))) + int(rng.integers(1, 9)))
    own = steps[n][: m.start()] + wrong + steps[n][m.end() :]
    return [*steps[:n], own, *steps[n + 1 :]], f"the question says {m[0]}, not {wrong}"


def missing_step(question: str, steps: list[str], rng: np.random.Generator) -> tuple[list[str], str] | None:
    """A step before the last is left out: what follows does not follow."""
    if len(steps) < 3:
        return None
    n = int(rng.integers(len(steps) - 1))
    return steps[:n] + steps[n + 1 :], f"a step is missing: “{steps[n].strip()[:60]}”"


def redundancy(question: str, steps: list[str], rng: np.random.Generator) -> tuple[list[str], str] | None:
    """A step stands twice."""
    if len(steps) < 2:
        return None
    n = int(rng.integers(len(steps) - 1))
    return [*steps[: n + 1], steps[n], *steps[n + 1 :]], f"“{steps[n].strip()[:60]}” is said twice"


#: Kinds of errors as in the paper's data: arithmetic, consistency with context, coherence and deduction, redundancy.
ERRORS: dict[str, Callable[[str, list[str], np.random.Generator], tuple[list[str], str] | None]] = {
    "arithmetic": arithmetic_error,
    "context": context_error,
    "coherence": missing_step,
    "redundancy": redundancy,
}


def planted(
    problems: Dataset, question: str, solution: str, separator: str, kinds: Sequence[str], each: int, seed: int
):
    """Of every problem its solution as it is, and `each` with an error of a kind that it can have: rows with
    `question`, `answer`, `error` (its kind, or none) and `critique`."""
    rows = []
    for n, row in enumerate(python_rows(problems.table)):
        rng = np.random.default_rng([seed, n])
        steps = [step for step in str(row[solution]).split(separator) if step.strip()]
        core = {"parents": [row["id"]], "question": str(row[question]), "right": separator.join(steps)}
        rows.append(
            {**core, "id": f"{row['id']}/none", "answer": core["right"], "error": NONE, "critique": "it is right"}
        )
        made = 0
        for kind in rng.permutation(list(kinds)):
            found = ERRORS[kind](core["question"], steps, rng) if made < each else None
            if found is not None:
                made += 1
                more = {"answer": separator.join(found[0]), "error": str(kind), "critique": found[1]}
                rows.append({**core, **more, "id": f"{row['id']}/{kind}"})
    return Dataset.from_rows([{**row, "synthetic": True} for row in rows])


def detection(found: Dataset) -> dict[str, Any]:
    """How well planted errors are found: `precision` and `recall` of calling an answer wrong; and of naming each kind.
    What could not be read names nothing."""
    said = [value if value is not None else "" for value in found.column("error")]
    real = found.column("source_error")
    wrong, called = np.array([x != NONE for x in real]), np.array([x not in (NONE, "") for x in said])
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
        if row["error"] not in (None, NONE):
            said[row["problem"]] = {"given": row["answer"], "feedback": f"{row['error']}: {row['critique']}"}
    names = ("tokens", "prompt", "logprobs", "text")
    rows = [{k: v for k, v in row.items() if k not in names} for row in python_rows(problems.table)]
    found = [{**row, "asked": template.asks(row), **said[row["id"]]} for row in rows if row["id"] in said]
    return Dataset.from_rows(found) if found else problems.take([])


def as_a_reward(criticised: Dataset) -> dict[str, Any]:
    """How often the critic's word, right or wrong, is that of the task's check; and what always saying the more
    frequent one would give."""
    right = np.array(criticised.column("was_right"), bool)
    said = np.array([value == NONE for value in criticised.column("error")])
    share = float(right.mean()) if len(right) else 0.0
    return {
        "agreement": float((right == said).mean()),
        "agreement_by_guessing": max(share, 1 - share),
        "rows": len(right),
    }


def lessons(planted: Dataset, people: list[dict], tokenizer: Any) -> Dataset:
    """Rows to train a critic on: planted errors, and people's critiques (`feedback`)."""
    given = [{"error": SAID, "critique": r["feedback"], **{k: r[k] for k in ("question", "answer")}} for r in people]
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
        if row["error"] is None:
            return Grade(None, row["text"], row["status"])
        return Grade(float(row["error"] == NONE), f"{row['error']}: {row['critique']}")
