"""RLAIF (arXiv:2309.00267; arXiv:2212.08073, sec. 4): preferences of a model, not of people, become a reward.

    student_0 = train(base, solutions)                             `solved: 0`: the base itself
    for k = 1 ..:
        pairs_k   = two answers of student_k-1 to every problem, compared by the judge in both orders; ties are dropped
        reward_k  = train(the base's trunk under a head of scores, pairs_k), Bradley and Terry
        student_k = policy gradient on reward_k from student_k-1, held to it by `beta`
    direct (d-RLAIF): the judge's own rating, 1 to 10, is the reward; no pairs, no reward model

Departures: the judge gives no reasons; hard labels (the paper's are soft); GRPO where the paper has REINFORCE with a
baseline (`signal: reinforce`). Expect: as good as people's preferences on summaries; a weak judge's mistakes are
learnt too (the report's *Learning from rewards*, and the held-out score by the task's own check)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from recursive_jax import rewards
from recursive_jax.config import TrainConfig
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.parsers import Score
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.models.scoring import scoring_model
from recursive_jax.objectives import PairwiseReward
from recursive_jax.recipes.answers import Course, check, judge_of
from recursive_jax.recipes.policy_rounds import PolicyConfig, reinforced
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import cost, rounds_of
from recursive_jax.rounds.round import Round

COMPARE = "Which answer is better?\nQuestion: {prompt}\n\nA: {first}\n\nB: {second}\n\nThe better one (A, B or tie): "
RATE = (
    "Rate the answer from 1 (bad) to 10 (perfect).\nQuestion: {prompt}\n\nAnswer: {reply}\n\nEnd with the line "
    "Score: N.\n"
)


class RlaifConfig(PolicyConfig):
    """Rounds of policy gradient by a model's preferences."""

    NEEDS = ("base", "task", "judge")

    recipe: str = "rlaif"

    judge: str = Field("", description="who compares: a model, or openai:MODEL@URL")
    compare: str = Field("", description="what the judge reads of two answers, {first} and {second}; default: COMPARE")
    rate: str = Field("", description="what it reads of one, {reply}, where direct; default: RATE")
    direct: bool = Field(False, description="the judge's rating is the reward itself")
    temperature: float = Field(1.0, gt=0.0, description="at which the two answers are drawn")
    truncated: Literal["keep", "zero", "soft", "mask"] = Field(
        "mask", description="a cut answer; reward models saw none"
    )
    beta: float = Field(0.05, ge=0.0, description="of the divergence from the student that a round begins with")
    reward: TrainConfig = Field(TrainConfig(steps=100, batch=16, learning_rate=1e-4), description="of reward models")


def advance(course: Course, round: Round, student: Model) -> tuple[Model, int]:
    config: Any = course.config
    judge = course.model(config.judge)
    asked = course.template.prompt
    if config.direct:
        rated = Template(
            config.rate or RATE.replace("{prompt}", asked),
            parser=Score(low=1, high=10, lenient=True),
        )
        return reinforced(course, round, student, judge_of(judge, rated))
    answers = course.answers(round, "answers", student, course.problems, each=2, temperature=config.temperature)
    facing = round.dataset("facing", side_by_side, answers)
    template = Template(config.compare or COMPARE.replace("{prompt}", asked))
    judged = round.score(
        "judged",
        facing,
        judge_of(judge, template, against="other"),
        column="won",
    )
    pairs = round.dataset("pairs", as_pairs, judged)
    trunk = scoring_model(course.start, seed=round.seed("head") % 2**31)
    model = round.train("reward-model", trunk, pairs, config.reward, PairwiseReward())
    return reinforced(course, round, student, rewards.reward_model(model))


def side_by_side(answers: Dataset) -> Dataset:
    """Of two answers to each problem the first, with the second as `other`; equal ones, and cut ones, are left
    out."""
    whole = [status == "ok" for status in answers.column("status")]
    both = np.repeat([a and b for a, b in zip(whole[::2], whole[1::2], strict=True)], 2)
    answers = answers.take(both)
    first, second = answers.take(np.arange(0, len(answers), 2)), answers.take(np.arange(1, len(answers), 2))
    rows = first.with_column("other", second.column("text"))
    return rows.take(np.array([a != b for a, b in zip(rows.column("text"), rows.column("other"), strict=True)], bool))


def as_pairs(judged: Dataset) -> Dataset:
    """`chosen` and `rejected` of the rows in which one side won. Raises InputError where none did."""
    rows = []
    for row in python_rows(judged.table):
        if row["won"] in (0.0, 1.0):
            better, worse = (row["text"], row["other"]) if row["won"] else (row["other"], row["text"])
            core = {"id": f"pair/{len(rows)}", "parents": row["parents"], "prompt": row["prompt"]}
            rows.append({**core, "chosen": better, "rejected": worse})
    if not rows:
        raise InputError(
            f"the judge preferred no answer in both orders, of {len(judged)} pairs: another judge is wanted"
        )
    return Dataset.from_rows(rows)


def rlaif(config: RlaifConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the rounds in `workdir` and returns the metrics records."""
    return rounds_of(config, workdir, advance, fork=fork, quiet=quiet)


recipe = Recipe(
    "rlaif",
    "a model's preferences become a reward model, and that a policy's reward; or its ratings do directly",
    RlaifConfig,
    rlaif,
    check,
    cost,
    paper="arXiv:2309.00267, arXiv:2212.08073",
    example="recursive-jax run configs/rlaif.yaml --workdir runs/rlaif",
)
