"""The report of a broad teacher and its narrow student: accuracy, size and speed of the two and of the seed's student;
by class; what was written, kept and dropped; whole answers."""

from __future__ import annotations

import html

from recursive_jax.collapse.metrics import panels
from recursive_jax.rounds.report.page import Layout, View, curves
from recursive_jax.rounds.report.written import answers, written_sections


def header(view: View) -> str:
    c = view.config
    return (
        f"{html.escape(str(c['teacher']))} writes data for {html.escape(str(c['task']['path']))}; a narrow student "
        "learns it. Round 0 is the student of the seed rows alone, trained for as many steps."
    )


def sections(view: View) -> list[str]:
    if not view.arms:
        return []
    shown = [m for m in panels(view.metrics | {"data_rows"}) if m.name in ("score", "data_rows")]
    return [_three(view), curves(view, shown), _classes(view), *written_sections(view), answers(view)]


narrow_layout = Layout(header, sections)


def _of(view: View, name: str, arm: str) -> dict:
    """The last such evaluation of an arm."""
    found = [r for r in view.records if r["name"] == name and r["arm"] == arm]
    return max(found, key=lambda r: (-r["replicate"], r["round"]))["metrics"] if found else {}


def _three(view: View) -> str:
    parts = []
    for arm in view.arms:
        evaluations = [r for r in view.records if r["name"] == "evaluation" and r["arm"] == arm.name]
        first = min(evaluations, key=lambda r: (r["replicate"], r["round"]))["metrics"]
        last, teacher = _of(view, "evaluation", arm.name), _of(view, "teacher", arm.name)
        fast, slow = _of(view, "speed", arm.name), _of(view, "speed-teacher", arm.name)
        lines = [
            _line("student of the seed", first, fast),
            _line("student of the teacher's rows", last, fast),
            _line("teacher, shown seed rows", teacher, slow),
        ]
        heads = ("", "right answers", "95% interval", "params", "rows a second", "rows learnt from")
        table = "".join(f"<th>{h}</th>" for h in heads)
        title = f"<h3>{html.escape(arm.name)}</h3>" if len(view.arms) > 1 else ""
        parts.append(f"{title}<div class=scroll><table><tr>{table}</tr>{''.join(lines)}</table></div>{_said(last)}")
    return f"<h2>Broad and narrow</h2>{''.join(parts)}"


def _line(name: str, m: dict, size: dict) -> str:
    if not m:
        return ""
    low, high = m.get("accuracy_ci_lo"), m.get("accuracy_ci_hi")
    cells = [
        f"{m.get('accuracy', m['score']):.3f}",
        f"{low:.3f} to {high:.3f}" if low is not None else "",
        f"{size['params']:,}" if size else "not known",
        f"{size['rows_per_second']:.1f}" if size else "not known",
        f"{m['data_rows']:,}" if m.get("data_rows") else "",
    ]
    return f"<tr><td class=left>{name}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _said(last: dict) -> str:
    if "gain" not in last:
        return ""
    gain, error, p = last["gain"], last["gain_stderr"] or 0.0, last["p"]
    firm = abs(gain) > 2 * error and p <= 0.05
    said = ("more" if gain > 0 else "less") if firm else "no difference beyond chance"
    return (
        f"<p>Against the seed alone: {gain:+.3f} ± {error:.3f} (one standard error over held-out rows; p = {p:.2g}, "
        f"paired): <b>{said}</b>.</p>"
    )


def _classes(view: View) -> str:
    """Right answers by class: where the teacher's rows helped, and where they did not."""
    arm = view.arms[0].name
    evaluations = [r for r in view.records if r["name"] == "evaluation" and r["arm"] == arm and not r["replicate"]]
    ends = [
        min(evaluations, key=lambda r: r["round"])["metrics"],
        max(evaluations, key=lambda r: r["round"])["metrics"],
    ]
    both = [m.get("by_class", {}) for m in (*ends, _of(view, "teacher", arm))]
    if not both[0]:
        return ""
    lines = []
    for name, before in sorted(both[0].items(), key=lambda item: both[1].get(item[0], 0) - item[1]):
        cells = [before, both[1].get(name), both[2].get(name)]
        shown = "".join(f"<td>{x:.3f}</td>" if x is not None else "<td></td>" for x in cells)
        lines.append(f"<tr><td class=left>{html.escape(name)}</td>{shown}<td>{(cells[1] or 0) - before:+.3f}</td></tr>")
    heads = "".join(f"<th>{h}</th>" for h in ("class", "of the seed", "of the teacher's rows", "teacher", "gain"))
    table = f"<table><tr>{heads}</tr>{''.join(lines)}</table>"
    return f"<h2>By class</h2><p class=soft>The classes that gained least come first.</p>{table}"
