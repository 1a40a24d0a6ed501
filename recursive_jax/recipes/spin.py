"""SPIN, self-play fine-tuning (arXiv:2401.01335, alg. 1): a model learns to tell the given solution from its own.

    answers_k = an answer of student_k-1 to every solved problem, at `temperature`
    pairs_k   = (the given solution, the answer), where the two differ
    student_k = dpo(student_k-1, pairs_k and pairs_k-1), reference student_k-1

Departures: AdamW (the released code has RMSprop). Expect: gains over two or three rounds, then none, since nothing but
the given solutions is ever aimed at; Zephyr-7B 58.1 to 63.2 on average."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import Course, check
from recursive_jax.recipes.preference_rounds import PreferenceConfig, preference_rounds
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import cost
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Round


class SpinConfig(PreferenceConfig):
    """Rounds of the given solutions against the model's own."""

    recipe: str = "spin"

    rounds: PositiveInt = 3
    window: PositiveInt = Field(2, description="rounds whose pairs a student learns from")


def pairs(course: Course, round: Round, student: Model) -> Stored:
    answers = course.answers(round, "answers", student, course.solved, temperature=course.config.temperature)
    return round.dataset("pairs", against_given, answers, course.solved, course.template, student.tokenizer)


def against_given(answers: Dataset, solved: Dataset, template: Template, tokenizer: Any) -> Dataset:
    """A row for each answer that is not the given solution. Raises InputError where all are."""
    given = {row["id"]: template.example(row, tokenizer) for row in python_rows(solved.table)}
    rows = []
    for n, (parents, prompt, tokens) in enumerate(
        zip(answers.column("parents"), answers.prompts(), answers.tokens(), strict=True)
    ):
        chosen = given[parents[0]].tokens[given[parents[0]].loss]
        if len(tokens) and chosen.tolist() != tokens.tolist():
            rows.append({"id": f"pair/{n}", "parents": parents, "prompt": prompt.tolist(), "chosen": chosen.tolist(),
                         "rejected": tokens.tolist()})  # fmt: skip
    if not rows:
        raise InputError("every answer is the given solution itself: there is nothing left to tell apart; stop here")
    return Dataset.from_rows(rows)


def spin(config: SpinConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the rounds in `workdir` and returns the metrics records."""
    return preference_rounds(config, workdir, pairs, fork=fork, quiet=quiet)


recipe = Recipe(
    "spin",
    "rounds of telling the given solutions from the model's own answers",
    SpinConfig,
    spin,
    check,
    cost,
    paper="arXiv:2401.01335",
    example="recursive-jax run configs/spin.yaml --workdir runs/spin",
)
