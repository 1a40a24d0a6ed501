"""The report of a recipe in which a teacher writes and a student learns: both on held-out rows, their answers side by
side, what was written, kept, and dropped for what reason."""

from __future__ import annotations

import html

from recursive_jax.collapse.metrics import metric
from recursive_jax.rounds.lineage import stored_rows
from recursive_jax.rounds.progress import failures
from recursive_jax.rounds.report import charts
from recursive_jax.rounds.report.page import Layout, View
from recursive_jax.rounds.report.rewards import asked_of

SHOWN = ("accuracy", "score", "win_rate", "format", "ce_task")


def header(view: View) -> str:
    c = view.config
    teacher = c.get("teacher") or c["base"]
    return (
        f"{html.escape(str(c['recipe']))}: {html.escape(str(teacher))} writes, {html.escape(str(c['base']))} learns, "
        f"on {html.escape(str(c['task']['path']))}."
    )


def sections(view: View) -> list[str]:
    return [cards(view), *written_sections(view), answers(view)] if view.arms else []


written_layout = Layout(header, sections)


def cards(view: View) -> str:
    """Of every metric that the first and the last round have: both, with the standard error."""
    found = []
    for arm in view.arms:
        for name in SHOWN:
            ks = arm.numbers(name)
            if not ks:
                continue
            m, errors = metric(name), [arm.stderr(name, k) for k in (ks[0], ks[-1])]
            values = " → ".join(f"{arm.mean(name, k):.3f}" for k in dict.fromkeys((ks[0], ks[-1])))
            around = " → ".join(charts.number(e) for e in errors if e == e)
            title = m.title if len(view.arms) == 1 else f"{arm.name}: {m.title}"
            found.append(
                f'<div class=arm style="--accent:var(--c{arm.colour})"><h3>{html.escape(title)}</h3><b>{values}</b>'
                f"<div class=soft>{html.escape(m.note)}</div>"
                + (f"<div class=soft>standard error {around}</div>" if around else "")
                + "</div>"
            )
    return f"<div class=arms>{''.join(found)}</div>"


def written_sections(view: View) -> list[str]:
    return [ledger_of_rules(view), kept_rows(view)]


def ledger_of_rules(view: View) -> str:
    """What became of what was written: by generation what could be read, by selection what each rule dropped, with the
    first such rows."""
    lines = []
    for m in (m for m in view.stored if m["verb"] in ("read", "select")):
        c = m["counts"]
        gone = {**failures(c), **c.get("dropped", {})}
        name = m["name"] if len(view.arms) == 1 else f"{m['arm']} {m['name']}"
        rows = c.get("proposed", c["rows"])
        kept = c["rows"] if m["verb"] == "select" else c["rows"] - sum(failures(c).values())
        lines.append(
            f"<tr><td class=left>round {m['round']} · {html.escape(name)}</td><td>{rows:,}</td><td>{kept:,}</td>"
            f"<td class=text>{_reasons(gone, c)}</td></tr>"
        )
    if not lines:
        return ""
    heads = "<tr><th class=left>result</th><th>rows</th><th>kept</th><th class=left>what was dropped, and why</th></tr>"
    table = f"<div class=scroll><table>{heads}{''.join(lines)}</table></div>"
    return f"<h2>What was written, and what was kept of it</h2>{table}"


def _reasons(gone: dict[str, int], counts: dict) -> str:
    shown = counts.get("dropped_examples", {})
    parts = []
    for why, n in sorted(gone.items(), key=lambda item: -item[1]):
        if n:
            example = "".join(f"<div class=soft>{html.escape(x)}</div>" for x in shown.get(why, [])[:1])
            parts.append(f"<div>{n:,} {html.escape(why)}</div>{example}")
    return "".join(parts)


def kept_rows(view: View, show: int = 12) -> str:
    """Generated rows that students learnt from, the first of the last round's."""
    trained = [m for m in view.stored if m["name"] == "examples"]
    if not trained:
        return ""
    data = stored_rows(view.run, max(trained, key=lambda m: m["round"])).where(synthetic=True)
    lines = [
        f"<tr><td class=text>{html.escape(str(asked)[:500])}</td><td class=text>{html.escape(text[:500])}</td></tr>"
        for asked, text in zip(asked_of(data)[:show], data.column("text")[:show], strict=True)
    ]
    if not lines:
        return ""
    heads = "<tr><th class=left>asked</th><th class=left>answered</th></tr>"
    said = f"<h2>What is learnt from</h2><p class=soft>The first of {len(data):,} generated rows.</p>"
    return f"{said}<table>{heads}{''.join(lines)}</table>"


def answers(view: View, show: int = 8) -> str:
    """The first held-out rows, answered before and after."""
    stored = [m for m in view.stored if m["name"] == "held-out" and not m["replicate"]]
    stored = [m for m in stored if m["arm"] == view.arms[0].name]
    if len(stored) < 2:
        return ""
    ends = [min(stored, key=lambda m: m["round"]), max(stored, key=lambda m: m["round"])]
    old, new = (stored_rows(view.run, m) for m in ends)
    asked, lines = asked_of(new), []
    answer = lambda data, n: f"{data.column('score')[n] or 0:.2f} {data.column('text')[n][:400]}"
    for n in range(min(show, len(old), len(new))):
        cells = [asked[n][:300], answer(old, n), answer(new, n)]
        lines.append("<tr>" + "".join(f"<td class=text>{html.escape(c)}</td>" for c in cells) + "</tr>")
    names = ["asked", *(f"round {m['round']}" for m in ends)]
    heads = "".join(f"<th class=left>{name}</th>" for name in names)
    return f"<h2>Answers to held-out rows</h2><table><tr>{heads}</tr>{''.join(lines)}</table>"
