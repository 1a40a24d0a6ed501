"""A gate: whether a round's student becomes the next round's teacher."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from recursive_jax.collapse.evaluate import evaluate
from recursive_jax.collapse.paired import paired_p, spent
from recursive_jax.collapse.tasks import Choices, Task
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.identity import Value
from recursive_jax.models.model import Model
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Round

WAYS = ("always", "better", "paired_test")


@dataclasses.dataclass(frozen=True)
class Gate(Value):
    """promote: `always`; `better`: its mean score on the target is higher; `paired_test`: it is, and chance does not
    explain it (`paired.paired_p`, at `alpha` for the whole chain of rounds). retention: another task, of what is not
    trained for: it is measured, and decides nothing."""

    promote: str = "always"
    target: Task | Choices | None = None
    retention: Task | Choices | None = None
    alpha: float = 0.05

    def __post_init__(self):
        if self.promote not in WAYS:
            raise InputError(f"promote={self.promote!r}: {', '.join(WAYS)} are there")
        if self.promote != "always" and self.target is None:
            raise InputError(f"promote={self.promote!r} needs a target: a task that both models are graded on")
        for name in ("target", "retention"):
            task = getattr(self, name)
            if task is not None and not isinstance(task, (Task, Choices)):
                raise InputError(f"{name}={str(task)[:60]!r}: a task is wanted (rj.tasks), not {type(task).__name__}")
        if not 0.0 < self.alpha < 1.0:
            raise InputError(f"alpha={self.alpha}: a share between 0 and 1 is wanted")

    @property
    def measures(self) -> bool:
        return self.target is not None or self.retention is not None

    def grade(self, round: Round, model: Model) -> dict[str, Stored]:
        """The rows of target and retention with the model's scores, stored as `target` and `retention`."""
        tasks = {"target": self.target, "retention": self.retention}
        return {name: round.dataset(name, graded, model, task) for name, task in tasks.items() if task is not None}

    def decide(self, round: Round, student: Model, new: dict[str, Stored], old: dict[str, Stored]) -> bool:
        """Whether the student is promoted; with all that says why as the evaluation `gate` of the round."""
        arguments = (self.promote, self.alpha, round.number)
        found = round.evaluate("gate", student, decision, new, old, *arguments, inputs=_inputs(new, old))
        return bool(found["promoted"])


def graded(model: Model, task: Task | Choices) -> Dataset:
    return evaluate(model, task).rows


def _inputs(new: dict[str, Stored], old: dict[str, Stored]) -> dict[str, Any]:
    return {**{f"student {name}": s for name, s in new.items()}, **{f"teacher {name}": s for name, s in old.items()}}


def decision(
    new: dict[str, Stored], old: dict[str, Stored], promote: str, alpha: float, number: int
) -> dict[str, float | str | None]:
    """The metrics of a gate: `target` and `retention` of the student, `..._teacher` of the model before it, `target_p`
    of their comparison and `target_p_adjusted` for the rounds so far, `promoted` (1 or 0)."""
    metrics: dict[str, float | str | None] = {}
    for name in new:
        mine, theirs = scores(new[name].value), scores(old[name].value)
        metrics |= {name: float(np.nanmean(mine)), f"{name}_teacher": float(np.nanmean(theirs))}
        known = mine[~np.isnan(mine)]
        metrics[f"{name}_stderr"] = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else None
        if name == "target":
            p, how = paired_p(mine, theirs)
            metrics |= {"target_p": p, "target_p_adjusted": min(1.0, p / spent(number)), "target_test": how}
    better = "target" in metrics and metrics["target"] > metrics["target_teacher"]
    ways = {
        "always": lambda: True,
        "better": lambda: better,
        "paired_test": lambda: better and metrics["target_p_adjusted"] <= alpha,
    }
    return {**metrics, "promoted": float(ways[promote]())}


def scores(rows: Dataset) -> np.ndarray:
    """float `[N]`, NaN for a row without one."""
    return np.array([np.nan if score is None else score for score in rows.column("score")], float)
