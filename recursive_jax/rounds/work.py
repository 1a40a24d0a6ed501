"""What a run does on its devices, as values: the trainings, the writing and the reading of all its rounds together.
`--dry-run` prices them, `plan` compiles them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from recursive_jax import mesh as meshes
from recursive_jax.config import MeshConfig, SamplingConfig, TrainConfig, row_length
from recursive_jax.models.network import Network
from recursive_jax.objectives.base import Objective
from recursive_jax.objectives.causal import causal
from recursive_jax.rounds.preflight import training_cost


@dataclasses.dataclass(frozen=True)
class Training:
    """train: one of them; times: how often its steps are taken in the whole run. objective: what for; held: the frozen
    networks that it reads, by name."""

    name: str
    network: Network
    train: TrainConfig
    times: float = 1.0
    objective: Objective = causal
    held: tuple[tuple[str, Network], ...] = ()

    @property
    def length(self) -> int:
        return row_length(self.train.length, self.network.max_length)

    @property
    def steps(self) -> float:
        return self.train.steps * self.times

    @property
    def tokens(self) -> float:
        return self.steps * self.train.batch * self.length


@dataclasses.dataclass(frozen=True)
class Writing:
    """rows of about `new` tokens each, after prompts of about `prompt`."""

    name: str
    network: Network
    sampling: SamplingConfig
    rows: float
    prompt: int = 1
    new: int = 1

    @property
    def tokens(self) -> float:
        return self.rows * self.new


@dataclasses.dataclass(frozen=True)
class Reading:
    """Log-probabilities of so many tokens, in rows of about `length`."""

    name: str
    network: Network
    tokens: float
    length: int


Work = Training | Writing | Reading


def cost_lines(work: Sequence[Work | str], mesh: MeshConfig) -> list[str]:
    """Mesh, parameters, memory and compute of a run, as lines; what is a line already stays."""
    items = [item for item in work if not isinstance(item, str)]
    trainings = [item for item in items if isinstance(item, Training)]
    if not trainings:
        written = sum(item.tokens for item in items if isinstance(item, Writing))
        lines = [f"generation    about {written:,.0f} tokens"] if written else []
        return [*lines, *(item for item in work if isinstance(item, str))]
    largest = max(trainings, key=lambda item: item.train.batch * item.length)
    others = sum(item.tokens for item in items if not isinstance(item, Training))
    lines = training_cost(
        largest.network,
        largest.train,
        meshes.make_mesh(mesh),
        round(sum(item.tokens for item in trainings)),
        round(others),
        _what(trainings),
    )
    return [*lines, *(item for item in work if isinstance(item, str))]


def _what(trainings: Iterable[Training]) -> str:
    return ", ".join(f"{item.tokens:,.0f} tokens{f' for {item.name}' if item.name else ''}" for item in trainings)
