"""`StudentTexts`: a student's own answers as it learns, for objectives that follow a teacher's distributions.

texts = StudentTexts(student, problems, ask, Distill(teacher, beta=1.0), lmbda=1.0, max_tokens=64)
trained = rj.train(student, texts, Distill(teacher, beta=1.0), steps=100, batch=16)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recursive_jax.config import SamplingConfig
from recursive_jax.curate.on_policy import OnPolicy
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Columns
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.generate.request import FromTemplate
from recursive_jax.identity import describe
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Objective, Params
from recursive_jax.objectives.distillation import SelfDistill


class StudentTexts(OnPolicy):
    """Batches for `Distill` (GKD, arXiv:2306.13649) and `SelfDistill` (SDFT, arXiv:2601.19897).

    problems: rows that `template` asks. lmbda: the share of writings that the student writes; of the others the answers
    are the problems' own, in the column `completion` (a text; the end token comes behind it). shown: what the model
    reads as its own teacher, a template over the same rows (with the demonstration in it). num_iterations,
    steps_per_generation, staleness, refresh, keep: see `OnPolicy`; sampling, settings: how answers are drawn.

    Raises InputError as `OnPolicy`, and for problems without the column that is wanted."""

    def __init__(
        self,
        model: Model,
        problems: Sequence[Mapping[str, Any]] | Dataset,
        template: Template,
        objective: Objective,
        *,
        lmbda: float = 1.0,
        completion: str = "answer",
        shown: Template | None = None,
        num_generations: int = 1,
        num_iterations: int = 1,
        steps_per_generation: int = 1,
        staleness: int = 0,
        refresh: int = 16,
        length: int | None = None,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        keep: Any = None,
        **settings: Any,
    ):
        if not 0.0 <= lmbda <= 1.0:
            raise InputError(f"lmbda={lmbda}: the share of the student's own texts is between 0 and 1")
        self.lmbda, self.completion, self.shown = lmbda, completion, shown
        if isinstance(objective, SelfDistill) and shown is None:
            raise InputError("SelfDistill: shown= is wanted, the template that its teacher reads")
        super().__init__(
            model, problems, template, objective, num_generations=num_generations, num_iterations=num_iterations,
            steps_per_generation=steps_per_generation, staleness=staleness, refresh=refresh, length=length,
            sampling=sampling, keep=keep, settings=settings,
        )  # fmt: skip
        if lmbda < 1.0 and not self.problems.has(completion):
            raise InputError(
                f"lmbda={lmbda}: the other texts are the problems' column {completion!r}, and there is none"
            )

    def _longest(self) -> int:
        """What the teacher's prompts and the given answers need, too."""
        found = super()._longest()
        if self.sampling.max_tokens is None:
            return found
        most = [] if self.shown is None else [self._prompts(self.shown) + self.sampling.max_tokens - 1]
        if self.lmbda < 1.0 and self.problems.has(self.completion):
            sizes = [len(r["prompt"]) + len(r["tokens"]) - 1 for r in self._given(self.problems)]
            most.append(max(sizes))
        return min(self.model.max_length, max([found, *most]))

    def _named(self) -> list[Any]:
        return [*super()._named(), self.lmbda, self.completion, describe(self.shown)]

    def written(self, writing: int, policy: Model) -> Dataset:
        asked = self._asked(writing)
        own = self._random(writing, "share", 0).random() < self.lmbda
        rows = self.answers(writing, policy, asked) if own else Dataset.from_rows(self._given(asked))
        if self.shown is None:
            return rows
        requests = FromTemplate(asked, self.shown, self.model.tokenizer, self.each)
        return rows.with_column("teacher_prompt", [r.prompt.tolist() for r in requests(0, len(requests))])

    def _given(self, asked: Dataset) -> list[dict[str, Any]]:
        """The problems' own answers as rows."""
        tokenizer, requests = self.model.tokenizer, FromTemplate(asked, self.template, self.model.tokenizer, self.each)
        answers = np.repeat(np.array(asked.column(self.completion), object), self.each)
        rows = []
        for n, (request, text) in enumerate(zip(requests(0, len(requests)), answers, strict=True)):
            if text is None:
                raise InputError(f"problem {n // self.each} has nothing in {self.completion!r}: a text is wanted")
            tokens = [*map(int, tokenizer.encode(str(text))), tokenizer.eos]
            rows.append({"id": f"given/{n}", "parents": list(request.parents), "prompt": request.prompt.tolist(),
                         "tokens": tokens, "text": str(text), "status": "ok"})  # fmt: skip
        return rows

    def batched(self, writing: int, written: Dataset, policy: Model, params: Params, state: Any) -> Columns:
        self._kept(writing, written)
        return self.objective.unpacked(written, self.model, self.length)
