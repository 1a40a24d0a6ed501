"""The metric suite: what a group of samples is asked, for texts (token ids), for vectors, and for log-probabilities.

Each metric is a function of a group of generated rows and of the real rows it is compared with. One that is not defined
for what it is given raises InputError."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recursive_jax.collapse import divergence, embeddings
from recursive_jax.collapse.diversity import distinct, miller_madow, repetition
from recursive_jax.collapse.mauve import mauve
from recursive_jax.collapse.metrics import metric
from recursive_jax.collapse.selfbleu import bleu, dense_ngrams, precisions
from recursive_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Measured:
    """A metric of the table and the function that computes it from a group of rows and the real ones."""

    name: str
    of: Callable[[Any, Any], float]

    @property
    def loss(self) -> str:
        return metric(self.name).loss

    @property
    def title(self) -> str:
        return metric(self.name).title


class Counts:
    """The n-grams of rows of token ids, counted once for all metrics."""

    def __init__(self, rows: Sequence[np.ndarray], vocab: int):
        self.rows, self.vocab = rows, vocab
        self.codes = {n: ids for n, ids, _ in dense_ngrams(rows, 4)}
        tokens = np.concatenate(rows) if len(rows) else np.empty(0, np.int64)
        self.types_V = np.bincount(tokens, minlength=vocab)

    def self_bleu(self, longest: int) -> float:
        """Mean over rows, exact against all others of the group."""
        return float(bleu(*self._precisions, longest).mean())

    @functools.cached_property
    def _precisions(self) -> tuple[np.ndarray, np.ndarray]:
        return precisions(self.rows, 4)

    @property
    def present(self) -> np.ndarray:
        return self.types_V[self.types_V > 0]


def _lost(group: Counts, real: Counts) -> float:
    """Share of the real tokens whose type the group does not have."""
    if real.types_V.sum() == 0:
        raise InputError("the real rows hold no token")
    return float(real.types_V[group.types_V == 0].sum() / real.types_V.sum())


def _rank_drift(group: Counts, real: Counts) -> float:
    """Mean over the ten frequency deciles of the real types of |log share in the group - log share in the real
    rows|."""
    order = np.argsort(-real.types_V, kind="stable")[: int((real.types_V > 0).sum())]
    parts = [p for p in np.array_split(order, 10) if len(p)]
    share = lambda c: np.array([c.types_V[p].sum() + 0.5 for p in parts]) / (c.types_V.sum() + 0.5 * len(parts))
    return float(np.abs(np.log(share(group) / share(real))).mean())


TEXT: tuple[Measured, ...] = (
    Measured("entropy_1gram_mm", lambda g, r: miller_madow(g.codes[1])),
    Measured("entropy_2gram_mm", lambda g, r: miller_madow(g.codes[2])),
    *(Measured(f"distinct_{n}", lambda g, r, n=n: distinct(g.codes[n])) for n in (1, 2, 3, 4)),
    *(Measured(f"self_bleu_{n}", lambda g, r, n=n: g.self_bleu(n)) for n in (2, 3, 4)),
    Measured("repetition_2", lambda g, r: repetition(g.rows, 2, g.vocab)),
    Measured("zipf_mle", lambda g, r: divergence.zipf_exponent(g.present)),
    Measured("types_alive", lambda g, r: float(len(g.present))),
    Measured("good_turing", lambda g, r: divergence.good_turing(g.present)),
    Measured("tail_mass_lost", _lost),
    Measured("decile_drift", _rank_drift),
    Measured("kl_1gram", lambda g, r: divergence.kl(r.types_V, g.types_V)),
    Measured("js_1gram", lambda g, r: divergence.jensen_shannon(r.types_V, g.types_V)),
    Measured("tv_1gram", lambda g, r: divergence.total_variation(r.types_V, g.types_V)),
    Measured("length_mean", lambda g, r: float(np.mean([len(x) for x in g.rows]))),
)


def _drift(generated: np.ndarray, real: np.ndarray) -> float:
    spread = np.sqrt(real.var(0).sum())
    if spread == 0:
        raise InputError("real rows are all the same: a drift in units of their spread is not defined")
    return float(np.linalg.norm(generated.mean(0) - real.mean(0)) / spread)


def _cover(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda g, r: embeddings.coverage(g, r)[name]


VECTORS: tuple[Measured, ...] = (
    Measured("variance_ratio", embeddings.variance_ratio),
    Measured("logdet_diff", embeddings.log_det_difference),
    Measured("frechet", embeddings.frechet),
    Measured("kid", embeddings.kernel_distance),
    Measured("wasserstein_sliced", divergence.sliced_wasserstein),
    *(
        Measured(f"vendi_{name}", lambda g, r, q=q: embeddings.vendi(g, q))
        for name, q in (("0.5", 0.5), ("1", 1.0), ("2", 2.0), ("inf", np.inf))
    ),
    Measured("mean_cosine", lambda g, r: embeddings.mean_cosine(g)),
    Measured("neighbour_entropy", lambda g, r: embeddings.neighbour_entropy(g)),
    *(Measured(name, _cover(name)) for name in ("precision", "recall", "density", "coverage")),
    Measured("mauve", mauve),
    Measured("representation_drift", _drift),
)
