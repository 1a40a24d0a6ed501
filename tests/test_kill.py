"""kill -9 at any moment loses nothing that was committed: the same command ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from recursive_jax.rounds.opening import load_model

CONFIG = """
data:
  real_tokens: 4000
  language: {types: 2, nouns: 4, verbs: 2, first_names: 5, last_names: 5, attributes: 2, values: 5}
model: {layers: 1, d_model: 32, heads: 2, max_length: 32}
train: {steps: 40, batch: 8, checkpoint_every: 7, log_every: 4}
sampling: {batch: 32}
rounds: {count: 2, init: base, token_budget: 2000}
arms:
  replace: {data: replace}
  accumulate: {data: accumulate, fresh: 0.2}
evaluate: {rows: 16, samples: 64, token_budget: 500}
mesh: {data: 1}
"""


def command(folder: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "recursive_jax.cli",
        "run",
        str(folder / "config.yaml"),
        "--workdir",
        str(folder / "run"),
        "--quiet",
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "config.yaml").write_text(CONFIG)
    subprocess.run(command(folder), check=True, capture_output=True)
    return folder / "run"


def assert_same_bits(left: Path, right: Path, mesh) -> None:
    """Rows, params and metrics of two runs, bit for bit."""
    files = sorted(p.relative_to(left) for p in left.rglob("*.parquet"))
    assert files and files == sorted(p.relative_to(right) for p in right.rglob("*.parquet"))
    for file in files:
        assert pq.read_table(left / file).equals(pq.read_table(right / file)), file
    assert (left / "metrics.jsonl").read_bytes() == (right / "metrics.jsonl").read_bytes()
    models = sorted(p.parent.relative_to(left) for p in left.rglob("model.json"))
    assert len(models) == 5
    for model in models:
        a, b = load_model(left / model, mesh), load_model(right / model, mesh)
        assert a.fingerprint == b.fingerprint
        assert jax.tree.all(
            jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a.params, b.params)
        ), model
    for log in left.rglob("train.jsonl"):
        losses = [
            [(r["step"], r["loss"]) for r in map(json.loads, (root / log.relative_to(left)).read_text().splitlines())]
            for root in (left, right)
        ]
        assert losses[0] == losses[1], log


def committed(folder: Path) -> int:
    patterns = ("run/rounds/*/*/manifest.json", "run/*/rounds/*/*/manifest.json")
    return sum(len(list(folder.glob(p))) for p in patterns)


def kill_until_done(folder: Path, moments: list[tuple[int, float]]) -> int:
    """Starts the command again and again; kills it so many committed results and then so many seconds after its start,
    and at last lets it finish. Returns how often the kill hit a living process."""
    killed = 0
    for results, seconds in moments:
        before = committed(folder)
        process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and committed(folder) < before + results:
            time.sleep(0.005)
        time.sleep(seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error.decode()
    done = subprocess.run(command(folder), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return killed


def fresh(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.slow
def test_killed_three_times(tmp_path, reference, mesh):
    folder = fresh(tmp_path)
    assert kill_until_done(folder, [(1, 0.1), (3, 0.03), (4, 0.15)]) >= 2
    assert_same_bits(reference, folder / "run", mesh)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_killed_at_many_random_moments(tmp_path, reference, mesh, seed):
    folder = fresh(tmp_path)
    rng = random.Random(seed)
    moments = [(rng.choice([0, 1, 1, 2, 3]), rng.uniform(0.0, 0.5)) for _ in range(8)]
    assert kill_until_done(folder, moments) >= 5
    assert_same_bits(reference, folder / "run", mesh)


@pytest.mark.slow
def test_sigterm_saves_and_exits_75(tmp_path, reference, mesh):
    folder = fresh(tmp_path)
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    teacher = folder / "run" / "rounds" / "0000" / "teacher"
    deadline = time.monotonic() + 120
    while not (teacher / "train.jsonl").exists() or not (teacher / "train.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error.decode()
    assert b"the same command goes on" in error
    assert subprocess.run(command(folder), capture_output=True).returncode == 0
    assert_same_bits(reference, folder / "run", mesh)
