"""The collapse profile of what a run's students learnt from: the generated rows of every round's training set against
its real ones. It needs nothing of a recipe but its training sets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from recursive_jax.collapse.profile import Profile, collapse_profile
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.rounds.lineage import manifests, resolve, stored_rows


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """profiles: by arm; missing: why an arm has none."""

    profiles: dict[str, Profile]
    missing: dict[str, str]


def synthetic_profiles(run: Any) -> Synthetic:
    """One profile for each arm, round by round; rows of all replicates count together. A row is what was asked and what
    is learnt, without what all prompts of the set begin and end with. Real rows are those of the same sets, or of round
    0 where later sets have none; where no real row is learnt, the seed's."""
    stored = manifests(run)
    real: dict[str, list] = {}
    made: dict[str, dict[str, list]] = {}
    for m in (m for m in stored if m["verb"] == "train" and not m["name"].startswith("backward")):
        behind = (m.get("origins", {}).get("data") or [m["inputs"].get("data", "")])[0]
        data = resolve(stored, behind, m)
        if data is None or "rows" not in data["counts"]:
            continue
        for synthetic, row in rows_of(stored_rows(run, data)):
            if synthetic:
                made.setdefault(m["arm"], {}).setdefault(f"round {m['round']}", []).append(row)
            elif not m["replicate"]:
                real.setdefault(m["arm"], []).append(row)
    known = [row for rows in real.values() for row in rows]
    profiles, missing = {}, {}
    for arm, rounds in made.items():
        try:
            reference = _distinct(real.get(arm) or known or _seed(run, stored))
            if not reference:
                raise InputError("no real row was learnt from, there is nothing to compare with")
            profiles[arm] = collapse_profile(rounds, reference)
        except InputError as error:
            missing[arm] = str(error)
    for arm in real:
        if arm not in made:
            missing[arm] = "no generated row was learnt from"
    return Synthetic(profiles, missing)


def _seed(run: Any, stored: list[dict]) -> list:
    """The seed rows as they would be learnt, where a recipe keeps them for this."""
    kept = [m for m in stored if m["name"] == "seed-examples"]
    return [row for m in kept[:1] for _, row in rows_of(stored_rows(run, m))]


def rows_of(data: Dataset) -> list[tuple[bool, Any]]:
    """(whether a model wrote it, what it holds) of each row: ids, or a text where there are none (a remote model's)."""
    kinds = data.column("synthetic")
    if data.token_count:
        return list(zip(kinds, without_common(data.prompts(), data.tokens()), strict=True))
    texts = data.column("chosen" if data.has("chosen") else "text")
    if texts and not isinstance(texts[0], str):
        texts = [np.asarray(ids, np.int64) for ids in texts]
    return [(kind, text) for kind, text in zip(kinds, texts, strict=True) if len(text)]


def without_common(prompts: list[np.ndarray], tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Prompt and tokens of each row, without the ids that all prompts begin and end with: a template's own words."""
    shortest = min(map(len, prompts), default=0)
    begin = next((k for k in range(shortest) if len({int(p[k]) for p in prompts}) > 1), shortest)
    rest = shortest - begin
    end = next((k for k in range(rest) if len({int(p[len(p) - 1 - k]) for p in prompts}) > 1), rest)
    cut = [p[begin : len(p) - end] for p in prompts]
    return [np.concatenate([p, t]).astype(np.int64) for p, t in zip(cut, tokens, strict=True)]


def _distinct(rows: list) -> list:
    """Every real row once, however many sets have it."""
    key = lambda row: row if isinstance(row, str) else row.tobytes()
    return list({key(row): row for row in rows}.values())
