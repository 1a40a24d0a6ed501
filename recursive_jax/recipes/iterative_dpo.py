"""Iterative DPO with a verifiable reward (arXiv:2404.19733, sec. 2; arXiv:2312.11456): the best and the worst of a
model's own answers to a problem, again and again.

    answers_k = `samples` answers of student_k-1 to every problem, at `temperature`
    pairs_k   = of each problem whose answers are not all alike, a right one and a wrong one
    student_k = dpo(student_k-1, pairs_k), reference student_k-1, and `sft_weight` times the chosen answers' own loss

Departure: that loss is a mean over all tokens (arXiv:2404.19733, eq. 2, divides by each answer's length). Expect: gains
that shrink over three or four rounds. Without it (`sft_weight: 0`) the right answers' own probability falls with the
wrong ones', and accuracy with it (docs/benchmarks.md)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from recursive_jax.curate import rules
from recursive_jax.curate.select import with_status
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import Course, check
from recursive_jax.recipes.preference_rounds import PreferenceConfig, preference_rounds
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import cost
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Round


class IterativeDpoConfig(PreferenceConfig):
    """Rounds of pairs by a reward."""

    recipe: str = "iterative_dpo"

    rounds: PositiveInt = 3
    samples: PositiveInt = Field(8, description="answers to a problem")
    sft_weight: float = Field(1.0, ge=0.0, description="of the chosen answers' own loss beside it; 0: none")


def pairs(course: Course, round: Round, student: Model) -> Stored:
    config = course.config
    answers = course.answers(
        round, "answers", student, course.problems, each=config.samples, temperature=config.temperature
    )
    return round.select("pairs", answers, [with_status("ok"), rules.pairs()])


def iterative_dpo(config: IterativeDpoConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the rounds in `workdir` and returns the metrics records."""
    return preference_rounds(config, workdir, pairs, fork=fork, quiet=quiet)


recipe = Recipe(
    "iterative_dpo",
    "rounds of preference optimisation on the best and the worst of a model's own answers",
    IterativeDpoConfig,
    iterative_dpo,
    check,
    cost,
    paper="arXiv:2404.19733, arXiv:2312.11456",
    example="recursive-jax run configs/iterative_dpo.yaml --workdir runs/iterative_dpo",
)
