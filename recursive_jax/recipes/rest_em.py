"""ReST-EM (arXiv:2312.06585): expectation-maximisation by samples that are right.

    E-step: answers_k = `samples` answers of student_k-1 to every problem, at `temperature`
            right_k   = those that are right, at most `cap` of a problem
    M-step: student_k = train(base, right_k)                from the base, as the paper finds best

Departures: the seed's own solutions may stay beside them (`keep_seed`). Expect: gains in one to three iterations, then
over-fitting (the paper's fig. 4)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from recursive_jax.curate import rules
from recursive_jax.curate.select import with_status
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import Course, check
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import SelfTrainingConfig, cost, self_training
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Round


class RestEmConfig(SelfTrainingConfig):
    """Iterations of sampling and training on what is right."""

    recipe: str = "rest_em"

    rounds: PositiveInt = 3
    keep_seed: bool = False
    samples: PositiveInt = Field(32, description="answers to a problem")
    temperature: float = Field(0.7, gt=0.0)
    cap: PositiveInt = Field(10, description="right answers to a problem that are learnt from, at most")


def right(course: Course, round: Round, student: Model) -> Stored:
    config = course.config
    answers = course.answers(
        round, "answers", student, course.problems, each=config.samples, temperature=config.temperature
    )
    return round.select("right", answers, [with_status("ok"), rules.correct(), rules.cap(config.cap)])


def rest_em(config: RestEmConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the iterations in `workdir` and returns the metrics records."""
    return self_training(config, workdir, right, fork=fork, quiet=quiet)


recipe = Recipe(
    "rest_em",
    "iterations of sampling answers and training the base on the right ones",
    RestEmConfig,
    rest_em,
    check,
    cost,
    paper="arXiv:2312.06585",
    example="recursive-jax run configs/rest_em.yaml --workdir runs/rest_em",
)
