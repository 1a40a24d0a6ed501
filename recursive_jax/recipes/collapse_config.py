"""The config of the collapse experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic import Field, PositiveInt, model_validator

from recursive_jax.config import (
    ArmConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
)
from recursive_jax.config.loader import changed_keys, explain
from recursive_jax.recipes.recipe import RecipeConfig

#: Names in a run folder that an arm's folder would collide with.
TAKEN = ("rounds", "run.json", "models.json", "commits.jsonl", "metrics.jsonl", "report.html")


class CollapseConfig(RecipeConfig):
    """A whole experiment."""

    base: str | None = Field(
        None,
        description="start from this model instead of random params: a run, a Hugging Face folder, a GGUF, smollm2; "
        "its network and tokenizer replace `model` and `data.tokenizer`",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    student: TrainConfig = Field(TrainConfig(), description="the rounds' training; what is left out is as in `train`")
    rounds: RoundsConfig = RoundsConfig()
    arms: dict[str, ArmConfig] = Field({"main": ArmConfig()}, min_length=1)
    replicates: PositiveInt = Field(1, description="chains per arm, differing by seed, from one shared teacher")
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _student_follows_train(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        if isinstance(raw.get("arms"), Mapping):  # arms.NAME=null leaves one of the file's out
            raw = {**raw, "arms": {name: arm for name, arm in raw["arms"].items() if arm is not None}}
        plain = lambda x: x.model_dump(exclude_unset=True) if isinstance(x, TrainConfig) else x
        train, student = plain(raw.get("train", {})), plain(raw.get("student")) or {}
        if isinstance(train, Mapping) and isinstance(student, Mapping):
            new = lambda section: {TrainConfig.RENAMED.get(k, k): v for k, v in section.items()}
            follows = {k: v for k, v in new(train).items() if k in TrainConfig.model_fields}
            return {**raw, "student": {**follows, **new(student)}}
        return raw

    @model_validator(mode="after")
    def _check(self) -> CollapseConfig:
        errors = [*self._unused(), *self._arm_problems()]
        if self.base is not None and self.data.path is None:
            errors.append("base needs data.path: real text for its tokenizer (the embedded language has its own words)")
        longest = self.model.max_length
        for section, train in (("train", self.train), ("student", self.student)):
            if self.base is None and train.length and train.length > longest:
                errors.append(f"{section}.length={train.length} is longer than model.max_length={longest}")
            if train.batch % train.gradient_accumulation:
                errors.append(
                    f"{section}.batch={train.batch} is not a multiple of "
                    f"gradient_accumulation={train.gradient_accumulation}"
                )
        if self.base is None and self.sampling.prompt_tokens >= longest:
            errors.append(
                f"sampling.prompt_tokens={self.sampling.prompt_tokens} leaves nothing of model.max_length={longest}"
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def _unused(self) -> list[str]:
        """Keys that were given and that nothing reads."""
        errors = []
        own = changed_keys(self.model)
        if self.base is not None and own:
            keys = ", ".join(f"model.{k}" for k in own)
            errors.append(f"{keys}: no use with base={self.base}, whose network is taken; leave it out")
        if self.base is not None and self.data.tokenizer != "byte":
            errors.append(
                f"data.tokenizer={self.data.tokenizer}: no use with base={self.base}, whose tokenizer is taken"
            )
        elif self.data.resolved_kind == "language" and self.data.tokenizer != "byte":
            errors.append(
                f"data.tokenizer={self.data.tokenizer} has no use without data.path: the embedded language has its own "
                "words"
            )
        if self.data.resolved_kind == "language":
            of_text = ("validation", "holdout", "field", "split", "data_dir", "vocab_size", "limit")
            given = [f"data.{k}" for k in of_text if k in changed_keys(self.data)]
            if given:
                errors.append(f"{', '.join(given)}: no use without data.path, where the text is the embedded language")
        return errors

    def _arm_problems(self) -> list[str]:
        errors = []
        for name, arm in self.arms.items():
            if (
                name in TAKEN
                or name.startswith(".")
                or name.endswith(".tmp")
                or not name.replace("-", "").replace("_", "").replace(".", "").isalnum()
            ):
                errors.append(
                    f"arms.{name}: an arm is a folder beside {', '.join(TAKEN)}: letters, digits, '-', '_', '.', and "
                    "none of "
                    "these names"
                )
            if len(name.encode()) > 100:
                errors.append(f"arms.{name[:20]}...: an arm's name is a folder's, {len(name)} characters are too long")
            try:
                sampling = self.arm_sampling(arm)
                if (
                    self.base is None
                    and sampling.prompt_tokens >= self.model.max_length
                    and "prompt_tokens" in arm.sampling
                ):
                    errors.append(
                        f"arms.{name}.sampling.prompt_tokens={sampling.prompt_tokens} leaves nothing of "
                        f"model.max_length={self.model.max_length}"
                    )
            except pydantic.ValidationError as error:
                errors.extend(f"arms.{name}.sampling: {line}" for line in explain(error, SamplingConfig))
            try:
                self.arm_student(arm)
            except pydantic.ValidationError as error:
                errors.extend(f"arms.{name}.student: {line}" for line in explain(error, TrainConfig))
        return errors

    def arm_sampling(self, arm: ArmConfig) -> SamplingConfig:
        return SamplingConfig(**{**self.sampling.model_dump(exclude_unset=True), **arm.sampling})

    def arm_student(self, arm: ArmConfig) -> TrainConfig:
        return TrainConfig(**{**self.student.model_dump(), **arm.student})
