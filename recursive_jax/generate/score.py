"""Passes over given texts as throughput jobs: log-probabilities, embeddings, rewards. Rows are packed as in training,
so that no position is padding; results come back in the order of the rows.

Shapes: B packed rows, T positions, M segments of a packed row, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.data.packing import first_fit
from recursive_jax.errors import InputError
from recursive_jax.generate.hidden_score import bound_logprobs, denoising
from recursive_jax.mesh import TRACES, local, spec
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network, TransformerNetwork
from recursive_jax.objectives.causal import token_nll

TOKENS = 4096  # positions of one dispatch, on each shard of the batch
SEGMENTS = 64  # texts of one packed row, when they are pooled
WINDOW = 4096  # rows packed together; memory does not grow with their number
LOGITS = 2**25  # values of logits held at once (128 MiB)


def token_logprobs(
    model: Model,
    rows: Iterable[np.ndarray],
    *,
    opened: bool = False,
    given: Sequence[int] | None = None,
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """log p of every token given those before it in its row: one float32 array (nats) per row, in order. Of a model
    that fills gaps: parts whose sum bounds the row's log-probability from below (`hidden_score.bound_logprobs`), where
    `given` says how many tokens of each row are known and not asked for.

    rows: token ids, without start token; opened: they begin as they stand, and the first token has no log-probability.
    Rows are cut at the context. Raises InputError for ids the model does not have.
    """
    how = denoising(model)
    if how is not None:
        yield from bound_logprobs(model, rows, how, opened=opened, given=given, dtype=dtype)
        return
    yield from _per_token(model, rows, opened, logprob_program(model.network, meshes.resolve_dtype(dtype, model.mesh)))


def token_entropies(
    model: Model, rows: Iterable[np.ndarray], *, opened: bool = False, dtype: str = "float32"
) -> Iterator[np.ndarray]:
    """The entropy (nats) of what the model expects at every token of a row. Arguments, shapes and errors as
    `token_logprobs`."""
    yield from _per_token(model, rows, opened, _entropy_program(model.network, meshes.resolve_dtype(dtype, model.mesh)))


def token_alternatives(
    model: Model, rows: Iterable[np.ndarray], count: int, *, opened: bool = False, dtype: str = "float32"
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of every token of a row its log-probability, and the `count` most probable ones in its place: float32 `[T]`,
    ids int32 `[T, count]`, their log-probabilities float32 `[T, count]`. Other arguments and errors as
    `token_logprobs`."""
    count = min(count, model.vocab)
    program = _alternatives_program(model.network, meshes.resolve_dtype(dtype, model.mesh), count)
    for table in _per_token(model, rows, opened, program):
        yield table[:, 0], table[:, 1 + count :].astype(np.int32), table[:, 1 : 1 + count]


def _per_token(model: Model, rows: Iterable[np.ndarray], opened: bool, program: Callable) -> Iterator[np.ndarray]:
    if not model.network.has_head:
        raise InputError("this model gives scores or states, no tokens: it has no log-probabilities")
    if not model.network.causal:
        raise InputError("this model reads in both directions: it says nothing of the next token alone")
    bos = np.array([] if opened else [model.tokenizer.bos], np.int32)
    pieces = (np.concatenate([bos, _checked(row, model)])[: model.max_length + 1].astype(np.int32) for row in rows)
    for packed, places in _batches(model, pieces, shift=1):
        table = _run(model, program, packed)
        yield from (table[n, at + 1 : at + size] for n, at, size in places)


def embed(
    model: Model,
    texts: Iterable[str | np.ndarray],
    *,
    pool: Literal["mean", "last"] = "mean",
    normalize: bool = True,
    both_ways: bool = False,
    skip: Sequence[int] | None = None,
    dtype: str = "float32",
) -> np.ndarray:
    """The last layer's states of each text, averaged over its tokens or of its last one: float32 `[N, D]`. both_ways: a
    model that writes from left to right reads in both directions (GRIT). skip: so many first tokens of each text are
    read, and left out of the mean (an instruction).

    texts: text, framed by the special tokens that the tokenizer puts around one, or token ids as they stand. Mean and
    length 1 is what sentence-transformers computes for MiniLM. Texts are cut at the context; an empty one is the start
    token alone. Raises InputError for a model of user functions, which gives logits only.
    """
    if model.network.states_size is None:
        raise InputError("a model of user functions gives logits only: it has no states to embed with")
    if pool not in ("mean", "last"):
        raise InputError(f"pool={pool!r}: mean or last is wanted")
    framed = getattr(model.tokenizer, "encode_framed", None) or (lambda ts: [model.tokenizer.encode(t) for t in ts])
    start = np.array([model.tokenizer.bos], np.int32)

    def pieces() -> Iterator[np.ndarray]:
        for text in texts:
            ids = framed([text])[0] if isinstance(text, str) else text
            ids = _checked(ids, model)[: model.max_length]
            yield ids if len(ids) else start

    both = both_ways and isinstance(model.network, TransformerNetwork) and model.network.causal
    program = _state_program(model.network, meshes.resolve_dtype(dtype, model.mesh), pool == "mean", both)
    found: list[np.ndarray] = []
    for (tokens, segments), places in _batches(model, pieces(), shift=0, most=SEGMENTS):
        pooled = segments.copy()
        for (n, at, size), left in zip(places, (skip or ())[len(found) :], strict=False):
            pooled[n, at : at + min(left, size - 1)] = 0
        pooled_BMD = _run(model, program, (tokens, segments, pooled), both)
        found += [pooled_BMD[n, segments[n, at] - 1] for n, at, _ in places]
    rows = np.stack(found) if found else np.empty((0, model.network.states_size), np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) if normalize else rows


