"""Rewards: a number for every row, or none. A new one is a frozen dataclass here and a line in `REWARDS`.

score(answers, ExactMatch("answer"))                    a Dataset with a column `score`
round.score("right", answers, ExactMatch("answer"))     the same, kept
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.identity import Value

Scores = Sequence[float | None]


class Reward(Value):
    """Called with a Dataset; gives a number for each row, None where it has none to give. Subclasses are frozen
    dataclasses of plain values (a model they hold counts by its fingerprint); raise `version` when one computes
    something else."""

    def __call__(self, data: Dataset) -> Scores:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ExactMatch(Reward):
    """1 where the row's text is that of a column, blanks around both left out; 0 where not; none where the column has
    none."""

    column: str = "answer"

    def __call__(self, data: Dataset) -> Scores:
        pairs = zip(data.column("text"), data.column(self.column), strict=True)
        return [None if right is None else float(text.strip() == str(right).strip()) for text, right in pairs]


@dataclasses.dataclass(frozen=True)
class TokenCount(Reward):
    """The row's tokens, up to `most`."""

    most: int = 1_000_000

    def __call__(self, data: Dataset) -> Scores:
        return [float(min(self.most, len(t))) for t in data.tokens()]


REWARDS: dict[str, type[Reward]] = {"exact_match": ExactMatch, "token_count": TokenCount}


def score(data: Dataset, reward: Callable[[Dataset], Scores], column: str = "score") -> Dataset:
    """The rows with a number for each in `column`, None where the reward gives none. reward: a Reward, or any function
    of the Dataset. Raises InputError, naming the reward and the row, for scores that are none."""
    called = getattr(reward, "__name__", type(reward).__name__)
    return data.with_column(column, checked_scores(reward(data), len(data), called))


def checked_scores(found: Scores, rows: int, name: str) -> list[float | None]:
    """Scores as floats and None. Raises InputError, naming the reward and the row, for anything else."""
    try:
        found = list(found)
    except TypeError:
        raise InputError(f"the reward {name} gave {found!r}: a number or None for each row is wanted") from None
    if len(found) != rows or isinstance(found, str):
        raise InputError(f"the reward {name} gave {len(found)} scores for {rows} rows")
    scores: list[float | None] = []
    for n, value in enumerate(found):
        try:
            score = None if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if isinstance(value, str) or (score is not None and not math.isfinite(score)):
            raise InputError(f"the reward {name} gave row {n} {str(value)[:40]!r}: a finite number or None is wanted")
        scores.append(score)
    return scores
