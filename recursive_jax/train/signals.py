"""SIGTERM, noticed between steps: the work in hand is saved and the process exits with 75."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import jax
import numpy as np

EVERY = 8  # steps between the agreements of several processes; each one waits for the slowest
_requested = threading.Event()
_calls = 0


def install() -> Callable[[], None]:
    """Notes SIGTERM (and a first Ctrl-C) instead of dying. Returns the function that puts the old handlers back."""
    _requested.clear()
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def note(number, frame):
        if _requested.is_set():  # the second time: now
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _requested.set()

    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    return restore


def stop_requested(now: bool = False) -> bool:
    """True once any process of the job was asked to stop. With several processes every one must call it equally often;
    they agree at every EVERY-th call, or at once with `now`.

    JAX's own preemption notice is not used: its sync points are shared with Orbax, which counts them by another step.
    """
    global _calls
    if jax.process_count() == 1:
        return _requested.is_set()
    _calls += 1
    if _calls % EVERY and not now:
        return False
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(_requested.is_set()))))


def clear() -> None:
    _requested.clear()
