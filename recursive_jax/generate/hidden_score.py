"""What a model that fills gaps says of given texts: a bound on their log-probability, and their pseudo-log-likelihood.

Shapes: M rows with hidden tokens, T positions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.config import DenoiseConfig, SamplingConfig
from recursive_jax.errors import InputError
from recursive_jax.mesh import TRACES
from recursive_jax.models.hidden import is_shifted, mask_id, own_logits
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.objectives.causal import token_nll
from recursive_jax.objectives.diffusion import behind, drawn_sets
from recursive_jax.objectives.masked_diffusion import read_blocks

SAMPLES = 32  # sets of hidden tokens that the bound of a row is averaged over
POSITIONS = 8192  # of one dispatch, on each shard of the batch
LOGITS = 2**26  # values of logits that a shard holds at once
WINDOW = 64  # rows that are worked on together


def denoising(model: Any, sampling: SamplingConfig | None = None) -> DenoiseConfig | None:
    """How the model writes out of order: as the settings ask, else as it was trained to; None: from left to right."""
    if sampling is not None and sampling.denoise is not None:
        own = model.sampling.get("denoise") or {}
        given = sampling.denoise.model_dump(exclude_unset=True)
        if own.get("block_causal") and given.get("block_size", own["block_size"]) != own["block_size"]:
            raise InputError(
                f"sampling.denoise.block_size={given['block_size']}: this model was trained by blocks of "
                f"{own['block_size']}, and reads no others; leave it out"
            )
        return DenoiseConfig(**{**own, **given})
    own = model.sampling.get("denoise")
    if own:
        return DenoiseConfig(**own)
    return None if model.network.causal else DenoiseConfig()


def bound_logprobs(
    model: Model,
    rows: Iterable[np.ndarray],
    how: DenoiseConfig,
    *,
    opened: bool = False,
    given: Sequence[int] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """A part for each token of a row (float32, nats, in order) whose sum is, in the mean over draws, a lower bound of
    the row's log-probability: LLaDA's estimator (arXiv:2502.09992, app. A.2) with the parts kept apart; of a model
    trained by blocks, of each block given those before.

    rows, opened: as of `token_logprobs`. given: so many first tokens of each row are not asked for (a prompt), and stay
    in sight; their parts are 0. samples: draws of each row, of sizes spread evenly. Where the model was trained to fill
    rows up with end tokens, a row that ends with one is read with them; the last part holds theirs.

    Raises InputError for ids that the model does not have."""
    mask, network = mask_id(model, how.mask_id), model.network
    size = how.block_size if how.block_causal else 0
    program = _program(network, meshes.resolve_dtype(dtype, model.mesh), mask, size, True)
    eos, longest = model.tokenizer.eos, min(model.max_length, how.fill or model.max_length)
    for first_of_window, window in _windows(rows):
        canvases, hidden = [], []
        for n, row in enumerate(window, first_of_window):
            ids, first = _canvas(model, row, opened)
            known = max(1, first + (0 if given is None else int(given[n])))
            fill = how.fill and len(ids) < longest and len(ids) and ids[-1] == eos
            full = np.concatenate([ids, np.full(longest - len(ids), eos, np.int32)]) if fill else ids
            canvases.append((ids, full, first))
            blocks = _blocks(len(full), known, size)
            hidden.append(drawn_sets(np.random.default_rng([seed, n]), len(full), blocks, samples))
        jobs = [(full, one) for (_, full, _), (sets, _) in zip(canvases, hidden, strict=True) for one in sets]
        found = _run(model, program, jobs)
        for (ids, full, first), (_, weights) in zip(canvases, hidden, strict=True):
            parts = [next(found)[: len(full)] * w for w in weights]
            mean = np.mean(parts, axis=0) if parts else np.zeros(len(full))
            own = mean[: len(ids)].astype(np.float32)
            if len(ids):
                own[-1] += mean[len(ids) :].sum()  # the end tokens that fill the row up
            yield own[max(1, first) :]


def _windows(rows: Iterable[np.ndarray]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number of the first, some rows that are worked on together): memory does not grow with their number."""
    source, first = iter(rows), 0
    while window := [row for _, row in zip(range(WINDOW), source, strict=False)]:
        yield first, window
        first += len(window)


