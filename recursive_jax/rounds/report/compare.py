"""Arms of a run against the first one: a verdict for each, by a paired test over the same held-out rows."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from recursive_jax.collapse.paired import two_sided_p
from recursive_jax.rounds.gate import scores
from recursive_jax.rounds.lineage import stored_rows

ALPHA = 0.05


def held_out(run: Any, stored: Sequence[dict]) -> dict[str, dict[int, list[np.ndarray]]]:
    """arm -> round -> the scores of the held-out rows, one array for each replicate."""
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    for m in stored:
        if m["name"] == "held-out":
            found.setdefault(m["arm"], {}).setdefault(m["round"], []).append(scores(stored_rows(run, m)))
    return found


def verdict(first: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, float, str]:
    """(difference, p, verdict) of two arms' last students; all replicates' rows together."""
    a, b = (np.concatenate(x[: min(len(first), len(other))]) for x in (first, other))
    gain = float(np.nanmean(a) - np.nanmean(b))
    p = two_sided_p(a, b)
    said = "no difference beyond chance" if p > ALPHA else "better" if gain > 0 else "worse"
    return gain, p, said


def section(run: Any, stored: Sequence[dict], begin: str = "round 0") -> str:
    """The last students of all arms beside the first arm's, and that beside its own round 0. begin: what that is."""
    found = held_out(run, stored)
    if not found or max(map(max, found.values())) == 0:
        return ""
    first = next(iter(found))
    last = {arm: by_round[max(by_round)] for arm, by_round in found.items()}
    others = [(begin, found[first][0])] if 0 in found[first] and max(found[first]) else []
    lines = []
    for name, other in [*others, *((arm, s) for arm, s in last.items() if arm != first)]:
        if [len(x) for x in other] != [len(x) for x in last[first]][: len(other)]:
            lines.append(
                f"<tr><td>{html.escape(f'{first} against {name}')}</td><td colspan=5>other held-out rows</td></tr>"
            )
            continue
        gain, p, said = verdict(last[first], other)
        means = [float(np.nanmean(np.concatenate(s))) for s in (last[first], other)]
        cells = [f"{first} against {name}", f"{means[0]:.3f}", f"{means[1]:.3f}", f"{gain:+.3f}", f"{p:.2g}", said]
        lines.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    heads = "".join(f"<th>{h}</th>" for h in ("", first, "the other", "difference", "p", f"{first} is"))
    return (
        "<h2>Verdicts</h2><p class=soft>Last students on the same held-out rows; a paired test (McNemar's exact one; a "
        "bootstrap where scores are not 0 and 1), two-sided, over all replicates' rows.</p><div class=scroll>"
        f"<table><tr>{heads}</tr>{''.join(lines)}</table></div>"
    )
