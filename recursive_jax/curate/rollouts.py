"""`Rollouts`: answers of the policy itself, rewarded, for a `PolicyGradient`.

ask = rj.Template("{problem}")
rollouts = Rollouts(model, problems, ask, rewards.exact_match("answer"), objective, max_tokens=64)
trained = rj.train(model, rollouts, objective, steps=100, batch=64)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recursive_jax.config import SamplingConfig
from recursive_jax.curate.on_policy import DrawnFrom, OnPolicy
from recursive_jax.curate.rewards import score
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Columns
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError, say, say_once
from recursive_jax.identity import describe
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Params
from recursive_jax.objectives.credit import WRITTEN, even, why_even
from recursive_jax.objectives.passes import learnt_logprobs, token_values
from recursive_jax.objectives.policy import PolicyGradient


class Rollouts(OnPolicy):
    """Batches for a `PolicyGradient`: `batch / num_generations` problems a step, each answered `num_generations` times.

    problems: rows (dicts, or a Dataset) that `template` asks. reward: of the answers, as for `rj.score`.
    dynamic_sampling: groups whose rewards are all equal, which teach nothing, are replaced by the answers to other
    problems, at most this many times. num_iterations, steps_per_generation, staleness, refresh, keep: see `OnPolicy`.
    sampling, settings: how answers are drawn, at most `max_tokens` long; where it is not from the policy as it is
    (temperature 1, nothing cut off), or by an older policy, tokens are weighted (`importance_sampling_cap`).

    Raises InputError for problems that there are none of, settings that no weight puts right, and a batch that is no
    multiple of num_generations."""

    def __init__(
        self,
        model: Model,
        problems: Sequence[Mapping[str, Any]] | Dataset,
        template: Template,
        reward: Any,
        objective: PolicyGradient,
        *,
        num_generations: int = 8,
        num_iterations: int = 1,
        steps_per_generation: int = 1,
        dynamic_sampling: int = 0,
        staleness: int = 0,
        refresh: int = 16,
        length: int | None = None,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        keep: Any = None,
        **settings: Any,
    ):
        if not isinstance(objective, PolicyGradient):
            raise InputError(f"objective={type(objective).__name__}: Rollouts are for a PolicyGradient")
        self.reward, self.again = reward, dynamic_sampling
        if not callable(reward):
            raise InputError(f"reward={reward!r}: a Reward or a function of a Dataset is wanted")
        describe(reward)  # a closure without a name is refused here
        self.compared = objective.signal in ("grpo", "rloo")  # within groups
        if isinstance(num_generations, int) and num_generations < 2 and self.compared:
            raise InputError(f"num_generations={num_generations}: answers are compared, at least 2 are wanted")
        if dynamic_sampling < 0 or (dynamic_sampling and not self.compared):
            raise InputError(
                f"dynamic_sampling={dynamic_sampling}: 0 or more is wanted, above 0 only where answers are compared "
                f"with those to their problem (signal grpo or rloo, not {objective.signal})"
            )
        super().__init__(
            model, problems, template, objective, num_generations=num_generations, num_iterations=num_iterations,
            steps_per_generation=steps_per_generation, staleness=staleness, refresh=refresh, length=length,
            sampling=sampling, keep=keep, settings=settings,
        )  # fmt: skip

    def _named(self) -> list[Any]:
        return [*super()._named(), describe(self.reward), self.again]

    def written(self, writing: int, policy: Model) -> tuple[Dataset, Columns]:
        rows = score(self.answers(writing, policy, self._asked(writing)), self.reward)
        if self.compared:
            rows = self._varied(writing, policy, rows)
        columns = dict(self.objective.packed(self._learnable(rows), self.model, self.length).columns)
        if self.drawn_otherwise:
            columns["sampled"] = learnt_logprobs(policy, columns, DrawnFrom(self.sampling), self._dtype)
        return rows, columns

    def _learnable(self, rows: Dataset) -> Dataset:
        """Without the problems' own column `reference`; a row that failed (its prompt may not even fit) is empty."""
        failed = [status not in WRITTEN for status in rows.column("status")]
        rows = rows.without("reference")
        if not any(failed):
            return rows
        for name in ("prompt", "tokens", "logprobs"):
            kept = [[] if bad else x.tolist() for bad, x in zip(failed, rows.lists(name), strict=True)]
            rows = rows.with_column(name, kept)
        return rows

    def _varied(self, writing: int, policy: Model, rows: Dataset) -> Dataset:
        """With other problems in place of those whose answers have equal rewards."""
        for attempt in range(1, self.again + 1):
            dull = np.flatnonzero(even(self._rewards(rows)))
            if not len(dull):
                break
            draw, asked = self._random(writing, "others", attempt), set(self._places(writing).tolist())
            fresh = [n for n in range(len(self.problems)) if n not in asked] or list(range(len(self.problems)))
            others = draw.choice(fresh, len(dull), replace=len(dull) > len(fresh))
            more = score(self.answers(writing, policy, self.problems.take(others), attempt), self.reward)
            better = np.flatnonzero(~even(self._rewards(more)))
            order = np.arange(len(rows)).reshape(-1, self.each)
            order[dull[: len(better)]] = len(rows) + better[:, None] * self.each + np.arange(self.each)
            rows = Dataset.concat([rows, more], fill=True).take(order.reshape(-1))
        dull = even(self._rewards(rows))
        if self.again and dull.any():
            why = why_even(self._rewards(rows)[dull])
            say(
                f"writing {writing}: {dull.sum():,} of {len(dull):,} groups have equal rewards after "
                f"{self.again:,} more askings ({why}): problems that are too easy or too hard teach nothing"
            )
        elif dull.all():
            say_once(f"all groups of a step have equal rewards ({why_even(self._rewards(rows))}): it teaches nothing")
        return rows

    def _rewards(self, rows: Dataset) -> np.ndarray:
        """`[N, G]`, NaN where there is none."""
        return self.objective.rewards(rows, "score").reshape(-1, self.each)

    def batched(
        self, writing: int, written: tuple[Dataset, Columns], policy: Model, params: Params, state: Any
    ) -> Columns:
        rows, columns = written
        objective, rewards_NG = self.objective, self._rewards(rows)
        unknown_B = np.isnan(rewards_NG).reshape(-1)
        columns["loss"] = np.where(unknown_B[:, None, None], np.zeros_like(columns["loss"]), columns["loss"])
        if not columns["loss"].any():
            say_once("no answer of a step can be learnt from: none has a reward, or all were cut and truncated='mask'")
        mask_NT = columns["loss"][:, 0].astype(np.float32)
        if self.staleness or self.drawn_otherwise:
            columns |= self._weighed(columns, policy)
        taken_NT = np.zeros_like(columns["old"])
        if objective.kl_in_reward:
            beta = float(objective.settled(state)) if objective.kl_target is not None else objective.beta
            taken_NT = beta * (columns["old"] - columns["reference"]) * mask_NT[:, None]
        if objective.signal == "gae":
            columns["value"] = token_values(policy, columns, params.extra["value"], self._dtype)
            each = [x[:, 0] for x in (taken_NT, columns["value"])]
            found = objective.of_tokens(rewards_NG.reshape(-1), *each, mask_NT)
            columns["advantage"], columns["return"] = (x[:, None].astype(np.float32) for x in found)
            kept = [row[learnt > 0].tolist() for row, learnt in zip(found[0], mask_NT, strict=True)]
        else:
            less_NG = taken_NT.sum(axis=(1, 2)).reshape(rewards_NG.shape)
            columns["advantage"] = objective.of_groups(rewards_NG - less_NG).reshape(-1)
            kept = columns["advantage"].tolist()
        self._kept(writing, rows.with_column("advantage", kept))
        status = rows.column("status")
        told = {"reward": np.nan_to_num(rewards_NG).reshape(-1), "rewarded": ~np.isnan(rewards_NG).reshape(-1)}
        if self.compared:
            told["even"] = np.repeat(even(rewards_NG), self.each)
        told |= {"cut": [s == "length" for s in status], "length": [len(t) for t in rows.tokens()]}
        return {**columns, **{name: np.asarray(x, np.float32) for name, x in told.items()}}

    def _weighed(self, columns: Columns, policy: Model) -> Columns:
        """`sampled`: log-probabilities that the tokens were drawn with; `old`: of the policy as it is now;
        `importance`: how much a token counts."""
        sampled = columns.get("sampled", columns["old"])
        now = learnt_logprobs(policy, columns, dtype=self._dtype) if self.staleness else columns["old"]
        weight = np.minimum(np.exp(now - sampled), self.objective.importance_sampling_cap)
        return {"sampled": sampled, "old": now, "importance": weight.astype(np.float32)}
