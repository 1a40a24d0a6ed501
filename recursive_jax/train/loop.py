"""The training loop: one linear function. Metrics of step t - 1 are read after step t is dispatched, so that the
device never waits for the host."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from recursive_jax import environment, hosts, storage
from recursive_jax import mesh as meshes
from recursive_jax.config import TrainConfig, difference, row_length
from recursive_jax.config.loader import with_settings
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Batches
from recursive_jax.errors import InputError, Preempted, TrainingDiverged, problems, say
from recursive_jax.identity import describe, digest
from recursive_jax.models.flops import peak_flops
from recursive_jax.models.model import Model
from recursive_jax.objectives import objective_of
from recursive_jax.objectives.base import Extra, Objective
from recursive_jax.objectives.causal import Causal, causal
from recursive_jax.train import signals
from recursive_jax.train.checkpoint import Resume
from recursive_jax.train.log import TrainLog, console
from recursive_jax.train.optimizer import Hyper
from recursive_jax.train.step import TrainState, init_program, join, split, start_program, step_program


@dataclasses.dataclass(frozen=True)
class Trained:
    """model: with the new params. summary: steps, tokens, packed rows, epochs, final loss (all reproducible). extra:
    the objective's own params and state, as they ended."""

    model: Model
    summary: dict[str, Any]
    extra: Extra = dataclasses.field(default_factory=Extra)


def train(
    model: Model,
    data: Dataset | Batches | Sequence[Any],
    objective: Objective = causal,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    directory: str | Path | None = None,
    label: str = "train",
    quiet: bool = False,
    **settings: Any,
) -> Trained:
    """Trains a copy of `model` on `data` and returns it: `train(model, texts, steps=100, batch=8)`; `model` stays as it
    was.

    data: texts, conversations, dicts or a Dataset (see `data.given`), packed by the objective; or Batches, which are.
    config: a TrainConfig or a dict of its keys; settings: more of them, by name.

    A model without params starts from `init(seed)`. With a `directory` the training is resumable: the train state is
    kept in `directory/resume`, and a second call with equal arguments goes on from there, on any mesh; to bit-equal
    params in an equal environment. Raises InputError (bad shapes, empty data, a directory of another training),
    TrainingDiverged (loss not finite), Preempted (SIGTERM; saved)."""
    config = with_settings(TrainConfig, config, settings)
    mesh = model.mesh or meshes.make_mesh()
    model = model.on(mesh)
    length = row_length(config.length, model.max_length)
    check_batch(config, mesh)
    if length > model.max_length > 1:
        raise InputError(f"train.length={length} is longer than the model reads, {model.max_length} tokens")
    objective = resolved_objective(objective, config, model)
    _check_head(model, objective)
    ready = all(hasattr(data, name) for name in ("begin", "next", "summary", "fingerprint"))
    own = getattr(data, "objective", None)
    if ready and own is not None and describe(own) != describe(objective):
        raise InputError(
            f"the {type(data).__name__} were made for {own!r}, and the training has {objective!r}: give both the same"
        )
    if hasattr(data, "bound"):  # what the model writes as it learns, it writes itself
        data = data.bound(model)
    batches = data if ready else objective.pack(objective.rows(data, model.tokenizer), model, length)
    try:
        hash(objective.static())
    except TypeError:
        raise InputError(f"a field of {type(objective).__name__} cannot be hashed: give tuples, not lists") from None
    if hasattr(batches, "columns"):
        objective.check(batches.columns)
    dtype = meshes.resolve_dtype(config.dtype, mesh)
    resume = None
    if directory is not None:
        directory = Path(directory)
        settings = _settings(model, batches, objective, config, dtype, length, seed)  # on every process: it may gather
        settings = json.loads(json.dumps(settings))
        before: list[Any] = []  # environments, on the main process
        meshes.on_main(lambda: before.extend(_half_done(directory, settings)))
        resume = Resume(directory / "resume", digest(json.dumps(settings, sort_keys=True).encode()))
        meshes.on_main(lambda: _claim(directory, settings, before, environment.environment(mesh)))
    others = {name: other.on(mesh) for name, other in objective.models(model).items()}
    held = tuple((name, other.network) for name, other in others.items())
    held_params = {name: other.params for name, other in others.items()}
    flops = model.network.train_flops_per_token(length)
    shown = flops and not quiet and jax.process_count() == 1
    peak = (peak_flops(dtype) or 0) * mesh.size if shown else None  # measured outside of the mesh: on one device
    step_fn = step_program(model.network, objective.static(), config.gradient_accumulation, dtype, held)
    try:
        with jax.set_mesh(mesh):
            trained, frozen = (None, {}) if model.params is None else split(model.network, model.params)
            state = _start(model, objective, trained, config, seed, resume, mesh)
            start = int(state.step)
            if start and not quiet and meshes.is_main():
                console.print(f"{label}: goes on from its checkpoint at step {start:,}", style="dim")
            log = TrainLog(
                label,
                config.steps,
                directory=directory if meshes.is_main() else None,
                start=start,
                every=config.log_every,
                flops_per_token=flops,
                peak_flops=peak,
                tensorboard=config.tensorboard and directory is not None,
                quiet=quiet or not meshes.is_main(),
            )
            for kind, rows in getattr(batches, "sizes", {}).items():
                if rows:
                    check_batch(config, mesh, rows, kind)
            try:
                step = lambda state, batch: step_fn(state, batch, frozen, held_params)
                batches.begin(config.batch, seed)
                state, loss = _run(state, step, batches, config, mesh, resume, log, start, label)
            finally:
                getattr(batches, "close", lambda: None)()
                log.close()
    finally:
        if resume is not None:
            resume.close()
    summary = {"steps": config.steps, **batches.summary(config.steps, config.batch), "loss": loss}
    params = join(model.network, state.params.model, frozen)
    model = dataclasses.replace(
        model.with_params(params), sampling={**model.sampling, **objective.sampling(model, length)}
    )
    return Trained(model, summary, Extra(state.params.extra, state.state))