def rewards(
    model: Model,
    texts: Iterable[str | np.ndarray],
    head_D: np.ndarray | None = None,
    bias: float = 0.0,
    *,
    dtype: str = "float32",
) -> np.ndarray:
    """A number per text from a linear head on the state of its last token (a reward model, arXiv:1706.03741): float32
    `[N]`. head_D: none: the model's own (`model.head=score`). Other arguments and errors as `embed`; raises InputError
    for a head of another width, and a model that has none."""
    if head_D is None:
        if model.params is None:
            raise InputError("this model has no params: train it, load one, or call .initialized(seed)")
        if not isinstance(model.params, Mapping) or "score" not in model.params:
            raise InputError("this model has no score head: it is no reward model")
        head_D = np.asarray(meshes.fetch(model.params["score"]))[0]
    head_D = np.asarray(head_D, np.float32)
    width = model.network.states_size
    if width is not None and head_D.shape != (width,):
        raise InputError(f"the head has shape {head_D.shape}, the model's states ({width},)")
    return embed(model, texts, pool="last", normalize=False, dtype=dtype) @ head_D + np.float32(bias)


def _checked(row: Any, model: Model) -> np.ndarray:
    row = np.asarray(row, np.int32)
    if row.size and (row.min() < 0 or row.max() >= model.vocab):
        raise InputError(f"rows hold token ids outside 0..{model.vocab - 1}: they come from another tokenizer")
    return row


Placed = list[tuple[int, int, int]]  # for each piece: its packed row, where it begins there, its length


def _batches(
    model: Model, pieces: Iterable[np.ndarray], shift: int, most: int | None = None
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], Placed]]:
    """Windows of pieces, packed; shift: 1 where the last position is only a label. most: pieces in a row."""
    if model.params is None:
        raise InputError("this model has no params: train it, load one, or call .initialized(seed)")
    source = iter(pieces)
    while True:
        window = [piece for _, piece in zip(range(WINDOW), source, strict=False)]
        if not window:
            return
        longest = max(map(len, window)) - shift
        T = max(1, min(model.max_length, max(256, 1 << max(0, longest - 1).bit_length())))
        rows = first_fit([len(piece) for piece in window], T + shift, most)
        tokens = np.zeros((len(rows), T + shift), np.int32)
        segments = np.zeros_like(tokens)
        places: Placed = [(0, 0, 0)] * len(window)
        for n, members in enumerate(rows):
            at = 0
            for segment, number in enumerate(members, 1):
                stop = at + len(window[number])
                tokens[n, at:stop], segments[n, at:stop] = window[number], segment
                places[number] = (n, at, len(window[number]))
                at = stop
        yield (tokens, segments), places
        if len(window) < WINDOW:
            return


