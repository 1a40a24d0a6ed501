"""A profile as a page and as figures."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from recursive_jax.collapse import figures
from recursive_jax.collapse.profile_text import MARKS, aligned, number
from recursive_jax.collapse.suite import TEXT, VECTORS

TITLES = {m.name: m.title for m in (*TEXT, *VECTORS)} | {"ce_real": "cross-entropy of the real rows, nats per token"}
CSS = """
:root{color-scheme:light dark;--soft:#6b6b70;--line:#d9d9de;--bad:#c8553d;--card:#f6f6f8}
@media(prefers-color-scheme:dark){:root{--soft:#a0a0a8;--line:#3a3a40;--bad:#ee8a73;--card:#1d1d21}}
body{font:15px/1.5 system-ui,sans-serif;margin:0}main{max-width:1080px;margin:2rem auto;padding:0 1.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px}
td,th{padding:.28rem .7rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left}
.soft{color:var(--soft)}.out{color:var(--bad);font-weight:600}.left{text-align:left}.scroll{overflow-x:auto}
figure{margin:1rem 0;background:#fff;border-radius:8px;padding:.5rem}figure svg{width:100%;height:auto}
"""


def write(profile: Any, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.jsonl").write_text(profile.jsonl(), encoding="utf-8")
    (folder / "profile.csv").write_text(profile.csv(), encoding="utf-8")
    picture = ""
    if figures.available():
        paths = figures.save(figures.curves(panels(profile)), folder / "figures", "profile")
        svg = paths[0].read_text(encoding="utf-8")
        picture = f"<figure>{svg[svg.index('<svg') :]}</figure>"
    page = folder / "profile.html"
    page.write_text(_page(profile, picture), encoding="utf-8")
    return page


def panels(profile: Any) -> list[tuple[str, dict]]:
    """Every metric that has a value, as `figures.curves` takes it."""
    found = []
    for metric in profile.metrics:
        points = [(k, m) for k, m in enumerate(profile[metric], start=1) if m.value is not None]
        if not points:
            continue
        line = {"x": [k for k, _ in points], "y": [m.value for _, m in points]}
        for key, name in (("low", "ci_lo"), ("high", "ci_hi"), ("null_lo", "null_lo"), ("null_hi", "null_hi")):
            values = [getattr(m, name) for _, m in points]
            line[key] = values if all(v is not None for v in values) else None
        found.append((TITLES.get(metric, metric), {metric: line}))
    return found


def verdict_table(profile: Any) -> str:
    """Metrics against rounds, with the null's band; values outside it are marked."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in profile.rounds)
    lines = []
    for metric in profile.metrics:
        values = profile[metric]
        first = values[0]
        low, high, *shown = aligned([first.null_lo, first.null_hi, *(m.value for m in values)])
        band = f"{low} to {high}" if first.null_lo is not None else "–"
        cells = "".join(_cell(m, text) for m, text in zip(values, shown, strict=True))
        title = html.escape(TITLES.get(metric, metric))
        lines.append(f"<tr><td title='{title}'>{html.escape(metric)}</td><td class=soft>{band}</td>{cells}</tr>")
    return f"<div class=scroll><table><tr><th>metric</th><th>null band</th>{heads}</tr>{''.join(lines)}</table></div>"


def _cell(m: Any, text: str) -> str:
    if m.value is None:
        mark = f" {MARKS[m.verdict]}" if m.outside else ""
        return f"<td class='{'out' if m.outside else 'soft'}' title='{html.escape(m.why)}'>–{mark}</td>"
    tip = f"95% interval {number(m.ci_lo)} to {number(m.ci_hi)}, n = {m.n}"
    mark = f" {MARKS[m.verdict]}" if m.outside else ""
    return f"<td class='{'out' if m.outside else ''}' title='{tip}'>{text}{mark}</td>"


def findings_table(profile: Any) -> str:
    """The definitions in the literature and the early signs."""
    lines = []
    for f in (*profile.definitions, *profile.warnings):
        when = (
            ""
            if f.first is None
            else f"round {f.first}" + (f", {f.lead} before the risk" if f.lead is not None else "")
        )
        lines.append(
            f"<tr><td title='{html.escape(f.question)}'>{f.name}</td><td class='left "
            f"{'out' if f.answer == 'yes' else ''}'>"
            f"{f.answer}</td><td class=left>{when}</td><td class='left soft'>{html.escape(f.evidence)}</td></tr>"
        )
    head = (
        "<tr><th>definition or sign</th><th class=left>answer</th><th class=left>from</th><th "
        "class=left>evidence</th></tr>"
    )
    return f"<div class=scroll><table>{head}{''.join(lines)}</table></div>"


def _page(profile: Any, picture: str) -> str:
    s = profile.settings
    size = next(f"{v:,} {k}" for k, v in s.items() if k in ("tokens", "rows"))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Collapse profile</title><style>{CSS}</style></head><body><main><h1>Collapse profile</h1>"
        f"<p class=soft>Every number is the mean over {s['groups']} disjoint groups of {size} each, its interval a 95% "
        "bootstrap "
        f"over the groups. The null band is where the number would lie with {s['confidence']:.0%} confidence if the "
        "samples "
        "came from the reference: the reference's own groups, measured in the same way. Marked values lie outside.</p>"
        f"{verdict_table(profile)}<h2>Is it collapse?</h2><p class=soft>The definitions in use (arXiv:2503.03150), "
        "from these "
        f"measurements, and the signs that come before.</p>{findings_table(profile)}<h2>Round by round</h2>{picture}"
        "</main></body></html>\n"
    )