def resolved_objective(objective: Objective, config: TrainConfig, model: Model) -> Objective:
    """With what the config and the model leave to it. Raises InputError for what is no objective."""
    if not (isinstance(objective, Objective) and "__dataclass_params__" in vars(type(objective))):
        raise InputError(
            f"{type(objective).__name__} is not an objective: a frozen dataclass that derives from "
            "recursive_jax.objectives.Objective "
            "is wanted"
        )
    if config.objective:
        asked = objective_of(config.objective)
        if objective != causal:
            raise InputError(
                f"train.objective={config.objective.get('name')}: this training is for {type(objective).__name__}; "
                f"leave "
                "the key out"
            )
        objective = asked
    if config.truncate < 1.0:
        if objective != causal:
            raise InputError(f"train.truncate={config.truncate} is for the causal objective; leave it at 1")
        objective = Causal(truncate=config.truncate)
    return objective.resolved(model)


def check_batch(config: TrainConfig, mesh, rows: int | None = None, kind: str = "batch") -> None:
    """rows: of a batch, where they are of a `kind` of their own."""
    rows = config.batch if rows is None else rows
    divisor = meshes.batch_divisor(mesh) * config.gradient_accumulation
    if rows % divisor:
        raise InputError(
            f"{kind}={rows} is not divisible by {divisor} (mesh data x fsdp = {meshes.batch_divisor(mesh)}, "
            f"gradient_accumulation = {config.gradient_accumulation})"
        )


def _settings(
    model: Model, batches: Batches, objective: Objective, config: TrainConfig, dtype: str, length: int, seed: int
) -> dict[str, Any]:
    """What decides the params, as plain values."""
    return {
        "model": model.fingerprint,
        "data": batches.fingerprint,
        "objective": describe(objective),
        "config": describe(config.model_copy(update={"dtype": dtype, "length": length})),
        "seed": seed,
    }


def _check_head(model: Model, objective: Objective) -> None:
    """Raises InputError where the objective reads what the model does not give."""
    scores = getattr(getattr(model.network, "config", None), "head", None) == "score"
    if scores and objective.reads == "logits":
        raise InputError(
            f"{type(objective).__name__} trains a model that writes, and this one has model.head=score, one number for "
            "a text: rj.objectives.PairwiseReward, ListwiseReward and ProcessReward train it"
        )
    if objective.reads == "score" and not scores:
        raise InputError(f"{type(objective).__name__} trains a model with model.head=score; this one has another head")


