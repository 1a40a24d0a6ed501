"""The exponent with which more data helps, round by round: whether recursion changed the scaling law
(arXiv:2402.07043)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.stats import t as student

from recursive_jax.collapse.intervals import Measurement
from recursive_jax.errors import InputError


def scaling_exponents(sizes: Any, risks: Any, confidence: float = 0.99) -> list[Measurement]:
    """a in risk ~ size^-a, by least squares on logarithms, of rounds 1 .. K beside round 0.

    sizes: `[S]` amounts of data, three at least. risks: `[K + 1, S]` or with replicates `[K + 1, S, R]`, round 0 first;
    what is above its floor (a KL, an excess risk, a cross-entropy less the entropy), so positive. The interval is the
    line's (95%); the band of the null is that of a difference from round 0's exponent.

    Raises InputError for fewer sizes, other shapes, and risks that are not positive numbers.
    """
    sizes, risks = np.asarray(sizes, np.float64), np.asarray(risks, np.float64)
    if sizes.ndim != 1 or len(np.unique(sizes)) < 3 or np.any(sizes <= 0):
        raise InputError(f"scaling: at least three different sizes are wanted, there are {sizes.tolist()}")
    if risks.ndim == 2:
        risks = risks[..., None]
    if risks.ndim != 3 or risks.shape[1] != len(sizes) or len(risks) < 2:
        raise InputError(f"scaling: risks [rounds + 1, {len(sizes)} sizes] are wanted, there is shape {risks.shape}")
    if not (np.isfinite(risks).all() and (risks > 0).all()):
        raise InputError("scaling: risks are positive numbers: what is above the floor, such as a KL or an excess risk")
    x = np.repeat(np.log(sizes), risks.shape[2])
    freedom = len(x) - 2
    lines = [_line(x, np.log(r).reshape(-1)) for r in risks]
    (first, first_error), found = lines[0], []
    for value, error in lines[1:]:
        half = float(student.ppf(0.975, freedom)) * error
        band = float(student.ppf((1 + confidence) / 2, 2 * freedom)) * math.hypot(error, first_error)
        here = Measurement(value, len(x), value - half, value + half, first - band, first + band)
        verdict = "lower" if value < here.null_lo else "higher" if value > here.null_hi else "same"
        found.append(dataclasses.replace(here, verdict=verdict))
    return found


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(-slope, its standard error)."""
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    return -slope, float(np.sqrt(residual @ residual / (len(x) - 2) / (x @ x)))
