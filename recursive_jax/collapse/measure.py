"""`measure`: everything one round's model is asked, under the names of the result schema."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from recursive_jax.collapse.diversity import sample_statistics
from recursive_jax.collapse.exact import Judged, bound_kl, exact_kl, judge, oracle_kl, validity
from recursive_jax.collapse.likelihood import (
    HISTOGRAM_EDGES,
    QUANTILES,
    cross_entropy,
    histogram,
    row_perplexities,
    token_losses,
)
from recursive_jax.collapse.tails import tail_lost, token_frequencies
from recursive_jax.config import EvaluateConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.sources import World
from recursive_jax.generate.hidden_score import denoising, pseudo_logprobs
from recursive_jax.generate.score import token_entropies
from recursive_jax.models.model import Model

#: Goes up when what is measured changes: stored evaluations are made again.
FORM = 3
PSEUDO = 32  # held-out rows whose tokens are hidden one by one


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What every round is measured with, fixed once: held-out real rows, the truth's token frequencies, the round-0
    model with what it said of those rows."""

    held_out: list[np.ndarray]
    truth_V: np.ndarray
    reference: Model
    world: World
    reference_losses: list[np.ndarray]
    reference_judged: Judged | None

    @classmethod
    def of(cls, world: World, reference: Model, config: EvaluateConfig) -> Yardstick:
        held_out = world.held_out.tokens()[: config.rows]
        truth = (
            world.language.marginals_V if world.language else token_frequencies(world.train.tokens(), reference.vocab)
        )
        losses = token_losses(reference, held_out)
        exact = world.language is not None and denoising(reference) is None
        judged = judge(reference, world.language, held_out) if exact else None
        return cls(held_out, truth, reference, world, losses, judged)


def measure(
    model: Model, samples: Dataset, yardstick: Yardstick, config: EvaluateConfig, training: Dataset | None = None
) -> dict[str, Any]:
    """Metrics of `model` and of `samples` drawn from it; training: what it was trained on, for what sampling alone
    loses. Nats unless the name says otherwise; floats, or lists for the histogram (`ppl_hist_under_gen0`, bins in
    `ppl_hist_edges`, log-perplexity) and the deciles."""
    losses = token_losses(model, yardstick.held_out)
    ce, ce_stderr = cross_entropy(losses)
    metrics: dict[str, Any] = {"ce_real": ce, "ce_real_stderr": ce_stderr, "ppl_real": float(np.exp(ce))}
    # The same rows under the round-0 model: the error of the difference, row by row, is much smaller.
    paired = [a - b for a, b in zip(losses, yardstick.reference_losses, strict=True)]
    metrics["ce_real_change_stderr"] = cross_entropy(paired)[1]
    rows = [r for r in samples.tokens() if len(r)]
    under_base = token_losses(yardstick.reference, rows)
    ppl = row_perplexities(under_base)
    metrics["ce_gen"] = cross_entropy(under_base)[0]
    metrics["ppl_gen"] = float(np.exp(metrics["ce_gen"]))
    metrics.update({f"ppl_under_gen0_q{q:02d}": float(np.percentile(ppl, q)) for q in QUANTILES})
    metrics["ppl_hist_under_gen0"] = histogram(ppl)
    metrics["ppl_hist_edges"] = HISTOGRAM_EDGES.round(6).tolist()
    metrics.update(sample_statistics(rows, model.vocab, config.token_budget))
    metrics.update(tail_lost(rows, yardstick.truth_V, config.token_budget))
    metrics["stopped_share"] = float(np.mean([s == "ok" for s in samples.column("status")]))
    language, fills = yardstick.world.language, denoising(model) is not None
    if fills:
        some = yardstick.held_out[:PSEUDO]
        metrics["ppl_pseudo"] = float(np.exp(-np.concatenate(list(pseudo_logprobs(model, some))).mean()))
    if language is None and not fills:
        entropies = np.concatenate(list(token_entropies(model, yardstick.held_out)))
        metrics["anchor_entropy"] = float(entropies.mean())
    if language is not None:
        if fills:
            metrics.update(bound_kl(language, yardstick.held_out, losses, yardstick.reference_losses))
        else:
            metrics.update(exact_kl(model, language, yardstick.held_out, yardstick.reference_judged))
        if not any(len(p) > 1 for p in samples.prompts()):  # a continuation begins in the middle of a sentence
            metrics.update(validity(language, rows, (len(samples), model.max_length)))
        if training is not None:
            metrics.update(oracle_kl(language, [r for r in training.tokens() if len(r)]))
    return metrics
