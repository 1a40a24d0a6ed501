"""The recursion: how many rounds, under which regimes, and how each is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from recursive_jax.config.sampling import SamplingConfig
from recursive_jax.config.section import Section
from recursive_jax.config.train import TrainConfig


class RoundsConfig(Section):
    """The recursion: how many rounds, what a student starts from, how much it is trained on."""

    GROWS = frozenset(("count", "schedule"))
    RENAMED = {"tokens": "token_budget"}  # noqa: RUF012

    count: int = Field(5, ge=0, le=10_000)
    init: Literal["base", "previous", "scratch"] = "scratch"
    token_budget: PositiveInt = Field(100_000, description="tokens of data per round and arm: synthetic plus real")
    budget: Literal["fixed", "grow"] = Field(
        "fixed", description="fixed: every round trains on as many tokens; grow: on the whole pool, equal epochs"
    )
    growth: float = Field(0.0, ge=0.0, description="round k has token_budget * k^growth, and its steps grow with them")
    schedule: tuple[PositiveInt, ...] = Field((), description="tokens of each round, in place of growth")

    @model_validator(mode="after")
    def _check(self) -> RoundsConfig:
        if self.schedule and len(self.schedule) != self.count:
            raise ValueError(f"schedule has {len(self.schedule)} sizes, count={self.count}; give as many")
        if self.schedule and self.growth:
            raise ValueError(f"schedule and growth={self.growth}: one of the two")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of rounds 1 .. count."""
        return self.schedule or tuple(round(self.token_budget * k**self.growth) for k in range(1, self.count + 1))


class FilterConfig(Section):
    """A verifier that sees every generated row and keeps right ones at one rate, wrong ones at another
    (arXiv:2406.07515)."""

    verifier: Literal["syntax", "semantics", "facts"] = Field(
        "facts",
        description="what makes a row of the embedded language right; facts: form, agreement and facts all right",
    )
    keep_right: float = Field(1.0, ge=0.0, le=1.0)
    keep_wrong: float = Field(0.0, ge=0.0, le=1.0)


class ArmConfig(Section):
    """One regime: what a round's student is trained on, by the names of the laboratory (arXiv:2404.01413,
    arXiv:2410.16713)."""

    OVERRIDES = {"sampling": SamplingConfig, "student": TrainConfig}  # noqa: RUF012

    data: Literal["replace", "accumulate", "accumulate_subsample", "window"] = "replace"
    window: PositiveInt | None = Field(None, description="rounds kept when data is `window`; default: 2")
    anchor: float = Field(0.0, ge=0.0, le=1.0, description="share of real rows, the same every round")
    fresh: float = Field(0.0, ge=0.0, le=1.0, description="share of real rows, new ones every round")
    carry: float = Field(
        0.0, ge=0.0, le=1.0, description="share of the last round's training rows, passed on unchanged"
    )
    weighted: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="as many new real tokens again, their loss weighted w against 1 - w (arXiv:2502.18049)",
    )
    filtered: FilterConfig | None = Field(None, description="a verifier of generated rows")
    init: Literal["base", "previous", "scratch"] | None = Field(None, description="default: rounds.init")
    sampling: dict[str, Any] = Field({}, description="overrides of `sampling` for this arm")
    student: dict[str, Any] = Field({}, description="overrides of `student` for this arm")

    @model_validator(mode="after")
    def _check(self) -> ArmConfig:
        if self.real + self.carry > 1.0:
            raise ValueError(
                f"anchor={self.anchor} + fresh={self.fresh} + carry={self.carry} is more than the whole round"
            )
        if self.window is not None and self.data != "window":
            raise ValueError(f"window={self.window} has no use with data={self.data}: leave it out, or set data=window")
        if self.weighted is not None and self.real + self.carry > 0:
            raise ValueError(f"weighted={self.weighted} brings its own real rows: without anchor, fresh and carry")
        return self

    @property
    def real(self) -> float:
        """Share of real rows in a round."""
        return self.anchor + self.fresh

    def real_tokens(self, sizes: Sequence[int]) -> int:
        """Real tokens that rounds of these sizes use."""
        new = self.fresh + (self.weighted is not None)
        return round(self.anchor * max(sizes, default=0) + new * sum(sizes))


class EvaluateConfig(Section):
    """How much is scored, sampled and counted in an evaluation."""

    HOW = frozenset(("show",))
    RENAMED = {"tokens": "token_budget"}  # noqa: RUF012

    rows: PositiveInt = Field(256, description="held-out real rows scored")
    samples: PositiveInt = Field(512, description="rows sampled from each model for the sample statistics")
    token_budget: PositiveInt = Field(8192, description="fixed token budget of every count statistic")
    show: int = Field(4, ge=0, description="sample texts kept for the report")
