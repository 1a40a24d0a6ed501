"""`generate`: prompts in, rows out, in request order; what is written depends on (params, prompt, settings, seed,
request id) and on nothing else."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recursive_jax.config import SamplingConfig
from recursive_jax.config.loader import parse_section
from recursive_jax.data.dataset import DECLARED, SCHEMA, Dataset
from recursive_jax.errors import InputError
from recursive_jax.generate.beam import beam_search
from recursive_jax.generate.engine import Engine
from recursive_jax.generate.prefill import Prefill, Row
from recursive_jax.generate.request import Draft, Guide, Request, as_requests, shared_prefix
from recursive_jax.models.model import Model

FIRST = 64  # requests looked at for a prefix they share


def generate(
    model: Model,
    requests: Sequence[Request] | Sequence[str] | str | Sequence[Any],
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    round: int = 0,
    name: str = "rows",
    operation: str = "generate",
    guide: Guide | None = None,
    draft: Draft | None = None,
    progress: bool = False,
    **settings: Any,
) -> Dataset:
    """Rows of a model: `generate(model, "Once upon a time", temperature=0.5, max_tokens=50)`.

    requests: a text, a list of texts, a conversation (a list of {"role", "content"}) or a list of them, or requests.
    sampling: a SamplingConfig or a dict of its keys; settings: more of them, by name.

    One row per request (`n_best` of them), in their order: `prompt` holds the ids that were read, `tokens` the new
    ones; columns of the prompt's row go along. status: `ok` (ended by a stop token or text), `length` (cut at the
    limit), `prompt_too_long` (no tokens), `constraint` (its grammar cannot be followed; what was written till then).
    progress: rows and tokens per second on stderr.

    Raises InputError for a model without params, or one that cannot write, and for settings that are none; ValueError
    for two requests with one id.
    """
    sampling = sampling_of(sampling, settings)
    requests = as_requests(requests, model.tokenizer)
    order = {request.id: i for i, request in enumerate(requests)}
    if len(order) < len(requests):
        raise ValueError(
            "two requests have the same id: it addresses their random numbers, and would give them one row"
        )
    rows = list(stream(model, requests, sampling, seed=seed, guide=guide, draft=draft, progress=progress))
    rows.sort(key=lambda row: (order[row.request.id], row.rank))
    return to_dataset(rows, model, seed=seed, round=round, name=name, operation=operation)


def sampling_of(sampling: SamplingConfig | Mapping[str, Any] | None, settings: Mapping[str, Any]) -> SamplingConfig:
    """A config, a dict or nothing, with keys by name on top. Raises InputError naming every wrong one."""
    if isinstance(sampling, SamplingConfig) and not settings:
        return sampling
    given = sampling.model_dump(exclude_unset=True) if isinstance(sampling, SamplingConfig) else dict(sampling or {})
    return parse_section(SamplingConfig, {**given, **settings}, where="the sampling settings")


def stream(
    model: Model,
    requests: Iterable[Request | None],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    guide: Guide | None = None,
    draft: Draft | None = None,
    like: Sequence[Request] = (),
    progress: bool = False,
) -> Iterator[Row]:
    """Rows as they finish, not in request order. requests may be any iterable, and are taken as there is room: memory
    does not grow with their number (None: there is none now, ask again after the next dispatch). like: where `requests`
    is no sequence, some that are like those to come: the prefix they share is read once, and requests may bring the
    settings that these do."""
    sampling = sampling or SamplingConfig()
    known = requests if isinstance(requests, Sequence) else like
    settings = list(dict.fromkeys(r.sampling for r in known if r.sampling is not None))
    shared = shared_prefix(known[:FIRST], model.tokenizer.bos)
    if sampling.beams > 1:
        if guide is not None or draft is not None or settings:
            raise ValueError("beam search takes neither a guide nor a draft, nor settings of a request's own")
        rows = beam_search(Prefill([model], sampling, seed, shared), requests)
    else:
        engine = Engine(model, sampling, seed=seed, guide=guide, draft=draft, shared=shared, settings=settings)
        if sampling.best_of > 1:
            rows = _best(engine.run(_candidates(requests, sampling.best_of)), sampling)
        else:
            rows = engine.run(requests)
    yield from _shown(rows, len(known) if known is requests else 0) if progress else rows


def _candidates(requests: Iterable[Request | None], count: int) -> Iterator[Request | None]:
    for request in requests:
        for sample in range(count if request is not None else 1):
            yield None if request is None else dataclasses.replace(request, sample=sample)


def _best(rows: Iterator[Row], sampling: SamplingConfig) -> Iterator[Row]:
    """Of each request's `best_of` rows the `n_best` with the largest log-probability / length ** length_penalty."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        row.score = float(np.sum(row.logprobs)) / max(1, len(row.tokens)) ** sampling.length_penalty
        group = groups.setdefault(row.request.id, [])
        group.append(row)
        if len(group) == sampling.best_of:
            del groups[row.request.id]
            group.sort(key=lambda r: (-r.score, r.request.sample))
            for rank, kept in enumerate(group[: sampling.n_best]):
                kept.rank, kept.last = rank, rank == sampling.n_best - 1
                yield kept


