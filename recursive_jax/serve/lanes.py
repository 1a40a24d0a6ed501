"""Engines on threads: requests that can be decoded together are, and join while others are in work.

What is compiled differs with the settings (which rules take part, a grammar) and with the number of slots, each of
which costs its share of every step: a kind of request has lanes of 1, 4, 16, ... slots, and takes the smallest that has
room. A lane is an engine on a thread of its own, that ends when it was idle for a while."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any

from recursive_jax.config import SamplingConfig
from recursive_jax.errors import RecursiveJaxError
from recursive_jax.generate.engine import Engine
from recursive_jax.generate.prefill import OF_ALL, Row, ends_of
from recursive_jax.generate.request import Request
from recursive_jax.generate.sampling import used_rules
from recursive_jax.models.model import Model

IDLE = 60.0  # seconds after which a lane without requests ends
LANES = 16  # at most
CHUNK = 4  # decode steps of a dispatch: what streams comes that many tokens at once


class Busy(RecursiveJaxError):
    """Too much waits already; ask again later."""


class Job:
    """A request in work. said: called on the lane's thread with the row as it grows; done: with the finished row, or
    with what went wrong. `cancel` gives it up."""

    def __init__(self, request: Request, said: Callable[[Row], None] | None, done: Callable[[Row | Exception], None]):
        self.request, self.said, self.done = request, said, done
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Lane:
    """One engine. `ended` is set once it takes no more."""

    def __init__(self, model: Model, sampling: SamplingConfig):
        self.model, self.sampling = model, sampling
        self.waiting: collections.deque[Job] = collections.deque()
        self.jobs: dict[int, Job] = {}  # in work, by the identity of the request
        self.changed, self.closing, self.ended = threading.Condition(), False, False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def put(self, job: Job) -> bool:
        """Whether it was taken: a lane that has ended takes none."""
        with self.changed:
            if self.ended or self.closing:
                return False
            self.waiting.append(job)
            self.changed.notify()
            return True

    def close(self) -> None:
        """No more are taken; those in work are given up."""
        with self.changed:
            self.closing = True
            for job in [*self.waiting, *self.jobs.values()]:
                job.cancel()
            self.changed.notify()

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.jobs

    def _requests(self) -> Iterator[Request | None]:
        while True:
            with self.changed:
                if not self.waiting and not self.jobs and not self.closing:
                    self.changed.wait(IDLE)
                if not self.waiting and not self.jobs:
                    self.ended = True  # under the lock: whoever comes now takes another lane
                    return
                job = self.waiting.popleft() if self.waiting else None
                if job is not None and not job.cancelled:
                    self.jobs[id(job.request)] = job
            if job is None:
                yield None
            elif job.cancelled:
                job.done(RecursiveJaxError("the request was given up"))
            else:
                yield job.request

    def _said(self, row: Row) -> bool:
        job = self.jobs[id(row.request)]
        if not job.cancelled and job.said is not None:
            job.said(row)
        return job.cancelled

    def _work(self) -> None:
        try:
            engine = Engine(self.model, self.sampling, partial=self._said)
            for row in engine.run(self._requests()):
                self.jobs.pop(id(row.request)).done(row)
        except Exception as error:  # of any kind: whoever waits is told
            with self.changed:
                self.ended = True
                left = [*self.jobs.values(), *self.waiting]
                self.jobs.clear()
                self.waiting.clear()
            for job in left:
                job.done(error)


class Lanes:
    """Takes requests for one model. slots: rows decoded together in a lane; most: rows that may wait or be in work."""

    def __init__(self, model: Model, slots: int, most: int):
        self.model, self.slots, self.most = model, slots, most
        self._lanes: dict[Any, Lane] = {}
        self._lock = threading.Lock()
        self.closed = False

    def put(self, jobs: list[Job], sampling: SamplingConfig) -> None:
        """Takes up requests of one kind, all or none. Raises Busy."""
        key = (tuple(getattr(sampling, k) for k in OF_ALL), used_rules([sampling]), sampling.bad_words)
        key += (ends_of(self.model.tokenizer, sampling)[1], sampling.guidance)
        with self._lock:
            lanes = [lane for lane in self._lanes.values() if not lane.ended]
            if self.closed or sum(len(n.waiting) + len(n.jobs) for n in lanes) + len(jobs) > self.most:
                raise Busy(f"{self.most} rows wait or are in work: ask again in a while")
            self._lanes = {k: lane for k, lane in self._lanes.items() if not lane.ended}
            key, slots = self._place(key, len(jobs))
            lane = self._lanes.get(key)
            if lane is None and len(self._lanes) >= LANES:
                idle = [k for k, lane in self._lanes.items() if lane.idle]
                if not idle:
                    raise Busy(f"{len(self._lanes)} kinds of settings are in work: ask again in a while")
                self._lanes.pop(idle[0]).close()
            for job in jobs:
                if lane is None or not lane.put(job):
                    own = sampling.model_copy(update={"batch": slots, "chunk": CHUNK})
                    lane = self._lanes[key] = Lane(self.model, own)
                    lane.put(job)

    def _place(self, kind: Any, rows: int) -> tuple[Any, int]:
        """(the lane of a kind that has room for so many rows, its slots): the smallest, or else the largest."""
        slots = 1
        while slots < self.slots:
            lane = self._lanes.get((kind, slots))
            if rows + (0 if lane is None else len(lane.waiting) + len(lane.jobs)) <= slots:
                break
            slots *= 4
        slots = min(slots, self.slots)
        return (kind, slots), slots

    def close(self) -> None:
        with self._lock:
            self.closed = True
            lanes = list(self._lanes.values())
        for lane in lanes:
            lane.close()
        for lane in lanes:
            lane.thread.join(timeout=30)
