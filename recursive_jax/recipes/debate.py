"""Debate of several agents (arXiv:2305.14325, sec. 2): each reads what the others say, and answers again.

    answers_0 = `agents` answers of the model to every problem, at `temperature`
    for t = 1 .. turns:
        answers_t = each agent's own, given the problem and the last answers of the other agents
    chosen = the first answer with the most frequent result

Departures: an agent reads the others, not its own last answer; all agents are the same model, told apart by their
draws. Expect: GPT-3.5 on GSM8K 77 to 85%; with small models agreement without being right: the paired test says
which."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.template import Template
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import AnswersConfig, Course, check
from recursive_jax.recipes.correction import correction, cost
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_consistency import majority
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report.corrections import correction_layout
from recursive_jax.rounds.round import Round


class DebateConfig(AnswersConfig):
    """Turns of agents that read each other."""

    recipe: str = "debate"

    agents: int = Field(3, ge=2)
    turns: PositiveInt = Field(2, description="in which every agent reads the others and answers again")
    temperature: float = Field(0.7, gt=0.0)

    def written(self, answer: int) -> float:
        return float(self.agents * (self.turns + 1) * answer)

    debate: str = "{asked}\n\nOther answers to it:\n{others}\n\nRead them with care and write your own answer."


def debated(course: Course, round: Round, model: Model, before: Stored) -> Stored:
    config: Any = course.config
    settings = {"temperature": config.temperature}
    answers = course.answers(round, "answers", model, course.problems, each=config.agents, **settings)
    reader = dataclasses.replace(course.template, prompt=config.debate)
    for turn in range(1, config.turns + 1):
        open_ = round.dataset(f"heard-{turn}", heard, course.problems, answers, course.template, config.agents)
        said = course.answers(round, f"answers-{turn}", model, open_, reader, **settings)
        answers = round.dataset(f"turn-{turn}", of_problems, said, open_)
    return round.dataset("chosen", majority, answers)


def heard(problems: Dataset, answers: Dataset, template: Template, agents: int) -> Dataset:
    """A row for each agent and problem: `asked`, and what the `others` said."""
    rows, texts = [], answers.column("text")
    for n, problem in enumerate(python_rows(problems.table)):
        own = {k: v for k, v in problem.items() if k not in ("tokens", "prompt", "logprobs")}
        said = texts[n * agents : (n + 1) * agents]
        for agent in range(agents):
            others = "\n\n".join(text for k, text in enumerate(said) if k != agent)
            asked = {"asked": template.asks(problem), "others": others, "problem": problem["id"]}
            rows.append({**own, **asked, "id": f"{problem['id']}/{agent}"})
    return Dataset.from_rows(rows)


def of_problems(said: Dataset, asked: Dataset) -> Dataset:
    """The answers as ones to their problems."""
    problem = dict(zip(asked.column("id"), asked.column("problem"), strict=True))
    rows = said.take(np.array(["#" not in name for name in said.column("id")]))
    return rows.with_column("parents", [[problem[parents[0]]] for parents in rows.column("parents")])


def debate(config: DebateConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records, before and after."""
    return correction(config, workdir, debated, fork=fork, quiet=quiet)


recipe = Recipe(
    "debate",
    "several agents of one model read each other's answers and answer again; the most frequent result counts",
    DebateConfig,
    debate,
    check,
    cost,
    layout=correction_layout,
    paper="arXiv:2305.14325, arXiv:2308.03188",
    example="recursive-jax run configs/debate.yaml --workdir runs/debate",
)
