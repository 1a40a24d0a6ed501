"""The config of `broad_to_narrow`, and its student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from recursive_jax.config import ModelConfig, TaskConfig
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model, parameter_count
from recursive_jax.recipes.recipe import RecipeConfig


class BroadToNarrowConfig(RecipeConfig):
    """A broad teacher writes data for one task; a narrow student learns it."""

    NEEDS = ("teacher", "task")

    recipe: str = "broad_to_narrow"

    teacher: str = Field("", description="who writes: a model, or openai:MODEL@URL")
    teacher_chat: bool | None = Field(
        None, description="ask the teacher in its chat form, not as a text that goes on; default: a remote one"
    )
    task: TaskConfig
    profile: bool = Field(True, description="the collapse profile of the generated rows: RUN/profiles, the report")
    description: str = Field("", description="the task in words, before what the teacher is asked")
    model: ModelConfig = Field(ModelConfig(), description="the student")
    tokenizer: str = Field("byte", description="of the student: byte, bpe (of the seed rows), or a tokenizer.json")
    vocab_size: PositiveInt = Field(1024, description="of a bpe")
    largest: float = Field(0.1, gt=0.0, description="the student's params over the teacher's, at most")
    rounds: PositiveInt = Field(1, description="of writing and training; rows of all rounds are learnt from")
    rows: PositiveInt = Field(700, description="rows that are asked for in a round, over all classes")
    per_request: PositiveInt = Field(8, description="rows that one request asks for")
    shots: PositiveInt = Field(5, description="seed rows of the class that a request shows")
    novelty: float = Field(0.7, gt=0.0, lt=1.0, description="ROUGE-L of a new row with any other, at most")
    verify: Literal["none", "student", "teacher"] = Field(
        "none", description="who must answer a new row as it is labelled: the last student, the teacher with examples"
    )
    teacher_shots: int = Field(8, ge=0, description="seed rows that the teacher is shown when it answers itself")


def tokenizer_of(config: BroadToNarrowConfig, texts: Sequence[str]) -> Any:
    """The student's."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    return FileTokenizer.train_bpe(texts, config.vocab_size) if config.tokenizer == "bpe" else FileTokenizer.open(
        config.tokenizer)  # fmt: skip


def check_size(student: Model, teacher: Any, largest: float) -> None:
    """Raises InputError for a student that is not narrow; of a remote teacher the size is not known."""
    if not isinstance(teacher, Model):
        return
    own, broad = parameter_count(student.network), parameter_count(teacher.network)
    if own > largest * broad:
        raise InputError(
            f"the student has {own:,} params, {own / broad:.2f} of the teacher's {broad:,}: at most {largest:g} is "
            "narrow; make `model` smaller, or raise `largest`"
        )
