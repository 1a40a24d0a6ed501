"""What recipes over problems with known answers share: how they are asked, answered, graded and checked."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax import mesh as meshes
from recursive_jax import rewards
from recursive_jax.collapse.tasks import Task, task_numbers
from recursive_jax.config import TaskConfig
from recursive_jax.data import fields
from recursive_jax.data.dataset import SCHEMA, Dataset
from recursive_jax.data.template import Template, task_rows
from recursive_jax.data.tokenizers import fingerprint
from recursive_jax.errors import InputError
from recursive_jax.generate.remote.model import Remote
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model
from recursive_jax.recipes.recipe import RecipeConfig, task_problems
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.place import replicate
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.round import Round


class AnswersConfig(RecipeConfig):
    """A model that answers problems whose answer is known."""

    NEEDS = ("base", "task")

    base: str = Field("", description="the model before every round: a run, a Hugging Face folder, a GGUF, smollm2")
    task: TaskConfig
    right: Literal["numeric_match", "exact_match", "math_equal"] = Field("numeric_match", description="what is right")
    column: str = Field("answer", description="the rows' column with the right answer")
    problems: PositiveInt | None = Field(None, description="held-out problems, the first ones; default: all")

    def written(self, answer: int) -> float:
        """Tokens written about a problem beside its greedy answer, if an answer has so many."""
        return getattr(self, "samples", 0) * float(answer)


class Course:
    """What a recipe writes with: the round, its last student, the problems and how they are asked and graded."""

    def __init__(self, config: AnswersConfig, template: Template, rows: list[dict[str, Any]]):
        problems = Dataset.from_rows([{**row, "id": f"problem/{n}"} for n, row in enumerate(rows)])
        self.config, self.template, self.problems = config, template, problems
        self.reward = getattr(rewards, config.right)(config.column)
        self.seed: Stored | None = None  # the given solutions as rows to train on
        self.start: Model | None = None  # what a training from the base begins from
        self._models: dict[str, Any] = {}
        self.solved = problems.take(np.arange(len(problems))[: getattr(config, "solved", None)])

    def model(self, path: str) -> Any:
        """A judge or a teacher, opened once for all rounds."""
        if path not in self._models:
            self._models[path] = load_model(path, meshes.make_mesh(self.config.mesh))
        return self._models[path]

    def answers(self, round: Round, name: str, model: Model, problems: Any, template: Template | None = None,
                each: int = 1, **sampling: Any) -> Stored:  # fmt: skip
        """Answers to the problems, with their `score`."""
        settings = {"max_tokens": 256, **self.config.sampling.model_dump(exclude_unset=True), **sampling}
        rows = round.generate(name, model, problems, settings, template=template or self.template, each=each)
        return round.score(f"{name}-graded", rows, self.reward)


def opened(config: Any) -> tuple[Course, Task, Model]:
    """(the rows to learn from and how they are asked and graded, the held-out task, what every round starts from) of a
    config with `lora`."""
    base = load_model(config.base, meshes.make_mesh(config.mesh))
    learnt, held_out, _ = task_rows(config.task, config.seed)
    course = Course(config, Template.of(config.task, base.tokenizer), learnt)
    settings = {"temperature": 0.0, "max_tokens": config.sampling.max_tokens or 256}
    task = Task("held-out", tuple(held_out[: config.problems]), course.template, course.reward, settings)
    return (
        course,
        task,
        base if config.lora is None else adapted_model(base, config.lora, seed=config.seed + replicate()),
    )


def judge_of(model: Any, template: Template, **settings: Any) -> Any:
    """A judge. One behind a server is not held to the form of its answer, which not every server knows how to do."""
    return rewards.judge(model, template, constrained=not isinstance(model, Remote), **settings)


def question_of(template: Template) -> str:
    """The one column that the problems are asked by. Raises InputError where there are several."""
    names = fields.names(template.prompt)
    if len(names) != 1:
        raise InputError(f"task.prompt={template.prompt!r}: this recipe writes new problems, of one {{field}}")
    return names[0]


def same_tokenizer(model: Model, scorer: Model, key: str) -> None:
    """Raises InputError for a scorer that would read other ids than the model writes."""
    if fingerprint(model.tokenizer) != fingerprint(scorer.tokenizer):
        raise InputError(f"{key}: its tokenizer is another one than the base's, whose ids it would read")


def measured(task: Task, answers: Dataset, data_rows: int) -> dict[str, Any]:
    """Of the held-out rows; and how many rows the student learnt from."""
    return {**task_numbers(task, answers), "data_rows": data_rows}


def check(config: AnswersConfig) -> list[str]:
    """What can be said before the model is loaded."""
    wrong = task_problems(config.task, config.seed, [config.column])
    taken = [name for name in fields.names(config.task.prompt) if name in SCHEMA.names]
    if taken:
        wrong.append(f"task.prompt={config.task.prompt!r}: {taken[0]} is a column of every row; call yours otherwise")
    return wrong or batch_problems(config.mesh, train=config.train)
