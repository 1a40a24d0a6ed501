"""`generate`: prompts in, rows out, in request order; what is written depends on (params, prompt, settings, seed,
request id) and on nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from recursive_jax.config import SamplingConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.generate.engine import Engine, Row
from recursive_jax.generate.request import Guide, Request, shared_prefix
from recursive_jax.models.model import Model

FIRST = 64  # requests looked at for a prefix they share


def generate(
    model: Model,
    requests: Sequence[Request],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    round: int = 0,
    name: str = "rows",
    operation: str = "generate",
    guide: Guide | None = None,
) -> Dataset:
    """One row per request, in their order, holding the new tokens only (the prompt is named by `parents`). status: `ok`
    (ended by a stop token or text), `length` (cut at the limit), `prompt_too_long` (no tokens).

    Raises InputError for a model without params, or one that cannot write.
    """
    requests = list(requests)
    rows = list(stream(model, requests, sampling, seed=seed, guide=guide))
    order = {request.id: i for i, request in enumerate(requests)}
    rows.sort(key=lambda row: order[row.request.id])
    return to_dataset(rows, model, seed=seed, round=round, name=name, operation=operation)


def stream(
    model: Model,
    requests: Iterable[Request],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    guide: Guide | None = None,
) -> Iterator[Row]:
    """Rows as they finish, not in request order; requests may be any iterable, and are taken as there is room."""
    known = list(requests) if isinstance(requests, Sequence) else []
    shared = shared_prefix(known[:FIRST], model.tokenizer.bos)
    settings = [r.sampling for r in known if r.sampling is not None]
    engine = Engine(model, sampling, seed=seed, guide=guide, shared=shared, settings=settings)
    yield from engine.run(known or requests)


def to_dataset(
    rows: Sequence[Row], model: Model, *, seed: int, round: int = 0, name: str = "rows", operation: str = "generate"
) -> Dataset:
    """Finished rows with their lineage."""
    return Dataset.from_columns(
        len(rows),
        id=[f"{name}/{r.request.id}" for r in rows],
        parents=[list(r.request.parents) for r in rows],
        operation=operation,
        model=model.fingerprint,
        round=round,
        seed=seed,
        synthetic=True,
        status=[r.status for r in rows],
        prompt_tokens=[len(r.request.prompt) for r in rows],
        tokens=[np.asarray(r.tokens, np.int32) for r in rows],
        logprobs=[np.asarray(r.logprobs, np.float32) for r in rows],
        text=[r.text for r in rows],
    )
