"""Two sections of a collapse report: what of the change is more than chance, and where the loss comes from."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from recursive_jax.collapse.profile import Profile
from recursive_jax.collapse.profile_page import findings_table, verdict_table
from recursive_jax.collapse.profile_text import aligned
from recursive_jax.rounds.report.series import Arm


def verdict_section(profiles: Mapping[str, Profile]) -> str:
    """For each regime the verdict table and the definitions of collapse; nothing while there is no round to judge."""
    if not profiles:
        return ""
    parts = []
    for i, (arm, profile) in enumerate(profiles.items()):
        parts.append(
            f"<details{' open' if i == 0 else ''}><summary>{html.escape(arm)}</summary>{verdict_table(profile)}"
            f"{findings_table(profile)}</details>"
        )
    first = next(iter(profiles.values())).settings
    return (
        "<h2>Verdicts</h2><p class=soft>Sample metrics are means over "
        f"{first['groups']} groups of {first['tokens']:,} tokens. The null band is where the samples of the round-0 "
        "model itself "
        f"lie, with {first['confidence']:.0%} confidence: outside it a change is more than chance (marked). Below each "
        "table: the "
        "definitions of collapse in the literature (arXiv:2503.03150) and the signs that precede it "
        "(arXiv:2605.14588).</p>" + "".join(parts)
    )


def attribution_section(arms: list[Arm]) -> str:
    """KL of the real student beside two others: the exact fit of the grammar to the same rows (what sampling alone
    loses), and the same network on as much new truth (an arm with fresh: 1.0; what the network cannot learn). What is
    left is the damage of recursion."""
    if not arms or "kl_oracle" not in arms[0].rounds.get(1, [{}])[0]:
        return ""
    ceiling = next((a for a in arms if a.name == "ceiling"), None)
    heads = "<th>round</th><th>student</th><th>sampling alone</th>" + (
        "<th>network on new truth</th><th>recursion's damage</th>" if ceiling else ""
    )
    tables = []
    for arm in arms:
        if arm is ceiling:
            continue
        ks = [k for k in arm.numbers("kl_oracle") if k]
        columns = [[arm.mean("kl_total", k) for k in ks], [arm.mean("kl_oracle", k) for k in ks]]
        if ceiling:
            limits = [ceiling.mean("kl_total", k) if ceiling.values("kl_total", k) else math.nan for k in ks]
            columns += [limits, [net - limit for net, limit in zip(columns[0], limits, strict=True)]]
        shown = [aligned(column, 3) for column in columns]
        lines = [
            f"<tr><td>{k}</td>{''.join(f'<td>{column[i]}</td>' for column in shown)}</tr>" for i, k in enumerate(ks)
        ]
        tables.append(f"<div><h3>{html.escape(arm.name)}</h3><table><tr>{heads}</tr>{''.join(lines)}</table></div>")
    how = (
        ""
        if ceiling
        else " Add an arm <code>ceiling: {fresh: 1.0}</code> to see what the network could learn from as much new "
        "truth."
    )
    return (
        "<h2>Where the loss comes from</h2><p class=soft>KL from the truth, nats per token. Sampling alone: the exact "
        "fit of the "
        "grammar to the rows the student was trained on. Network on new truth: the same student trained on as much "
        "real text, "
        f"never seen before. The rest is what recursion did.{how}</p><div class=grid2>{''.join(tables)}</div>"
    )
