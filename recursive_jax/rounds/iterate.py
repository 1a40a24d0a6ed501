"""`iterate`: the recursion. Each round's data comes from the last round's model, mixed by one of the named regimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from recursive_jax.collapse.tasks import Choices, Task
from recursive_jax.config import ArmConfig, RoundsConfig
from recursive_jax.curate.select import Rule
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.identity import named
from recursive_jax.models.model import Model
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.gate import Gate
from recursive_jax.rounds.round import Chain, Round


@dataclasses.dataclass
class Pool:
    """What a round's student is trained on.

    data: `replace` (this round's rows only), `accumulate` (all real and synthetic rows so far; arXiv:2404.01413),
    `accumulate_subsample` (a round's budget of them, whatever grow says; arXiv:2410.16713), `window` (the last `window`
    rounds). anchor: share of real rows, the same every round; fresh: share of real rows, new ones every round; carry:
    share of the last round's training rows, passed on unchanged. weighted: as many new real tokens again, their loss
    weighted w against 1 - w (arXiv:2502.18049). filtered: (verifier, keep_right, keep_wrong), of generated rows; the
    verifier says of each row of a Dataset whether it is right (arXiv:2406.07515). tokens: the budget of a round, equal
    for every regime; with grow the whole pool is used. sizes: the budgets of all rounds, where they differ.
    """

    real: Stored
    tokens: int
    data: str = "replace"
    window: int = 2
    anchor: float = 0.0
    fresh: float = 0.0
    carry: float = 0.0
    weighted: float | None = None
    filtered: tuple[Rule, float, float] | None = None
    grow: bool = False
    sizes: tuple[int, ...] = ()
    rows: list[Stored] = dataclasses.field(default_factory=list)
    training: Stored | None = None  # the last round's

    @classmethod
    def of(cls, real: Stored, arm: ArmConfig, rounds: RoundsConfig, verifier: Rule | None = None) -> Pool:
        shares = {k: getattr(arm, k) for k in ("data", "window", "anchor", "fresh", "carry", "weighted")}
        filtered = arm.filtered and (verifier, arm.filtered.keep_right, arm.filtered.keep_wrong)
        grow = rounds.budget == "grow"
        shares["window"] = arm.window or 2
        return cls(real, rounds.token_budget, **shares, filtered=filtered, grow=grow, sizes=rounds.sizes)

    def begin(self, number: int) -> None:
        """The budget of round `number` (from 1)."""
        if self.sizes:
            self.tokens = self.sizes[number - 1]

    @property
    def kept_tokens(self) -> int:
        """Of a round's budget, what is not generated."""
        return round((self.anchor + self.fresh + self.carry) * self.tokens)

    @property
    def synthetic_tokens(self) -> int:
        """Tokens a round has to generate."""
        return max(1, self.tokens - self.kept_tokens) if self.anchor + self.fresh + self.carry < 1.0 else 0

    def settings(self, number: int) -> dict:
        """What decides the training rows, beside the pool. New regimes stand in it only where they are used, so that
        runs of before keep their fingerprints."""
        found = {k: getattr(self, k) for k in ("tokens", "data", "window", "anchor", "fresh", "grow")}
        found |= {k: getattr(self, k) for k in ("carry", "weighted") if getattr(self, k)}
        if self.fresh or self.weighted:  # where new real rows begin depends on the budgets of other rounds
            found["begin"] = self._begin(number, 1.0 if self.weighted else self.fresh)
        return found

    def kept(self) -> list[Stored]:
        """The rounds' rows that this regime still draws on, oldest first."""
        if self.data == "replace":
            return self.rows[-1:]
        return self.rows[-self.window :] if self.data == "window" else self.rows

    def sources(self) -> list[Stored]:
        """The stored rows this round draws on, oldest first."""
        found = self.kept()
        if self.carry and self.training is not None:
            found = [self.training, *found]
        needs_real = self.accumulates or self.weighted or self.anchor + self.fresh + self.carry > 0
        return [self.real, *found] if needs_real else found

    @property
    def accumulates(self) -> bool:
        return self.data.startswith("accumulate")

    def mix(self, number: int, seed: int) -> Dataset:
        """The training rows of round `number` (from 1)."""
        real: Dataset = self.real.value
        members = [s.value for s in self.kept()]
        if self.accumulates:
            members = [real, *members]
        rng = np.random.default_rng([seed, number])
        drawn = usable(Dataset.concat([alone(m) for m in members]))
        drawn = drawn.take(rng.permutation(len(drawn)))
        if not self.grow or self.data == "accumulate_subsample":
            drawn = drawn.first_tokens(self.tokens - self.kept_tokens) if self.synthetic_tokens else Dataset.empty()
        if self.weighted:
            fresh, w = self._fresh(real, number, 1.0), self.weighted
            return fresh.with_column("weight", [w] * len(fresh)) + drawn.with_column("weight", [1 - w] * len(drawn))
        parts = [drawn]
        if self.carry:
            before = real if self.training is None else self.training.value
            before = before.take(rng.permutation(len(before)))
            parts.insert(0, before.first_tokens(round(self.carry * self.tokens)))
        if self.anchor:
            parts.insert(0, real.first_tokens(round(self.anchor * self.tokens)))
        if self.fresh:
            parts.insert(0, self._fresh(real, number, self.fresh))
        return Dataset.concat(parts)

    def verified(self, seed: int) -> Rule:
        """The rule of `filtered`: each row is kept at its rate, random numbers of `seed` deciding."""
        verifier, keep_right, keep_wrong = self.filtered
        name = f"{verifier.name}: right at {keep_right:g}, wrong at {keep_wrong:g}, seed {seed}"
        return Rule(name, Verified(verifier, keep_right, keep_wrong, seed))

    def _begin(self, number: int, share: float) -> int:
        """Real tokens that the anchor and the rounds before used."""
        sizes = self.sizes or (self.tokens,) * number
        return round(self.anchor * max(sizes)) + sum(round(share * n) for n in sizes[: number - 1])

    def _fresh(self, real: Dataset, number: int, share: float) -> Dataset:
        """Real rows that neither the anchor nor an earlier round used."""
        want = round(share * self.tokens)
        ends = np.cumsum([len(t) for t in real.tokens()])
        begin = self._begin(number, share)
        low, high = np.searchsorted(ends, [begin, begin + want], side="right")
        if high >= len(ends):
            raise InputError(
                f"round {number} has no new real rows left: a share of {share:g} of {self.tokens} tokens a round uses "
                f"{begin + want} real tokens by then, there are {int(ends[-1])}; raise data.real_tokens or give more "
                "data"
            )
        return real.take(np.arange(low, high))


@dataclasses.dataclass(frozen=True)
class Verified:
    """Keeps rows at one rate where the verifier calls them right, at another where wrong."""

    verifier: Rule
    keep_right: float
    keep_wrong: float
    seed: int

    def __call__(self, data: Dataset) -> np.ndarray:
        rate_N = np.where(np.asarray(self.verifier.keep(data), bool), self.keep_right, self.keep_wrong)
        return np.random.default_rng(self.seed).random(len(data)) < rate_N


def alone(data: Dataset) -> Dataset:
    """Rows as texts of their own: a student learns what was written from the start token, as the collapse papers do,
    not as the answer to the prompt it was written to."""
    if not any(len(p) > 1 for p in data.prompts()):
        return data
    return data.with_column("prompt", [[]] * len(data))


def usable(data: Dataset) -> Dataset:
    """Rows that can be trained on: not failed, not empty."""
    status = data.column("status")
    lengths = [len(t) for t in data.tokens()]
    if len(data) and not any(lengths) and any(data.column("text")):
        raise InputError(
            "these rows have texts and no tokens (a remote model wrote them), and a pool is measured in tokens: encode "
            "them first, by data.given.as_dataset(rows, student.tokenizer), or give them to round.train as they are"
        )
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
    promote: str = "always",
    target: Task | Choices | None = None,
    retention: Task | Choices | None = None,
    alpha: float = 0.05,
) -> Model:
    """Runs `rounds` rounds and returns the last teacher: the last round's model, or the last that was promoted (every
    round's is stored; few are kept in memory).

    round_fn(round, teacher, start, pool) -> student. `teacher` is the last round's model (`base` in round 1), `start`
    the model a student begins from: `base`, `previous` (the teacher itself) or `scratch` (`blank`, what the first
    teacher was trained from: imported weights, or by default fresh params, a new initialisation every round). round_fn
    appends what it generates to `pool.rows`.

    promote: whether a student becomes the teacher of the next round: `always`, where it is `better` on the target, or
    where a `paired_test` at `alpha` says so, corrected over the rounds (`gate.Gate`). target, retention: tasks that
    every round's model is graded on, whatever promote is; in RUN/ledger.csv, status and report."""
    if init not in ("base", "previous", "scratch"):
        raise InputError(f"init={init!r}: base, previous or scratch is wanted")
    gate = Gate(promote, target, retention, alpha)
    teacher, known = base, gate.grade(chain.round(0), base)
    for number in range(1, rounds + 1):
        round = chain.round(number)
        start = {"base": base, "previous": teacher, "scratch": blank or base.with_params(None)}[init]
        student = round_fn(round, teacher, start, pool)
        found = gate.grade(round, student)
        if not gate.measures or gate.decide(round, student, found, known):
            teacher, known = student, found
    return teacher


def generate_and_mix(round: Round, teacher: Model, pool: Pool, requests, sampling) -> Stored:
    """The first half of most rounds: new rows from the teacher, mixed with the pool into stored training rows."""
    pool.begin(round.number)
    if pool.synthetic_tokens:
        new = round.generate("rows", teacher, requests, sampling, tokens=pool.synthetic_tokens)
        if pool.filtered:
            new = round.select("kept", new, [pool.verified(round.seed("kept"))])
            if not len(new.value):
                raise InputError(
                    f"{round.label}: the verifier kept none of {new.manifest['counts']['proposed']} rows; raise "
                    "keep_right or keep_wrong"
                )
        pool.rows.append(new)
        pool.rows = pool.kept()
    inputs = {str(i): s for i, s in enumerate(pool.sources())}
    seed = round.seed("mix")
    settings = {**pool.settings(round.number), "seed": seed}
    mix = named("mix", 1)(lambda: pool.mix(round.number, seed))  # all that it captures is in inputs and settings
    pool.training = round.dataset("training", mix, inputs=inputs, config=settings)
    return pool.training
