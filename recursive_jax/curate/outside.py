"""Functions of a row run in processes of their own, under a time limit that kills them: a verifier that hangs, or
brings its process down, costs one row.

The function goes over by `cloudpickle`, one of a script or a notebook too. Nothing here runs code that a model wrote.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import hashlib
import os
import pickle
import queue
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle

from recursive_jax.errors import InputError

START = 120.0  # seconds that a process has to begin
KEPT = 4  # functions whose processes wait for the next call
MEMORY = 8 * 2**30  # bytes that a process may take


def run_outside(
    function: Callable[[Any], Any], items: Sequence[Any], seconds: float, workers: int = 0
) -> list[tuple[str, Any]]:
    """(status, value) of each item, in order: `ok` with what the function gave, `timeout` after `seconds`, `died` where
    its process did, `error` with the message of what it raised. workers: processes; 0: one for each CPU, at most 8.

    Raises InputError for a function that cannot be sent to another process, or that cannot begin there."""
    if not items:
        return []
    try:
        sent = cloudpickle.dumps((list(sys.path), function))
    except Exception as error:
        raise InputError(
            f"the function cannot be sent to a process of its own: {type(error).__name__}: {error}"
        ) from None
    count = min(workers or min(8, os.cpu_count() or 1), len(items))
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(items)):
        todo.put(number)
    found: list[tuple[str, Any]] = [("died", None)] * len(items)
    failures: list[BaseException] = []

    def drain() -> None:
        worker: _Worker | None = None
        try:
            while not failures:
                number = todo.get_nowait()
                worker = worker if worker is not None and worker.alive else _take(sent)
                found[number] = worker.call(items[number], seconds)
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            if worker is not None and worker.alive:
                _keep(sent, worker)

    threads = [threading.Thread(target=drain, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return found


_waiting: collections.OrderedDict[str, list[_Worker]] = collections.OrderedDict()
_lock = threading.Lock()


def _take(sent: bytes) -> _Worker:
    with _lock:
        idle = _waiting.get(hashlib.sha256(sent).hexdigest(), [])
        while idle:
            worker = idle.pop()
            if worker.alive:
                return worker
    return _Worker(sent)


def _keep(sent: bytes, worker: _Worker) -> None:
    with _lock:
        name = hashlib.sha256(sent).hexdigest()
        _waiting.setdefault(name, []).append(worker)
        _waiting.move_to_end(name)
        while len(_waiting) > KEPT:
            for old in _waiting.popitem(last=False)[1]:
                old.kill()


@atexit.register
def close_all() -> None:
    """Ends the processes that wait."""
    with _lock:
        for workers in _waiting.values():
            for worker in workers:
                worker.kill()
        _waiting.clear()


class _Worker:
    """One process. Frames on its pipes are a length of eight bytes and a pickle."""

    def __init__(self, sent: bytes):
        command = [sys.executable, "-c", "from recursive_jax.curate.outside import serve; serve()"]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0)
        self.alive, self._buffer = True, bytearray()
        self._send(sent)
        status, value = self._receive(time.monotonic() + START)
        if status != "ok":
            self.kill()
            said = {"timeout": f"it did not begin in {START:g} seconds", "died": "its process ended"}.get(status, value)
            raise InputError(f"the function cannot run in a process of its own: {said}")

    def call(self, item: Any, seconds: float) -> tuple[str, Any]:
        """What the function gives for an item."""
        self._send(pickle.dumps(item))
        status, value = self._receive(time.monotonic() + seconds)
        if status in ("timeout", "died"):
            self.kill()
        return status, value

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # then the answer says that it died
            self.process.stdin.write(struct.pack("<Q", len(data)) + data)

    def _receive(self, end: float) -> tuple[str, Any]:
        while True:
            if len(self._buffer) >= 8:
                (size,) = struct.unpack("<Q", self._buffer[:8])
                if len(self._buffer) >= 8 + size:
                    frame = bytes(self._buffer[8 : 8 + size])
                    del self._buffer[: 8 + size]
                    return pickle.loads(frame)
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return "timeout", None
            more = os.read(self.process.stdout.fileno(), 2**16)
            if not more:
                return "died", None
            self._buffer += more

    def kill(self) -> None:
        self.alive = False
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def serve() -> None:
    """The process's own loop. What the function prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def answer(status: str, value: Any) -> None:
        try:
            data = pickle.dumps((status, value))
        except Exception as error:
            data = pickle.dumps(("error", f"{type(error).__name__}: {error}"))
        answers.write(struct.pack("<Q", len(data)) + data)

    def receive() -> bytes | None:
        head = requests.read(8)
        return requests.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None

    function: Any = None
    try:
        path, function = _opened(receive())
        sys.path[:] = path
        answer("ok", None)
    except BaseException as error:
        answer("error", f"{type(error).__name__}: {error}")
        return
    while (frame := receive()) is not None:
        try:
            answer("ok", function(pickle.loads(frame)))
        except MemoryError:
            answer("error", "MemoryError")
        except Exception as error:
            answer("error", f"{type(error).__name__}: {str(error)[:200]}")


def _opened(sent: bytes) -> tuple[list[str], Any]:
    return pickle.loads(sent)
