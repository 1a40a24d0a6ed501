"""What STaR, RFT and ReST-EM share: a model answers problems whose answer is known, and learns from what it got right.

student_0 = train(base, seed)                     the rows' own solutions
right_k   = right(answers of student_k-1)         each recipe's own: how many, which of them
student_k = train(base, seed + right_k)           `keep_seed: false`: of right_k alone"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from recursive_jax.collapse.tasks import answered
from recursive_jax.config import LoraConfig
from recursive_jax.data.dataset import SCHEMA, Dataset
from recursive_jax.data.template import examples_dataset, task_rows
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.recipes.answers import AnswersConfig, Course, measured, opened
from recursive_jax.recipes.recipe import concluded, prompt_tokens, student_network
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import open_network
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training, Work, Writing


class SelfTrainingConfig(AnswersConfig):
    """Rounds of a model that learns from its own right answers."""

    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")
    rounds: PositiveInt = Field(1, description="of answering and training, after the student of the seed")
    solved: NonNegativeInt | None = Field(
        None,
        description="rows whose own solution round 0 learns from, the first; 0: none, round 0 is the base",
    )
    keep_seed: bool = Field(True, description="learn from the rows' own solutions too, every round")
    epochs: float = Field(3.0, gt=0.0, description="over a round's rows; decides train.steps")

    def steps(self, rows: int, number: int) -> int:
        return max(1, math.ceil(self.epochs * rows / self.train.batch))

    def work(self, network: Network, rows: int, prompt: int, answer: int) -> list[Work]:
        """What all rounds together do on the devices, for `rows` problems with prompts and answers of about so many
        tokens: here, answers to all of them and a training on as many rows, if all are right."""
        steps = [self.steps(rows, number) for number in range(1, self.rounds + 1)]
        train = self.train.model_copy(update={"steps": max(steps)})
        written = rows * self.rounds * getattr(self, "samples", 1)
        return [
            Writing("the rounds' answers", network, self.sampling, written, prompt, answer),
            Training("the rounds", network, train, sum(steps) / max(steps)),
        ]


Advance = Callable[[Course, Round, Model], tuple[Model, int]]
Right = Callable[[Course, Round, Model], Stored]


def rounds_of(config: SelfTrainingConfig, workdir: Any, advance: Advance, *, fork: Any = None, quiet: bool = False):
    """Runs (or goes on with) the rounds; the metrics records. Round 0 is the student of the given solutions.
    advance(course, round, student): (the round's student, how many rows it learnt from)."""
    course, task, start = opened(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 4 + 8 * config.rounds
        student, count = start, len(course.solved)
        if count:
            seed = run.round(0).dataset("seed", examples_dataset, course.solved, course.template, start.tokenizer)
            train = config.train.model_copy(update={"steps": config.steps(count, 0)})
            course.seed, student = seed, run.round(0).train("student", start, seed, train)
        course.start = start
        for number in range(config.rounds + 1):
            round = run.round(number)
            if number:
                student, count = advance(course, round, student)
            held = round.dataset("held-out", answered, student, task, {})
            round.evaluate("evaluation", student, measured, task, held, count, inputs={"answers": held})
        return concluded(run, round)


def self_training(config: SelfTrainingConfig, workdir: Any, right: Right, *, fork: Any = None, quiet: bool = False):
    """Rounds of training on right answers, from the base. right(course, round, student): rows that are learnt."""

    def advance(course: Course, round: Round, student: Model) -> tuple[Model, int]:
        found = right(course, round, student)
        seed = [course.seed] if config.keep_seed and course.seed is not None else []
        data = round.dataset("data", together, *seed, found)
        train = config.train.model_copy(update={"steps": config.steps(len(data), round.number)})
        return round.train("student", course.start, data, train), len(data)

    return rounds_of(config, workdir, advance, fork=fork, quiet=quiet)


def together(*parts: Dataset) -> Dataset:
    """The rows of a round: prompts and tokens, those of the seed first."""
    parts = tuple(part for part in parts if len(part))
    if not parts:
        raise InputError("no answer was right, and without the seed's rows (keep_seed=false) nothing is learnt")
    return Dataset.concat(map(bare, parts))


def bare(data: Dataset) -> Dataset:
    """Without the columns of the user's; what says how much is learnt of a row stays."""
    kept = {*SCHEMA.names, "loss", "weight"}
    return data.without(*(name for name in data.table.column_names if name not in kept))


def cost(config: SelfTrainingConfig) -> list[Work]:
    """The student of the given solutions, the rounds' trainings and what they write, and the held-out answers."""
    learnt, held_out, _ = task_rows(config.task, config.seed)
    solved = len(learnt) if config.solved is None else min(len(learnt), config.solved)
    network, base = student_network(config.base, config.lora), open_network(config.base)
    asked, prompt = min(len(held_out), config.problems or len(held_out)), prompt_tokens(config.task, learnt)
    answers = config.sampling.max_tokens or 256
    rows, greedy = (config.rounds + 1) * asked, config.sampling.model_copy(update={"temperature": 0.0})
    first = config.train.model_copy(update={"steps": config.steps(solved, 0)}) if solved else None
    return [
        *([Training("the first student", network, first)] if first is not None else []),
        *config.work(network, len(learnt), prompt, answers),
        Writing("held-out answers", base, greedy, rows, prompt, answers),
    ]
