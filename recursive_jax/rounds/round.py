"""`Round`: the six verbs made durable. Each stores its result with the fingerprint of its inputs; started again, it
returns the stored result, or goes on in the middle of a half-done one."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax import storage, waiting
from recursive_jax.config import SamplingConfig, TrainConfig, row_length
from recursive_jax.config.loader import with_settings
from recursive_jax.curate.rewards import Scores, score
from recursive_jax.curate.select import Rule, as_rules, select
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import ORDER, Batches
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import fingerprint as tokenizer_fingerprint
from recursive_jax.errors import InputError, Preempted
from recursive_jax.generate.dialogue import Dialogue, hold, repeated
from recursive_jax.generate.engine import slots_for
from recursive_jax.generate.generate import FIRST, stream, to_dataset
from recursive_jax.generate.prefill import Row
from recursive_jax.generate.reading import ask, constrained_by
from recursive_jax.generate.remote.model import Remote
from recursive_jax.generate.request import Again, FromTemplate, Request, as_requests, requests_fingerprint
from recursive_jax.identity import describe
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Objective
from recursive_jax.objectives.causal import causal
from recursive_jax.rounds.durable import DurableFolder, Stored, mark_of, read_manifest, value_of
from recursive_jax.rounds.journal import BLOCK, Budget, Journal
from recursive_jax.rounds.opening import load_stored_model
from recursive_jax.rounds.writing import write_model
from recursive_jax.train import checkpoint, signals
from recursive_jax.train.loop import resolved_objective, train

Requests = Callable[[int, int], Sequence[Request]]


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
        """A seed of 63 bits for one use in this round: a hash, so that no two uses share random numbers."""
        key = [self.run.seed, self.chain.replicate, self.number, name]
        return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8]) >> 1

    # The verbs.

    def dataset(
        self,
        name: str,
        make: Callable[..., Dataset],
        *arguments: Any,
        inputs: dict[str, Any] | None = None,
        config: Any = None,
    ) -> Stored:
        """Rows made by `make(*arguments)`: read from disk, composed, imported. `make` is a function of a module, a
        frozen dataclass or `named`; arguments are plain values, stored results, models. inputs, config: what else
        decides."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            data = make(*map(value_of, arguments))
            meshes.on_main(lambda: data.write(str(folder / "rows-00000.parquet")))
            return _counts(data)

        settings = {"make": describe(make), "arguments": describe(arguments), "config": describe(config)}
        given = {str(i): a for i, a in enumerate(arguments) if isinstance(a, (Dataset, Stored))}
        return self.durable("data", name, {**given, **(inputs or {})}, _given(settings), None, produce, _read_rows)

    def train(
        self,
        name: str,
        model: Model,
        data: Dataset | Stored | Batches | Sequence[Any],
        config: TrainConfig | Mapping[str, Any] | None = None,
        objective: Objective = causal,
    ) -> Model:
        """A new model: `model` (or, without params, its fresh initialisation) trained on `data`, which is whatever
        `rj.train` takes, or a stored result."""
        config = with_settings(TrainConfig, config, {})
        seed = self.seed(name)
        model = model.on(model.mesh or meshes.make_mesh())
        objective = resolved_objective(objective, config, model)
        if isinstance(data, (Sequence, Dataset)):
            data = objective.rows(data, model.tokenizer)
        inputs = {
            "model": model.fingerprint,
            "data": data,
            "tokenizer": tokenizer_fingerprint(model.tokenizer),
        }

        def produce(folder: epath.Path) -> tuple[dict[str, Any], Model]:
            label = f"{self.label} · train {name}"
            rows = value_of(data)
            if getattr(rows, "keep", "") is None:  # what the model writes as it learns is kept with what it became
                rows = copy.copy(rows)
                rows.keep = str(folder / "rollouts")
            quiet = self.run.progress.quiet
            plain = config.model_copy(update={"truncate": 1.0, "objective": {}})  # the objective knows
            trained = train(model, rows, objective, plain, seed=seed, directory=folder, label=label, quiet=quiet)
            write_model(folder, trained.model)
            extra = {"params": trained.extra.params, "state": trained.extra.state}
            if jax.tree.leaves(extra):
                checkpoint.save(folder / "extra", extra)
            return trained.summary, trained.model

        decided = {
            "dtype": meshes.resolve_dtype(config.dtype, model.mesh),
            "length": row_length(config.length, model.max_length),
            "truncate": 1.0,
            "objective": {},
        }
        settings = {"train": describe(config.model_copy(update=decided)), "objective": describe(objective)}
        settings["order"] = ORDER
        stored = self.durable(
            "train", name, inputs, settings, seed, produce, lambda folder: load_stored_model(folder, model)
        )
        named = stored.value.with_params(stored.value.params, stored.fingerprint)
        length = row_length(config.length, model.max_length)
        sampling = {**model.sampling, **objective.sampling(model, length)}
        return dataclasses.replace(named, source=str(stored.path.resolve()), sampling=sampling)

    def generate(
        self,
        name: str,
        model: Model,
        requests: Requests | Sequence[Request] | Dataset | Stored,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        *,
        template: Template | Dialogue | None = None,
        each: int = 1,
        attempts: int = 1,
        constrained: bool = False,
        count: int | None = None,
        tokens: int | None = None,
        inputs: dict[str, Any] | None = None,
    ) -> Stored:
        """Rows from `model`, one to a request: of a list; or of requests(first, n), which gives those with ids first ..
        first + n, and of which the first `count` are taken, or as many as it takes to hold `tokens` tokens (then cut to
        the budget). Requests count by value, a function's too.

        Of a Dataset whose rows a template asks: what the replies say, as in `rj.generate`. The replies themselves are
        kept beside it (`<name>-replies`, of a second attempt `<name>-replies-2`), so that a template that reads them
        otherwise asks nothing anew.

        Rows are kept as they finish. A kill loses those in work and of the last quarter second; the rows that are made
        again have the same bits.
        """
        sampling = with_settings(SamplingConfig, sampling, {})
        if template is not None:
            if count is not None or tokens is not None:
                raise InputError(
                    "count and tokens are for requests that a function gives; `each` says how many replies"
                )
            data = requests if isinstance(requests, (Dataset, Stored)) else Dataset.from_rows(requests)
            if isinstance(template, Dialogue):
                return self._held(
                    name, model, repeated(value_of(data), each), template, sampling, attempts, constrained
                )
            asked = FromTemplate(value_of(data), template.asking, model.tokenizer, each)
            sampling = constrained_by(template, sampling) if constrained else sampling
            return self._asked(name, model, asked, template, sampling, attempts, inputs)
        seed = self.seed(name)
        if tokens is not None and isinstance(model, Remote):
            raise InputError(f"{model.source}: its tokens are not known here; give count=, the rows that are wanted")
        asked, count = _requests(requests, count, tokens, model.tokenizer)
        sampling = sampling if count is None else slots_for(sampling, count)
        identity, by_value = _identity(asked, count)

        def produce(folder: epath.Path) -> dict[str, Any]:
            journal = Journal(folder, mark_of(folder))
            journal.check(asked if by_value else None, model.tokenizer.bos)
            budget = Budget(journal.lengths, asked, count, tokens)
            rows = stream(
                model, budget, sampling, seed=seed, like=asked(0, FIRST if count is None else min(FIRST, count))
            )
            for row in rows:
                journal.append(row, self._as_rows(name, model, seed, getattr(asked, "types", None)))
                budget.finished(row)
                if budget.enough:
                    break
                waiting.note(budget.note())
                if row.last and signals.stop_requested():
                    journal.close()
                    raise Preempted(
                        f"{self.label} · {name}: stopped by a signal after {budget.done} rows, all kept; the same "
                        "command "
                        "goes on from there"
                    )
            if tokens is not None and budget.total == 0:
                raise InputError(
                    f"{self.label} · {name}: the model writes no tokens (do the prompts fill the context?)"
                )
            data = journal.finish(budget.wanted)
            used = _blocks_fingerprint(asked, budget.wanted) if by_value else None
            return {
                **_counts(data),
                **_paid(data, model),
                "budget_tokens": tokens,
                "requests": budget.wanted,
                "requests_fingerprint": used,
            }

        def check(manifest: dict) -> None:
            """Of requests that a function gives without end, the fingerprint holds the first ones only."""
            counts = manifest["counts"]
            if by_value and tokens is not None and counts.get("requests_fingerprint") is not None:
                now = _blocks_fingerprint(asked, counts["requests"])
                if now != counts["requests_fingerprint"]:
                    before = {"requests": counts["requests_fingerprint"]}
                    self._refuse(self.path / name, "was made", before, {"requests": now})

        def read(folder: epath.Path) -> Dataset:
            data = _read_rows(folder)
            return data if tokens is None else data.first_tokens(tokens)

        ins = {"model": model.fingerprint, **(inputs or {})}
        decided = sampling.model_copy(update={"dtype": meshes.resolve_dtype(sampling.dtype, model.mesh)})
        settings = {"requests": identity, "sampling": describe(decided), "count": count, "tokens": tokens}
        return self.durable("generate", name, ins, settings, seed, produce, read, check)

    def _held(
        self, name: str, model: Model, data: Dataset, talk: Dialogue, sampling: Any, attempts: int, constrained: bool
    ) -> Stored:
        """What a dialogue ends with; each of its turns is kept as `<name>-1`, `<name>-2`, ..."""
        stored: list[Stored] = []

        def turn(n: int, rows: Dataset, step: Template) -> Dataset:
            more = {"template": step, "attempts": attempts, "constrained": constrained}
            stored.append(self.generate(f"{name}-{n + 1}", model, rows, sampling, **more))
            return stored[-1].value

        held = hold(talk, data, turn)

        def produce(folder: epath.Path) -> dict[str, Any]:
            meshes.on_main(lambda: held.write(str(folder / "rows-00000.parquet")))
            return _counts(held)

        parts = {"rows": data, **{f"turn-{n}": part for n, part in enumerate(stored, 1)}}
        return self.durable("read", name, parts, {"dialogue": describe(talk)}, None, produce, _read_rows)

    def _asked(
        self,
        name: str,
        model: Model,
        asked: FromTemplate,
        template: Template,
        sampling: SamplingConfig,
        attempts: int,
        inputs: dict[str, Any] | None,
    ) -> Stored:
        stored: list[Stored] = []

        def replies(attempt: int, which: Sequence[int]) -> Dataset:
            part = f"{name}-replies" + (f"-{attempt + 1}" if attempt else "")
            again = Again(asked, tuple(which)) if attempt else asked
            stored.append(self.generate(part, model, again, sampling, count=len(which), inputs=inputs))
            return stored[-1].value

        read = ask(replies, len(asked), template, attempts)

        def produce(folder: epath.Path) -> dict[str, Any]:
            meshes.on_main(lambda: read.write(str(folder / "rows-00000.parquet")))
            return _counts(read)

        parts = {f"replies-{n}": part for n, part in enumerate(stored, 1)}
        return self.durable("read", name, parts, {"template": describe(template)}, None, produce, _read_rows)

    def _as_rows(self, name: str, model: Model, seed: int, types: Any) -> Callable[[Sequence[Row]], Dataset]:
        """How finished rows are kept: their ids begin with the chain, the round and the result's name."""
        parts = [self.chain.arm] if self.chain.arm != "main" else []
        parts += [str(self.chain.replicate)] if self.chain.replicate else []
        prefix = "/".join([*parts, str(self.number), name])
        return lambda rows: to_dataset(rows, model, seed=seed, round=self.number, name=prefix, types=types)

    def select(self, name: str, data: Dataset | Stored, rules: Rule | Sequence[Rule | Callable]) -> Stored:
        """The rows every rule keeps, and for each rule how many it dropped. A `Rule` sees the Dataset; a function, of a
        module or `named`, a row."""
        rules = as_rules(rules)

        def produce(folder: epath.Path) -> dict[str, Any]:
            rows = value_of(data)
            chosen, dropped = select(rows, rules)
            meshes.on_main(lambda: chosen.write(str(folder / "rows-00000.parquet")))
            counts = {**_counts(chosen), "proposed": len(rows), "dropped": dict(dropped)}
            for why in dict.fromkeys(rule.why for rule in rules if rule.why):
                counts[why] = sum(dropped.get(name, 0) for name in {rule.name for rule in rules if rule.why == why})
            if "contaminated_by" in chosen.table.column_names:  # flagged, and kept
                flagged = sum(item is not None for item in chosen.column("contaminated_by"))
                counts["contaminated"] = counts.get("contaminated", 0) + flagged
            return {**counts, "dropped_examples": {rule: shown for rule, shown in dropped.examples.items() if shown}}

        settings = {"rules": [[r.name, r.fingerprint] for r in rules]}
        return self.durable("select", name, {"data": data}, settings, None, produce, _read_rows)

    def score(
        self, name: str, data: Dataset | Stored, reward: Callable[[Dataset], Scores], column: str = "score"
    ) -> Stored:
        """The rows with a number per row in `column`; None where the reward gives none."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            scored = score(value_of(data), reward, column)
            meshes.on_main(lambda: scored.write(str(folder / "rows-00000.parquet")))
            return _counts(scored)

        settings = {"reward": describe(reward), "column": column}
        return self.durable("score", name, {"data": data}, settings, None, produce, _read_rows)

    def evaluate(
        self,
        name: str,
        model: Model,
        measure: Callable[..., dict[str, Any]],
        *arguments: Any,
        inputs: dict[str, Any] | None = None,
        config: Any = None,
    ) -> dict[str, Any]:
        """Numbers about `model`, stored and added to RUN/metrics.jsonl: those of `measure(*arguments)`. measure,
        arguments, inputs and config as in `dataset`."""

        def produce(folder: epath.Path) -> dict[str, Any]:
            metrics = plain_metrics(measure(*map(value_of, arguments)))
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

        settings = {"measure": describe(measure), "arguments": describe(arguments), "config": describe(config)}
        ins = {"model": model.fingerprint, **(inputs or {})}
        return self.durable("evaluate", name, ins, _given(settings), None, produce, read).value


def plain_metrics(found: Any) -> dict[str, Any]:
    """Metrics as JSON keeps them: NumPy's and JAX's numbers as numbers, NaN as null. Raises InputError naming what is
    not one."""
    if not isinstance(found, Mapping):
        raise InputError(f"a measure gives a dict of metrics, not {type(found).__name__}: {{'name': 1.0}}")

    def plain(name: str, value: Any) -> Any:
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [plain(name, v) for v in value]
        if isinstance(value, Mapping):
            return {str(k): plain(name, v) for k, v in value.items()}
        raise InputError(
            f"metric {name!r} is a {type(value).__name__}: numbers, texts, lists and dicts of them are kept"
        )

    return {str(name): plain(str(name), value) for name, value in found.items()}


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if v not in (None, [])}


def _requests(requests: Any, count: int | None, tokens: int | None, tokenizer: Any) -> tuple[Requests, int | None]:
    """(requests as a function, how many are wanted)."""
    if isinstance(requests, (Dataset, Stored)):
        raise InputError("rows are asked through a template: generate(..., data, template=...)")
    if not callable(requests):
        listed = as_requests(requests, tokenizer)
        if [r.id for r in listed] != list(range(len(listed))):
            raise InputError(
                "the ids of a list of requests are 0, 1, 2, ... in a durable generation: its rows are kept by them"
            )
        if count is not None and count > len(listed):
            raise InputError(f"count={count}, and the list has {len(listed)} requests")
        return lambda first, n: listed[first : first + n], len(listed) if count is None else count
    if (count is None) == (tokens is None):
        raise InputError("give either count or tokens: how many requests are wanted, or how many tokens")
    return requests, count


def _identity(asked: Requests, count: int | None) -> tuple[Any, bool]:
    """(what names the requests, whether that is their content). A function without an identity of its own is asked: all
    of its requests where their number is known, else the first ones (the rest is checked when a result is used)."""
    try:
        return describe(asked), False
    except InputError:
        return _blocks_fingerprint(asked, BLOCK if count is None else count), True


def _blocks_fingerprint(asked: Requests, count: int) -> str:
    blocks = [requests_fingerprint(asked(first, min(BLOCK, count - first))) for first in range(0, count, BLOCK)]
    return hashlib.sha256("".join(blocks).encode()).hexdigest()[:16]


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


def _paid(data: Dataset, model: Any) -> dict[str, Any]:
    """What a remote model was asked for, and the dollars that it cost."""
    if not isinstance(model, Remote) or "reply_input_tokens" not in data.table.column_names:
        return {}
    read, written = (sum(data.column(f"reply_{what}_tokens")) for what in ("input", "output"))
    return {"input_tokens": read, "output_tokens": written, "cost": model.settings.cost(read, written)}


def _read_rows(folder: epath.Path) -> Dataset:
    """The files that its manifest names: what else lies there was not committed."""
    names = sorted(n for n in read_manifest(folder / "manifest.json")["files"] if n.startswith("rows-"))
    return Dataset.read([str(folder / n) for n in names])
