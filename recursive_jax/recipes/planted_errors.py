"""Errors of known kinds in right solutions: what a critic is taught and measured by."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from recursive_jax.curate.rewards import cut_in_steps
from recursive_jax.data.dataset import Dataset, python_rows

NONE = "none"
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
        steps = cut_in_steps(str(row[solution]), separator)
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
