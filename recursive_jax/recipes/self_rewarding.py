"""Self-rewarding language models (arXiv:2401.10020, sec. 2): a model judges its own answers and learns what it prefers.

    student_0 = train(base, solutions)
    for k = 1 ..:
        new_k     = `new_problems` problems that student_k-1 writes like the given ones
        answers_k = `samples` answers of student_k-1 to every problem, at `temperature`
        judged_k  = the mean of `judgements` ratings of each, 0 to 5, by student_k-1 itself
        student_k = dpo(student_k-1, best and worst of each problem), ties dropped

Departures: problems are the task's own beside the new ones; the judge is not trained on evaluations before; held-out
answers are graded by the task's own check, so that a judge that fools itself is seen. Expect: Llama-2-70B on AlpacaEval
9.9, 15.4, 20.4% over three rounds; small models cannot judge (their pairs are noise)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from recursive_jax import rewards
from recursive_jax.curate import rules
from recursive_jax.curate.select import with_status
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.parsers import Numbered, Score
from recursive_jax.data.template import Template
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import Course, check, question_of
from recursive_jax.recipes.preference_rounds import PreferenceConfig, preference_rounds
from recursive_jax.recipes.proposals import shown_lists
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import cost
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Round

PROPOSE = "Write more problems like these.\n\n{shown}\n{next}."
RUBRIC = """Rate the answer to the question with 0 to 5 points. Add a point if it is on the subject; a point if it
covers much of what was asked; a point if it answers the essentials; a point if it is clear and well written; a point
if it is perfect.
Question: {prompt}

Answer: {reply}

End with the line Score: N.
"""


class SelfRewardingConfig(PreferenceConfig):
    """Rounds of pairs by a model's own judgement."""

    recipe: str = "self_rewarding"

    rounds: PositiveInt = 3
    samples: PositiveInt = Field(4, description="answers to a problem")
    judgements: PositiveInt = Field(3, description="ratings of an answer, averaged")
    new_problems: NonNegativeInt = Field(0, description="requests for new problems in a round")
    rubric: str = Field("", description="what the judge reads: {reply} and the row's fields; default: five points")


def problems_of(course: Course, round: Round, student: Model) -> Any:
    """The task's problems and those that the student writes."""
    config: Any = course.config
    if not config.new_problems:
        return course.problems
    column = question_of(course.template)
    draw = round.seed("ask") % 2**31
    asked = round.dataset("ask", shown_lists, config.new_problems, draw, (6,), column, course.problems)
    template = Template(PROPOSE, parser=Numbered(column, opened=True), chat=course.template.chat)
    new = round.generate(
        "proposed", student, asked, {"temperature": 0.7, "top_p": 0.9, "max_tokens": 256}, template=template
    )
    known = tuple(map(str, course.problems.column(column)))
    chosen = [with_status("ok", "length"), rules.words(3, 150, column), rules.novel(0.7, column, known)]
    kept = round.select("new", new, chosen)
    return round.dataset("problems", all_of, course.problems, kept, column)


def all_of(problems: Dataset, new: Dataset, column: str) -> Dataset:
    rows = [*python_rows(problems.table), *python_rows(new.table)]
    return Dataset.from_rows([{"id": row["id"], column: row[column]} for row in rows])


def pairs(course: Course, round: Round, student: Model) -> Stored:
    config: Any = course.config
    problems = problems_of(course, round, student)
    settings = {
        "max_tokens": 256,
        **config.sampling.model_dump(exclude_unset=True),
        "temperature": config.temperature,
    }
    answers = round.generate("answers", student, problems, settings, template=course.template, each=config.samples)
    rubric = config.rubric or RUBRIC.replace("{prompt}", course.template.prompt)
    template = Template(rubric, parser=Score(low=0, high=5), chat=course.template.chat)
    judge = rewards.judge(student, template, samples=config.judgements, seed=round.seed("judge") % 2**31)
    judged = round.score("judged", answers, judge, column="judged")
    return round.select("pairs", judged, [with_status("ok"), rules.pairs("judged")])


def self_rewarding(config: SelfRewardingConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the rounds in `workdir` and returns the metrics records."""
    return preference_rounds(config, workdir, pairs, fork=fork, quiet=quiet)


recipe = Recipe(
    "self_rewarding",
    "a model judges its own answers, and learns to prefer those that it rates best",
    SelfRewardingConfig,
    self_rewarding,
    check,
    cost,
    paper="arXiv:2401.10020",
    example="recursive-jax run configs/self_rewarding.yaml --workdir runs/self_rewarding",
)
