"""`generate`: prompts in, rows out, in request order; what is written depends on (params, prompt, settings, seed,
request id) and on nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.config import SamplingConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.generate.decode import decode_program
from recursive_jax.generate.sampling import Rules
from recursive_jax.models.model import Model
from recursive_jax.train.step import resolve_dtype


@dataclasses.dataclass(frozen=True)
class Request:
    """prompt: token ids without the start token. id: addresses the randomness. parents: ids of the prompt's rows."""

    id: int
    prompt: np.ndarray
    parents: tuple[str, ...] = ()


def unconditional(count: int, first: int = 0) -> list[Request]:
    """Requests `first .. first + count` from the start token alone."""
    return [Request(i, np.empty(0, np.int32)) for i in range(first, first + count)]


def from_rows(data: Dataset, prompt_tokens: int, count: int, first: int = 0) -> list[Request]:
    """Requests whose prompts are the first tokens of rows, cycling through the rows that are long enough."""
    usable = [(i, t) for i, t in zip(data.column("id"), data.tokens(), strict=True) if len(t) >= prompt_tokens]
    if not usable:
        raise InputError(f"no row is long enough for sampling.prompt_tokens={prompt_tokens}")
    return [
        Request(r, usable[r % len(usable)][1][:prompt_tokens], (usable[r % len(usable)][0],))
        for r in range(first, first + count)
    ]


def generate(
    model: Model,
    requests: Sequence[Request],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    round: int = 0,
    name: str = "rows",
    operation: str = "generate",
) -> Dataset:
    """One row per request, holding the new tokens only (the prompt is named by `parents`). status: `ok` (ended by a stop token), `length` (cut at the limit), `prompt_too_long` (no tokens).

    Raises InputError for a model without params.
    """
    batches = list(generate_batches(model, requests, sampling, seed=seed, round=round, name=name, operation=operation))
    return sum(batches[1:], batches[0]) if batches else Dataset.empty()


def generate_batches(
    model: Model,
    requests: Sequence[Request],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
    round: int = 0,
    name: str = "rows",
    operation: str = "generate",
) -> Iterator[Dataset]:
    """The same, a batch of `sampling.batch` rows at a time."""
    sampling = sampling or SamplingConfig()
    if model.params is None:
        raise InputError("this model has no params to generate with: train it or load one")
    for begin in range(0, len(requests), sampling.batch):
        chunk = requests[begin : begin + sampling.batch]
        yield _rows(model, chunk, *_decode(model, chunk, sampling, seed), sampling, seed, round, name, operation)


def _bucket(n: int) -> int:
    """Prompt widths are rounded up to a power of two, so that few programs are compiled."""
    return 1 << max(0, (n - 1).bit_length())


def _decode(model: Model, requests: Sequence[Request], sampling: SamplingConfig, seed: int):
    """Host arrays tokens_BN, logprobs_BN, length_B for the requests, by one or more dispatches."""
    tokenizer = model.tokenizer
    longest = max((len(r.prompt) for r in requests if len(r.prompt) <= model.context), default=0)
    width = min(_bucket(longest + 1), model.context + 1)
    new = min(sampling.max_tokens or model.context, model.context)
    B = sampling.batch + (-sampling.batch % meshes.batch_divisor(model.mesh))
    prompts_BP = np.full((B, width), tokenizer.pad, np.int32)
    first_B, limit_B, ids_B = np.full(B, width - 1, np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
    for i, request in enumerate(requests):
        ids_B[i] = request.id
        if len(request.prompt) <= model.context:
            row = np.concatenate([[tokenizer.bos], request.prompt]).astype(np.int32)
            first_B[i] = width - len(row)
            prompts_BP[i, first_B[i] :] = row
            limit_B[i] = min(new, model.context - len(request.prompt))
    program = decode_program(model.architecture, width, new, resolve_dtype(sampling.dtype))
    stops = np.array([tokenizer.eos, *sampling.stop_tokens], np.int32)
    banned = np.array(sorted({tokenizer.bos, tokenizer.pad, *range(model.tokenizer.vocab, model.vocab)}), np.int32)
    with jax.set_mesh(model.mesh):
        key = jax.random.key(seed)
        rows = meshes.put_batch(model.mesh, (prompts_BP, first_B, ids_B, limit_B))
        out = program(model.params, *rows, meshes.replicate(model.mesh, Rules.of(sampling)), key, stops, banned)
        return meshes.fetch(out)


def _rows(model, requests, tokens_BN, logprobs_BN, length_B, sampling, seed, round, name, operation) -> Dataset:
    tokenizer = model.tokenizer
    rows, logprobs, status = [], [], []
    for i, request in enumerate(requests):
        new = tokens_BN[i, : length_B[i]]
        rows.append(new.astype(np.int32))
        logprobs.append(logprobs_BN[i, : length_B[i]])
        if len(request.prompt) > model.context:
            status.append("prompt_too_long")
        else:
            stopped = len(new) and int(new[-1]) in (tokenizer.eos, *sampling.stop_tokens)
            status.append("ok" if stopped else "length")
    return Dataset.from_columns(
        len(requests),
        id=[f"{name}/{r.id}" for r in requests],
        parents=[list(r.parents) for r in requests],
        operation=operation,
        model=model.fingerprint,
        round=round,
        seed=seed,
        synthetic=True,
        status=status,
        prompt_tokens=[len(r.prompt) for r in requests],
        tokens=rows,
        logprobs=logprobs,
        text=[tokenizer.decode(r) for r in rows],
    )
