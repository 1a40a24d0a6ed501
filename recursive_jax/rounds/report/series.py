"""From the metrics records of a run to the numbers a page shows: means over replicates, errors, changes, verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from recursive_jax.collapse.intervals import Measurement, within
from recursive_jax.rounds.report.charts import Series

NOISE = 4.0  # standard errors a change must exceed before it is called one


@dataclasses.dataclass(frozen=True)
class Arm:
    """One regime: per round the records of its replicates; round 0 is the shared teacher."""

    name: str
    colour: int
    rounds: dict[int, list[dict[str, Any]]]

    def values(self, metric: str, number: int) -> list[float]:
        return [m[metric] for m in self.rounds.get(number, []) if isinstance(m.get(metric), (int, float))]

    def numbers(self, metric: str) -> list[int]:
        return [k for k in sorted(self.rounds) if self.values(metric, k)]

    def mean(self, metric: str, number: int) -> float:
        return float(np.mean(self.values(metric, number)))

    def stderr(self, metric: str, number: int) -> float:
        """Over replicates where there are several, else the evaluation's own standard error, else NaN."""
        values = self.values(metric, number)
        if len(values) > 1:
            return float(np.std(values, ddof=1) / math.sqrt(len(values)))
        own = self.values(f"{metric}_stderr", number)
        return own[0] if own else math.nan

    def series(self, metric: str) -> Series:
        ks = self.numbers(metric)
        means = [self.mean(metric, k) for k in ks]
        errors = [self.stderr(metric, k) for k in ks]
        known = bool(errors) and all(math.isfinite(e) for e in errors[1:] or errors)
        spread = [0.0 if not math.isfinite(e) else e for e in errors]
        low = within(metric, *(m - e for m, e in zip(means, spread, strict=True))) if known else None
        high = within(metric, *(m + e for m, e in zip(means, spread, strict=True))) if known else None
        tips = [
            f"{self.name}, round {k}: {m:.4g}" + (f" ± {e:.2g}" if math.isfinite(e) else "")
            for k, m, e in zip(ks, means, errors, strict=True)
        ]
        return Series(self.name, self.colour, ks, means, low, high, tips)

    def profiled(self, metric: str, measured: Sequence[Measurement]) -> Series | None:
        """The same from the groups of a profile, round 0 as their null: with the 95% intervals of the groups."""
        points = [(k, m) for k, m in enumerate(measured, start=1) if m.value is not None]
        if not points:
            return None
        ks, ys = [k for k, _ in points], [m.value for _, m in points]
        low, high = ([getattr(m, end) for _, m in points] for end in ("ci_lo", "ci_hi"))
        tips = [
            f"{self.name}, round {k}: {m.value:.4g} [{a:.4g}, {b:.4g}]"
            for (k, m), a, b in zip(points, low, high, strict=True)
        ]
        null = measured[0].null
        if null is not None:
            ks, ys, low, high = [0, *ks], [null, *ys], [null, *low], [null, *high]
            tips = [f"round 0: {null:.4g}", *tips]
        return Series(self.name, self.colour, ks, ys, low, high, tips)


def null_band(measured: Sequence[Sequence[Measurement]]) -> tuple[list[float], list[float], list[float]] | None:
    """(rounds, low, high) of the nulls of several arms, the widest at each round; None where there is none."""
    rounds = list(zip_longest(*measured))
    bands = [[m for m in here if m is not None and m.null_lo is not None] for here in rounds]
    points = [(k, min(m.null_lo for m in b), max(m.null_hi for m in b)) for k, b in enumerate(bands, start=1) if b]
    if not points:
        return None
    points = [(0, *points[0][1:]), *points]
    return tuple(map(list, zip(*points, strict=True)))


def arms_of(records: list[dict], order: list[str]) -> list[Arm]:
    """The arms in the config's order, each beginning with its round 0, or where it has none of its own with that of
    the arm `main`. Several evaluations of a round are one: of a metric that two of them have, the one that is called
    `evaluation` counts."""
    merged: dict[tuple[str, int, int], dict[str, Any]] = {}
    for r in sorted(records, key=lambda r: r["name"] != "evaluation"):
        place = merged.setdefault((r["arm"], r["round"], r["replicate"]), {})
        place |= {name: value for name, value in r["metrics"].items() if name not in place}
    found: dict[str, dict[int, list[dict]]] = {}
    for (arm, number, _), metrics in sorted(merged.items(), key=lambda item: item[0][1:]):
        found.setdefault(arm, {}).setdefault(number, []).append(metrics)
    shared = found.get("main", {}).get(0)
    later = {arm: rounds for arm, rounds in found.items() if max(rounds) > 0}
    names = [n for n in order if n in later] + [n for n in later if n not in order]
    own = lambda name: later[name] if 0 in later[name] or not shared else {0: shared, **later[name]}
    return [Arm(n, i % 8, own(n)) for i, n in enumerate(names)]


@dataclasses.dataclass(frozen=True)
class Change:
    """A metric from round 0 to the last round. `slope`: change per round over rounds 1..last, with its error: what goes
    on being lost after the first round on synthetic data."""

    first: float
    last: float
    rounds: int
    slope: float
    slope_stderr: float

    @property
    def verdict(self) -> str:
        if self.rounds < 3 or not math.isfinite(self.slope_stderr):
            return "too few rounds to tell"
        if self.slope > NOISE * self.slope_stderr:
            return "keeps losing"
        if self.slope < -NOISE * self.slope_stderr:
            return "recovers"
        return "holds"


def change(arm: Arm, metric: str) -> Change | None:
    """Least-squares slope over rounds 1..last; its error from the residuals of the fit."""
    ks = arm.numbers(metric)
    if len(ks) < 2 or ks[0] != 0:
        return None
    later = [k for k in ks if k > 0]
    y = np.array([arm.mean(metric, k) for k in later])
    slope, error = 0.0, math.nan
    if len(later) >= 3:
        x = np.array(later, float) - np.mean(later)
        slope = float((x * y).sum() / (x**2).sum())
        residual = y - y.mean() - slope * x
        error = float(math.sqrt((residual**2).sum() / (len(later) - 2) / (x**2).sum()))
        measured = [arm.stderr(metric, k) for k in later]
        if all(math.isfinite(e) for e in measured):  # a lucky straight line must not look certain
            error = max(error, float(np.mean(measured) / math.sqrt((x**2).sum())))
    return Change(arm.mean(metric, 0), float(y[-1]), later[-1], slope, error)
