"""SIGTERM, noticed between steps: the work in hand is saved and the process exits with 75."""

from __future__ import annotations

import signal
import threading

import jax

_requested = threading.Event()
_checks = 0


def install() -> None:
    """Notes SIGTERM (and a first Ctrl-C) instead of dying. With several processes JAX's own notifier is used, so that
    all of them stop at the same step although only one was told."""
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        return

    def note(number, frame):
        if _requested.is_set():  # the second time: now
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _requested.set()

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


def stop_requested() -> bool:
    """True once this process (or any of the job) was asked to stop. Collective: every process must call it equally
    often."""
    global _checks
    if jax.process_count() == 1:
        return _requested.is_set()
    from jax.experimental import multihost_utils

    _checks += 1
    return bool(multihost_utils.reached_preemption_sync_point(_checks))


def clear() -> None:
    _requested.clear()
