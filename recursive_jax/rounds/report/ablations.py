"""The report of a recipe whose arms differ in one thing each: accuracy by round, and a verdict for every arm against
the first, by a paired test over the same held-out rows."""

from __future__ import annotations

import html

from recursive_jax.rounds.lineage import stored_rows
from recursive_jax.rounds.report import charts
from recursive_jax.rounds.report.compare import section
from recursive_jax.rounds.report.page import Layout, View
from recursive_jax.rounds.report.rewards import asked_of


def header(view: View) -> str:
    c = view.config
    return (
        f"{html.escape(str(c['base']))} on {html.escape(str(c['task']['path']))}; more rows from "
        f"{html.escape(str(c.get('teacher')))}, over {c.get('rounds')} rounds."
    )


def sections(view: View) -> list[str]:
    return [_curves(view), section(view.run, view.stored, "the seed alone"), _answers(view)] if view.arms else []


ablations_layout = Layout(header, sections, compares=True)


def _curves(view: View) -> str:
    series = [s for arm in view.arms if len(arm.numbers("score")) > 1 for s in [arm.series("score")]]
    rows = [
        charts.Series(arm.name, arm.colour, ks, [arm.mean("data_rows", k) for k in ks])
        for arm in view.arms
        if len(ks := arm.numbers("data_rows")) > 1
    ]
    drawn = (
        [charts.figure("Right answers", "held-out rows, greedy", charts.lines(series, "Right answers"))]
        if series
        else []
    )
    drawn += [charts.figure("Rows learnt from", "seed and new", charts.lines(rows, "Rows"))] if rows else []
    return f"<h2>Round by round</h2><div class=grid2>{''.join(drawn)}</div>"


def _answers(view: View, show: int = 8) -> str:
    """The first held-out rows, answered by the first and by the last student."""
    stored = [
        m for m in view.stored if m["name"] == "held-out" and m["arm"] == view.arms[0].name and not m["replicate"]
    ]
    ends = [min(stored, key=lambda m: m["round"]), max(stored, key=lambda m: m["round"])]
    both = [stored_rows(view.run, m) for m in ends]
    lines = []
    for n in range(min(show, len(both[0]))):
        cells = [f"{'✓' if d.column('score')[n] == 1 else '✗'} {d.column('text')[n][:300]}" for d in both]
        cells.insert(0, asked_of(both[1])[n][:300])
        lines.append("<tr>" + "".join(f"<td class=text>{html.escape(c)}</td>" for c in cells) + "</tr>")
    heads = "".join(f"<th class=left>{h}</th>" for h in ("asked", "seed alone", "last round"))
    return f"<h2>Answers, side by side</h2><table><tr>{heads}</tr>{''.join(lines)}</table>"
