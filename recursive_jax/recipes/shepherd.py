"""Shepherd (arXiv:2308.04592): a critic is taught critiques; answers are criticised and revised; the critic is a
reward.

    planted = right solutions, and the same with an error of a kind: arithmetic, context, coherence, redundancy
    critic  = train(base, question and answer -> kind of error, critique)         and people's critiques (`critiques`)
    found   = critic(planted in held-out solutions): precision and recall, by kind
    answers = student(held-out problems)                                          student = train(base, solutions)
    revised = student(problem, answer, critique) where the critic names an error

Departures: errors are planted by rules (people's rows are CC BY-NC: give them as `critiques`, rows with question,
answer, feedback); the answers are a student's of the same base. Expect: by GPT-4, 53 to 87% of its critiques are
preferred to other models'; here detection is exact, since what is planted is known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pydantic import Field, PositiveInt

from recursive_jax import mesh as meshes
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.task import read_rows
from recursive_jax.data.template import examples_dataset
from recursive_jax.models.model import Model
from recursive_jax.recipes import shepherd_rows as rows
from recursive_jax.recipes.answers import Course, check, opened
from recursive_jax.recipes.correction import compared, one_each
from recursive_jax.recipes.planted_errors import ERRORS, planted
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import SelfTrainingConfig, cost
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.report.shepherd import shepherd_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run

REVISE = "{asked}\n\nAnswer: {given}\n\nFeedback: {feedback}\n\nWrite the answer again, corrected.\n"


class ShepherdConfig(SelfTrainingConfig):
    """A critic, what it finds, and what a student makes of it."""

    recipe: str = "shepherd"

    errors: tuple[str, ...] = Field(tuple(ERRORS), description="kinds that are planted")
    each: PositiveInt = Field(1, description="solutions with an error of every problem, beside the right one")
    separator: str = Field("\n", description="between the steps of a solution")
    critiques: str = Field("", description="people's: rows with question, answer, feedback, learnt beside the planted")
    critic_epochs: float = Field(3.0, gt=0.0)
    revise: str = Field(REVISE, description="what the student is asked with a critique")


def taught(course: Course, round: Round, first: Round, held_out: Dataset) -> Model:
    """The critic; round 0 and round 1 have what the base and it find in held-out solutions."""
    c: Any = course.config
    question, solution = rows.columns(course.template)
    plant = lambda name, data: round.dataset(
        name, planted, data, question, solution, c.separator, c.errors, c.each, round.seed(name) % 2**31
    )
    people = read_rows(c.critiques) if c.critiques else []
    examples = round.dataset(
        "examples", rows.lessons, plant("planted", course.problems), people, course.start.tokenizer
    )
    steps = max(1, math.ceil(c.critic_epochs * len(examples) / c.train.batch))
    critic = round.train("critic", course.start, examples, c.train.model_copy(update={"steps": steps}))
    held = plant("planted-held-out", held_out)
    for where, model in ((first, course.start), (round, critic)):
        settings = {"temperature": 0.0, "max_tokens": 64, "batch": c.sampling.batch}
        found = where.generate("criticised", model, held, settings, template=rows.CRITIC)
        where.evaluate("detection", model, rows.detection, found)
    return critic


def revised(course: Course, round: Round, student: Model, critic: Model, before: Stored) -> Stored:
    """Graded answers to the problems: where the critic names an error, the student's second one."""
    settings = {"temperature": 0.0, "max_tokens": 64, "batch": course.config.sampling.batch}
    read = round.dataset("to-criticise", rows.to_criticise, before, rows.columns(course.template)[0])
    said = round.generate("critiques", critic, read, settings, template=rows.CRITIC)
    round.evaluate("as-a-reward", critic, rows.as_a_reward, said)
    wrong = round.dataset("found-wrong", rows.found_wrong, said, course.problems, course.template)
    if not len(wrong):
        return before
    reviser = dataclasses.replace(course.template, prompt=course.config.revise)
    again = course.answers(round, "revised", student, wrong, reviser, temperature=0.0)
    return round.dataset("held-out-revised", one_each, course.problems, again, before)


def shepherd(config: ShepherdConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records: `detection` of planted errors by the base (round
    0) and the critic (round 1), `evaluation` of answers before and after revision, `as-a-reward`."""
    course, task, course_start = opened(config)
    course.start = course_start
    held = Course(config, course.template, list(task.rows))
    held.start = course.start
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 22
        first, round = run.round(0), run.round(1)
        critic = taught(course, round, first, held.problems)
        student = course.start
        if len(course.solved):
            seed = first.dataset("seed", examples_dataset, course.solved, course.template, course.start.tokenizer)
            train = config.train.model_copy(update={"steps": config.steps(len(seed), 0)})
            student = first.train("student", course.start, seed, train)
        greedy = held.answers(first, "answers", student, held.problems, temperature=0.0)
        before = first.dataset("held-out", one_each, held.problems, greedy)
        first.evaluate("evaluation", student, compared, before, before, inputs={"answers": before})
        found = revised(held, round, student, critic, before)
        after = round.dataset("held-out", one_each, held.problems, found)
        round.evaluate("evaluation", student, compared, after, before, inputs={"answers": after})
        run.name_model("critic", round, "critic", default=True)
        if len(course.solved):
            run.name_model("student", first, "student")
        records = run.refresh_metrics()
        meshes.on_main(lambda: write_report(run.path, shepherd_layout))
        return records


recipe = Recipe(
    "shepherd",
    "a critic is taught to find planted errors; answers are criticised and revised; the critic is a reward",
    ShepherdConfig,
    shepherd,
    check,
    cost,
    shepherd_layout,
    paper="arXiv:2308.04592",
    example="recursive-jax run configs/shepherd.yaml --workdir runs/shepherd",
)
