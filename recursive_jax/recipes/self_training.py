"""What STaR, RFT and ReST-EM share: a model answers problems whose answer is known, and learns from what it got right.

student_0 = train(base, seed)                     the rows' own solutions
right_k   = right(answers of student_k-1)         each recipe's own: how many, which of them
student_k = train(base, seed + right_k)           `keep_seed: false`: of right_k alone"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from recursive_jax import mesh as meshes
from recursive_jax import rewards
from recursive_jax.collapse.tasks import Task, answered, task_numbers
from recursive_jax.config import LoraConfig, TaskConfig
from recursive_jax.data.dataset import SCHEMA, Dataset
from recursive_jax.data.template import Template, examples_dataset, task_rows
from recursive_jax.errors import InputError
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model
from recursive_jax.recipes.recipe import RecipeConfig
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.preflight import batch_problems, training_cost
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run


class AnswersConfig(RecipeConfig):
    """A model that answers problems whose answer is known."""

    base: str = Field("", description="the model before every round: a run, a Hugging Face folder, a GGUF, smollm2")
    task: TaskConfig
    right: Literal["numeric_match", "exact_match", "math_equal"] = Field("numeric_match", description="what is right")
    column: str = Field("answer", description="the rows' column with the right answer")
    problems: PositiveInt | None = Field(None, description="held-out problems, the first ones; default: all")

    @model_validator(mode="before")
    @classmethod
    def _must(cls, raw: Any) -> Any:
        missing = [key for key in ("base", "task") if isinstance(raw, dict) and not raw.get(key)]
        if missing:
            raise ValueError("\n".join(f"recipe={raw.get('recipe')} needs {key}" for key in missing))
        return raw


class SelfTrainingConfig(AnswersConfig):
    """Rounds of a model that learns from its own right answers."""

    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")
    rounds: PositiveInt = Field(1, description="of answering and training, after the student of the seed")
    solved: PositiveInt | None = Field(
        None,
        description="rows whose own solution is learnt from, the first; of the others only the answer is used",
    )
    keep_seed: bool = Field(True, description="learn from the rows' own solutions too, every round")
    epochs: float = Field(3.0, gt=0.0, description="over a round's rows; decides train.steps")

    def steps(self, rows: int, number: int) -> int:
        return max(1, math.ceil(self.epochs * rows / self.train.batch))


class Course:
    """What a recipe writes with: the round, its last student, the problems and how they are asked and graded."""

    def __init__(self, config: AnswersConfig, template: Template, problems: Dataset):
        self.config, self.template, self.problems = config, template, problems
        self.reward = getattr(rewards, config.right)(config.column)
        self.solved = problems.take(np.arange(len(problems))[: getattr(config, "solved", None)])

    def answers(self, round: Round, name: str, model: Model, problems: Any, template: Template | None = None,
                each: int = 1, **sampling: Any) -> Stored:  # fmt: skip
        """Answers to the problems, with their `score`."""
        settings = {"max_tokens": 256, **self.config.sampling.model_dump(exclude_defaults=True), **sampling}
        rows = round.generate(name, model, problems, settings, template=template or self.template, each=each)
        return round.score(f"{name}-graded", rows, self.reward)


Right = Callable[[Course, Round, Model], Stored]


def self_training(config: SelfTrainingConfig, workdir: Any, right: Right, *, fork: Any = None, quiet: bool = False):
    """Runs (or goes on with) the rounds; the metrics records. right(course, round, student): rows that are learnt."""
    base = load_model(config.base, meshes.make_mesh(config.mesh))
    train_rows, held_out, _ = task_rows(config.task, config.seed)
    template = Template.of(config.task, base.tokenizer)
    problems = Dataset.from_rows([{**row, "id": f"problem/{n}"} for n, row in enumerate(train_rows)])
    course = Course(config, template, problems)
    settings = {"temperature": 0.0, "max_tokens": config.sampling.max_tokens or 256}
    task = Task("held-out", tuple(held_out[: config.problems]), template, course.reward, settings)
    start = base if config.lora is None else adapted_model(base, config.lora, seed=config.seed)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 4 + 8 * config.rounds
        seed = run.round(0).dataset("seed", examples_dataset, course.solved, template, base.tokenizer)
        data, student = seed, start
        for number in range(config.rounds + 1):
            round = run.round(number)
            if number:
                data = round.dataset("data", together, seed, right(course, round, student), config.keep_seed)
            steps = config.steps(len(data), number)
            student = round.train("student", start, data, config.train.model_copy(update={"steps": steps}))
            held = round.dataset("held-out", answered, student, task, {})
            round.evaluate("evaluation", student, measured, task, held, len(data), inputs={"answers": held})
        run.name_model("student", round, "student", default=True)
        records = run.refresh_metrics()
        meshes.on_main(lambda: write_report(run.path))
        return records


def measured(task: Task, answers: Dataset, data_rows: int) -> dict[str, Any]:
    return {**task_numbers(task, answers), "data_rows": data_rows}


def together(seed: Dataset, right: Dataset, keep_seed: bool) -> Dataset:
    """The rows of a round: prompts and tokens, those of the seed first."""
    parts = [part for part in ([seed] if keep_seed else []) + [right] if len(part)]
    if not parts:
        raise InputError("no answer was right, and without the seed's rows (keep_seed=false) nothing is learnt")
    return Dataset.concat(map(bare, parts))


def bare(data: Dataset) -> Dataset:
    """Without the columns of the user's."""
    return data.without(*(name for name in data.table.column_names if name not in SCHEMA.names))


def cost(config: SelfTrainingConfig) -> list[str]:
    """Of all students, if every round had the solved rows alone: at least that."""
    rows = len(task_rows(config.task, config.seed)[0])
    steps = sum(config.steps(min(rows, config.solved or rows), number) for number in range(config.rounds + 1))
    train = config.train.model_copy(update={"steps": steps})
    return training_cost(load_model(config.base).network, train, meshes.make_mesh(config.mesh))


def check(config: SelfTrainingConfig) -> list[str]:
    """What can be said before the model is loaded: the files are there, and the first rows fill the template."""
    try:
        train, test, _ = task_rows(config.task, config.seed)
        for row in (train[0], test[0]):
            Template(config.task.prompt, config.task.completion, config.task.system).messages(row)
            if config.column not in row:
                raise InputError(f"column={config.column}: the rows have no such column: {', '.join(row)}")
    except InputError as error:
        return [str(error)]
    return batch_problems(config.mesh, train=config.train)
