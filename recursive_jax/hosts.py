"""The processes of one job: a roll call before JAX starts, and a watch while they work.

JAX's own start-up waits, then aborts with a stack trace that names nobody; a process that dies leaves the others in a
collective for minutes. Here process 0 says who is missing, and when one is gone or stuck, all end with a message that
says which, on what host, at what, for how long; and with exit code 75, after which the same command goes on.

Process 0 listens one port above the coordinator's address (RECURSIVE_JAX_WATCH_PORT: another; `off`: no watch). What
is sent are lines of JSON. Of a process 0 that dies JAX's own client tells the others first, and aborts them (exit code
134)."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from recursive_jax.errors import EXIT_PREEMPTED, InputError, Preempted, say

START = 300.0  # seconds that processes have to come (RECURSIVE_JAX_START_SECONDS)
STUCK = (
    1800.0  # seconds that one may be at the same step or dispatch (RECURSIVE_JAX_STUCK_SECONDS), its compilation too
)
SILENT = 60.0  # seconds without a word from one: it is cut off (RECURSIVE_JAX_SILENT_SECONDS)
EVERY = 1.0  # seconds between words
GRACE = 5.0  # seconds for the others to end by themselves where one ended: an error that all of them have


@dataclasses.dataclass(frozen=True)
class Places:
    """Where this process stands in its job. source: what said so."""

    coordinator: str
    processes: int
    process: int
    source: str


def places(env: Mapping[str, str] = os.environ) -> Places | None:
    """From JAX's own variables, those of TPUs on GKE, or SLURM; None: one process, or a platform that JAX alone knows.
    Raises InputError for variables that say half, or what cannot be."""
    if "JAX_COORDINATOR_ADDRESS" in env:
        missing = [k for k in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if k not in env]
        if missing:
            raise InputError(f"JAX_COORDINATOR_ADDRESS is set but {' and '.join(missing)} is not")
        count, own = _number(env, "JAX_NUM_PROCESSES"), _number(env, "JAX_PROCESS_ID")
        if not 0 <= own < max(count, 1) or ":" not in env["JAX_COORDINATOR_ADDRESS"]:
            raise InputError(
                f"JAX_PROCESS_ID={own} of JAX_NUM_PROCESSES={count} at {env['JAX_COORDINATOR_ADDRESS']}: ids count "
                "from 0, and the address is HOST:PORT of process 0"
            )
        return Places(env["JAX_COORDINATOR_ADDRESS"], count, own, "JAX_COORDINATOR_ADDRESS")
    hosts = [h for h in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    if len(hosts) > 1 and "TPU_WORKER_ID" in env and "MEGASCALE_NUM_SLICES" not in env:
        # The watch is at 8477; JAX's own coordinator is at a port that JAX chooses (8482).
        return Places(f"{hosts[0]}:8476", len(hosts), _number(env, "TPU_WORKER_ID"), "TPU_WORKER_HOSTNAMES")
    # Of the step that srun started, not of the allocation: a shell inside `salloc -n 8` is one process.
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        port = 65535 - 2 * 2**12 + _number(env, "SLURM_JOB_ID", 0) % 2**12  # below those that JAX chooses from
        first = first_node(env.get("SLURM_STEP_NODELIST", "localhost"))
        count, own = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
        return Places(f"{first}:{port}", count, own, "SLURM")
    return None


def first_node(nodes: str) -> str:
    """The first host of a SLURM list: `tpu[003-007,9],gpu1` is tpu003."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]+))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InputError(f"{name}={value!r}: a whole number is wanted") from None


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    value = env.get(f"RECURSIVE_JAX_{name}_SECONDS", default)
    try:
        if float(value) > 0:
            return float(value)
    except ValueError:
        pass
    raise InputError(f"RECURSIVE_JAX_{name}_SECONDS={value!r}: a number above 0 is wanted")


# ---- what this process is at

_at: list[Any] = ["starting", time.monotonic(), False]


def at(what: str, short: bool = False) -> None:
    """Says what this process does now; a new word is progress. short: it is over soon, and another word follows: one
    that is at it for long is stuck."""
    _at[:] = [what, time.monotonic(), short]


