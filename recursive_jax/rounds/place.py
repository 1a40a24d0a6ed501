"""Where in a run a recipe's rounds are: its arm and its replicate. A recipe that knows of neither, `run.round(1)`, has
its rounds there."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Place:
    """config: of the whole run, arms and all."""

    config: Any
    arm: str
    replicate: int
    replicates: int
    first: bool  # of all places: its models are the run's


_PLACE: contextvars.ContextVar[Place | None] = contextvars.ContextVar("place", default=None)


def place() -> Place | None:
    return _PLACE.get()


def replicate() -> int:
    """Of the recipe that runs, for what is drawn outside of a round's verbs."""
    here = place()
    return 0 if here is None else here.replicate


@contextlib.contextmanager
def placed(where: Place) -> Iterator[None]:
    """Runs that are opened inside are of `where.config`, and their rounds stand at its arm and replicate."""
    token = _PLACE.set(where)
    try:
        yield
    finally:
        _PLACE.reset(token)
