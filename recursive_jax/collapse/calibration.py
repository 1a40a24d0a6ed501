"""Whether a model is as often right as it is sure."""

from __future__ import annotations

import numpy as np

from recursive_jax.errors import InputError


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> dict[str, float]:
    """confidence: probability given to the answer, in [0, 1]; correct: whether it was right.

    `ece`: mean over equal bins of |accuracy - confidence|, weighted by rows (arXiv:1706.04599); `ece_null`: what a
    perfectly calibrated model would show with as many rows, from the mean absolute error of a binomial share, sqrt(2 c
    (1 - c) / pi n); `brier`: mean squared error; `confident_wrong`: share of rows wrong with more than 0.9."""
    confidence, correct = np.asarray(confidence, np.float64).ravel(), np.asarray(correct, np.float64).ravel()
    if len(confidence) != len(correct) or not len(correct):
        raise InputError(
            f"{len(confidence)} confidences and {len(correct)} answers: as many are wanted, and at least one"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise InputError("confidences are probabilities between 0 and 1")
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    some = count > 0
    sure = np.bincount(index, confidence, bins)[some] / count[some]
    right = np.bincount(index, correct, bins)[some] / count[some]
    share = count[some] / len(correct)
    return {
        "ece": float(share @ np.abs(sure - right)),
        "ece_null": float(share @ np.sqrt(2 * sure * (1 - sure) / (np.pi * count[some]))),
        "brier": float(((confidence - correct) ** 2).mean()),
        "confident_wrong": float(((confidence > 0.9) & (correct == 0)).mean()),
    }
