"""Rewards: a number for every row, or none, and perhaps a text. They are called with a Dataset or a list of dicts:

    rj.rewards.exact_match("answer")(rows)                       [1.0, 0.0, None, ...]
    rj.score(answers, rj.rewards.exact_match("answer"))          a Dataset with a column `score`
    round.score("right", answers, exact_match("answer"))         the same, kept

    a * b    minimum(a, b)    weighted({"right": (a, 0.8), "short": (b, 0.2)})    process_reward(a, how="min")

A new one is a frozen dataclass (here or in a file of its own) and a line in `REWARDS`. A plain function of a Dataset
that gives a number for each of its rows is one too; `function(f)` makes one of a function of a row, which runs in a
process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from recursive_jax.curate.outside import run_outside
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.errors import InputError
from recursive_jax.identity import Value

Row = Mapping[str, Any]
Rows = Dataset | Sequence[Row]
Scores = Sequence[float | None]


class Grade(NamedTuple):
    """What a reward says of a row. text: a critic's. status: `ok`, `timeout`, `died`, `error`; without a score it is
    None. parts: of a reward that is put together, the number of each."""

    score: float | None
    text: str | None = None
    status: str = "ok"
    parts: Mapping[str, float | None] = {}


class Reward(Value):
    """Subclasses are frozen dataclasses of plain values (a model they hold counts by its fingerprint) that have
    `of_row` (one) or `grade` (all of them); raise `version` when one computes something else."""

    OUTSIDE: ClassVar[bool] = False  # whether `of_row` runs in a process of its own, for `seconds` a row at most

    def __call__(self, data: Rows) -> list[float | None]:
        return [grade.score for grade in self.grade(as_row_dicts(data))]

    def of_row(self, row: Row) -> Any:
        """A number, None, or (number, text) for a row."""
        raise NotImplementedError(f"{type(self).__name__} has neither `of_row` nor `grade`")

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        """A `Grade` for each row."""
        name = type(self).__name__
        if self.OUTSIDE:
            return graded_outside(self.of_row, rows, self.seconds, name)
        return [as_grade(self.of_row(row), name, n) for n, row in enumerate(rows)]

    def __mul__(self, other: Reward) -> Reward:
        return Combined("product", (self, other))


def as_row_dicts(data: Rows) -> list[Row]:
    return python_rows(data.table) if isinstance(data, Dataset) else list(data)


def as_grade(found: Any, name: str, row: int) -> Grade:
    """What a reward gave as a `Grade`. Raises InputError, naming the reward and the row, for anything that is no finite
    number, None, or such a one with a text."""
    if isinstance(found, Grade):
        return found
    score, text = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    (checked,) = checked_scores([score], 1, name, row)
    return Grade(checked, None if text is None else str(text))


def graded_outside(function: Callable[[Row], Any], rows: Sequence[Row], seconds: float, name: str) -> list[Grade]:
    """Grades of a function that runs in processes of its own. Raises InputError where it fails on every row, which is
    the function's fault and not the rows'."""
    found = run_outside(function, rows, seconds)
    errors = [value for status, value in found if status == "error"]
    if found and len(errors) == len(found):
        raise InputError(f"the reward {name} fails on every row: {errors[0]}")
    return [
        as_grade(value, name, n) if status == "ok" else Grade(None, value if status == "error" else None, status)
        for n, (status, value) in enumerate(found)
    ]


@dataclasses.dataclass(frozen=True)
class Function(Reward):
    """A plain function of a row, run in a process of its own for at most `seconds` a row: it gives a number, None, or
    (number, text)."""

    function: Callable[[Row], Any]
    seconds: float = 10.0

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return graded_outside(self.function, rows, self.seconds, name)


def grades(reward: Any, data: Rows) -> list[Grade]:
    """What a reward, or a plain function of a Dataset, says of the rows. Raises InputError for what is neither."""
    if not callable(reward):
        raise InputError(f"a reward is a Reward or a function of a Dataset, not a {type(reward).__name__}")
    if not isinstance(reward, Reward) or type(reward).__call__ is not Reward.__call__:  # it looks at all rows itself
        dataset = data if isinstance(data, Dataset) else Dataset.from_rows(data)
        name = getattr(reward, "__name__", type(reward).__name__)
        return [Grade(score) for score in checked_scores(reward(dataset), len(dataset), name)]
    rows = as_row_dicts(data)
    found = reward.grade(rows)
    if len(found) != len(rows):
        raise InputError(f"the reward {type(reward).__name__} gave {len(found)} scores for {len(rows)} rows")
    return found


def score(data: Rows, reward: Any, column: str = "score") -> Dataset:
    """The rows, a Dataset or a list of dicts, with a number for each in `column`, None where the reward gives none.
    reward: a Reward, or any function of the Dataset.

    Where there are some: `<column>_text` holds the texts of a critic, `<column>_status` what kept a row from its number
    (`timeout`, `died`, `error`), and `<column>_<name>` the parts of rewards put together. Raises InputError, naming the
    reward and the row, for scores that are none."""
    data = data if isinstance(data, Dataset) else Dataset.from_rows(data)
    found = grades(reward, data)
    data = data.with_column(column, pa.array([g.score for g in found], pa.float64()))
    if any(g.text is not None for g in found):
        data = data.with_column(f"{column}_text", [g.text for g in found])
    if any(g.status != "ok" for g in found):
        data = data.with_column(f"{column}_status", [g.status for g in found])
    for name in dict.fromkeys(name for g in found for name in g.parts):
        data = data.with_column(f"{column}_{name}", [g.parts.get(name) for g in found])
    return data


def checked_scores(found: Scores, rows: int, name: str, first: int = 0) -> list[float | None]:
    """Scores as floats and None. Raises InputError, naming the reward and the row, for anything else."""
    try:
        found = list(found)
    except TypeError:
        raise InputError(f"the reward {name} gave {found!r}: a number or None for each row is wanted") from None
    if len(found) != rows or isinstance(found, str):
        raise InputError(f"the reward {name} gave {len(found)} scores for {rows} rows")
    scores: list[float | None] = []
    for n, value in enumerate(found, first):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, str) or (number is not None and not math.isfinite(number)):
            raise InputError(f"the reward {name} gave row {n} {str(value)[:40]!r}: a finite number or None is wanted")
        scores.append(number)
    return scores


# Put together.

HOW = ("product", "minimum", "weighted", "sum_then_normalize", "normalize_then_sum")
EPSILON = 1e-4  # beside a standard deviation, as in trl's GRPO


@dataclasses.dataclass(frozen=True)
class Combined(Reward):
    """how: `product`, `minimum`, `weighted` (sum of weight * score), `sum_then_normalize` (what that sum is above its
    group's mean, in standard deviations: GRPO, arXiv:2402.03300), `normalize_then_sum` (each reward so, then the sum,
    as `trl` does under that name). by: the column whose equal values are a group; none: the rows' parents. A row to
    which one part gives no number has none."""

    how: str
    parts: tuple[Any, ...]
    weights: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    by: str = ""

    def __post_init__(self):
        if self.how not in HOW:
            raise InputError(f"how={self.how!r}: one of {', '.join(HOW)} is wanted")
        flat = [q for p in self.parts for q in (p.parts if self._joins(p) else (p,))]  # a * b * c has three parts
        object.__setattr__(self, "parts", tuple(flat))
        weights = tuple(self.weights) or (1.0,) * len(flat)
        if len(weights) != len(flat) or not flat:
            raise InputError(f"{len(weights)} weights for {len(flat)} rewards")
        object.__setattr__(self, "weights", weights)
        names = tuple(self.names) or _distinct([_snake(getattr(p, "__name__", type(p).__name__)) for p in flat])
        object.__setattr__(self, "names", names)

    def _joins(self, part: Any) -> bool:
        return isinstance(part, Combined) and part.how == self.how == "product"

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        found = [grades(part, rows) for part in self.parts]
        table = np.array([[np.nan if g.score is None else g.score for g in column] for column in found], float)
        weights = np.asarray(self.weights)[:, None]
        if self.how == "product":
            total = table.prod(0)
        elif self.how == "minimum":
            total = table.min(0) if not np.isnan(table).all() else table[0]
        elif self.how == "normalize_then_sum":
            total = (weights * np.stack([self._normalized(scores, rows) for scores in table])).sum(0)
        else:
            total = (weights * table).sum(0)
            total = self._normalized(total, rows) if self.how == "sum_then_normalize" else total
        grades_ = []
        for n, value in enumerate(total.tolist()):
            parts = {name: column[n].score for name, column in zip(self.names, found, strict=True)}
            texts = [column[n].text for column in found if column[n].text]
            status = next((column[n].status for column in found if column[n].status != "ok"), "ok")
            number = None if math.isnan(value) else value
            grades_.append(Grade(number, "\n".join(texts) or None, status, parts))
        return grades_

    def _normalized(self, scores: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        groups: dict[str, list[int]] = {}
        for n, row in enumerate(rows):
            groups.setdefault(str(row.get(self.by) if self.by else row.get("parents")), []).append(n)
        out = np.full(len(scores), np.nan)
        for members in groups.values():
            own = scores[members]
            known = own[~np.isnan(own)]
            spread = known.std(ddof=1) if len(known) > 1 else 0.0
            out[members] = (own - known.mean()) / (spread + EPSILON) if len(known) else np.nan
        return out


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names that stand twice, numbered."""
    number = lambda n: f"_{names[: n + 1].count(names[n])}" if names.count(names[n]) > 1 else ""
    return tuple(name + number(n) for n, name in enumerate(names))


