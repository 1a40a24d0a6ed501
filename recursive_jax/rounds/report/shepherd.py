"""The report of a critic: what it finds of planted errors, by kind; answers before and after its critiques."""

from __future__ import annotations

import html

from recursive_jax.rounds.report import corrections
from recursive_jax.rounds.report.page import Layout, View


def sections(view: View) -> list[str]:
    own = [r for r in corrections.of_first(view) if r["name"] == "evaluation"]
    parts = [_detection(view), _reward(view)]
    return [*parts, *(corrections.both(view, own) if len(own) > 1 else [])]


shepherd_layout = Layout(corrections.header, sections)


def _detection(view: View) -> str:
    found = {r["round"]: r["metrics"] for r in corrections.of_first(view) if r["name"] == "detection"}
    if len(found) < 2:
        return ""
    share = lambda x: "–" if x is None else f"{x:.3f}"
    whole = [
        f"<tr><td class=left>{name}</td>" + "".join(f"<td>{share(found[k][key])}</td>" for k in (0, 1)) + "</tr>"
        for key, name in (("precision", "precision of calling an answer wrong"), ("recall", "recall of it"),
                          ("score", "the kind named, or none"), ("read", "critiques that could be read"))
    ]  # fmt: skip
    kinds = [
        f"<tr><td class=left>{html.escape(kind)} ({m['rows']:,} rows)</td><td>{share(m['precision'])}</td>"
        f"<td>{share(m['recall'])}</td></tr>"
        for kind, m in found[1]["by_kind"].items()
    ]
    return (
        f"<h2>Planted errors</h2><p class=soft>In {found[1]['rows']:,} held-out solutions, right ones and ones with an "
        "error of a known kind.</p><div class=grid2><table><tr><th class=left></th><th>base</th><th>critic</th></tr>"
        f"{''.join(whole)}</table><table><tr><th class=left>kind, by the critic</th><th>precision</th><th>recall</th>"
        f"</tr>{''.join(kinds)}</table></div>"
    )


def _reward(view: View) -> str:
    found = next((r["metrics"] for r in corrections.of_first(view) if r["name"] == "as-a-reward"), None)
    if found is None:
        return ""
    if found["agreement"] is None:
        return f"<p>As a reward: none of {found['unread']:,} critiques of real answers gave a verdict.</p>"
    return (
        f"<p>As a reward: of {found['rows']:,} real answers the critic calls {found['agreement']:.3f} as the task's "
        f"own check does ({found['unread']} critiques gave no verdict); always saying the more frequent one would "
        f"agree on {found['agreement_by_guessing']:.3f}.</p>"
    )
