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
from recursive_jax.data.tokenizers import stop_tokens
from recursive_jax.errors import InputError
from recursive_jax.generate.decode import decode_program
from recursive_jax.generate.sampling import Rules
from recursive_jax.models.model import Model
from recursive_jax.train.step import resolve_dtype


@dataclasses.dataclass(frozen=True)
class Request:
    """prompt: token ids. id: addresses the randomness. parents: ids of the prompt's rows. opened: whether the prompt
    begins the sequence as it stands (a rendered chat); otherwise the start token is put before it."""

    id: int
    prompt: np.ndarray
    parents: tuple[str, ...] = ()
    opened: bool = False

    def tokens(self, bos: int) -> np.ndarray:
        """What the model reads, int32; an empty prompt always starts with the start token."""
        prompt = np.asarray(self.prompt, np.int32)
        return prompt if self.opened and len(prompt) else np.concatenate([[bos], prompt]).astype(np.int32)


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
    if model.architecture.config is not None and not model.architecture.config.causal:
        raise InputError("this model is an encoder: it reads in both directions and cannot write")
    model = model.merged()
    for begin in range(0, len(requests), sampling.batch):
        chunk = requests[begin : begin + sampling.batch]
        yield _rows(model, chunk, *_decode(model, chunk, sampling, seed), sampling, seed, round, name, operation)


def _bucket(n: int) -> int:
    """Prompt widths are rounded up to a power of two, so that few programs are compiled."""
    return 1 << max(0, (n - 1).bit_length())


def _decode(model: Model, requests: Sequence[Request], sampling: SamplingConfig, seed: int):
    """Host arrays tokens_BN, logprobs_BN, length_B for the requests, by one or more dispatches."""
    tokenizer = model.tokenizer
    prompts = [r.tokens(tokenizer.bos) for r in requests]
    longest = max((len(p) for p in prompts if len(p) <= model.context + 1), default=1)
    width = min(_bucket(longest), model.context + 1)
    new = min(sampling.max_tokens or model.context, model.context)
    B = sampling.batch + (-sampling.batch % meshes.batch_divisor(model.mesh))
    prompts_BP = np.zeros((B, width), np.int32)
    first_B, limit_B, ids_B = np.full(B, width - 1, np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32)
    for i, request in enumerate(requests):
        ids_B[i] = request.id
        if len(prompts[i]) <= model.context + 1:
            first_B[i] = width - len(prompts[i])
            prompts_BP[i, first_B[i] :] = prompts[i]
            limit_B[i] = min(new, model.context + 1 - len(prompts[i]))
    program = decode_program(model.architecture, width, new, resolve_dtype(sampling.dtype))
    stops = np.array([*stop_tokens(tokenizer), *sampling.stop_tokens], np.int32)
    never = {tokenizer.bos, tokenizer.pad, *range(tokenizer.vocab, model.vocab)} - {None, *stops.tolist()}
    banned = np.array(sorted(never), np.int32)
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
        if len(request.tokens(tokenizer.bos)) > model.context + 1:
            status.append("prompt_too_long")
        else:
            stopped = len(new) and int(new[-1]) in (*stop_tokens(tokenizer), *sampling.stop_tokens)
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
