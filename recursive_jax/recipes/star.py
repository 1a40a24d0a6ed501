"""STaR, the self-taught reasoner (arXiv:2203.14465, alg. 1).

    for k = 1 ..:
        answers = student_k-1(problems), greedy
        hinted  = student_k-1(problems it got wrong, with the right answer as a hint)     `rationalise`
        right_k = right answers + right hinted ones, the hint taken out of their prompts
        student_k = train(base, right_k), `first_steps` * `growth` ** (k - 1) steps

Departures: student_0 is the base trained on the rows' own solutions (`solved` of them), where the paper shows a few in
the prompt; these stay in every round (`keep_seed`). Expect: GPT-J on CommonsenseQA 60.0 (direct) to 72.5%."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax.curate import rules
from recursive_jax.curate.select import with_status
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.parsers import Answer
from recursive_jax.data.template import Template
from recursive_jax.generate.request import FromTemplate
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import Course, check
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import SelfTrainingConfig, bare, cost, self_training
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Round


class StarConfig(SelfTrainingConfig):
    """Rounds of greedy answers, and of hinted ones where they are wrong."""

    recipe: str = "star"

    rounds: PositiveInt = 5
    rationalise: bool = Field(True, description="wrong problems are asked again with the right answer as a hint")
    hint: str = Field(
        "(The answer is {hinted}.)\n", description="what stands before the question then; {hinted}: the answer alone"
    )
    first_steps: PositiveInt = Field(40, description="of the first round's training")
    growth: float = Field(1.2, ge=1.0, description="each round has so many times the steps of the one before")

    def steps(self, rows: int, number: int) -> int:
        if not number:
            return super().steps(rows, number)
        return round(self.first_steps * self.growth ** (number - 1))


def right(course: Course, round: Round, student: Model) -> Stored:
    config = course.config
    answers = course.answers(round, "answers", student, course.problems, temperature=0.0)
    found = round.select("right", answers, [with_status("ok"), rules.correct()])
    if not config.rationalise:
        return found
    wrong = round.dataset("wrong", missed, course.problems, answers, config.column)
    if not len(wrong):
        return found
    template = dataclasses.replace(course.template, prompt=config.hint + course.template.prompt)
    hinted = course.answers(round, "hinted", student, wrong, template, temperature=0.0)
    kept = round.select("hinted-right", hinted, [with_status("ok"), rules.correct()])
    return round.dataset("learnt", unhinted, found, kept, course.problems, course.template, student.tokenizer)


def missed(problems: Dataset, answers: Dataset, column: str) -> Dataset:
    """The problems whose answer is not right, with `hinted`: the right one, without the way there."""
    names = {
        (p or [""])[0] for p, s in zip(answers.column("parents"), answers.column("score"), strict=True) if s == 1.0
    }
    wrong = problems.take(np.array([n for n, i in enumerate(problems.column("id")) if i not in names], np.int64))
    return wrong.with_column("hinted", [answer_alone(str(value)) for value in wrong.column(column)])


def answer_alone(text: str) -> str:
    """What a solution ends in: behind its last ####, in its last box, its last number; else the text."""
    found = Answer().read(text)
    return found[0]["answer"] if isinstance(found, list) else text


def unhinted(right: Dataset, hinted: Dataset, problems: Dataset, template: Template, tokenizer: Any) -> Dataset:
    """Both, the hinted ones behind the prompt without the hint."""
    asked = FromTemplate(problems, template, tokenizer)
    prompts = {r.parents[0]: r.prompt for r in asked(0, len(asked))}
    plain = bare(hinted).with_column("prompt", [prompts[p[0]].tolist() for p in hinted.column("parents")])
    return Dataset.concat([bare(right), plain])


def star(config: StarConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the rounds in `workdir` and returns the metrics records."""
    return self_training(config, workdir, right, fork=fork, quiet=quiet)


recipe = Recipe(
    "star",
    "a model learns from its own right answers, and from those it finds when it is told the answer",
    StarConfig,
    star,
    check,
    cost,
    paper="arXiv:2203.14465",
    example="recursive-jax run configs/star.yaml --workdir runs/star",
)
