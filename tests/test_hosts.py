"""Several processes that find each other, or say who is missing, gone, stuck or cut off. Real processes over loopback;
no JAX in them, so that each takes a tenth of a second."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from recursive_jax import hosts
from recursive_jax.errors import InputError
from tests.conftest import ROOT

WORKER = """
import sys, time
from recursive_jax import hosts
from recursive_jax.errors import RecursiveJaxError
try:
    hosts.begin(hosts.places())
except RecursiveJaxError as error:
    print(error)
    sys.exit(error.exit_code)
print("all here", flush=True)
for step in range(int(sys.argv[1])):
    hosts.at(f"teacher, step {step}", short=True)
    time.sleep(0.1)
if sys.argv[2] == "stay":
    time.sleep(60)
elif sys.argv[2] == "fail":
    sys.exit(1)
hosts.leave()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(of, *processes, steps=3, then="leave", **limits):
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port - 1}"}
    env |= {f"RECURSIVE_JAX_{name.upper()}_SECONDS": str(value) for name, value in limits.items()}
    counts = of if isinstance(of, list) else [of] * len(processes)
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(steps), then[p] if isinstance(then, dict) else then],
            env={**env, "JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(p)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for p, n in zip(processes, counts, strict=True)
    ]


def ended(process, code):
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, out
    return out


def test_all_who_come_work_and_leave():
    for process in start(3, 0, 1, 2):
        assert "all here" in ended(process, 0)


def test_who_does_not_come_is_named():
    for process in start(5, 0, 2, start=2):
        out = ended(process, 75)
        assert "3 of 5 processes did not come within 2 s: 1, 3, 4" in out and f"2 ({socket.gethostname()})" in out


def test_a_process_that_finds_nobody_says_where_it_looked():
    (process,) = start(2, 1, start=1)
    assert "nobody answers at 127.0.0.1:" in ended(process, 75)


def test_processes_that_contradict_each_other_are_refused():
    for process in start([3, 2], 0, 1, start=20):
        assert "process 0 was told of 3 processes, process 1 of 2" in ended(process, 2)
    outs = [ended(process, 2) for process in start(3, 0, 1, 1, start=20)]
    assert sum("two processes say that they are process 1" in out for out in outs) >= 2


def test_one_that_dies_ends_the_others_with_its_name():
    first, second, third = start(3, 0, 1, 2, steps=5, then="stay")
    for process in (first, second, third):
        assert process.stdout.readline() == "all here\n"
    time.sleep(2)
    third.send_signal(signal.SIGKILL)
    for process in (first, second):
        out = ended(process, 75)
        assert "process 2 on" in out and "is gone; it was last at: teacher, step 4" in out
        assert "the same command goes on" in out


def test_one_that_fails_ends_the_others():
    first, second = start(2, 0, 1, steps=1, then={0: "stay", 1: "fail"})
    ended(second, 1)
    assert "process 1 on" in ended(first, 75)


def test_one_that_is_stuck_is_told_what_at_and_how_long():
    for process in start(2, 0, 1, steps=2, then="stay", stuck=2):
        out = ended(process, 75)
        assert "is stuck: at teacher, step 1 for" in out


def test_one_that_is_cut_off_is_named():
    """Stopped, it sends nothing and closes nothing, as behind a cut cable."""
    first, second = start(2, 0, 1, steps=2, then="stay", silent=2)
    assert second.stdout.readline() == "all here\n"
    time.sleep(1.5)
    second.send_signal(signal.SIGSTOP)
    try:
        assert "process 1 on" in (out := ended(first, 75)) and "is cut off: not a word for" in out
    finally:
        second.send_signal(signal.SIGCONT)
        second.kill()


def test_places_are_read_from_their_platforms():
    of = hosts.places
    assert of({}) is None
    jax_s = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert of(jax_s) == hosts.Places("a:1", 2, 1, "JAX_COORDINATOR_ADDRESS")
    tpu = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2", "TPU_WORKER_ID": "2"}
    assert of(tpu) == hosts.Places("t0:8476", 3, 2, "TPU_WORKER_HOSTNAMES")
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "77",
             "SLURM_STEP_NODELIST": "gpu[003-007,9],x1"}  # fmt: skip
    found = of(slurm)
    assert (found.processes, found.process, found.source) == (8, 3, "SLURM") and found.coordinator.startswith("gpu003:")
    assert of({**slurm, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert [hosts.first_node(n) for n in ("n1", "n1,n2", "n[1-3]", "a[07,9],b")] == ["n1", "n1", "n1", "a07"]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x'"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "ids count from 0"),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "HOST:PORT"),
    ],
)
def test_what_says_half_is_refused(env, message):
    with pytest.raises(InputError, match=message):
        hosts.places(env)
