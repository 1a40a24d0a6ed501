"""What generated rows lack: their collapse profile against the real ones."""

from __future__ import annotations

import html
from typing import Any

from recursive_jax.collapse.profile_page import verdict_table
from recursive_jax.rounds.synthetic import synthetic_profiles


def section(run: Any) -> str:
    found = synthetic_profiles(run)
    parts = []
    for n, (arm, profile) in enumerate(found.profiles.items()):
        s = profile.settings
        parts.append(
            f"<details{' open' if n == 0 else ''}><summary>{html.escape(arm)}, {s['groups']} groups of "
            f"{s['tokens']:,} tokens</summary>{verdict_table(profile)}</details>"
        )
    parts += [f"<p class=soft>{html.escape(arm)}: {html.escape(why)}</p>" for arm, why in found.missing.items()]
    return (
        "<h2>What the generated rows lack</h2><p class=soft>The generated rows that students learnt from, by round, "
        "beside the real ones: every number is a mean over groups of one size, the band is where the real rows' own "
        f"groups lie, and what is marked lies outside it.</p>{''.join(parts)}"
    )