def _run(model: Model, program: Callable, packed: tuple[np.ndarray, ...], both_ways: bool = False) -> np.ndarray:
    """All packed rows through the program, as many at once as keep the logits small."""
    tokens, segments, *_ = packed
    # Where every row is one text, what is behind it is padding, which a causal model's tokens do not see unmasked
    # either.
    masked = both_ways or not isinstance(model.network, TransformerNetwork) or not model.network.causal
    masked = masked or bool((segments > 1).any())
    divisor, T = meshes.batch_divisor(model.mesh), tokens.shape[1]
    B = min(rows_at_once(T, model.vocab, divisor), -(-len(tokens) // divisor) * divisor)
    B = 1 << (B - 1).bit_length() if B < 4 * divisor else B
    B += -B % divisor
    out = []
    with jax.set_mesh(model.mesh):
        for begin in range(0, len(tokens), B):
            fill = max(0, begin + B - len(tokens))
            chunk = [np.pad(x[begin : begin + B], ((0, fill), (0, 0))) for x in packed]
            out.append(program(model.params, *meshes.put_batch(model.mesh, tuple(chunk)), masked))
            if len(out) > 1:  # the next batch is dispatched before the last one is fetched
                out[-2] = meshes.fetch(out[-2])
        out[-1] = meshes.fetch(out[-1])
    return np.concatenate(out)[: len(tokens)]


def rows_at_once(length: int, vocab: int, divisor: int) -> int:
    """Rows of one dispatch, over all shards of the batch, that keep the logits small."""
    return max(1, min(TOKENS // length, LOGITS // (length * vocab))) * divisor


@functools.cache
def logprob_program(network: Network, dtype: str) -> Callable:
    """(params, tokens `[B, T + 1]`, segments, whether segments part) -> log-probabilities `[B, T + 1]`, first 0."""
    apply = network.bind(dtype)

    def logprobs(params, tokens, segments, masked):
        TRACES["logprobs"] += 1
        logits_BTV = apply(params, tokens[:, :-1], segments[:, :-1] if masked else None)
        nll_BT = token_nll(logits_BTV, tokens[:, 1:])
        return jnp.pad(jnp.where(segments[:, 1:] > 0, -nll_BT, 0.0), ((0, 0), (1, 0)))

    return jax.jit(logprobs, static_argnums=3)


@functools.cache
def _alternatives_program(network: Network, dtype: str, count: int) -> Callable:
    """(..., masked) -> float32 `[B, T, 1 + 2 * count]`: the token's, the best ones', their ids (exact up to 2**24)."""
    apply = network.bind(dtype)

    def alternatives(params, tokens, segments, masked):
        TRACES["alternatives"] += 1
        logits_BTV = apply(params, tokens[:, :-1], segments[:, :-1] if masked else None)

        def found(logits_BTV, next_BT):
            logp_BTV = jax.nn.log_softmax(logits_BTV[:, :, : network.vocab].astype(jnp.float32), axis=-1)
            own_BT1 = jnp.take_along_axis(logp_BTV, next_BT[:, :, None], axis=-1)
            best_BTK, ids_BTK = jax.lax.top_k(logp_BTV, count)
            return jnp.concatenate([own_BT1, best_BTK, ids_BTK.astype(jnp.float32)], axis=-1)

        rows = spec("batch")  # the vocabulary of a row is gathered: the best may lie in any part of it
        found_BTX = local(found, (rows, rows), rows)(logits_BTV, tokens[:, 1:])
        return jnp.pad(found_BTX, ((0, 0), (1, 0), (0, 0)))

    return jax.jit(alternatives, static_argnums=3)


@functools.cache
def _entropy_program(network: Network, dtype: str) -> Callable:
    apply = network.bind(dtype)

    def entropies(params, tokens, segments, masked):
        TRACES["entropies"] += 1
        logits_BTV = apply(params, tokens[:, :-1], segments[:, :-1] if masked else None)
        logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
        entropy_BT = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
        return jnp.pad(jnp.where(segments[:, 1:] > 0, entropy_BT, 0.0), ((0, 0), (1, 0)))

    return jax.jit(entropies, static_argnums=3)


@functools.cache
def _state_program(network: Network, dtype: str, mean: bool, both: bool) -> Callable:
    """(params, tokens_BT, segments_BT, pooled_BT, masked) -> pooled_BMD; M: as many segments as a row may hold, at most
    64. pooled_BT: the segments without what is left out of the mean."""
    apply = network.bind(dtype)

    def states(params, tokens, segments, taken, masked):
        TRACES["states"] += 1
        way = {"causal": False} if both else {}
        states_BTD = apply(params, tokens, segments if masked else None, hidden=True, **way).astype(jnp.float32)

        def pooled(states_BTD, segments_BT):
            T = segments_BT.shape[1]
            member_BMT = segments_BT[:, None] == jnp.arange(1, min(T, SEGMENTS) + 1)[None, :, None]
            if mean:
                weight_BMT = member_BMT / jnp.maximum(jnp.sum(member_BMT, axis=2, keepdims=True), 1)
            else:
                last_BM = jnp.max(jnp.where(member_BMT, jnp.arange(T)[None, None], -1), axis=2)
                weight_BMT = (jnp.arange(T)[None, None] == last_BM[:, :, None]).astype(jnp.float32)
            return jnp.einsum("bmt,btd->bmd", weight_BMT, states_BTD, precision=jax.lax.Precision.HIGHEST)

        rows = spec("batch")
        return local(pooled, (rows, rows), rows)(states_BTD, taken)

    return jax.jit(states, static_argnums=4)
