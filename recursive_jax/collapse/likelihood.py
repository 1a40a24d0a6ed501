"""Likelihoods: cross-entropy of real rows, and how probable generated rows look to another model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.data.packing import Example
from recursive_jax.errors import InputError
from recursive_jax.generate.score import token_logprobs
from recursive_jax.models.model import Model

QUANTILES = (1, 5, 25, 50, 75, 95, 99)
LOGITS = 2**25  # values of logits held at once (128 MiB)


def rows_per_batch(model: Model, count: int, length: int | None = None) -> int:
    """A power of two that keeps the logits small and is not much more than there is to do; the mesh divides it."""
    fits = max(1, LOGITS // ((length or model.max_length) * model.vocab))
    size = min(1 << (fits.bit_length() - 1), 1 << max(0, (count - 1).bit_length()), 128)
    return size + (-size % meshes.batch_divisor(model.mesh))


def rows_to_batch(rows: Sequence[np.ndarray], model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Rows without start token -> tokens `[N, T + 1]`, T at most the context (start token first) and segments (1 real,
    0 padding)."""
    rows = [np.concatenate([[model.tokenizer.bos], r]) for r in rows]
    longest = max([2, *(len(r) - 1 for r in rows)])
    # Few widths, so that few programs are compiled, and none much wider than the rows.
    width = max(256, 1 << (longest - 1).bit_length()) if model.max_length <= 1024 else -(-longest // 64) * 64
    T = min(model.max_length, width)
    tokens = np.zeros((len(rows), T + 1), np.int32)
    segments = np.zeros((len(rows), T + 1), np.int32)
    for n, row in enumerate(rows):
        row = row[: T + 1]
        tokens[n, : len(row)] = row
        segments[n, : len(row)] = 1
    return tokens, segments


def token_losses(model: Model, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """-log p of every token given those before it in its row (float32, nats); one array per row.

    Raises InputError for ids the model does not have.
    """
    return [-found for found in token_logprobs(model, rows)]


def example_losses(model: Model, examples: Sequence[Example]) -> list[np.ndarray]:
    """-log p of the tokens that count in each example (float32, nats); examples are read as they stand, without a start
    token put before them, and cut at the context."""
    prompts = [int(np.argmax(e.loss)) for e in examples]
    found = token_logprobs(model, [e.tokens for e in examples], opened=True, given=prompts)
    return [-f[e.loss[1 : len(f) + 1]] for f, e in zip(found, examples, strict=True)]


def cross_entropy(losses: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean loss per token (nats) and its standard error, rows taken as the independent units."""
    sums = np.array([x.sum(dtype=np.float64) for x in losses])
    counts = np.array([len(x) for x in losses], np.float64)
    total = counts.sum()
    if total == 0:
        raise InputError("there are no tokens to score")
    mean = sums.sum() / total
    residual = sums - mean * counts  # delta method for a ratio of sums
    stderr = np.sqrt((residual**2).sum()) / total if len(sums) > 1 else float("nan")
    return float(mean), float(stderr)


def row_perplexities(losses: Sequence[np.ndarray]) -> np.ndarray:
    """exp(mean loss) of each non-empty row."""
    return np.exp(np.array([x.mean(dtype=np.float64) for x in losses if len(x)]))


#: Log-perplexity, from certainty to 1.2 million; the same for every model, so that histograms of all runs compare.
HISTOGRAM_EDGES = np.linspace(0.0, 14.0, 281)


def histogram(perplexities: np.ndarray) -> list[float]:
    """Shares of rows per bin of `HISTOGRAM_EDGES`; the last bin takes what lies beyond."""
    counts, _ = np.histogram(np.clip(np.log(perplexities), 0.0, HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)
    return (counts / max(1, counts.sum())).round(6).tolist()


def merged_bins(
    histograms: Sequence[Sequence[float]], edges: Sequence[float], bins: int = 40
) -> tuple[np.ndarray, np.ndarray]:
    """(histograms `[N, bins]`, edges) cut to the bins that any of them uses, neighbours merged until there are at most
    `bins`: what a figure shows."""
    shares, edges = np.asarray(histograms, np.float64), np.asarray(edges)
    used = np.flatnonzero(shares.sum(0))
    first, last = max(0, used[0] - 1), min(shares.shape[1], used[-1] + 2)
    width = -(-(last - first) // bins)
    starts = np.arange(first, last, width)
    return np.add.reduceat(shares[:, :last], starts, axis=1), edges[np.append(starts, last)]
