"""A whole run in under a second, for the tests that damage it: data, training, generation, selection, evaluation, and
what it ends with as bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recursive_jax import storage
from recursive_jax.config import LanguageConfig, ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.curate.select import Rule
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.language import Language
from recursive_jax.generate.request import Unconditional
from recursive_jax.models.model import Model, transformer
from recursive_jax.rounds.run import Run

TRAIN = TrainConfig(batch=8, checkpoint_every=2, log_every=1, tensorboard=False)
SAMPLING = SamplingConfig(batch=8, max_tokens=6, chunk=4)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """Real rows of a language."""

    language: LanguageConfig
    count: int

    def __call__(self):
        rows = Language(self.language).sample(0, 0, self.count)
        return real_rows(rows, [f"row {i}" for i in range(self.count)])


def longer(data: Any) -> list[bool]:
    return [len(tokens) > 2 for tokens in data.tokens()]


def mean_length(data: Any) -> dict[str, Any]:
    return {"length": float(np.mean([len(t) for t in data.tokens()]))}


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """seed: another run's differs. steps, rows: how much it makes. student: whether a second model is trained."""

    tokenizer: Any
    mesh: Any
    seed: int = 0
    steps: int = 6
    rows: int = 24
    student: bool = True

    def model(self) -> Model:
        config = ModelConfig(layers=1, d_model=16, heads=2, max_length=32)
        return transformer(config, self.tokenizer, self.mesh)

    def __call__(self, path: Path, until: str = "evaluation") -> dict[str, str]:
        """Runs, or goes on with, the run in `path` up to a result; the checksum of every result by name."""
        with Run(path, {"what": "small"}, seed=self.seed, quiet=True) as run:
            first, train = run.round(0), TRAIN.model_copy(update={"steps": self.steps})
            data = first.dataset("data", Grammar(self.tokenizer.language.config, 40))
            found = {"data": _rows(data.value)}
            if until == "data":
                return found
            model = first.train("model", self.model(), data, train)
            run.name_model("model", first, "model", default=True)
            found["model"] = _params(model)
            if until == "model":
                return found
            rows = first.generate("rows", model, Unconditional(), SAMPLING, count=self.rows)
            found["rows"] = _rows(rows.value)
            kept = first.select("kept", rows, Rule("longer", longer))
            found["kept"] = _rows(kept.value)
            if self.student:
                model = run.round(1).train("student", self.model(), kept, train)
                found["student"] = _params(model)
            metrics = run.round(1).evaluate("evaluation", model, mean_length, kept)
            found["metrics"] = storage.checksum(repr(sorted(metrics.items())).encode())
            return found


def _rows(data: Any) -> str:
    return storage.checksum(repr(data.table.to_pylist()).encode())


def _params(model: Model) -> str:
    return storage.checksum(*(np.asarray(x).tobytes() for x in jax.tree.leaves(model.params)))
