"""GRPO with a verifiable reward (arXiv:2402.03300, sec. 4.1; arXiv:2501.12948): answers are held against the others to
their problem.

    student_0 = train(base, solutions)                             `solved: 0`: the base itself
    for k = 1 ..:
        for each of `policy_steps`:
            answers   = `samples` answers of the student as it is to each problem of a batch
            advantage = (reward - mean of the problem's) / their standard deviation
            student   = a step of the clipped policy gradient, `beta` times its divergence from student_k-1 beside it

Departure: the reference is the student that a round begins with. `signal` and `loss_type` give RLOO, Dr. GRPO, DAPO,
PPO and the others (docs/preferences.md). Expect: gains on what the student gets right now and then; none where it
never does, or always."""

from __future__ import annotations

from typing import Any

from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import Course, check
from recursive_jax.recipes.policy_rounds import PolicyConfig, reinforced
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import cost, rounds_of
from recursive_jax.rounds.round import Round


class GrpoConfig(PolicyConfig):
    """Rounds of policy gradient with the task's own check as the reward."""

    recipe: str = "grpo"


def advance(course: Course, round: Round, student: Model) -> tuple[Model, int]:
    return reinforced(course, round, student, course.reward)


def grpo(config: GrpoConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the rounds in `workdir` and returns the metrics records."""
    return rounds_of(config, workdir, advance, fork=fork, quiet=quiet)


recipe = Recipe(
    "grpo",
    "rounds of policy gradient by a check that is always right: GRPO, RLOO, PPO and their kin",
    GrpoConfig,
    grpo,
    check,
    cost,
    paper="arXiv:2402.03300, arXiv:2501.12948",
    example="recursive-jax run configs/grpo.yaml --workdir runs/grpo",
)
