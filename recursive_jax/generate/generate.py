"""`generate`: prompts in, rows out, in request order; what is written depends on (params, prompt, settings, seed,
request id) and on nothing else."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recursive_jax.config import SamplingConfig
from recursive_jax.config.loader import with_settings
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.generate.beam import beam_search
from recursive_jax.generate.denoise import Denoiser
from recursive_jax.generate.dialogue import Dialogue, hold, repeated
from recursive_jax.generate.engine import Engine, slots_for
from recursive_jax.generate.hidden_score import denoising
from recursive_jax.generate.prefill import Prefill, Row
from recursive_jax.generate.reading import ask, constrained_by
from recursive_jax.generate.remote.model import Remote
from recursive_jax.generate.request import Draft, FromTemplate, Guide, Request, as_requests, own_name, shared_prefix
from recursive_jax.models.model import Model
from recursive_jax.waiting import Wait, note, rate

FIRST = 64  # requests looked at for a prefix they share


def generate(
    model: Model | Remote,
    requests: Sequence[Request] | Sequence[str] | str | Sequence[Any] | Dataset,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    *,
    template: Template | Dialogue | None = None,
    each: int = 1,
    attempts: int = 1,
    constrained: bool = False,
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
    sampling: a SamplingConfig, or a dict of its keys over the model's own (`model.sampling`); settings: more of them,
    by name.

    template: asks it of every row (dicts, or a Dataset), `each` times, and reads the replies (`read_replies`): their
    fields are columns, and what cannot be read has a status that says why; a Dialogue goes on asking (`hold`).
    attempts: how often what failed is asked anew, at most. constrained: replies are held to what the template's parser
    reads.

    Without one, a row per request (`n_best` of them), in their order: `prompt` holds the ids that were read, `tokens`
    the new ones; columns of the prompt's row go along. status: `ok` (ended by a stop token or text), `length` (cut at
    the limit), `prompt_too_long` (no tokens), `constraint` (its grammar cannot be followed; what was written till
    then).
    progress: rows and tokens per second on stderr.

    Raises InputError for a model without params, or one that cannot write, and for settings that are none; ValueError
    for two requests with one id.
    """
    sampling = sampling_for(model, sampling, settings)
    more = {"seed": seed, "round": round, "operation": operation, "guide": guide, "draft": draft, "progress": progress}
    if template is not None:
        data = requests if isinstance(requests, Dataset) else Dataset.from_rows(requests)
        if isinstance(template, Dialogue):
            more |= {"attempts": attempts, "constrained": constrained}
            turn = lambda n, rows, step: generate(
                model, rows, sampling, template=step, name=f"{name}-{n}", **{**more, "seed": seed + n}
            )
            return hold(template, repeated(data, each), turn)
        sampling = constrained_by(template, sampling) if constrained else sampling
        asked = FromTemplate(data, template, model.tokenizer, each)
        run = lambda attempt, which: generate(model, asked.again(attempt, which), sampling, name=name, **more)
        return ask(run, len(asked), template, attempts)
    if isinstance(requests, Dataset) or (each, attempts, constrained) != (1, 1, False):
        raise InputError("rows are asked through a template: generate(model, rows, template=...)")
    requests = as_requests(requests, model.tokenizer)
    order = {request.id: i for i, request in enumerate(requests)}
    if len(order) < len(requests):
        raise ValueError(
            "two requests have the same id: it addresses their random numbers, and would give them one row"
        )
    rows = list(stream(model, requests, sampling, seed=seed, guide=guide, draft=draft, progress=progress))
    rows.sort(key=lambda row: (order[row.request.id], row.rank))
    return to_dataset(rows, model, seed=seed, round=round, name=name, operation=operation)


def sampling_for(
    model: Model, sampling: SamplingConfig | Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None
) -> SamplingConfig:
    """What is asked for, over how the model samples where nobody says (`Model.sampling`). A SamplingConfig says all;
    beams and `best_of` have no use for a model's own way."""
    if isinstance(sampling, SamplingConfig):
        return with_settings(SamplingConfig, sampling, settings or {})
    asked = {**(sampling or {}), **(settings or {})}
    searched = any(str(asked.get(key, 1)) != "1" for key in ("beams", "best_of"))
    return with_settings(SamplingConfig, None, asked if searched else {**model.sampling, **asked})


def stream(
    model: Model | Remote,
    requests: Iterable[Request | None],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    guide: Guide | None = None,
    draft: Draft | None = None,
    like: Sequence[Request] = (),
    progress: bool = False,
    partial: Callable[[Row], None] | None = None,
) -> Iterator[Row]:
    """Rows as they finish, not in request order. requests may be any iterable, and are taken as there is room: memory
    does not grow with their number (None: there is none now, ask again after the next dispatch). like: where `requests`
    is no sequence, some that are like those to come: the prefix they share is read once, and requests may bring the
    settings that these do. partial: called with each row that goes on, after every dispatch (not of beams)."""
    sampling = sampling or SamplingConfig()
    if isinstance(model, Remote):
        if guide is not None or draft is not None:
            raise InputError(f"{model.source} takes neither a guide nor a draft: they need its logits")
        rows = model.stream(requests, sampling, seed=seed)
        yield from _shown(rows, len(requests) if isinstance(requests, Sequence) else 0) if progress else rows
        return
    if isinstance(requests, Sequence):
        sampling = slots_for(sampling, len(requests))
    known = requests if isinstance(requests, Sequence) else like
    settings = list(dict.fromkeys(r.sampling for r in known if r.sampling is not None))
    how = denoising(model, sampling)
    if how is not None:
        if guide is not None or draft is not None:
            raise InputError("this model writes out of order: it takes neither a guide nor a draft")
        run = Denoiser(model, sampling, how, seed=seed, settings=settings).run
        rows = _best_rows(run, requests, sampling)
        yield from _shown(rows, len(known) if known is requests else 0) if progress else rows
        return
    shared = shared_prefix(known[:FIRST], model.tokenizer.bos)
    if sampling.beams > 1:
        if guide is not None or draft is not None or settings:
            raise ValueError("beam search takes neither a guide nor a draft, nor settings of a request's own")
        rows = beam_search(Prefill([model], sampling, seed, shared), requests)
    else:
        more = {"guide": guide, "draft": draft, "shared": shared, "settings": settings, "partial": partial}
        engine = Engine(model, sampling, seed=seed, **more)
        rows = _best_rows(engine.run, requests, sampling)
    yield from _shown(rows, len(known) if known is requests else 0) if progress else rows


def _best_rows(run: Callable[..., Iterator[Row]], requests: Any, sampling: SamplingConfig) -> Iterator[Row]:
    """The rows of a writer; with `best_of` the best ones of each request."""
    if sampling.best_of > 1:
        return _best(run(_candidates(requests, sampling.best_of)), sampling)
    return run(requests)


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
    """The rows, with their number and the tokens per second so far on stderr."""
    count = tokens = 0
    of = f"/{total:,}" if total else ""
    with Wait("generating", every=10.0) as wait:
        for row in rows:
            count, tokens = count + 1, tokens + row.request.columns.get("reply_output_tokens", len(row.tokens))
            note(f"{count:,}{of} rows, {tokens:,} tokens, {rate(tokens, wait.seconds)} tokens/s")
            yield row
        wait.close()
        seconds = wait.seconds
    said = f"{count:,}{of} rows, {tokens:,} tokens in {seconds:.1f} s: {rate(tokens, seconds)} tokens/s"
    print(said, file=sys.stderr, flush=True)


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
