"""`select`: rules that keep rows, and for each rule how many it dropped. A rule sees the rows the ones before it kept."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from recursive_jax.data.dataset import Dataset


@dataclasses.dataclass(frozen=True)
class Rule:
    """name: stands in the ledger. keep: Dataset -> boolean per row. source: the function that decides, where `keep` only
    wraps it: a stored result is made again when its source changes."""

    name: str
    keep: Callable[[Dataset], Sequence[bool] | np.ndarray]
    source: Callable | None = None


def select(data: Dataset, rules: Sequence[Rule]) -> tuple[Dataset, dict[str, int]]:
    """Rows that pass every rule, in order, and the rows dropped by each."""
    dropped: dict[str, int] = {}
    for rule in rules:
        mask = np.asarray(rule.keep(data), bool)
        if mask.shape != (len(data),):
            raise ValueError(f"rule {rule.name!r} gave {mask.shape} decisions for {len(data)} rows")
        dropped[rule.name] = int((~mask).sum())
        data = data.take(np.flatnonzero(mask))
    return data, dropped


def status(*allowed: str) -> Rule:
    """Rows with one of the statuses; `status("ok", "length")` drops failures."""
    return Rule(f"status in {','.join(allowed)}", lambda d: [s in allowed for s in d.column("status")])


def tokens_between(least: int, most: int) -> Rule:
    return Rule(f"{least}..{most} tokens", lambda d: [least <= len(t) <= most for t in d.tokens()])


def at_least(threshold: float, column: str = "score") -> Rule:
    """Rows whose reward is at least the threshold; a missing reward is dropped."""
    return Rule(f"{column} >= {threshold:g}", lambda d: [v is not None and v >= threshold for v in d.column(column)])


def unique() -> Rule:
    """The first of rows whose texts are equal but for case and white space."""

    def keep(data: Dataset) -> list[bool]:
        seen: set[str] = set()
        out = []
        for text in data.column("text"):
            key = re.sub(r"\s+", " ", text).strip().lower()
            out.append(key not in seen)
            seen.add(key)
        return out

    return Rule("unique", keep)