def minimum(*parts: Any) -> Reward:
    """The least of several rewards."""
    return Combined("minimum", parts)


def weighted(parts: Mapping[str, tuple[Any, float]], how: str = "weighted", by: str = "") -> Reward:
    """A weighted sum of named rewards: `weighted({"right": (exact_match(), 0.8), "short": (length(high=50), 0.2)})`.
    how: also `sum_then_normalize` and `normalize_then_sum`, within groups of rows."""
    rewards, weights = zip(*parts.values(), strict=True)
    return Combined(how, tuple(rewards), tuple(map(float, weights)), tuple(parts), by)


def cut_in_steps(text: str, separator: str = "\n") -> list[str]:
    """The steps of a solution: what stands between separators, blank pieces left out."""
    return [piece for piece in text.split(separator) if piece.strip()]


#: How the numbers of steps become one.
TAKEN: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "prod": math.prod,
    "last": lambda x: x[-1],
    "mean": lambda x: sum(x) / len(x),
}


@dataclasses.dataclass(frozen=True)
class Steps(Reward):
    """A process reward: the row's text cut into steps, each graded by `reward` (of the row with the step as its `text`
    and what stands before it as `before`), and these taken together: `min` or `prod` (arXiv:2305.20050), `last`,
    `mean`. The text names the numbers."""

    reward: Any
    separator: str = "\n"
    how: str = "min"
    column: str = "text"

    def __post_init__(self):
        if self.how not in TAKEN:
            raise InputError(f"how={self.how!r}: {', '.join(TAKEN)} are there")

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        asked: list[Row] = []
        counts = []
        for row in rows:
            text = str(field(row, self.column))
            pieces = cut_in_steps(text, self.separator)
            before = [self.separator.join(pieces[:n]) for n in range(len(pieces))]
            asked += [{**row, "text": piece, "before": b} for piece, b in zip(pieces, before, strict=True)]
            counts.append(len(pieces))
        found = iter(grades(self.reward, asked))
        taken = TAKEN[self.how]
        out = []
        for count in counts:
            part = [next(found) for _ in range(count)]
            scores = [g.score for g in part]
            whole = bool(scores) and None not in scores
            status = next((g.status for g in part if g.status != "ok"), "ok")
            out.append(Grade(taken(scores) if whole else None, " ".join(map(str, scores)), status))
        return out


