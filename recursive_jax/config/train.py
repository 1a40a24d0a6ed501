"""One training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from recursive_jax.config.section import Section

DEFAULT_LENGTH = 1024  # positions of a packed row, for models that read longer ones; see `row_length`


class TrainConfig(Section):
    """One training: steps, batch, optimizer, dtype, logging."""

    HOW = frozenset(("checkpoint_every", "log_every", "tensorboard"))
    RENAMED = {"accumulate": "gradient_accumulation"}  # noqa: RUF012

    steps: PositiveInt = 1000
    batch: PositiveInt = Field(16, description="rows per step over all devices")
    length: PositiveInt | None = Field(None, description="tokens per packed row; default: model.max_length")
    gradient_accumulation: PositiveInt = Field(1, description="micro-batches per step")
    learning_rate: float = Field(1e-3, gt=0.0)
    warmup: float = Field(0.05, ge=0.0, le=1.0, description="share of the steps")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final: float = Field(0.1, ge=0.0, le=1.0, description="last learning rate as a share of the peak")
    decay: float = Field(0.2, gt=0.0, le=1.0, description="wsd: share of the steps that decay")
    weight_decay: float = Field(0.1, ge=0.0)
    clip: float = Field(1.0, gt=0.0, description="global gradient norm")
    truncate: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="tokens that the model gives more than this are left out of the loss (arXiv:2509.08972); 1: none",
    )
    objective: dict[str, Any] = Field(
        {},
        description="what is trained for where the recipe leaves it open: {name: masked, share: 0.3}; default: causal",
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; params stay float32. auto: bfloat16 on TPU and GPU, float32 on CPU"
    )
    checkpoint_every: PositiveInt = Field(1000, description="steps between resumable checkpoints")
    log_every: PositiveInt = 10
    tensorboard: bool = True


def row_length(asked: int | None, max_length: int) -> int:
    """Positions of a packed row, the one place where this is decided: what is asked for, else all that the model reads,
    but no more than DEFAULT_LENGTH (imported models read many thousands)."""
    return asked or min(max_length, DEFAULT_LENGTH)
