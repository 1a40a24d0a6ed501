"""The config that recipes on instructions share."""

from __future__ import annotations

import math

from pydantic import Field, PositiveInt

from recursive_jax.config import LoraConfig, TaskConfig
from recursive_jax.data.template import task_rows
from recursive_jax.errors import InputError
from recursive_jax.recipes.instruction_rows import as_instructions
from recursive_jax.recipes.recipe import RecipeConfig, student_network
from recursive_jax.rounds.opening import open_network
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.work import Training, Work, Writing


class InstructionTask(TaskConfig):
    """Rows with `instruction`, `input` and `output`, Self-Instruct's `instances`, or any form of conversation."""

    prompt: str = Field("{asked}", description="what the model reads; {asked}: the instruction, and its input")
    completion: str = "{output}"


class InstructionsConfig(RecipeConfig):
    """A teacher writes, a student is tuned on what is kept."""

    NEEDS = ("base", "task")

    base: str = Field("", description="the student before: a run, a Hugging Face folder, a GGUF, smollm2")
    teacher: str | None = Field(None, description="who writes: a model, or openai:MODEL@URL; default: the base itself")
    teacher_chat: bool | None = Field(
        None, description="ask the teacher in its chat form, not as a text that goes on; default: a remote one"
    )
    task: InstructionTask
    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")
    epochs: float = Field(2.0, gt=0.0, description="over the rows learnt from; decides train.steps")
    problems: PositiveInt | None = Field(None, description="held-out rows, the first ones; default: all")
    judge: str | None = Field(None, description="a model that compares answers before and after, in both orders")


def cost(config: InstructionsConfig) -> list[Work]:
    """A student of as many rows as the seed has, which is the least, and its answers to the held-out ones."""
    learnt, held_out, _ = task_rows(config.task, config.seed)
    steps = max(1, math.ceil(config.epochs * len(learnt) / config.train.batch))
    train = config.train.model_copy(update={"steps": steps})
    network, base = student_network(config.base, config.lora), open_network(config.base)
    asked, new = min(len(held_out), config.problems or len(held_out)), config.sampling.max_tokens or 256
    prompt = min(base.max_length // 2, 128)
    return [Training("", network, train), Writing("answers", base, config.sampling, 2 * asked, prompt, new)]


def check(config: InstructionsConfig) -> list[str]:
    """What can be said before a model is loaded: the files are there, and their rows are instructions."""
    try:
        train, test, _ = task_rows(config.task, config.seed)
        as_instructions(train, "seed")
        as_instructions(test, "held-out")
    except InputError as error:
        return [str(error)]
    return batch_problems(config.mesh, train=config.train)
