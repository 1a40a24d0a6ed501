"""On-policy distillation (arXiv:2306.13649 with lmbda 1; arXiv:2306.08543): a student writes, and follows its teacher's
distributions on what it wrote itself.

    student_0 = train(base, solutions)                             `solved: 0`: the base itself
    for each of `distill_steps`:
        texts   = student(problems), as it is
        student = a step on KL(student || teacher) of every token of them

`distill` with how=distributions, lmbda=1, beta=1. The teacher has the student's tokenizer. Expect: most of a teacher's
accuracy in a fraction of the steps that a reward needs, since every token is told how it should have been."""

from __future__ import annotations

from typing import Any, Literal

from recursive_jax.recipes.answers import check
from recursive_jax.recipes.distill import DistillConfig, distill
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import cost


class OnPolicyDistillationConfig(DistillConfig):
    """A student follows its teacher on its own texts."""

    recipe: str = "on_policy_distillation"

    how: Literal["distributions"] = "distributions"
    lmbda: float = 1.0
    beta: float = 1.0


def on_policy_distillation(config: OnPolicyDistillationConfig, workdir: Any, *, fork: Any = None, quiet: bool = False):
    """Runs (or goes on with) it in `workdir` and returns the metrics records."""
    return distill(config, workdir, fork=fork, quiet=quiet)


recipe = Recipe(
    "on_policy_distillation",
    "a student writes and follows its teacher's distributions on what it wrote",
    OnPolicyDistillationConfig,
    on_policy_distillation,
    check,
    cost,
    paper="arXiv:2306.13649, arXiv:2306.08543",
    example="recursive-jax run configs/on_policy_distillation.yaml --workdir runs/on_policy",
)
