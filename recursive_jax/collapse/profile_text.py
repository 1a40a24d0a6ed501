"""A profile as text: the verdict table for a terminal."""

from __future__ import annotations

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
        band = f"{number(first.null_lo)} .. {number(first.null_hi)}" if first.null_lo is not None else ""
        cells = "".join(f"{number(m.value) + ' ' + MARKS[m.verdict]:>{width}}" for m in values)
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