# ---- the watch

_watch: Watch | None = None


def begin(where: Places, env: Mapping[str, str] = os.environ) -> None:
    """The roll call; then the watch, for as long as this process lives. Raises Preempted where some do not come, and
    InputError where they contradict each other."""
    global _watch
    port = env.get("RECURSIVE_JAX_WATCH_PORT", "")
    if port == "off" or where.processes < 2 or _watch is not None:
        return
    host, _, own = where.coordinator.rpartition(":")
    chosen = _number(env, "RECURSIVE_JAX_WATCH_PORT") if port else int(own) + 1
    limits = [_seconds(env, *limit) for limit in (("START", START), ("STUCK", STUCK), ("SILENT", SILENT))]
    kind = First if where.process == 0 else Other
    watch = kind(where, host, chosen, *limits)
    watch.call()
    _watch = watch
    watch.start()


def watched() -> bool:
    return _watch is not None


def leave() -> None:
    """This process has done all its work: it is not missed."""
    if _watch is not None:
        _watch.leave()


def settle() -> None:
    """Time for the watch to find who is gone, and to end this process with its name."""
    time.sleep(GRACE + 3 * EVERY)


def fail(code: int) -> None:
    """This process ends with an error: at once, where others wait for it. JAX's own end would wait for them."""
    if _watch is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # which closes the connection: the others end after GRACE


def line(file: Any) -> dict[str, Any] | None:
    """The next message, None at the end of the connection. Raises TimeoutError."""
    text = file.readline()
    return json.loads(text) if text else None


def send(connection: socket.socket, **message: Any) -> bool:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
        return True
    except OSError:
        return False


class Watch:
    def __init__(self, where: Places, host: str, port: int, start: float, stuck: float, silent: float):
        self.where, self.host, self.port = where, host, port
        self.start_seconds, self.stuck, self.silent = start, stuck, silent
        self.over = False

    def start(self) -> None:
        threading.Thread(target=self.run, daemon=True, name="hosts").start()

    def end(self, message: str) -> None:
        """The end of this process, from the watch's thread: the main one may be inside of a collective for ever."""
        if not self.over:
            self.over = True
            say(f"{message}; the same command goes on from what was committed")
            os._exit(EXIT_PREEMPTED)


@dataclasses.dataclass
class Seen:
    """What process 0 knows of another."""

    connection: socket.socket
    file: Any
    host: str
    doing: str = "starting"
    since: float = 0.0  # seconds that it was at that when it last said so
    short: bool = False
    heard: float = dataclasses.field(default_factory=time.monotonic)
    gone: float | None = None
    done: bool = False


