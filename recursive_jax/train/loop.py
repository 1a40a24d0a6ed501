"""The training loop: one linear function. Metrics of step t - 1 are read after step t is dispatched, so that the
device never waits for the host."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from recursive_jax import mesh as meshes
from recursive_jax.config import TrainConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import PackedRows, batches, pack_dataset
from recursive_jax.errors import InputError, Preempted, TrainingDiverged
from recursive_jax.models.flops import peak_flops, train_flops_per_token
from recursive_jax.models.model import Model
from recursive_jax.objectives.causal import Objective, causal, truncated
from recursive_jax.train import signals
from recursive_jax.train.checkpoint import Resume
from recursive_jax.train.log import TrainLog, console
from recursive_jax.train.optimizer import Hyper
from recursive_jax.train.step import init_program, join, resolve_dtype, split, start_program, step_program


@dataclasses.dataclass(frozen=True)
class Trained:
    """model: with the new params. summary: steps, tokens, packed rows, epochs, final loss (all reproducible)."""

    model: Model
    summary: dict[str, Any]


def train(
    model: Model,
    data: Dataset | PackedRows,
    objective: Objective = causal,
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    directory: str | Path | None = None,
    label: str = "train",
    quiet: bool = False,
) -> Trained:
    """Trains a copy of `model` on `data` (packed if it is not yet) and returns it; `model` stays as it was.

    A model without params starts from `init(seed)`. With a `directory` the training is resumable: the train state is
    kept in `directory/resume`, and a second call with equal arguments goes on from there to bit-equal params.
    Raises InputError (bad shapes, empty data), TrainingDiverged (loss not finite), Preempted (SIGTERM; saved).
    """
    config = config or TrainConfig()
    mesh = model.mesh or meshes.make_mesh()
    model = model.on(mesh)
    length = config.length or model.context
    check_batch(config, mesh)
    rows = data if isinstance(data, PackedRows) else pack_dataset(data, length, model.tokenizer)
    directory = Path(directory) if directory is not None else None
    resume = Resume(directory / "resume") if directory is not None else None
    dtype = resolve_dtype(config.dtype)
    if config.truncate < 1.0:
        if objective is not causal:
            raise InputError(f"train.truncate={config.truncate} is for the causal objective; leave it at 1")
        objective = truncated(config.truncate)
    step_fn = step_program(model.architecture, objective, config.accumulate, dtype)
    try:
        with jax.set_mesh(mesh):
            trained, frozen = (None, {}) if model.params is None else split(model.architecture, model.params)
            state = _start(model, trained, config, seed, resume, mesh)
            start = int(state.step)
            if start and not quiet and meshes.is_main():
                console.print(f"{label}: goes on from its checkpoint at step {start:,}", style="dim")
            flops = train_flops_per_token(model.architecture.config, length) if model.architecture.config else None
            if flops and model.architecture.lora:
                flops *= 2 / 3  # frozen weights get no gradient of their own
            log = TrainLog(
                label,
                config.steps,
                directory=directory if meshes.is_main() else None,
                start=start,
                every=config.log_every,
                flops_per_token=flops,
                peak_flops=(peak_flops(dtype) or 0) * mesh.size
                if flops and not quiet and jax.process_count() == 1
                else None,
                tensorboard=config.tensorboard and directory is not None,
                quiet=quiet or not meshes.is_main(),
            )
            try:
                step = lambda state, batch: step_fn(state, batch, frozen)
                state, loss = _run(state, step, rows, config, seed, mesh, resume, log, start, label)
            finally:
                log.close()
    finally:
        if resume is not None:
            resume.close()
    tokens = config.steps * config.batch * length
    summary = {
        "steps": config.steps,
        "tokens": tokens,
        "packed_rows": len(rows),
        "packed_fill": round(rows.fill, 4),
        "epochs": round(config.steps * config.batch / len(rows), 3),
        "loss": loss,
    }
    return Trained(model.with_params(join(model.architecture, state.params, frozen)), summary)


def check_batch(config: TrainConfig, mesh) -> None:
    divisor = meshes.batch_divisor(mesh) * config.accumulate
    if config.batch % divisor:
        raise InputError(
            f"batch={config.batch} is not divisible by {divisor} (mesh data x fsdp = {meshes.batch_divisor(mesh)}, "
            f"accumulate = {config.accumulate})"
        )


def _start(model: Model, trained: Any, config: TrainConfig, seed: int, resume: Resume | None, mesh):
    """The newest checkpoint of this training, else its first state."""
    hyper = meshes.replicate(mesh, Hyper.of(config, seed))
    if resume is not None and resume.latest is not None:
        if model.architecture.frozen:
            target = meshes.abstract(mesh, start_program(), trained, hyper)
        else:
            target = meshes.abstract(mesh, init_program(model.architecture), jax.random.key(0), Hyper.of(config, seed))
        return resume.load(resume.latest, target)
    if trained is None:
        return init_program(model.architecture)(jax.random.key(seed), hyper)
    return start_program()(trained, hyper)


def _run(state, step_fn, rows, config: TrainConfig, seed, mesh, resume, log: TrainLog, start: int, label: str):
    stream = batches(rows, config.batch, seed, start)
    positions = config.batch * (rows.tokens_NT.shape[1] - 1)
    pending = None
    loss = math.nan
    for step in range(start + 1, config.steps + 1):
        state, metrics = step_fn(state, meshes.put_batch(mesh, next(stream)))
        if pending is not None:
            loss = _settle(*pending, log, positions, label, resume)
        pending = (step, metrics)
        stopping = signals.stop_requested() and step < config.steps  # after the last step there is nothing to save
        if resume is not None and (stopping or (step % config.checkpoint_every == 0 and step < config.steps)):
            loss = _settle(*pending, log, positions, label, resume)  # only a finite state is ever saved
            pending = None
            resume.save(step, state, wait=stopping)
        if stopping:
            where = f"saved at step {step}" if resume is not None else "nothing is saved: no directory was given"
            raise Preempted(f"{label}: stopped by a signal, {where}; the same command goes on from there")
    if pending is not None:
        loss = _settle(*pending, log, positions, label, resume)
    return state, loss


def _settle(step: int, metrics: dict[str, jax.Array], log: TrainLog, positions: int, label: str, resume) -> float:
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}  # replicated: every process has them
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        kept = resume.latest if resume is not None else None
        last = f"the last good checkpoint is step {kept}" if kept is not None else "there is no earlier checkpoint"
        raise TrainingDiverged(
            f"{label}: the {'loss' if not math.isfinite(values['loss']) else 'gradient norm'} became "
            f"{values['loss'] if not math.isfinite(values['loss']) else values['gradient_norm']} at step {step} "
            f"(learning rate {values['learning_rate']:.3g}); {last}. Lower train.learning_rate or train.clip, or raise train.warmup."
        )
    log.step(step, values, positions)
    return values["loss"]
