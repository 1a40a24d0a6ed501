"""The report of a correction: accuracy before and after, with the paired test, and the answers that changed."""

from __future__ import annotations

import html

from recursive_jax.rounds.lineage import stored_rows
from recursive_jax.rounds.report.page import Layout, View
from recursive_jax.rounds.report.rewards import asked_of


def header(view: View) -> str:
    c = view.config
    return f"{html.escape(str(c['base']))} on {html.escape(str(c['task'].get('validation') or c['task']['path']))}."


def sections(view: View) -> list[str]:
    own = of_first(view)
    return both(view, own) if len(own) > 1 else []


def of_first(view: View) -> list[dict]:
    """The records of the first arm's first replicate; the arms are compared below."""
    return [r for r in view.records if r["arm"] == view.records[0]["arm"] and not r["replicate"]]


def both(view: View, records: list[dict]) -> list[str]:
    """records: the evaluations before (round 0) and after (round 1)."""
    return [_numbers(view, records), _changed(view)]


correction_layout = Layout(header, sections)


def _numbers(view: View, records: list[dict]) -> str:
    m = next(r["metrics"] for r in records if r["round"] == 1)
    gain = m["accuracy"] - m["accuracy_before"]
    said = "chance explains the difference" if m["p"] > 0.05 else "better" if gain > 0 else "worse"
    own = [r for r in view.stored if r["arm"] == view.records[0]["arm"] and not r["replicate"]]
    own = [r for r in own if r["verb"] == "generate" and not r["name"].startswith("criticised")]
    written = [r["counts"]["tokens"] for r in own]
    rounds = [r["round"] for r in own]
    before, after = (sum(t for t, k in zip(written, rounds, strict=True) if k == number) for number in (0, 1))
    return (
        f'<h2>Before and after</h2><div class=arms><div class=arm style="--accent:var(--c0)"><h3>Right answers</h3>'
        f"<b>{m['accuracy_before']:.3f} → {m['accuracy']:.3f}</b><div class=verdict>{said}</div>"
        f"<div class=soft>p = {m['p']:.2g} (McNemar, two-sided) over {m['rows']:,} problems; {m['became_right']} "
        f"became right, {m['became_wrong']} wrong</div></div>"
        f'<div class=arm style="--accent:var(--c1)"><h3>Tokens written</h3>'
        f"<b>{before:,} → {before + after:,}</b></div></div>"
    )


def _changed(view: View, show: int = 10) -> str:
    stored = [m for m in view.stored if m["name"] == "held-out" and not m["replicate"]]
    stored = sorted((m for m in stored if m["arm"] == view.records[0]["arm"]), key=lambda m: m["round"])
    old, new = (stored_rows(view.run, m) for m in stored)
    columns = (asked_of(new), *(d.column(c) for c in ("text", "score") for d in (old, new)))
    lines = []
    for asked, before, after, was, became in zip(*columns, strict=True):
        if was != became and len(lines) < show:
            cells = [asked[:300], *(f"{'✓' if s == 1 else '✗'} {t[:400]}" for s, t in ((was, before), (became, after)))]
            lines.append("<tr>" + "".join(f"<td class=text>{html.escape(c)}</td>" for c in cells) + "</tr>")
    if not lines:
        return "<p class=soft>No answer became right or wrong.</p>"
    heads = "".join(f"<th class=left>{h}</th>" for h in ("asked", "before", "after"))
    return f"<h2>Answers that became right or wrong</h2><table><tr>{heads}</tr>{''.join(lines)}</table>"
