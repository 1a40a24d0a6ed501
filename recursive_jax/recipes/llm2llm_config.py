"""The config of `llm2llm`, and its arms."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from recursive_jax.config import LoraConfig, TaskConfig
from recursive_jax.recipes.recipe import RecipeConfig


class Llm2llmConfig(RecipeConfig):
    """Rounds that write more of what the student gets wrong."""

    NEEDS = ("base", "task")

    recipe: str = "llm2llm"

    base: str = Field(description="the student before every round: a run, a Hugging Face folder, a GGUF, smollm2")
    teacher: str = Field("oracle", description="who varies rows: a model, openai:MODEL@URL, or oracle: exact")
    task: TaskConfig
    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")
    rounds: PositiveInt = Field(5, description="of writing and training, after the student of the seed alone")
    per_wrong: PositiveInt = Field(1, description="variations of a row that the student gets wrong")
    epochs: float = Field(3.0, gt=0.0, description="over a round's rows; decides train.steps")
    novelty: float = Field(0.95, gt=0.0, lt=1.0, description="ROUGE-L of a new row with any other, at most")
    init: Literal["base", "previous"] = "base"
    parents: Literal["seed", "all"] = "seed"
    targeted: bool = Field(True, description="vary what is wrong; else as many rows, drawn from all")
    ablations: bool = Field(False, description="beside it the paper's four ablations, each with as many new rows")
    replicates: PositiveInt = Field(1, description="seeds")

    @model_validator(mode="after")
    def _own_arms(self) -> Llm2llmConfig:
        if self.arms:
            raise ValueError("arms: llm2llm has arms of its own, which add as many rows: ablations=true")
        return self


@dataclasses.dataclass(frozen=True)
class Arm:
    """One course. bulk: all rows are written at once, after the first student."""

    init: str = "base"
    parents: str = "seed"
    targeted: bool = True
    bulk: bool = False


def arms_of(config: Llm2llmConfig) -> dict[str, Arm]:
    """name -> arm; the first is the one that the others are held against."""
    main = Arm(config.init, config.parents, config.targeted)
    if not config.ablations:
        return {"main": main}
    changed = {"untargeted": {"targeted": False}, "bulk": {"bulk": True}, "continued": {"init": "previous"}}
    changed["all-parents"] = {"parents": "all"}
    return {"main": main, **{name: dataclasses.replace(main, **change) for name, change in changed.items()}}
