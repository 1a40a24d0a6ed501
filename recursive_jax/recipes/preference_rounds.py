"""What SPIN and iterative DPO share: pairs of answers, one of them better, from the last student, which goes on from
itself.

    student_0 = train(base, solutions)
    pairs_k   = pairs(student_k-1)                            each recipe's own
    student_k = dpo(student_k-1, pairs_k, reference student_k-1)      of the last `window` rounds' pairs"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import Field, PositiveInt

from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.objectives import DPO
from recursive_jax.recipes.answers import Course
from recursive_jax.recipes.self_training import SelfTrainingConfig, rounds_of
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.work import Training, Work, Writing


class PreferenceConfig(SelfTrainingConfig):
    """Rounds of direct preference optimisation on a model's own answers."""

    beta: float = Field(0.1, gt=0.0, description="how far a round may leave the student before it")
    temperature: float = Field(0.7, gt=0.0, description="at which answers are drawn")
    preference_rate: float = Field(5e-6, gt=0.0, description="learning rate of the rounds; train has the first one's")
    preference_epochs: float = Field(1.0, gt=0.0, description="over a round's pairs")
    window: PositiveInt = Field(1, description="rounds whose pairs a student learns from")
    sft_weight: float = Field(0.0, ge=0.0, description="of the chosen answers' own loss beside it; 0: none")

    def work(self, network: Network, rows: int, prompt: int, answer: int) -> list[Work]:
        """Two answers or more to every problem, and a pair of each learnt from."""
        steps = max(1, math.ceil(self.preference_epochs * rows / self.train.batch))
        train = self.train.model_copy(update={"steps": steps})
        written = rows * self.rounds * getattr(self, "samples", 2)
        return [
            Writing("the rounds' answers", network, self.sampling, written, prompt, answer),
            Training("the rounds' pairs", network, train, float(self.rounds), self.objective),
        ]

    @property
    def objective(self) -> DPO:
        if not self.sft_weight:
            return DPO(beta=self.beta)
        return DPO(beta=self.beta, loss_type=("sigmoid", "sft"), loss_weights=(1.0, self.sft_weight))


Pairs = Callable[[Course, Round, Model], Stored]


def preference_rounds(
    config: PreferenceConfig, workdir: Any, pairs: Pairs, *, fork: Any = None, quiet: bool = False
) -> list[dict]:
    """Runs (or goes on with) the rounds and returns the metrics records. pairs(course, round, student): rows with
    `prompt`, `chosen`, `rejected`."""
    found: list[Stored] = []

    def advance(course: Course, round: Round, student: Model) -> tuple[Model, int]:
        found.append(pairs(course, round, student))
        data = round.dataset("data", together, *found[-config.window :])
        steps = max(1, math.ceil(config.preference_epochs * len(data) / config.train.batch))
        train = config.train.model_copy(update={"steps": steps, "learning_rate": config.preference_rate})
        return round.train("student", student, data, train, config.objective), len(data)

    return rounds_of(config, workdir, advance, fork=fork, quiet=quiet)


def together(*parts: Dataset) -> Dataset:
    """The pairs of some rounds. Raises InputError where there is none."""
    if not any(map(len, parts)):
        raise InputError(
            "no problem has answers of which one is better: the round has no pair to learn from; stop here"
        )
    parts = tuple(part for part in parts if len(part))
    columns = ("id", "parents", "prompt", "chosen", "rejected")
    rows = [{c: row[c] for c in columns} for part in parts for row in part.table.to_pylist()]
    return Dataset.from_rows(rows)
