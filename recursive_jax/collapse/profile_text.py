"""A profile as text: the verdict table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MARKS = {"higher": "▲", "lower": "▼", "same": " ", "untested": " "}


def text(profile: Any) -> str:
    """Metrics as lines, rounds as columns; ▲ and ▼ stand beside values outside the null's band."""
    width = max(12, *(len(name) + 2 for name in profile.rounds))
    settings = ", ".join(
        f"{v} {k}" if k != "confidence" else f"{v:.0%} band" for k, v in profile.settings.items() if k != "seed"
    )
    lines = [
        f"{'metric':<22}{'null band':>24}" + "".join(f"{name:>{width}}" for name in profile.rounds),
    ]
    for metric in profile.metrics:
        values = profile[metric]
        first = values[0]
        low, high, *shown = aligned([first.null_lo, first.null_hi, *(m.value for m in values)])
        band = f"{low} .. {high}" if first.null_lo is not None else ""
        cells = "".join(f"{x + ' ' + MARKS[m.verdict]:>{width}}" for x, m in zip(shown, values, strict=True))
        lines.append(f"{metric:<22}{band:>24}{cells}")
    lines += ["", "definitions of collapse (arXiv:2503.03150)"]
    lines += [f"  {f.name:<24}{f.answer:<14}{f.evidence}" for f in profile.definitions]
    lines += ["", "early signs"]
    for f in profile.warnings:
        lead = f", {f.lead} rounds before the risk" if f.lead is not None else ""
        lines.append(f"  {f.name:<24}{f.answer + (f' (round {f.first}{lead})' if f.first else ''):<14}  {f.evidence}")
    return "\n".join([*lines, "", settings])


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def aligned(values: Sequence[float | None], digits: int = 4) -> list[str]:
    """Values of one kind with as many decimals each: enough for `digits` digits of the largest; – for none."""
    known = [abs(v) for v in values if v is not None and math.isfinite(v)]
    most = max(known, default=0.0)
    decimals = 0 if most >= 10**digits else max(0, digits - 1 - math.floor(math.log10(most))) if most else 0
    shown = lambda v: "–" if v is None or not math.isfinite(v) else f"{v:,.{min(decimals, 9)}f}"
    return [shown(v) for v in values]
