"""Self-consistency (arXiv:2203.11171): of `samples` answers the one that most of them come to.

    answers = `samples` answers of the model to every problem, at `temperature`
    chosen  = the first whose result (the number it ends in, else its text) is the most frequent one

Expect: GSM8K of PaLM-540B 56.5 to 74.4% with 40 samples; gains grow with the model."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax.curate.verifiers import number_of
from recursive_jax.data.dataset import Dataset
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import AnswersConfig, Course, check
from recursive_jax.recipes.correction import correction, cost
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report.corrections import correction_layout
from recursive_jax.rounds.round import Round


class SelfConsistencyConfig(AnswersConfig):
    """Many answers, and the one that most of them come to."""

    recipe: str = "self_consistency"

    samples: PositiveInt = Field(8, description="answers to a problem")
    temperature: float = Field(0.7, gt=0.0)


def majority(answers: Dataset) -> Dataset:
    """Of each problem the first answer with the most frequent result; of equally frequent ones the first."""
    groups: dict[str, list[int]] = {}
    for n, parents in enumerate(answers.column("parents")):
        groups.setdefault(parents[0], []).append(n)
    texts = answers.column("text")
    results = [found if (found := number_of(text)) is not None else text.strip() for text in texts]
    first = []
    for places in groups.values():
        counts = collections.Counter(results[n] for n in places)
        first.append(max(places, key=lambda n: (counts[results[n]], -n)))
    return answers.take(np.array(first, np.int64))


def chosen(course: Course, round: Round, model: Model, before: Stored) -> Stored:
    config = course.config
    settings = {"each": config.samples, "temperature": config.temperature}
    answers = course.answers(round, "answers", model, course.problems, **settings)
    return round.dataset("chosen", majority, answers)


def self_consistency(config: SelfConsistencyConfig, workdir: Any, *, fork: Any = None, quiet: bool = False):
    """Runs (or goes on with) it in `workdir` and returns the metrics records, before and after."""
    return correction(config, workdir, chosen, fork=fork, quiet=quiet)


recipe = Recipe(
    "self_consistency",
    "of several answers the one that most of them come to, beside the greedy one",
    SelfConsistencyConfig,
    self_consistency,
    check,
    cost,
    layout=correction_layout,
    paper="arXiv:2203.11171",
    example="recursive-jax run configs/self_consistency.yaml --workdir runs/self_consistency",
)
