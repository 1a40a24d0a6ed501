"""Best of n (arXiv:2110.14168, sec. 4.2; re-ranking in arXiv:2308.03188): of `samples` answers the one that a scorer
puts first. The scorer never sees the right answer.

    answers = `samples` answers of the model to every problem, at `temperature`
    chosen  = argmax score(answer)             `scorer`: likelihood (mean of the tokens' log-probabilities), or a reward
                                               model's folder

Expect: gains with a trained verifier; with the model's own likelihood little or none."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax import rewards
from recursive_jax.curate import rules
from recursive_jax.data.dataset import Dataset
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import AnswersConfig, Course, check, same_tokenizer
from recursive_jax.recipes.correction import correction, cost
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.report.corrections import correction_layout
from recursive_jax.rounds.round import Round


class BestOfNConfig(AnswersConfig):
    """Many answers, and one that a scorer puts first."""

    recipe: str = "best_of_n"

    samples: PositiveInt = Field(8, description="answers to a problem")
    temperature: float = Field(0.7, gt=0.0)
    scorer: str = Field("likelihood", description="likelihood, or a reward model: a folder with model.head=score")


def mean_logprob(data: Dataset) -> list[float | None]:
    """Of the tokens as they were written; None for an answer without any."""
    return [float(np.mean(x)) if len(x) else None for x in data.lists("logprobs")]


def chosen(course: Course, round: Round, model: Model, before: Stored) -> Stored:
    config = course.config
    settings = {"each": config.samples, "temperature": config.temperature}
    answers = course.answers(round, "answers", model, course.problems, **settings)
    scorer: Any = mean_logprob
    if config.scorer != "likelihood":
        judge = load_model(config.scorer, model.mesh)
        same_tokenizer(model, judge, f"scorer={config.scorer}")
        scorer = rewards.reward_model(judge)
    scored = round.score("scored", answers, scorer, column="choice")
    return round.select("chosen", scored, [rules.best_of("choice")])


def best_of_n(config: BestOfNConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records, before and after."""
    return correction(config, workdir, chosen, fork=fork, quiet=quiet)


recipe = Recipe(
    "best_of_n",
    "of several answers the one that a scorer puts first, beside the greedy one",
    BestOfNConfig,
    best_of_n,
    check,
    cost,
    layout=correction_layout,
    paper="arXiv:2110.14168, arXiv:2308.03188",
    example="recursive-jax run configs/best_of_n.yaml --workdir runs/best_of_n",
)
