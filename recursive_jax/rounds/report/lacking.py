"""What generated rows lack: their collapse profile against the real ones."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from etils import epath

from recursive_jax import storage
from recursive_jax.collapse.profile_page import verdict_table
from recursive_jax.errors import say
from recursive_jax.rounds.synthetic import Synthetic, synthetic_profiles

PART = "profiles/section.html"


def save(run: Any) -> None:
    """RUN/profiles/ARM/profile.{html,jsonl,csv} of what each arm's students learnt from, and the report's part; where
    there is too little of it, that is said."""
    run = Path(run)
    (run / "profiles").mkdir(exist_ok=True)
    found = synthetic_profiles(run)
    for arm, profile in found.profiles.items():
        profile.save(run / "profiles" / arm)
    for arm, why in found.missing.items():
        say(f"profile of {arm}: {why}")
    storage.write_json(epath.Path(run / "profiles/missing.json"), found.missing)
    storage.write_atomic(epath.Path(run / PART), _told(found).encode())


def section(run: Any) -> str:
    """As it was measured when the run ended; nothing before."""
    file = Path(run) / PART
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _told(found: Synthetic) -> str:
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
