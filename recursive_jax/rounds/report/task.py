"""The report of a fine-tuning: the task before and after, and answers side by side."""

from __future__ import annotations

import html

from recursive_jax.collapse.metrics import metric
from recursive_jax.rounds.report import charts
from recursive_jax.rounds.report.page import Layout, View
from recursive_jax.rounds.report.series import Arm

METRICS = tuple(metric(name) for name in ("accuracy", "format", "ce_task"))


def header(view: View) -> str:
    c = view.config
    how = "all weights"
    if c.get("lora"):
        how = f"an adapter of rank {c['lora']['rank']} on the frozen base"
    return (
        f"{html.escape(str(c['base']))} fine-tuned on {html.escape(str(c['task']['path']))}: {how}, "
        f"{c['train']['steps']} steps. "
        "Round 0 is the model as it came, round 1 the trained one."
    )


def sections(view: View) -> list[str]:
    return [_before_and_after(view.arms[0])] if view.arms else []


task_layout = Layout(header, sections)


def _with_interval(arm: Arm, metric: str, number: int) -> str:
    """A share with its Wilson interval, another number with its standard error over rows."""
    low, high = (arm.values(f"{metric}_ci_{end}", number) for end in ("lo", "hi"))
    around = f"± {charts.number(arm.stderr(metric, number))}"
    if len(low) == len(high) == 1:
        around = f"[{low[0]:.3f}, {high[0]:.3f}]"
    return f"{arm.mean(metric, number):.3f} {around}"


def _before_and_after(arm: Arm) -> str:
    last = max(arm.rounds)
    cards = []
    for m in METRICS:
        key, title, note = m.name, m.title, m.note
        if not arm.values(key, 0) or not arm.values(key, last):
            continue
        before, after = (_with_interval(arm, key, k) for k in (0, last))
        cards.append(
            f'<div class=arm style="--accent:var(--c0)"><h3>{title}</h3><b>{arm.mean(key, 0):.3f} → '
            f"{arm.mean(key, last):.3f}</b>"
            f"<div class=soft>{note}</div><div class=soft>before {before}, after {after}</div></div>"
        )
    rows = []
    both = zip(arm.rounds[0][0].get("shown", []), arm.rounds[last][0].get("shown", []), strict=False)
    for before, after in both:
        mark = lambda shown: f"{'✓' if shown['right'] else '✗'} {html.escape(shown['answer'])}"
        rows.append(
            f"<tr><td class=text>{html.escape(after['prompt'])}</td><td class=text>{mark(before)}</td>"
            f"<td class=text>{mark(after)}</td></tr>"
        )
    count = arm.rounds[last][0].get("rows", 0)
    return (
        f"<div class=arms>{''.join(cards)}</div><h2>Answers, side by side</h2><p class=soft>The first of the {count} "
        "held-out rows, answered greedily. In brackets 95% intervals (Wilson), behind ± one standard error over "
        "rows.</p><table><tr><th class=left>asked</th><th class=left>before</th><th class=left>after</th></tr>"
        f"{''.join(rows)}</table>"
    )
