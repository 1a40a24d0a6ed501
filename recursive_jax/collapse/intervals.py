"""Error bars and verdicts. A metric is computed on G disjoint groups of equal size, so that its value does not depend
on how much there was to count, and so that the groups tell how far chance alone moves it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from recursive_jax.collapse.metrics import metric

RESAMPLES = 2000
Z95 = 1.959963984540054  # the normal quantile of a 95% interval


@dataclasses.dataclass(frozen=True)
class Measurement:
    """value: mean over `n` groups; ci_lo, ci_hi: its 95% bootstrap interval; null_lo, null_hi: where it would lie, with
    the chosen confidence, if the samples came from the reference (None: no null), within the range that the metric
    has; null: the reference's own value. verdict: `same`, `higher`, `lower`,
    or `untested`. value None: it is not defined, or infinite, and `why` says which."""

    value: float | None
    n: int = 0
    ci_lo: float | None = None
    ci_hi: float | None = None
    null_lo: float | None = None
    null_hi: float | None = None
    null: float | None = None
    verdict: str = "untested"
    why: str = ""

    @property
    def outside(self) -> bool:
        return self.verdict in ("higher", "lower")

    def to_dict(self) -> dict:
        return {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, "") or k == "value"}


def bootstrap(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of independent values; widened by sqrt(n / (n - 1)), since few values resample
    too narrowly."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    index = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    spread = (values[index].mean(1) - values.mean()) * math.sqrt(len(values) / (len(values) - 1))
    low, high = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values.mean() + low), float(values.mean() + high)


def proportion(name: str, successes: int, count: int) -> dict[str, float]:
    """A share of independent cases as metrics: its 95% Wilson interval (1927, doi:10.1080/01621459.1927.10502953), and
    a standard error that is not 0 where all or none succeed (Agresti and Coull 1998, doi:10.2307/2685469): 20 of 20 is
    not certain."""
    if count < 1:
        return {name: math.nan, f"{name}_stderr": math.nan}
    share, z = successes / count, Z95
    middle = (successes + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(successes * (count - successes) / count + z * z / 4)
    error = math.sqrt(middle * (1 - middle) / (count + z * z))
    low, high = max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
    return {name: share, f"{name}_stderr": error, f"{name}_ci_lo": low, f"{name}_ci_hi": high}


def within(name: str, *values: float) -> list[float]:
    """Values cut to the range that the metric has."""
    m = metric(name)
    return [min(m.most, max(m.least, float(v))) for v in values]


def measured(
    values: Sequence[float], null: Sequence[float] = (), confidence: float = 0.99, seed: int = 0, name: str = ""
) -> Measurement:
    """A metric's values on the groups of a sample, beside those on the groups of the reference itself. The band of the
    null is Welch's: the reference's mean, plus and minus the t quantile times the error of a difference of the two
    means. name: of the metric, whose range the bands keep to."""
    values, null = np.asarray(values, np.float64), np.asarray(null, np.float64)
    if not len(values) or np.isnan(values).any() or len({*values[np.isinf(values)]}) > 1:
        return Measurement(None, len(values), why="not a number on every group")
    if np.isinf(values).any():  # rows that are all the same, one type: as far from the null as can be
        end, count = values[np.isinf(values)][0], int(np.isinf(values).sum())
        tested = len(null) and np.isfinite(null).all()
        verdict = ("higher" if end > 0 else "lower") if tested else "untested"
        why = f"{'' if end > 0 else 'minus '}infinity on {count} of {len(values)} groups"
        return Measurement(None, len(values), verdict=verdict, why=why)
    low, high = within(name, *bootstrap(values, seed=seed))
    found = (
        Measurement(float(values.mean()), len(values), low, high)
        if len(values) > 1
        else Measurement(float(values[0]), 1)
    )
    if len(null) < 2 or len(values) < 2 or not np.isfinite(null).all():
        return found
    a, b = values.var(ddof=1) / len(values), null.var(ddof=1) / len(null)
    if a + b == 0:
        band = 0.0
    else:
        freedom = (a + b) ** 2 / (a**2 / (len(values) - 1) + b**2 / (len(null) - 1))
        band = float(student.ppf((1 + confidence) / 2, freedom) * math.sqrt(a + b))
    low, high = null.mean() - band, null.mean() + band
    slack = 1e-9 * max(1.0, abs(null.mean()))
    verdict = "lower" if values.mean() < low - slack else "higher" if values.mean() > high + slack else "same"
    low, high = within(name, low, high)
    return dataclasses.replace(found, null_lo=low, null_hi=high, null=float(null.mean()), verdict=verdict)
