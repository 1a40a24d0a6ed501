"""`Round`: the six verbs made durable. Each stores its result with the fingerprint of its inputs; started again, it
returns the stored result, or goes on in the middle of a half-done one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax.config import SamplingConfig, TrainConfig
from recursive_jax.curate.select import Rule, select
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import fingerprint as tokenizer_fingerprint
from recursive_jax.errors import InputError, Preempted
from recursive_jax.generate.generate import FIRST, stream, to_dataset
from recursive_jax.generate.reader import Row
from recursive_jax.generate.request import Request
from recursive_jax.models.model import Model, source_mark
from recursive_jax.objectives.causal import Objective, causal
from recursive_jax.rounds import storage
from recursive_jax.rounds.durable import DurableFolder, Stored, architecture_mark, callable_mark, data_mark, model_mark
from recursive_jax.rounds.journal import Budget, Journal
from recursive_jax.rounds.stored import load_stored_model, write_model
from recursive_jax.train import signals
from recursive_jax.train.loop import train


class Chain:
    """Rounds that follow from one another; `seed` differs by replicate and is the same for every arm, so that arms
    are compared on common random numbers."""

    def __init__(self, run: Any, arm: str, replicate: int, path: epath.Path):
        self.run, self.arm, self.replicate, self.path = run, arm, replicate, path

    def round(self, number: int) -> Round:
        return Round(self, number)


class Round(DurableFolder):
    """One round's durable verbs. Every call names its result; results are stored under `rounds/<number>/<name>`."""

    def __init__(self, chain: Chain, number: int):
        self.chain, self.run, self.number = chain, chain.run, number
        self.path = chain.path / "rounds" / f"{number:04d}"
        self.label = f"{chain.arm} · " if chain.arm != "main" else ""
        self.label += f"round {number}"
        if chain.path.name.startswith("replicate-"):
            self.label = self.label.replace(" ·", f" {chain.replicate} ·", 1)

    def seed(self, name: str) -> int:
        """A seed for one use in this round: a hash, so that no two uses share random numbers."""
        key = [self.run.seed, self.chain.replicate, self.number, name]
        return int(hashlib.sha256(json.dumps(key).encode()).hexdigest()[:7], 16)

    # The verbs.

    def dataset(
        self, name: str, make: Callable[[], Dataset], inputs: dict[str, str] | None = None, config: Any = None
    ) -> Stored:
        """Rows made by a function of the given inputs: read from disk, composed, imported."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            data = make()
            meshes.on_main(lambda: data.write(str(folder / "rows-00000.parquet")))
            return _counts(data)

        return self.durable("data", name, inputs or {}, config, None, produce, _read_rows)

    def train(
        self,
        name: str,
        model: Model,
        data: Dataset | Stored,
        config: TrainConfig | None = None,
        objective: Objective = causal,
    ) -> Model:
        """A new model: `model` (or, without params, its fresh initialisation) trained on `data`."""
        config = config or TrainConfig()
        seed = self.seed(name)
        architecture = model.architecture
        inputs = {
            "model": model_mark(model) if model.params is not None else f"init:{architecture_mark(architecture)}",
            "data": data_mark(data),
            "tokenizer": tokenizer_fingerprint(model.tokenizer),
        }

        def produce(folder: epath.Path) -> dict[str, Any]:
            label = f"{self.label} · train {name}"
            rows = data.value if isinstance(data, Stored) else data
            trained = train(
                model, rows, objective, config, seed=seed, directory=folder, label=label, quiet=self.run.progress.quiet
            )
            write_model(folder, trained.model)
            return trained.summary

        result = {
            k: v for k, v in config.model_dump().items() if k not in ("checkpoint_every", "log_every", "tensorboard")
        }
        settings = {"train": result, "objective": callable_mark(objective)}
        stored = self.durable(
            "train", name, inputs, settings, seed, produce, lambda folder: load_stored_model(folder, model)
        )
        return stored.value.with_params(stored.value.params, stored.fingerprint)

    def generate(
        self,
        name: str,
        model: Model,
        requests: Callable[[int, int], Sequence[Request]],
        sampling: SamplingConfig | None = None,
        *,
        count: int | None = None,
        tokens: int | None = None,
        inputs: dict[str, str] | None = None,
    ) -> Stored:
        """Rows from `model`: those of the first `count` requests, or of as many as it takes to hold `tokens` tokens (then
        cut to the budget). requests(first, n) gives the requests with ids first .. first + n.

        Rows are kept as they finish. A kill loses those in work and of the last quarter second; the rows that are made
        again have the same bits.
        """
        sampling = sampling or SamplingConfig()
        seed = self.seed(name)
        if (count is None) == (tokens is None):
            raise ValueError("give either count or tokens")

        def produce(folder: epath.Path) -> dict[str, Any]:
            journal = Journal(folder)
            budget = Budget(journal.lengths, requests, count, tokens)
            rows = stream(model, budget, sampling, seed=seed, like=requests(0, min(FIRST, count or FIRST)))
            for row in rows:
                journal.append(row, self._as_rows(name, model, seed))
                budget.finished(row)
                if budget.enough:
                    break
                self.run.progress.working(f"{self.label} · {name}", budget.note())
                if signals.stop_requested():
                    journal.close()
                    raise Preempted(
                        f"{self.label} · {name}: stopped by a signal after {budget.done} rows, all kept; the same command "
                        "goes on from there"
                    )
            if tokens is not None and budget.total == 0:
                raise InputError(
                    f"{self.label} · {name}: the model writes no tokens (do the prompts fill the context?)"
                )
            data = journal.finish(budget.wanted)
            return {**_counts(data), "budget_tokens": tokens}

        def read(folder: epath.Path) -> Dataset:
            data = _read_rows(folder)
            return data if tokens is None else data.first_tokens(tokens)

        ins = {"model": model_mark(model), **(inputs or {})}
        settings = {"sampling": sampling.model_dump(), "count": count, "tokens": tokens}
        return self.durable("generate", name, ins, settings, seed, produce, read)

    def _as_rows(self, name: str, model: Model, seed: int) -> Callable[[Sequence[Row]], Dataset]:
        """How finished rows are kept: their ids begin with the chain, the round and the result's name."""
        parts = [self.chain.arm] if self.chain.arm != "main" else []
        parts += [str(self.chain.replicate)] if self.chain.replicate else []
        prefix = "/".join([*parts, str(self.number), name])
        return lambda rows: to_dataset(rows, model, seed=seed, round=self.number, name=prefix)

    def select(self, name: str, data: Stored, rules: Sequence[Rule]) -> Stored:
        """The rows every rule keeps, and for each rule how many it dropped."""
        kept: dict[str, int] = {}

        def produce(folder: epath.Path) -> dict[str, Any]:
            chosen, dropped = select(data.value, rules)
            kept.update(dropped)
            meshes.on_main(lambda: chosen.write(str(folder / "rows-00000.parquet")))
            return {**_counts(chosen), "proposed": len(data.value), "dropped": dropped}

        settings = {"rules": [f"{r.name} ({source_mark(r.source or r.keep)})" for r in rules]}
        return self.durable("select", name, {"data": data.fingerprint}, settings, None, produce, _read_rows)

    def score(
        self, name: str, data: Stored, reward: Callable[[Dataset], Sequence[float]], column: str = "score"
    ) -> Stored:
        """The rows with a number per row in `column`."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            scored = data.value.with_column(column, [float(x) for x in reward(data.value)])
            meshes.on_main(lambda: scored.write(str(folder / "rows-00000.parquet")))
            return _counts(scored)

        settings = {"reward": callable_mark(reward), "column": column}
        return self.durable("score", name, {"data": data.fingerprint}, settings, None, produce, _read_rows)

    def evaluate(
        self,
        name: str,
        model: Model,
        measure: Callable[[], dict[str, Any]],
        inputs: dict[str, str] | None = None,
        config: Any = None,
    ) -> dict[str, Any]:
        """Numbers about `model`, stored and added to RUN/metrics.jsonl."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            metrics = measure()
            record = {
                "arm": self.chain.arm,
                "round": self.number,
                "replicate": self.chain.replicate,
                "name": name,
                "model": model.fingerprint,
                "metrics": metrics,
            }
            meshes.on_main(lambda: storage.write_json(folder / "metrics.json", record))
            return {"metrics": len(metrics)}

        def read(folder: epath.Path) -> dict[str, Any]:
            return storage.read_json(folder / "metrics.json", "the evaluation")["metrics"]

        return self.durable(
            "evaluate", name, {"model": model_mark(model), **(inputs or {})}, config, None, produce, read
        ).value


def _counts(data: Dataset) -> dict[str, Any]:
    status: dict[str, int] = {}
    for s in data.column("status"):
        status[s] = status.get(s, 0) + 1
    real = data.where(synthetic=False)
    return {
        "rows": len(data),
        "tokens": data.token_count,
        "synthetic_rows": len(data) - len(real),
        "real_rows": len(real),
        "real_tokens": real.token_count,
        "status": status,
    }


def _read_rows(folder: epath.Path) -> Dataset:
    return Dataset.read([str(p) for p in sorted(folder.glob("rows-*.parquet"))])
