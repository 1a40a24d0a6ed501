"""What a training says while it runs: a JSONL log, TensorBoard events, and a line or live display for people."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from recursive_jax.waiting import Wait, rate

console = Console(stderr=True, highlight=False)


class TrainLog:
    """Takes the metrics of finished steps; keeps the host work tiny.

    `train.jsonl` has one object per logged step: step, loss, gradient_norm, learning_rate, tokens_per_second, mfu.
    On resume the lines after the restored step are cut off, so an interrupted run leaves the same log.
    """

    def __init__(
        self,
        label: str,
        steps: int,
        *,
        directory: Path | None,
        start: int = 0,
        every: int = 10,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        tensorboard: bool = False,
        quiet: bool = False,
    ):
        self.label, self.steps, self.every, self.start = label, steps, every, start
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._file = self._board = self._progress = None
        self._time, self._tokens, self._told = time.perf_counter(), 0, time.perf_counter()
        self.rate = 0.0
        if directory is not None:
            self._file = _open_truncated(directory / "train.jsonl", start)
            if tensorboard:
                from tensorboardX import SummaryWriter

                self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start, write_to_disk=True)
        if not quiet and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(28),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(label, total=steps, completed=start, note="compiling")
        self._lines = not quiet and not console.is_terminal
        self._wait: Wait | None = Wait(f"{label}: the first step", not self._lines).__enter__()

    def step(self, step: int, metrics: dict[str, Any], tokens: int) -> None:
        """`metrics` are host floats of step number `step` (1-based); `tokens` positions it processed."""
        if self._wait is not None:  # the first step, with what was compiled for it: no rate to go by
            self._wait.close()
            self._wait, self._told = None, time.perf_counter()
        self._tokens += tokens
        if step % self.every and step != self.steps:
            return
        now = time.perf_counter()
        self.rate = self._tokens / max(now - self._time, 1e-9)
        self._time, self._tokens = now, 0
        record = {"step": step, **{k: float(v) for k, v in metrics.items()}, "tokens_per_second": round(self.rate, 1)}
        if self.flops_per_token and self.peak_flops:
            record["mfu"] = round(self.rate * self.flops_per_token / self.peak_flops, 4)
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._board:
            for key, value in record.items():
                if key != "step":
                    self._board.add_scalar(f"train/{key}", value, step)
        note = f"loss {record['loss']:.4f}  {rate(self.rate, 1)} tok/s"
        if "mfu" in record:
            note += f"  MFU {record['mfu']:.0%}"
        if self._progress:
            self._progress.update(self._task, completed=step, note=note)
        elif self._lines and now - self._told > 10:
            left = (self.steps - step) * tokens / max(self.rate, 1e-9)
            print(f"{self.label}  step {step}/{self.steps}  {note}  {left:.0f}s left", file=sys.stderr, flush=True)
            self._told = now

    def close(self) -> None:
        if self._wait is not None:
            self._wait.close()
        if self._progress:
            self._progress.stop()
        if self._board:
            self._board.close()
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()


def _open_truncated(path: Path, start: int):
    """The log with only the whole lines of steps up to `start`, open for appending."""
    kept = []
    if path.exists() and start:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                break  # a line torn by a kill
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")