class First(Watch):
    """Process 0."""

    def call(self) -> None:
        self.seen: dict[int, Seen] = {}
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", self.port))
        except OSError as error:
            raise InputError(
                f"port {self.port}, by which the processes of this job find each other, is not free "
                f"({error.strerror}): another coordinator port, or RECURSIVE_JAX_WATCH_PORT on all of them"
            ) from None
        server.listen(self.where.processes)
        limit, wanted = time.monotonic() + self.start_seconds, set(range(1, self.where.processes))
        while wanted - set(self.seen):
            server.settimeout(max(0.05, limit - time.monotonic()))
            try:
                self._greet(server.accept()[0])
            except TimeoutError:
                self._stop_all(Preempted, self._missing(wanted))
        for other in self.seen.values():
            send(other.connection, go=True)
        server.close()

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(5.0)
        file = connection.makefile("r")
        try:
            said = line(file) or {}
        except (OSError, ValueError):
            said = {}
        process, of = said.get("process"), said.get("of")
        if not isinstance(process, int):
            connection.close()  # not one of ours
            return
        other, n = Seen(connection, file, str(said.get("host", "?"))), self.where.processes
        wrong = ""
        if of != n or not 0 < process < n:
            wrong = f"process 0 was told of {n} processes, process {process} of {of}"
        elif process in self.seen:
            wrong = f"two processes say that they are process {process}: on {self.seen[process].host} and {other.host}"
        if wrong:
            send(connection, stop=wrong, bad=True)
            self._stop_all(InputError, wrong)
        self.seen[process] = other

    def _missing(self, wanted: set[int]) -> str:
        missing = sorted(wanted - set(self.seen))
        here = {p: other.host for p, other in self.seen.items()}
        names = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        came = ", ".join(f"{p} ({host})" for p, host in sorted(here.items())[:20]) or "none"
        return (
            f"{len(missing)} of {self.where.processes} processes did not come within {self.start_seconds:.0f} s: "
            f"{names}; besides process 0 on {socket.gethostname()} there came {came}. Look at the logs of the others, "
            "or allow more by RECURSIVE_JAX_START_SECONDS"
        )

    def _stop_all(self, kind: type[Exception], message: str) -> None:
        for other in self.seen.values():
            send(other.connection, stop=message, bad=kind is InputError)
        raise kind(message)

    def run(self) -> None:
        for process in self.seen:
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        while not self.over:
            time.sleep(EVERY / 2)
            self._look()

    def _listen(self, process: int) -> None:
        other = self.seen[process]
        other.connection.settimeout(None)
        try:
            while (said := line(other.file)) is not None:
                other.heard = time.monotonic()
                other.doing, other.since = said.get("doing", other.doing), said.get("since", 0.0)
                other.short = said.get("short", False)
                other.done |= bool(said.get("bye"))
        except (OSError, ValueError):
            pass
        other.gone = time.monotonic()

    def _look(self) -> None:
        now = time.monotonic()
        for process, other in self.seen.items():
            name = f"process {process} on {other.host}"
            if other.done:
                continue
            if other.gone is not None and now - other.gone > GRACE:
                self._end_all(f"{name} is gone; it was last at: {other.doing}")
            elif other.gone is None and now - other.heard > self.silent:
                self._end_all(f"{name} is cut off: not a word for {now - other.heard:.0f} s; it was at: {other.doing}")
            elif other.short and other.gone is None and other.since + now - other.heard > self.stuck:
                self._end_all(f"{name} is stuck: at {other.doing} for {other.since + now - other.heard:.0f} s")
        if _at[2] and now - _at[1] > self.stuck:
            self._end_all(f"process 0 on {socket.gethostname()} is stuck: at {_at[0]} for {now - _at[1]:.0f} s")

    def _end_all(self, message: str) -> None:
        for other in self.seen.values():
            send(other.connection, stop=message)
        self.end(message)

    def leave(self) -> None:
        self.over = True
        for other in self.seen.values():
            send(other.connection, bye=True)


class Other(Watch):
    """Every other process."""

    def call(self) -> None:
        limit = time.monotonic() + self.start_seconds
        while True:
            try:
                self.connection = socket.create_connection((self.host, self.port), timeout=5.0)
                break
            except OSError as error:
                if time.monotonic() > limit:
                    raise Preempted(
                        f"process {self.where.process} of {self.where.processes} on {socket.gethostname()}: nobody "
                        f"answers at {self.host}:{self.port} for {self.start_seconds:.0f} s ({error}). Does process 0 "
                        "run there, and does a firewall let the port through?"
                    ) from None
                time.sleep(0.2)
        self.connection.settimeout(self.start_seconds + 30.0)
        self.file = self.connection.makefile("r")
        send(self.connection, process=self.where.process, of=self.where.processes, host=socket.gethostname())
        try:
            said = line(self.file)
        except (OSError, ValueError):
            said = None
        if said is None or "go" not in said:
            text = (said or {}).get("stop", f"process 0 at {self.host} ended while the others were awaited")
            raise (InputError if (said or {}).get("bad") else Preempted)(text)
        self.connection.settimeout(None)

    def run(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        while not self.over:
            if not send(self.connection, doing=_at[0], since=round(time.monotonic() - _at[1], 1), short=_at[2]):
                return
            time.sleep(EVERY)

    def _listen(self) -> None:
        try:
            while (said := line(self.file)) is not None:
                if "stop" in said:
                    self.end(said["stop"])
                self.over |= bool(said.get("bye"))
        except (OSError, ValueError):
            pass
        time.sleep(GRACE)
        self.end(f"process 0 on {self.host} is gone")

    def leave(self) -> None:
        self.over = True
        send(self.connection, bye=True)
