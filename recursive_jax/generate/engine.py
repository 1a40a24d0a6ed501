"""The engine: any number of requests through B slots. A row that ends makes room for the next request at once; what is
common to prompts is read once; several decode steps run per dispatch.

    for row in Engine(model, sampling, seed=0).run(requests):   # in the order they finish
        row.request, row.tokens, row.logprobs, row.status, row.text

Memory is constant in the number of requests: they are taken from an iterator, one more than there are free slots.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from recursive_jax import hosts
from recursive_jax import mesh as meshes
from recursive_jax.config import SamplingConfig
from recursive_jax.generate import programs
from recursive_jax.generate.constrain import Constraint
from recursive_jax.generate.prefill import Prefill, Row, prefill_rows
from recursive_jax.generate.request import Draft, Guide, Request
from recursive_jax.generate.speculate import speculate_program
from recursive_jax.generate.text import cut_at_stop
from recursive_jax.models.model import Model

END = object()
LAST = 4  # dispatches rolled into one when no request waits for a slot


@dataclasses.dataclass
class Counts:
    """What an engine has done: finished rows, new tokens (also of rows in work), prompt tokens, dispatches of decode
    steps, and steps; seconds since it began."""

    rows: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)


def slots_for(sampling: SamplingConfig, rows: int) -> SamplingConfig:
    """The settings with no more slots than `rows` requests want: each costs its share of every step. Four times as many
    at each step up, so that few programs are compiled. rows: of the whole generation, never what is left of it: the
    last bits of a log-probability depend on how many rows are multiplied together."""
    wanted, slots = rows * max(sampling.best_of, sampling.beams), 1
    while slots < wanted:
        slots *= 4
    return sampling if slots >= sampling.batch else sampling.model_copy(update={"batch": slots})


class Engine:
    """See the module. guide: a second model or prompt that steers; draft: a small model that guesses ahead (the rows
    stay the same); constraint: what every row must parse as. settings and shared: as in `Prefill`, errors too. partial:
    called with each row that goes on, after every dispatch; a row that it says True of ends there (`cancelled`)."""

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig | None = None,
        *,
        seed: int = 0,
        guide: Guide | None = None,
        draft: Draft | None = None,
        shared: Sequence[int] = (),
        settings: Sequence[SamplingConfig] = (),
        partial: Callable[[Row], bool | None] | None = None,
    ):
        self.partial = partial
        self.sampling = sampling = sampling or SamplingConfig()
        if guide is None and any(s.guidance != 1.0 for s in (sampling, *settings)):
            guide = Guide(model)
        if draft is not None and guide is not None:
            raise ValueError("give a guide or a draft, not both")
        second = [x.model for x in (guide, draft) if x is not None]
        self.guide, self.draft = guide, draft
        self.prefill = Prefill([model, *second], sampling, seed, shared, settings)
        self.mesh, self.counts = self.prefill.mesh, Counts()
        self.constraint = Constraint.of(sampling, self.prefill.tokenizer, self.prefill.model.vocab)
        self.B = sampling.batch + (-sampling.batch % self.prefill.divisor)
        self.rows: list[Row | None] = [None] * self.B
        self._state: programs.Slots | None = None
        self._size = 0
        sides = [*self.prefill.networks, None][:2]
        combine = guide.combine if guide else None
        most, where = sampling.chunk * LAST, meshes.platform(self.mesh)
        if draft is not None:
            self._decode = speculate_program(*sides, self.prefill.dtype, most, draft.ahead)
        elif self.constraint is not None:
            self._decode = self.constraint.decode(*sides, self.prefill.dtype, combine, where)
        else:
            self._decode = programs.decode_program(*sides, self.prefill.dtype, most, combine, where)
        self._empty = lambda slots: programs.empty_program(*sides, self.prefill.dtype, self.B, slots)
        self._params = [*self.prefill.params, None][:2]

    def run(self, requests: Iterable[Request | None]) -> Iterator[Row]:
        """Rows as they finish. A request whose prompt does not fit, or that asks for nothing, is a row at once. None
        says that there is no request now: more are asked for after the next dispatch."""
        source, waiting, exhausted = iter(requests), collections.deque(), False
        with jax.set_mesh(self.mesh):
            while True:
                free = [i for i, row in enumerate(self.rows) if row is None]
                while not exhausted and len(waiting) <= len(free):  # one more tells whether any waits for a slot
                    request = next(source, END)
                    exhausted = request is END
                    if exhausted or request is None:
                        break
                    row = self.prefill.open(request)
                    if row.status:
                        self.counts.rows += 1
                        yield row
                    else:
                        self.counts.prompt_tokens += len(row.prompt)
                        waiting.append(row)
                if waiting and free:
                    self._admit([waiting.popleft() for _ in range(min(len(free), len(waiting)))], free)
                if any(row is not None for row in self.rows):
                    yield from self._work(last=exhausted and not waiting)
                elif exhausted and not waiting:
                    hosts.at("writing, done")
                    return

    def _work(self, last: bool) -> Iterator[Row]:
        """One dispatch of decode steps, and the rows it ended. last: nothing waits for a slot."""
        working = [row for row in self.rows if row is not None]
        hosts.at(f"writing, {self.counts.rows:,} rows done and {self.counts.tokens:,} tokens", short=True)
        # Stop texts, and who looks at rows in work, see them only between dispatches.
        watched = self.partial is not None or any(row.stop_texts for row in working)
        steps = self.sampling.chunk * (LAST if last and not watched else 1)
        steps = min(steps, max(row.limit - len(row.tokens) for row in working))
        self._make_room(working, steps)
        keep_B = meshes.put_batch(self.mesh, np.array([row is not None for row in self.rows]))
        steps = np.int32(steps)
        self._state, *out = self._decode(*self._params, self._state, keep_B, steps, self.prefill.banned)
        tokens_BC, logprobs_BC, count_B = meshes.fetch(tuple(out))
        for slot, row in enumerate(self.rows):
            if row is None:
                continue
            n = int(count_B[slot])
            self.counts.tokens += n
            row.tokens += tokens_BC[slot, :n].tolist()
            row.logprobs += logprobs_BC[slot, :n].tolist()
            if self.constraint is not None and slot in self.constraint.failed:
                row.status, row.text = "constraint", row.text_of(row.tokens)
            going = not row.status and not finish(row)
            if going and self.partial is not None and self.partial(row):
                row.status, row.text = "cancelled", row.text_of(row.tokens)
            if row.status:
                self.rows[slot] = None
                self.counts.rows += 1
                if self.constraint is not None:
                    self.constraint.release(slot)
                yield row
        self.counts.steps += int(count_B.max(initial=0))

    def _make_room(self, rows: Sequence[Row], steps: int) -> None:
        """A cache with room for `steps` more tokens of the rows. It grows with them, since attention reads all of
        it."""
        ahead = 2 * (self.draft.ahead + 1) if self.draft else 0
        size = self.prefill.size(max(len(row.prompt) + len(row.tokens) for row in rows) + steps + ahead)
        if self._state is None:
            self._size = size
            self._state = self._empty(size)(meshes.put_batch(self.mesh, self.prefill.terms([None] * self.B)))
        elif size > self._size or size * 4 <= self._size:
            self._size = size
            self._state = programs.resize_program(size)(self._state)

    def _admit(self, rows: list[Row], free: list[int]) -> None:
        """Reads the rows' prompts and puts them into slots; equal prompts are read once."""
        self._make_room([*rows, *(row for row in self.rows if row is not None)], self.sampling.chunk)
        groups: dict[tuple[tuple[bytes, int], ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(self._prompts(row), []).append(row)
        plans: dict[tuple, list[tuple[tuple[bytes, int], ...]]] = {}
        for prompts in groups:
            plans.setdefault(tuple(self.prefill.plan(_ids(p), both) for p, both in prompts), []).append(prompts)
        slots = iter(free)
        for plan, members in sorted(plans.items()):
            U = prefill_rows(max(side.width for side in plan), self.B, self.prefill.divisor)
            for begin in range(0, len(members), U):
                chunk = members[begin : begin + U]
                sides = [self.prefill.read(i, side, [_ids(m[i][0]) for m in chunk], U) for i, side in enumerate(plan)]
                placed = [(u, row, next(slots)) for u, member in enumerate(chunk) for row in groups[member]]
                for start in range(0, len(placed), U):
                    self._insert(sides, placed[start : start + U], U)

    def _prompts(self, row: Row) -> tuple[tuple[bytes, int], ...]:
        """What the model, and the second one where there is one, read before the row; and how much of it both ways."""
        prompts = [(row.prompt, row.request.both_ways)]
        if self.guide is not None:
            prompts.append((self.guide.prompt(row.request, self.prefill.tokenizer.bos), 0))
        elif self.draft is not None:
            prompts.append(prompts[0])
        return tuple((np.ascontiguousarray(p, np.int32).tobytes(), both) for p, both in prompts)

    def _insert(self, sides: list[tuple[Any, Any]], placed: list[tuple[int, Row, int]], U: int) -> None:
        source, slot = np.zeros(U, np.int32), np.full(U, self.B, np.int32)
        rows: list[Row | None] = [None] * U
        for i, (u, row, at) in enumerate(placed):
            source[i], slot[i], rows[i] = u, at, row
            self.rows[at] = row
            if self.constraint is not None:
                self.constraint.start(at, opens=not row.text_of.before)
        (logits, memory), (guide_logits, guide) = [*sides, (None, None)][:2]
        terms = meshes.put_replicated(self.mesh, self.prefill.terms(rows))
        new = programs.Slots(memory, logits, terms, guide, guide_logits)
        self._state = programs.insert_program()(self._state, new, source, slot)


def _ids(prompt: bytes) -> np.ndarray:
    return np.frombuffer(prompt, np.int32)


def finish(row: Row) -> bool:
    """Whether the row is done; then sets its status and text, and cuts it where a stop text was complete."""
    if row.stop_texts:
        cut = cut_at_stop(row.tokens, row.stop_texts, row.sampling.min_tokens, row.text_of)
        if cut is not None:
            kept, row.text = cut
            row.tokens, row.logprobs, row.status = row.tokens[:kept], row.logprobs[:kept], "ok"
            return True
    stopped = bool(row.tokens) and row.tokens[-1] in row.stops
    if not stopped and len(row.tokens) < row.limit:
        return False
    row.status, row.text = "ok" if stopped else "length", row.text_of(row.tokens)
    return True