def field(row: Row, name: str) -> Any:
    """A row's value. Raises InputError naming the columns that there are."""
    if name not in row:
        raise InputError(f"there is no column {name!r}; there are {', '.join(row)}")
    return row[name]


def truth(row: Row, name: str) -> Any:
    """A value of the row that was asked. Where the reply's template read a field of the same name, that is the reply's,
    and the row's own is kept as `source_<name>`: an answer is never right by being itself."""
    return field(row, f"source_{name}" if f"source_{name}" in row else name)


#: name -> (module, class). A row's own module is imported when it is first asked for.
REWARDS: dict[str, str] = {
    "exact_match": "curate.verifiers:ExactMatch",
    "api_call": "curate.api_calls:ApiCall",
    "numeric_match": "curate.verifiers:NumericMatch",
    "math_equal": "curate.verifiers:MathEqual",
    "equation": "curate.verifiers:Equation",
    "regex": "curate.verifiers:Regex",
    "json_valid": "curate.verifiers:JsonValid",
    "contains": "curate.verifiers:Contains",
    "length": "curate.verifiers:Length",
    "rouge_l": "curate.verifiers:RougeL",
    "token_count": "curate.verifiers:TokenCount",
    "likelihood": "curate.judges:Likelihood",
    "judge": "curate.judges:Judge",
    "reward_model": "curate.judges:RewardModel",
    "process_reward": "curate.rewards:Steps",
    "process_model": "curate.judges:ProcessModel",
    "function": "curate.rewards:Function",
}


def __getattr__(name: str) -> Any:
    """`rewards.exact_match` and `rewards.ExactMatch`, from the table."""
    classes = {path.partition(":")[2]: path for path in REWARDS.values()}
    path = REWARDS.get(name) or classes.get(name)
    if path is None:
        raise AttributeError(f"there is no reward {name!r}; there are {', '.join(REWARDS)}")
    module, _, kind = path.partition(":")
    return getattr(importlib.import_module(f"recursive_jax.{module}"), kind)
