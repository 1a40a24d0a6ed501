"""A transformer on the embedded language, trained and sampled by the package's own verbs: the laboratory's family that
is not a formula. For experiments that must survive a kill, on any corpus, there is `recursive-jax run`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from recursive_jax.collapse.exact import exact_kl, right_rows, validity
from recursive_jax.collapse.lab.chain import Family
from recursive_jax.collapse.likelihood import token_losses
from recursive_jax.config import LanguageConfig, ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.language import Language
from recursive_jax.data.tokenizers import LanguageTokenizer
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import unconditional
from recursive_jax.models.model import Model, transformer
from recursive_jax.train.loop import train

HELD_OUT = 256  # rows of the truth that a measurement looks at
NOTHING = -1  # in a row after its end


@dataclasses.dataclass(frozen=True)
class TransformerFamily(Family):
    """A row is a document of the embedded language, cut at `context` tokens; data: int32 `[N, context]`, -1 after its
    end. params: a `Model`, or None for the language itself. Every round trains fresh params for `steps` steps.

    temperature, truncation (top-p): of sampling. A verifier holds for right what the grammar and its facts allow.
    """

    layers: int = 2
    width: int = 64
    heads: int = 2
    context: int = 64
    steps: int = 300
    batch: int = 32
    learning_rate: float = 4e-3
    temperature: float = 1.0
    truncation: float = 0.0

    name = "transformer"
    traced = False

    def truth(self) -> None:
        return None

    def sample(self, params: Model | None, key: jax.Array, most: int, count: int, context: Any):
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        if params is None:
            rows = _language().sample(seed, 0, count)
        else:
            top_p = self.truncation or 1.0
            sampling = SamplingConfig(temperature=self.temperature, top_p=top_p, max_tokens=self.context, batch=256)
            rows = generate(params, unconditional(count), sampling, seed=seed).tokens()
        data = np.full((most, self.context), NOTHING, np.int32)
        for n, row in enumerate(rows):
            data[n, : len(row)] = row[: self.context]
        return data, (np.arange(most) < count).astype(np.float32)

    def right(self, data: np.ndarray) -> np.ndarray:
        return right_rows(_language(), _rows(data))

    def fit(self, data, weight_N, previous, context, key) -> Model:
        weight_N = np.asarray(weight_N)
        kept = np.flatnonzero(weight_N > 0)
        rows = [row for row in _rows(np.asarray(data)[kept])]
        dataset = real_rows(rows, [""] * len(rows))
        if len(np.unique(weight_N[kept])) > 1:
            dataset = dataset.with_column("weight", weight_N[kept])
        config = TrainConfig(steps=self.steps, batch=self.batch, learning_rate=self.learning_rate, tensorboard=False)
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        return train(self._blank(), dataset, config=config, seed=seed, quiet=True).model

    def _blank(self) -> Model:
        config = ModelConfig(layers=self.layers, d_model=self.width, heads=self.heads, max_length=self.context)
        return transformer(config, LanguageTokenizer(_language()))

    def log_prob(self, params: Model | None, data) -> np.ndarray:
        """Nats per row."""
        rows = _rows(np.asarray(data))
        if params is None:
            language = _language()
            states, _ = language.parse(np.where(data < 0, 0, data))
            with np.errstate(divide="ignore"):
                found = [np.log(language.P_AV[s[: len(r)], r]).sum() for s, r in zip(states, rows, strict=True)]
            return np.array(found)
        return np.array([-x.sum() for x in token_losses(params, rows)])

    def measure(self, params: Model | None, context) -> dict[str, float]:
        """Per token, nats: `kl` to the truth and its parts; `valid`: share of right sentences among as many samples."""
        if params is None:
            parts = dict.fromkeys(("kl", "kl_syn", "kl_sem", "kl_fact", "kl_dist"), 0.0)
            return parts | {"knowledge": 1.0, "valid": 1.0}
        truth, _ = self.sample(None, jax.random.key(0), HELD_OUT, HELD_OUT, ())
        written, _ = self.sample(params, jax.random.key(1), HELD_OUT, HELD_OUT, ())
        found = exact_kl(params, _language(), _rows(truth))
        names = {"kl": "kl_total"} | {k: k for k in ("kl_syn", "kl_sem", "kl_fact", "kl_dist", "knowledge")}
        return {k: found[v] for k, v in names.items()} | {"valid": validity(_language(), _rows(written))["valid"]}


@functools.cache
def _language() -> Language:
    return Language(LanguageConfig())


def _rows(data: np.ndarray) -> list[np.ndarray]:
    return [row[row != NOTHING] for row in np.asarray(data)]
