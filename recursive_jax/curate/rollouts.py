"""`Rollouts`: batches that the policy itself writes, with the params of the step that reads them.

    ask = rj.Template("{problem}")
    rollouts = Rollouts(model, problems, ask, rewards.exact_match("answer"), objective, max_tokens=64)
    trained = rj.train(model, rollouts, objective, steps=100, batch=64)

The sampler reads the training params in this process: there is nothing to copy and nothing that could be stale. A
batch is a function of (seed, step, params), so that a training that was killed goes on to the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recursive_jax.config import SamplingConfig
from recursive_jax.curate.rewards import score
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Columns
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError, say_once
from recursive_jax.generate.generate import generate, sampling_for
from recursive_jax.generate.reading import failed
from recursive_jax.identity import describe, fingerprint
from recursive_jax.mesh import is_main
from recursive_jax.models.model import Model
from recursive_jax.objectives.policy import PolicyGradient
from recursive_jax.objectives.policy_losses import SIGNALS, advantages
from recursive_jax.train.step import join, split

TEMPERED = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
TEMPERED += ("presence_penalty", "frequency_penalty")


class Rollouts:
    """Batches for a `PolicyGradient`: `batch / num_generations` problems a step, each answered `num_generations` times.

    problems: rows (dicts, or a Dataset) that `template` asks. reward: of the answers, as for `rj.score`. signal, scale:
    as in `with_advantages`. keep: a folder that gets every step's rows, with their rewards and advantages. sampling,
    settings: how answers are drawn, at most `max_tokens` long; from the policy as it is (temperature 1, no truncation),
    since that is what its log-probabilities are of.

    Raises InputError for problems that there are none of, settings that would draw from another distribution, and a
    batch that is no multiple of num_generations."""

    def __init__(
        self,
        model: Model,
        problems: Sequence[Mapping[str, Any]] | Dataset,
        template: Template,
        reward: Any,
        objective: PolicyGradient,
        *,
        num_generations: int = 8,
        length: int | None = None,
        signal: str = "grpo",
        scale: str = "group",
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        keep: Any = None,
        **settings: Any,
    ):
        self.problems = problems if isinstance(problems, Dataset) else Dataset.from_rows(problems)
        if not len(self.problems):
            raise InputError("there are no problems to answer")
        if num_generations < 2:
            raise InputError(f"num_generations={num_generations}: answers are compared, at least 2 are wanted")
        if signal not in SIGNALS:
            raise InputError(f"signal={signal!r}: {', '.join(SIGNALS)} are there")
        self.model, self.template, self.reward, self.objective = model, template, reward, objective
        self.each, self.signal, self.scale, self.keep = num_generations, signal, scale, keep
        self.sampling = sampling_for(dataclasses.replace(model, sampling={}), sampling, settings)
        plain = SamplingConfig()
        odd = [name for name in TEMPERED if getattr(self.sampling, name) != getattr(plain, name)]
        if odd:
            raise InputError(
                f"sampling.{odd[0]}={getattr(self.sampling, odd[0])}: rollouts are drawn from the policy itself "
                "(temperature 1, nothing cut off), or their log-probabilities would be of another distribution"
            )
        self.length = length or model.max_length
        self._frozen = split(model.network, model.params)[1] if model.params is not None else {}
        self.fingerprint = fingerprint(
            [model.fingerprint, self.problems.fingerprint, describe(template), describe(reward), describe(objective)]
            + [num_generations, self.length, signal, scale, describe(self.sampling)]
        )

    @property
    def positions(self) -> int:
        return self.length

    def begin(self, batch: int, seed: int) -> None:
        if batch % self.each:
            raise InputError(f"train.batch={batch} is no multiple of num_generations={self.each}")
        self._count, self._seed = batch // self.each, seed

    def _asked(self, step: int) -> Dataset:
        """The problems of a step, every epoch in an order of its own."""
        N, first = len(self.problems), step * self._count
        places = [divmod(i, N) for i in range(first, first + self._count)]
        orders = {epoch: np.random.default_rng([self._seed, epoch]).permutation(N) for epoch, _ in places}
        return self.problems.take(np.array([orders[epoch][place] for epoch, place in places], np.int64))

    def next(self, step: int, params: Any) -> Columns:
        now = join(self.model.network, params.model, self._frozen)
        policy = self.model.with_params(now, f"{self.model.fingerprint} at step {step}")
        own = hashlib.sha256(json.dumps([self._seed, step]).encode()).digest()
        more = {"template": self.template, "each": self.each, "seed": int.from_bytes(own[:8]) >> 1, "round": step}
        rows = score(generate(policy, self._asked(step), self.sampling, name=f"step-{step}", **more), self.reward)
        known = [None if failed(s) else x for s, x in zip(rows.column("status"), rows.column("score"), strict=True)]
        rewards_NG = np.array([np.nan if x is None else x for x in known], float).reshape(self._count, self.each)
        away_NG = advantages(rewards_NG, self.signal, self.scale)
        rows = rows.with_column("advantage", away_NG.reshape(-1).tolist())
        if self.keep is not None and is_main():
            os.makedirs(self.keep, exist_ok=True)
            rows.write(os.path.join(self.keep, f"rollouts-{step:06d}.parquet"))
        even_N1 = np.array([[len(set(r[~np.isnan(r)])) < 2] for r in rewards_NG], np.float32)
        if even_N1.all():
            say_once("all groups of a step have equal rewards: it teaches nothing (problems too easy, or too hard?)")
        columns = self.objective.pack(rows, self.model, self.length).columns
        found = {"reward": np.nan_to_num(rewards_NG), "rewarded": ~np.isnan(rewards_NG)}
        found["zero_variance"] = np.broadcast_to(even_N1, rewards_NG.shape)
        return {**columns, **{name: x.reshape(-1).astype(np.float32) for name, x in found.items()}}

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        return {"rollouts": steps * batch, "epochs": round(steps * batch / self.each / len(self.problems), 3)}