def _half_done(directory: Path, settings: dict[str, Any]) -> list[Any]:
    """The environments that a half-done training in the directory was made under. Raises InputError where checkpoints
    of another training lie; one whose record is damaged says itself what it is of (`Resume`)."""
    file = directory / "training.json"
    if not file.exists() or not any((directory / "resume").glob("*")):
        return []
    try:
        before = storage.read_json(file, "the record of the training")
    except storage.Damaged as error:
        say(f"{error.what}; it is written anew: the checkpoints beside it say themselves what they are of")
        return []
    if before.get("settings") != settings:
        raise problems(
            f"{directory} holds a half-done training of other settings. Give these again to go on with it, another "
            "directory to keep it, or delete it. The differences:",
            difference(before.get("settings", {}), settings),
        )
    return before.get("environments", [])


def _claim(directory: Path, settings: dict[str, Any], before: list[Any], now: dict[str, Any]) -> None:
    """Says in the directory what is trained in it, and under which environments: when what lies there was accepted."""
    environment.changed(before, now, str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "environments": environment.continued(before, now)}
    storage.write_json(directory / "training.json", record)


def _start(
    model: Model, objective: Objective, trained: Any, config: TrainConfig, seed: int, resume: Resume | None, mesh
):
    """The newest checkpoint of this training, else its first state."""
    hyper = meshes.put_replicated(mesh, Hyper.of(config, seed))
    key = meshes.random_key(seed)
    extra = objective.init(jax.random.fold_in(key, 1), model)
    if resume is not None and resume.latest is not None:
        if trained is not None:  # with the dtypes of the params that it began with
            target = meshes.abstract(mesh, start_program(), trained, extra.params, extra.state, hyper)
        else:
            target = meshes.abstract(mesh, init_program(model.network), key, extra.params, extra.state, hyper)
        return resume.load(resume.latest, target)
    if trained is None:
        return init_program(model.network)(key, extra.params, extra.state, hyper)
    return start_program()(trained, extra.params, extra.state, hyper)


def _run(state: TrainState, step_fn, batches: Batches, config: TrainConfig, mesh, resume, log: TrainLog, start, label):
    pending = None
    loss = math.nan
    positions = getattr(batches, "positions", 1) * config.batch
    resumable = getattr(batches, "resumable", lambda step: True)
    due = False
    for step in range(start + 1, config.steps + 1):
        hosts.at(f"{label}, step {step:,}", short=True)
        columns = batches.next(step - 1, state.params, state.state)
        state, metrics = step_fn(state, meshes.put_batch(mesh, columns))
        if pending is not None:
            loss = _settle(*pending, log, positions, label, resume)
        pending = (step, metrics)
        stopping = signals.stop_requested() and step < config.steps  # after the last step there is nothing to save
        due |= step % config.checkpoint_every == 0
        if resume is not None and step < config.steps and (stopping or due) and resumable(step):
            loss = _settle(*pending, log, positions, label, resume)  # only a finite state is ever saved
            pending, due = None, False
            resume.save(step, state, wait=stopping)
        if stopping:
            where = "nothing is saved: no directory was given"
            if resume is not None:
                kept = step if resumable(step) else resume.latest
                where = f"saved at step {kept}" if kept else "nothing was saved yet"
            raise Preempted(f"{label}: stopped by a signal, {where}; the same command goes on from there")
    if pending is not None:
        loss = _settle(*pending, log, positions, label, resume)
    hosts.at(f"{label}, done")
    return state, loss


def _settle(step: int, metrics: dict[str, jax.Array], log: TrainLog, positions: int, label: str, resume) -> float:
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}  # replicated: every process has them
    broken = next((k for k in ("loss", "gradient_norm") if not math.isfinite(values[k])), None)
    if broken is not None:
        kept = resume.latest if resume is not None else None
        last = f"the last good checkpoint is step {kept}" if kept is not None else "there is no earlier checkpoint"
        raise TrainingDiverged(
            f"{label}: the {broken.replace('_', ' ')} became {values[broken]} at step {step} (learning rate "
            f"{values['learning_rate']:.3g}); {last}. Lower train.learning_rate or train.clip, or raise train.warmup."
        )
    log.step(step, values, positions)
    return values["loss"]
