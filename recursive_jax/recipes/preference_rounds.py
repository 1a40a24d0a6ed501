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

from recursive_jax import mesh as meshes
from recursive_jax.collapse.tasks import answered
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.template import examples_dataset
from recursive_jax.models.model import Model
from recursive_jax.objectives import DPO
from recursive_jax.recipes.answers import Course, measured, opened
from recursive_jax.recipes.self_training import SelfTrainingConfig
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run


class PreferenceConfig(SelfTrainingConfig):
    """Rounds of direct preference optimisation on a model's own answers."""

    beta: float = Field(0.1, gt=0.0, description="how far a round may leave the student before it")
    temperature: float = Field(0.7, gt=0.0, description="at which answers are drawn")
    preference_rate: float = Field(5e-6, gt=0.0, description="learning rate of the rounds; train has the first one's")
    preference_epochs: float = Field(1.0, gt=0.0, description="over a round's pairs")
    window: PositiveInt = Field(1, description="rounds whose pairs a student learns from")
    sft_weight: float = Field(0.0, ge=0.0, description="of the chosen answers' own loss beside it; 0: none")

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
    course, task, start = opened(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 4 + 7 * config.rounds
        first = run.round(0)
        seed = first.dataset("seed", examples_dataset, course.solved, course.template, start.tokenizer)
        train = config.train.model_copy(update={"steps": config.steps(len(seed), 0)})
        student, found = first.train("student", start, seed, train), []
        for number in range(config.rounds + 1):
            round = run.round(number)
            if number:
                found.append(pairs(course, round, student))
                data = round.dataset("data", together, *found[-config.window :])
                steps = max(1, math.ceil(config.preference_epochs * len(data) / config.train.batch))
                changed = {"steps": steps, "learning_rate": config.preference_rate}
                student = round.train("student", student, data, train.model_copy(update=changed), config.objective)
            held = round.dataset("held-out", answered, student, task, {})
            count = len(data) if number else len(seed)
            round.evaluate("evaluation", student, measured, task, held, count, inputs={"answers": held})
        run.name_model("student", round, "student", default=True)
        records = run.refresh_metrics()
        meshes.on_main(lambda: write_report(run.path))
        return records


def together(*parts: Dataset) -> Dataset:
    columns = ("id", "parents", "prompt", "chosen", "rejected")
    rows = [{c: row[c] for c in columns} for part in parts for row in part.table.to_pylist()]
    return Dataset.from_rows(rows)