def pseudo_logprobs(
    model: Model, rows: Iterable[np.ndarray], *, opened: bool = False, dtype: str = "float32"
) -> Iterator[np.ndarray]:
    """log p of each token of a row given all others: float32, nats; their sum is the pseudo-log-likelihood
    (arXiv:1910.14659), which is no bound: neighbours tell of each other. One pass for each token. rows, opened: as of
    `token_logprobs`."""
    how = denoising(model)
    mask = mask_id(model, None if how is None else how.mask_id)
    program = _program(model.network, meshes.resolve_dtype(dtype, model.mesh), mask, 0, False)
    for _, window in _windows(rows):
        canvases = [_canvas(model, row, opened) for row in window]
        jobs = [(ids, np.arange(len(ids)) == t) for ids, _ in canvases for t in range(1, len(ids))]
        found = _run(model, program, jobs)
        for ids, first in canvases:
            each = np.array([next(found)[t] for t in range(1, len(ids))], np.float32)
            yield each[max(1, first) - 1 :]


def _canvas(model: Model, row: np.ndarray, opened: bool) -> tuple[np.ndarray, int]:
    """(the row as it is read, where the asked tokens begin)."""
    row = np.asarray(row, np.int32)
    if row.size and (row.min() < 0 or row.max() >= model.vocab):
        raise InputError(f"rows hold token ids outside 0..{model.vocab - 1}: they come from another tokenizer")
    ids = row if opened else np.concatenate([[model.tokenizer.bos], row]).astype(np.int32)
    return ids[: model.max_length], 0 if opened else 1


def _blocks(length: int, known: int, size: int) -> list[np.ndarray]:
    """The positions that are asked for, block by block (size 0: one)."""
    size = size or max(length, 1)
    return [np.arange(max(at, known), min(at + size, length)) for at in range(0, length, size)]


def _run(model: Model, program: Callable, jobs: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """log p of the tokens of each job, float64 `[T]`, 0 where they are not hidden; in order."""
    if model.params is None:
        raise InputError("this model has no params: train it, load one, or call .initialized(seed)")
    if not model.network.has_head:
        raise InputError("this model gives scores or states, no tokens: it has no log-probabilities")
    order = sorted(range(len(jobs)), key=lambda n: -len(jobs[n][0]))
    found: dict[int, np.ndarray] = {}
    divisor = meshes.batch_divisor(model.mesh)
    with jax.set_mesh(model.mesh):
        at, pending = 0, None
        while at < len(order):
            width = max(16, len(jobs[order[at]][0]))
            T = min(model.max_length, max(16, 1 << (width - 1).bit_length()))
            M = max(1, min(POSITIONS // T, LOGITS // (T * model.vocab))) * divisor
            M += -M % divisor
            members = order[at : at + M]
            at += M
            tokens, segments = np.zeros((M, T), np.int32), np.zeros((M, T), np.int32)
            hidden = np.zeros((M, T), bool)
            for m, n in enumerate(members):
                ids, set_ = jobs[n]
                tokens[m, : len(ids)], segments[m, : len(ids)], hidden[m, : len(ids)] = ids, 1, set_
            out = program(model.params, *meshes.put_batch(model.mesh, (tokens, segments, hidden)))
            if pending is not None:
                _settle(found, *pending)
            pending = (members, out)
        if pending is not None:
            _settle(found, *pending)
    yield from (found.pop(n) for n in range(len(jobs)))


def _settle(found: dict[int, np.ndarray], members: list[int], out: Any) -> None:
    table = meshes.fetch(out)
    found.update({n: table[m].astype(np.float64) for m, n in enumerate(members)})


@functools.cache
def _program(network: Network, dtype: str, mask: int, size: int, never: bool) -> Callable:
    """(params, tokens_MT, segments_MT, hidden_MT) -> log p of the hidden tokens `[M, T]`, 0 elsewhere. never: the mask
    itself is not what is hidden."""
    apply, shifted = network.bind(dtype), is_shifted(network)

    def logprobs(params, tokens, segments, hidden):
        TRACES["hidden_logprobs"] += 1
        inputs = jnp.where(hidden, mask, tokens)
        if size:
            logits_MTV = read_blocks(apply, params, inputs, tokens, segments, size)
        else:
            logits_MTV = own_logits(apply, shifted, params, inputs, segments)
        logp_MT = behind(logits_MTV, tokens, mask) if never else -token_nll(logits_MTV, tokens)
        return jnp.where(hidden, logp_MT, 0.0)

    return jax.jit(logprobs)