def _shown(rows: Iterator[Row], total: int) -> Iterator[Row]:
    """The rows, with their number and the tokens per second so far on stderr: one line that changes on a terminal, else
    a line every ten seconds."""
    live, begin, said, count, tokens = sys.stderr.isatty(), time.perf_counter(), 0.0, 0, 0
    for row in rows:
        count, tokens = count + 1, tokens + len(row.tokens)
        now = time.perf_counter() - begin
        if now - said > (0.2 if live else 10.0):
            said = now
            print(_line(count, total, tokens, now), end="\r" if live else "\n", file=sys.stderr, flush=True)
        yield row
    print(_line(count, total, tokens, time.perf_counter() - begin), file=sys.stderr, flush=True)


def _line(count: int, total: int, tokens: int, seconds: float) -> str:
    of = f"/{total:,}" if total else ""
    return f"{count:,}{of} rows, {tokens:,} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):,.0f} tokens/s   "


def to_dataset(
    rows: Sequence[Row],
    model: Model,
    *,
    seed: int,
    round: int = 0,
    name: str = "rows",
    operation: str = "generate",
    types: Mapping[str, Any] | None = None,
) -> Dataset:
    """Finished rows with their lineage. Where a request has several, `.1`, `.2`, ... follows the id of the lesser
    ones."""
    return Dataset.from_columns(
        len(rows),
        id=[f"{name}/{r.request.id}" + (f".{r.rank}" if r.rank else "") for r in rows],
        parents=[list(r.request.parents) for r in rows],
        operation=operation,
        model=writer_name(model),
        round=round,
        seed=seed,
        synthetic=True,
        status=[r.status for r in rows],
        prompt=[np.asarray(r.prompt, np.int32) for r in rows],
        tokens=[np.asarray(r.tokens, np.int32) for r in rows],
        logprobs=[np.asarray(r.logprobs, np.float32) for r in rows],
        text=[r.text for r in rows],
        **carried([r.request.columns for r in rows], types or {}),
    )


def writer_name(model: Model) -> str:
    """The fingerprint of the model that wrote; without one (user functions that have no name) none."""
    try:
        return model.fingerprint
    except InputError:
        return ""


def carried(columns: Sequence[Mapping[str, Any]], types: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that rows carry on from their prompts' rows. One that is called as a core column is, is kept as
    `source_<name>`."""
    names = dict.fromkeys([*types, *(name for row in columns for name in row)])
    typed = lambda name, values: pa.array(values, types[name]) if name in types else values
    return {own_name(name): typed(name, [row.get(name) for row in columns]) for name in names}


def own_name(name: str) -> str:
    return f"source_{name}" if name in SCHEMA.names or name in DECLARED else name
