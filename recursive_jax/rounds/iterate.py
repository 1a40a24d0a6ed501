"""`iterate`: the recursion. Each round's data comes from the last round's model, mixed by one of the named regimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Chain, Round


@dataclasses.dataclass
class Pool:
    """What a round's student is trained on.

    data: `replace` (this round's rows only), `accumulate` (all real and synthetic rows so far; arXiv:2404.01413),
    `window` (the last `window` rounds). anchor: share of real rows, the same every round; fresh: share of real rows,
    new ones every round. tokens: the budget of a round, equal for every regime; with grow the whole pool is used.
    """

    real: Stored
    tokens: int
    data: str = "replace"
    window: int = 2
    anchor: float = 0.0
    fresh: float = 0.0
    grow: bool = False
    rows: list[Stored] = dataclasses.field(default_factory=list)

    @property
    def real_tokens(self) -> int:
        return round((self.anchor + self.fresh) * self.tokens)

    @property
    def synthetic_tokens(self) -> int:
        """Tokens a round has to generate."""
        return max(1, self.tokens - self.real_tokens) if self.anchor + self.fresh < 1.0 else 0

    def settings(self) -> dict:
        return {k: getattr(self, k) for k in ("tokens", "data", "window", "anchor", "fresh", "grow")}

    def kept(self) -> list[Stored]:
        """The rounds' rows that this regime still draws on, oldest first."""
        return {"replace": self.rows[-1:], "window": self.rows[-self.window :], "accumulate": self.rows}[self.data]

    def sources(self) -> list[Stored]:
        """The stored rows this round draws on, oldest first."""
        needs_real = self.data == "accumulate" or self.real_tokens > 0
        return [self.real, *self.kept()] if needs_real else self.kept()

    def mix(self, number: int, seed: int) -> Dataset:
        """The training rows of round `number` (from 1)."""
        real: Dataset = self.real.value
        members = [s.value for s in self.kept()]
        if self.data == "accumulate":
            members = [real, *members]
        rng = np.random.default_rng([seed, number])
        drawn = usable(sum(members[1:], members[0])) if members else Dataset.empty()
        drawn = drawn.take(rng.permutation(len(drawn)))
        if not self.grow:
            drawn = drawn.first_tokens(self.tokens - self.real_tokens) if self.synthetic_tokens else Dataset.empty()
        parts = [drawn]
        if self.anchor:
            parts.insert(0, real.first_tokens(round(self.anchor * self.tokens)))
        if self.fresh:
            parts.insert(0, self._fresh(real, number))
        return sum(parts[1:], parts[0])

    def _fresh(self, real: Dataset, number: int) -> Dataset:
        """Real rows that neither the anchor nor an earlier round used."""
        want = round(self.fresh * self.tokens)
        ends = np.cumsum([len(t) for t in real.tokens()])
        begin = round(self.anchor * self.tokens) + (number - 1) * want
        low, high = np.searchsorted(ends, [begin, begin + want], side="right")
        if high >= len(ends):
            raise InputError(
                f"round {number} has no new real rows left: fresh={self.fresh} of {self.tokens} tokens a round uses "
                f"{begin + want} real tokens by then, there are {int(ends[-1])}; raise data.tokens or give more data"
            )
        return real.take(np.arange(low, high))


def usable(data: Dataset) -> Dataset:
    """Rows that can be trained on: not failed, not empty."""
    status = data.column("status")
    lengths = [len(t) for t in data.tokens()]
    keep = [i for i, (s, n) in enumerate(zip(status, lengths, strict=True)) if s in ("ok", "length") and n]
    return data if len(keep) == len(data) else data.take(np.array(keep, np.int64))


RoundFn = Callable[[Round, Model, Model, Pool], Model]


def iterate(
    chain: Chain,
    round_fn: RoundFn,
    rounds: int,
    *,
    base: Model,
    pool: Pool,
    init: str = "base",
    blank: Model | None = None,
) -> Model:
    """Runs `rounds` rounds and returns the last one's model (every round's is stored; none but the last is kept in memory).

    round_fn(round, teacher, start, pool) -> student. `teacher` is the last round's model (`base` in round 1), `start`
    the model a student begins from: `base`, `previous` (the teacher itself) or `scratch` (`blank`, what the first teacher
    was trained from: imported weights, or by default fresh params, a new initialisation every round). round_fn appends
    what it generates to `pool.rows`.
    """
    if init not in ("base", "previous", "scratch"):
        raise InputError(f"init={init!r}: base, previous or scratch is wanted")
    teacher = base
    for number in range(1, rounds + 1):
        start = {"base": base, "previous": teacher, "scratch": blank or base.with_params(None)}[init]
        teacher = round_fn(chain.round(number), teacher, start, pool)
    return teacher


def generate_and_mix(round: Round, teacher: Model, pool: Pool, requests, sampling) -> Stored:
    """The first half of most rounds: new rows from the teacher, mixed with the pool into stored training rows."""
    if pool.synthetic_tokens:
        new = round.generate("rows", teacher, requests, sampling, tokens=pool.synthetic_tokens)
        pool.rows.append(new)
        pool.rows = pool.kept()
    inputs = {str(i): s.fingerprint for i, s in enumerate(pool.sources())}
    seed = round.seed("mix")
    return round.dataset("training", lambda: pool.mix(round.number, seed), inputs, {**pool.settings(), "seed": seed})
