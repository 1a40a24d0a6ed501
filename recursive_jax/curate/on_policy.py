"""Batches that the trained model itself writes, with the params of the step that reads them: what `Rollouts` (rewards)
and `StudentTexts` (a teacher's distributions) share.

The sampler reads the training params in this process: there is nothing to copy and nothing that could be stale. A
batch is a function of (seed, step, params), so that a training that was killed goes on to the same bits."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.config import SamplingConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Columns
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate, sampling_for
from recursive_jax.generate.request import FromTemplate
from recursive_jax.generate.sampling import Rules, apply_rules
from recursive_jax.identity import describe, fingerprint
from recursive_jax.mesh import is_main, local, resolve_dtype, spec
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Objective, Params
from recursive_jax.train.step import join, split

#: Settings that draw from another distribution in a way that no weight of a token puts right: they are refused.
REFUSED = ("repetition_penalty", "presence_penalty", "frequency_penalty", "bad_words", "min_tokens", "guidance")
REFUSED += ("beams", "best_of", "n_best", "regex", "json_schema", "grammar")
#: Those that one does.
DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclasses.dataclass(frozen=True)
class DrawnFrom:
    """Logits `[B, T, V]` as those of the distribution that the settings draw from (`DRAWN`)."""

    sampling: SamplingConfig

    def __call__(self, logits_BTV: jax.Array) -> jax.Array:
        rules = Rules.of([self.sampling])

        def of_rows(logits_BTV):
            flat = logits_BTV.reshape(-1, logits_BTV.shape[-1])
            whole = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(flat), *x.shape[1:])), rules)
            return apply_rules(flat, whole).reshape(logits_BTV.shape)

        return local(of_rows, (spec("batch"),), spec("batch"))(logits_BTV)


class OnPolicy:
    """`Batches` of `num_generations` answers to each problem. A writing serves `steps_per_generation` steps (of as many
    answers as its batches hold together) `num_iterations` times over.

    staleness: 1: the answers of a writing are written while the training learns from those before (on one device, in a
    thread of its own), by the params of one writing ago; every `refresh`-th is not, and a training is saved there.
    length: positions of a row, by default what the longest prompt and `max_tokens` need. keep: a folder that gets every
    writing's rows; in a run it is the training's own by default.

    Subclasses have `written` and `batched`."""

    def __init__(
        self,
        model: Model,
        problems: Sequence[Mapping[str, Any]] | Dataset,
        template: Template,
        objective: Objective,
        *,
        num_generations: int,
        num_iterations: int = 1,
        steps_per_generation: int = 1,
        staleness: int = 0,
        refresh: int = 16,
        length: int | None = None,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        keep: Any = None,
        settings: Mapping[str, Any],
    ):
        self.problems = problems if isinstance(problems, Dataset) else Dataset.from_rows(problems)
        if not len(self.problems):
            raise InputError("there are no problems to answer")
        counts = {"num_generations": num_generations, "num_iterations": num_iterations}
        for name, count in {**counts, "steps_per_generation": steps_per_generation, "refresh": refresh}.items():
            if not isinstance(count, int) or count < 1:
                raise InputError(f"{name}={count!r}: a whole number of at least 1 is wanted")
        if not isinstance(template, Template):
            raise InputError(f"template={template!r}: rj.Template(...) is wanted, which asks the problems")
        if staleness not in (0, 1):
            raise InputError(f"staleness={staleness}: 0 or 1 is wanted, answers are at most one writing old")
        self.model, self.template, self.objective = model, template, objective
        self.each, self.iterations, self.parts = num_generations, num_iterations, steps_per_generation
        self.staleness, self.refresh, self.keep = staleness, refresh, keep
        self.sampling = sampling_for(dataclasses.replace(model, sampling={}), sampling, settings)
        plain = SamplingConfig()
        odd = [name for name in REFUSED if getattr(self.sampling, name) != getattr(plain, name)]
        odd += ["temperature"] if self.sampling.temperature == 0 else []
        if odd:
            raise InputError(
                f"sampling.{odd[0]}={getattr(self.sampling, odd[0])!r}: answers are drawn from the policy (or by "
                f"{', '.join(DRAWN)}, which is put right), or their log-probabilities would be of another distribution"
            )
        self.drawn_otherwise = any(getattr(self.sampling, name) != getattr(plain, name) for name in DRAWN)
        needed = self._longest()
        if length is not None and length < needed:
            raise InputError(f"length={length}: the longest prompt with its answer needs {needed}; leave it out")
        self.length = length or needed
        self._dtype = resolve_dtype(self.sampling.dtype, model.mesh)
        self._pool: ThreadPoolExecutor | None = None
        self._later: tuple[int, Future] | None = None
        self._held: tuple[int, Columns] | None = None

    def _longest(self) -> int:
        """Positions of the longest prompt with an answer behind it: batches are no wider than they must be."""
        if self.sampling.max_tokens is None:
            return self.model.max_length
        return min(self.model.max_length, self._prompts(self.template) + self.sampling.max_tokens - 1)

    def _prompts(self, template: Template) -> int:
        """The longest prompt that a template makes of the problems, in tokens."""
        asked = FromTemplate(self.problems, template, self.model.tokenizer)
        return max(1, *(len(request.prompt) for request in asked(0, len(asked))))

    def bound(self, model: Model) -> OnPolicy:
        """The same for one training of `model`, which is the policy, and by default its own reference."""
        found = copy.copy(self)
        found.model, found._pool, found._later, found._held = model, None, None, None
        return found

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._named())

    def _named(self) -> list[Any]:
        stale = [self.staleness, self.refresh] if self.staleness else []
        parts = [self.model.fingerprint, self.problems.fingerprint, describe(self.template), describe(self.objective)]
        return [*parts, self.each, self.iterations, self.parts, *stale, self.length, describe(self.sampling)]

    @property
    def positions(self) -> int:
        return self.length

    def begin(self, batch: int, seed: int) -> None:
        if batch * self.parts % self.each:
            raise InputError(
                f"train.batch={batch} x steps_per_generation={self.parts} is no multiple of num_generations={self.each}"
            )
        self._batch, self._seed, self._count = batch, seed, batch * self.parts // self.each
        self._later = self._held = None

    @property
    def _steps(self) -> int:
        """That one writing serves."""
        return self.parts * self.iterations

    def resumable(self, step: int) -> bool:
        """Whether a training can go on to the same bits after `step` steps: where its next one writes anew."""
        writing, within = divmod(step, self._steps)
        return not within and not (self.staleness and writing % self.refresh)

    def next(self, step: int, params: Params, state: Any = None) -> Columns:
        writing, within = divmod(step, self._steps)
        if self._held is None or self._held[0] != writing:
            if within:
                raise InputError(f"step {step} is in the middle of writing {writing}: a training goes on at its begin")
            written = self._written(writing, params)
            self._held = writing, self.batched(writing, written, self._policy(params, step), params, state)
        columns = self._held[1]
        if self._steps == 1:
            return columns
        round, part = divmod(within, self.parts)
        first = {"first": np.full(self._batch, float(round == 0), np.float32)}
        order = self._random(writing, "order", round).permutation(self._batch * self.parts)
        taken = np.sort(order[part * self._batch : (part + 1) * self._batch])
        return {**{name: column[taken] for name, column in columns.items()}, **first}

    def batched(self, writing: int, written: Any, policy: Model, params: Params, state: Any) -> Columns:
        """The batch of a writing from what `written` gave; policy, params, state: of this step."""
        raise NotImplementedError

    def written(self, writing: int, policy: Model) -> Any:
        """What the policy writes, and all that is asked of no other."""
        raise NotImplementedError

    def answers(self, writing: int, policy: Model, problems: Dataset, attempt: int = 0) -> Dataset:
        """A row for each of `each` answers to each problem."""
        own = self._random(writing, "answers", attempt).integers(2**62)
        name = f"step-{writing}" + (f"-{attempt}" if attempt else "")
        more = {"template": self.template, "each": self.each, "seed": int(own), "round": writing, "name": name}
        return generate(policy, problems, self.sampling, **more)

    def _written(self, writing: int, params: Params) -> Any:
        if self._later is not None and self._later[0] == writing:
            found = self._later[1].result()
        else:
            found = self.written(writing, self._policy(params, writing * self._steps))
        self._later = None
        if self.staleness and (writing + 1) % self.refresh:
            copied = dataclasses.replace(params, model=jax.tree.map(jnp.copy, params.model))
            still = self._policy(copied, writing * self._steps)
            self._later = writing + 1, self._begun(writing + 1, still)
        return found

    def _begun(self, writing: int, policy: Model) -> Future:
        """A writing on its way: in a thread where there is one device; on several at once, since two programs whose
        devices wait for one another must not be mixed."""
        if self.model.mesh is not None and self.model.mesh.size == 1:
            self._pool = self._pool or ThreadPoolExecutor(1)
            return self._pool.submit(self.written, writing, policy)
        done: Future = Future()
        done.set_result(self.written(writing, policy))
        return done

    def close(self) -> None:
        """Waits for what is being written."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = self._later = None

    def _policy(self, params: Params, step: int) -> Model:
        frozen = split(self.model.network, self.model.params)[1] if self.model.params is not None else {}
        now = join(self.model.network, params.model, frozen)
        return self.model.with_params(now, f"{self.model.fingerprint} at step {step}")

    def _random(self, writing: int, what: str, number: int) -> np.random.Generator:
        named = hashlib.sha256(json.dumps([self._seed, writing, what, number]).encode()).digest()
        return np.random.default_rng(int.from_bytes(named[:16]))

    def _asked(self, writing: int) -> Dataset:
        return self.problems.take(self._places(writing))

    def _places(self, writing: int) -> np.ndarray:
        """The problems of a writing, every epoch in an order of its own."""
        N, first = len(self.problems), writing * self._count
        places = [divmod(i, N) for i in range(first, first + self._count)]
        orders = {epoch: np.random.default_rng([self._seed, epoch]).permutation(N) for epoch, _ in places}
        return np.array([orders[epoch][place] for epoch, place in places], np.int64)

    def _kept(self, writing: int, rows: Dataset) -> None:
        if self.keep is not None and is_main():
            os.makedirs(self.keep, exist_ok=True)
            rows.write(os.path.join(self.keep, f"rollouts-{writing:06d}.parquet"))

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        rows = -(-steps // self._steps) * batch * self.parts
        return {"rollouts": rows, "epochs": round(rows / self.each / len(self.problems), 3)}
