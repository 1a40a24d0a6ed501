"""Self-Refine (arXiv:2303.17651, alg. 1), and refinement only where an outside check fails (CRITIC, arXiv:2305.11738).

    answer_0 = model(problem)
    for t = 1 .. turns:
        feedback = model(problem, answer_t-1)           of those that `only` names
        stop where the feedback holds `stop`
        answer_t = model(problem, answer_t-1, feedback)

Departures: a turn sees the last answer and its feedback, not all before. `only`: `all` (the paper's, from within), or
`wrong`: those that the task's own check calls wrong (an outside check, as unit tests are). Expect: from within, gains
in style and almost none in mathematics, or losses (arXiv:2310.01798)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.template import Template
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import AnswersConfig, Course, check
from recursive_jax.recipes.correction import correction, cost, one_each
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report.corrections import correction_layout
from recursive_jax.rounds.round import Round


class SelfRefineConfig(AnswersConfig):
    """Turns of feedback and revision."""

    recipe: str = "self_refine"

    turns: PositiveInt = Field(2, description="of feedback and revision, at most")
    only: Literal["all", "wrong"] = Field(
        "all", description="which answers: all, or those an outside check calls wrong"
    )
    feedback: str = "{asked}\n\nAnswer: {given}\n\nIs this answer right? Say what is wrong, or write: It is correct."
    revise: str = "{asked}\n\nAnswer: {given}\n\nFeedback: {feedback}\n\nWrite the answer again, corrected."
    stop: str = Field("It is correct", description="feedback that ends the turns of an answer")

    def written(self, answer: int) -> float:
        return 2.0 * self.turns * answer


def refined(course: Course, round: Round, model: Model, before: Stored) -> Stored:
    config, current = course.config, before
    critic = Template(config.feedback, "{feedback}", chat=course.template.chat)
    reviser = dataclasses.replace(course.template, prompt=config.revise)
    for turn in range(1, config.turns + 1):
        open_ = round.dataset(f"open-{turn}", to_review, course.problems, current, course.template, config.only)
        if not len(open_):
            break
        settings = {"max_tokens": 256, **config.sampling.model_dump(exclude_unset=True), "temperature": 0.0}
        feedback = round.generate(f"feedback-{turn}", model, open_, settings, template=critic)
        faulty = round.dataset(f"faulty-{turn}", found_faulty, open_, feedback, config.stop)
        if not len(faulty):
            break
        revised = course.answers(round, f"revised-{turn}", model, faulty, reviser, temperature=0.0)
        current = round.dataset(f"answers-{turn}", one_each, course.problems, revised, current)
    return current


def to_review(problems: Dataset, answers: Dataset, template: Template, only: str) -> Dataset:
    """The problems with `asked` and `given`, the answer; all, or those whose answer's `score` is below 1."""
    rows = []
    for problem, text, score in zip(
        python_rows(problems.table), answers.column("text"), answers.column("score"), strict=True
    ):
        if only == "all" or score < 1.0:
            own = {k: v for k, v in problem.items() if k not in ("tokens", "prompt", "logprobs")}
            rows.append({**own, "asked": template.asks(problem), "given": text})
    return Dataset.from_rows(rows) if rows else problems.take(np.empty(0, np.int64))


def found_faulty(rows: Dataset, feedback: Dataset, stop: str) -> Dataset:
    """Those whose feedback could be read and does not end the turns, with it."""
    said = {
        parents[0]: text for parents, text in zip(feedback.column("parents"), feedback.column("feedback"), strict=True)
    }
    keep = [n for n, name in enumerate(rows.column("id")) if said.get(name) and stop.lower() not in said[name].lower()]
    found = rows.take(np.array(keep, np.int64))
    return found.with_column("feedback", [said[name] for name in found.column("id")])


def self_refine(config: SelfRefineConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records, before and after."""
    return correction(config, workdir, refined, fork=fork, quiet=quiet)


recipe = Recipe(
    "self_refine",
    "a model criticises and revises its own answers, all or those that an outside check calls wrong",
    SelfRefineConfig,
    self_refine,
    check,
    cost,
    layout=correction_layout,
    paper="arXiv:2303.17651, arXiv:2305.11738",
    example="recursive-jax run configs/self_refine.yaml --workdir runs/self_refine",
)
