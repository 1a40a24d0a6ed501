"""Writing out of order: requests in, rows out, by a model that fills gaps. What is written depends on (params, prompt,
settings, seed, request id) and on nothing else, as by the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.config import DenoiseConfig, SamplingConfig
from recursive_jax.config.loader import with_settings
from recursive_jax.config.sampling import UNDENOISED
from recursive_jax.errors import InputError
from recursive_jax.generate import programs
from recursive_jax.generate.denoise_program import Canvas, denoise_program
from recursive_jax.generate.engine import finish
from recursive_jax.generate.hidden_score import denoising
from recursive_jax.generate.prefill import Row, check_prompt, check_writer, ends_of, never_written
from recursive_jax.generate.request import Request
from recursive_jax.generate.sampling import Rules
from recursive_jax.models.hidden import mask_id
from recursive_jax.models.model import Model
from recursive_jax.models.network import TransformerNetwork

WIDTH = 16  # canvases are multiples of this wide, so that few programs are compiled
USED = frozenset(("truncate", "min_p", "typical"))
FIXED = ("denoise", "dtype", "best_of", "n_best", "length_penalty")  # one for all rows of a generation


@dataclasses.dataclass
class _Waiting:
    """Rows whose canvases have one shape."""

    width: int
    size: int
    rows: list[Row] = dataclasses.field(default_factory=list)


class Denoiser:
    """As `Engine`: `for row in Denoiser(model, sampling, how, seed=0).run(requests)`. Rows of one shape of canvas are
    written together, `sampling.batch` at a time. settings: those that requests bring along. Raises InputError for
    settings that have no meaning out of order, and for a model that cannot fill gaps."""

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig,
        how: DenoiseConfig,
        *,
        seed: int = 0,
        settings: Sequence[SamplingConfig] = (),
    ):
        check_writer(model, out_of_order=True)
        self.model, self.sampling, self.how, self.seed = model.merged(), sampling, how, seed
        self.settings = list(dict.fromkeys([sampling, *settings]))
        for own in self.settings:
            checked(own)
            other = [k for k in FIXED if getattr(own, k) != getattr(sampling, k)]
            if other:
                raise InputError(
                    f"{', '.join(other)}: one for all rows of a generation, a request cannot bring its own"
                )
        network = self.model.network
        if how.block_causal and not (how.block_size and isinstance(network, TransformerNetwork) and not network.causal):
            raise InputError(
                "denoise.block_causal is for a model that was trained by blocks: it needs their block_size"
            )
        if how.block_causal and (how.cfg_scale or any(s.guidance != 1.0 for s in self.settings)):
            raise InputError("guidance hides the prompt, which a model trained by blocks has read once: leave it out")
        self.mask = mask_id(model, how.mask_id)
        self.mesh, self.tokenizer = model.mesh, model.tokenizer
        self.dtype = meshes.resolve_dtype(sampling.dtype, self.mesh)
        divisor = meshes.batch_divisor(self.mesh)
        self.B = sampling.batch + (-sampling.batch % divisor)
        self.ends = {own: ends_of(self.tokenizer, own) for own in self.settings}
        self.most_stops = max(len(ids) for _, ids in self.ends.values())
        stops = {i for _, ids in self.ends.values() for i in ids}
        self.banned = np.array(sorted({*never_written(model, stops), self.mask, *how.suppress_tokens}), np.int32)

    def run(self, requests: Iterable[Request | None]) -> Iterator[Row]:
        """Rows, a batch at a time. None among the requests: what waits is written before the next is asked for."""
        waiting: dict[tuple[int, int], _Waiting] = {}
        with jax.set_mesh(self.mesh):
            for request in requests:
                if request is None:
                    for group in waiting.values():
                        yield from self._written(group)
                    waiting.clear()
                    continue
                row = self._open(request)
                if row.status:
                    yield row
                    continue
                shape = self._shape(row)
                group = waiting.setdefault(shape, _Waiting(*shape))
                group.rows.append(row)
                if len(group.rows) == self.B:
                    yield from self._written(waiting.pop(shape))
            for group in waiting.values():
                yield from self._written(group)

    def _open(self, request: Request) -> Row:
        sampling = request.sampling or self.sampling
        if sampling not in self.ends:
            raise InputError(f"request {request.id} has settings of its own; name them beforehand: settings=[...]")
        texts, stops = self.ends[sampling]
        prompt = request.tokens(self.tokenizer.bos)
        check_prompt(request, prompt, self.model.vocab)
        if request.negative is not None or request.both_ways:
            raise InputError(f"request {request.id}: negative and both_ways have no use for a model that fills gaps")
        row = Row(request, prompt, sampling, stops, texts, self.tokenizer)
        longest = self.model.max_length
        longest -= longest % self.how.block_size if self.how.block_causal else 0
        asked = longest if sampling.max_tokens is None else sampling.max_tokens
        row.limit = max(0, min(asked, longest - len(prompt)))
        if len(prompt) > longest:
            row.status, row.text = "prompt_too_long", ""
        elif row.limit == 0:
            row.status, row.text = "length", ""
        return row

    def _shape(self, row: Row) -> tuple[int, int]:
        """(positions of the canvas, of a block)."""
        up = lambda n: min(-(-n // WIDTH) * WIDTH, self.model.max_length)
        return up(self._length(row)), self.how.block_size or up(row.limit)

    def _length(self, row: Row) -> int:
        """Positions that are written or read; a model that was trained by blocks knows whole ones only."""
        length = len(row.prompt) + row.limit
        return -(-length // self.how.block_size) * self.how.block_size if self.how.block_causal else length

    def _written(self, group: _Waiting) -> Iterator[Row]:
        canvas, blocks, steps = self._canvas(group)
        guided = bool(self.how.cfg_scale) or any(s.guidance != 1.0 for s in self.settings)
        out = self._run(canvas, group.size, blocks, steps, guided)
        for row, tokens, logprobs in zip(group.rows, *out, strict=False):
            begin, end = len(row.prompt), len(row.prompt) + row.limit
            row.tokens, row.logprobs = tokens[begin:end].tolist(), logprobs[begin:end].tolist()
            stops = [i for i, token in enumerate(row.tokens) if token in row.stops]
            if stops:
                row.tokens, row.logprobs = row.tokens[: stops[0] + 1], row.logprobs[: stops[0] + 1]
            finish(row)
            yield row

    def fill(self, numbered: Sequence[tuple[int, Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, log-probabilities) `[B, T]` of at most B rows with hidden tokens, each addressed by its number."""
        longest = max(len(ids) for _, ids in numbered)
        known = all(0 <= int(i) < self.model.vocab for _, ids in numbered for i in ids)
        if not known:
            raise InputError(f"a row holds ids outside 0..{self.model.vocab - 1}: another tokenizer's?")
        if longest > self.model.max_length:
            raise InputError(f"a row has {longest} tokens, the model reads {self.model.max_length}")
        T = min(-(-longest // WIDTH) * WIDTH, self.model.max_length)
        B = self.B
        tokens, length = np.full((B, T), self.tokenizer.eos, np.int32), np.zeros(B, np.int32)
        for n, (_, ids) in enumerate(numbered):
            tokens[n, : len(ids)], length[n] = ids, len(ids)
        free = (tokens == self.mask) & (np.arange(T) < length[:, None])
        count = free.sum(1)
        steps = np.minimum(self.how.steps or T, np.maximum(count, 1)).astype(np.int32)
        steps = np.full(B, self.how.steps, np.int32) if self.how.steps and self.how.remasking == "gibbs" else steps
        ids = np.array([n for n, _ in numbered] + [0] * (B - len(numbered)), np.uint32)
        keys = programs.keys_program()(np.tile(meshes.seed_words(self.seed), (B, 1)), ids, np.zeros(B, np.uint32))
        rules = Rules.of([self.sampling] * B)
        zeros = np.zeros(B, np.int32)
        canvas = Canvas(
            tokens, free, zeros, length, zeros, steps, np.asarray(keys), np.ones(B, np.float32), zeros,
            np.full((B, 1), -1, np.int32), rules.replace(uses=rules.uses & USED),
        )  # fmt: skip
        return self._run(canvas, T, 1, int(steps.max()), False)

    def _run(self, canvas: Canvas, size: int, blocks: int, steps: int, guided: bool) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, log-probabilities) `[B, T]` of the canvas, written."""
        how = self.how
        steps += how.remasking == "gibbs"  # it guesses all of it first
        program = denoise_program(
            self.model.network, self.dtype, size, how.remasking, how.threshold, guided, how.block_causal, self.mask
        )
        placed, banned = meshes.put_batch(self.mesh, (canvas, np.tile(self.banned, (self.B, 1))))
        return meshes.fetch(program(self.model.params, placed, np.int32(blocks), np.int32(steps), banned))

    def _canvas(self, group: _Waiting) -> tuple[Canvas, int, int]:
        """(the rows as arrays, blocks of the longest, steps of a block); empty rows fill the batch."""
        B, T, size, how = self.B, group.width, group.size, self.how
        rows: list[Row | None] = [*group.rows, *[None] * (B - len(group.rows))]
        column = lambda value, dtype: np.array([value(r) if r else 0 for r in rows], dtype)
        tokens, free = np.full((B, T), self.mask, np.int32), np.zeros((B, T), bool)
        stops = np.full((B, self.most_stops), -1, np.int32)
        for n, row in enumerate(group.rows):
            tokens[n, : len(row.prompt)] = row.prompt
            free[n, len(row.prompt) : self._length(row)] = True
            tokens[n, self._length(row) :] = self.tokenizer.eos
            stops[n, : len(row.stops)] = row.stops
        start = column(lambda r: len(r.prompt), np.int32)
        length = column(self._length, np.int32)
        first = start // size * size if how.block_causal else start
        blocks = np.maximum(1, -(-(length - first) // size))
        steps = np.maximum(1, how.steps // blocks) if how.steps else np.clip(length - start, 1, size)
        steps = (steps if how.remasking in ("ancestral", "gibbs") else np.minimum(steps, size)).astype(np.int32)
        settings = [row.sampling if row else self.sampling for row in rows]
        words = Rules.of(settings)
        own = lambda r: self.seed if r is None or r.request.seed is None else r.request.seed
        keys = np.stack([meshes.seed_words(own(row)) for row in rows])
        ids = column(lambda r: r.request.id & 0xFFFFFFFF, np.uint32)
        keys = programs.keys_program()(keys, ids, column(lambda r: r.request.sample, np.uint32))
        weight = np.array([1.0 + how.cfg_scale if how.cfg_scale else s.guidance for s in settings], np.float32)
        canvas = Canvas(
            tokens, free, start, length, first.astype(np.int32), steps, np.asarray(keys), weight,
            column(lambda r: r.sampling.min_tokens, np.int32), stops, words.replace(uses=words.uses & USED),
        )  # fmt: skip
        return canvas, int(blocks.max()), int(steps.max())


def checked(sampling: SamplingConfig) -> None:
    """Raises InputError for settings that look at what stands to the left."""
    used = [k for k in UNDENOISED if getattr(sampling, k) != type(sampling).model_fields[k].default]
    if used:
        raise InputError(f"sampling.{used[0]}: this model writes out of order, where it has no meaning; leave it out")


def fill_masks(
    model: Model,
    rows: Sequence[Sequence[int]],
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of token ids with what is hidden in them written: for each its ids int32 `[T]`, and of each position that
    was written the model's log-probability when it was (float32 `[T]`, nats, 0 elsewhere).

    rows: as the model reads them (with start and end tokens where it wants some), hidden tokens as its mask id
    (`models.hidden.mask_id`). sampling: a SamplingConfig or a dict of its keys; what counts is `denoise` (steps,
    remasking, threshold, suppress_tokens), temperature, top_k, top_p, min_p and batch. Row n is addressed by n.

    Raises InputError for a row that is longer than the model reads, and for settings that have no meaning here."""
    sampling = with_settings(SamplingConfig, sampling, {})
    how = denoising(model, sampling) or DenoiseConfig()
    unused = [k for k in ("guidance", "stop", "stop_tokens", "min_tokens", "max_tokens", "best_of")
              if getattr(sampling, k) != SamplingConfig.model_fields[k].default]  # fmt: skip
    if unused or how.cfg_scale:
        raise InputError(
            f"sampling.{(unused or ['denoise.cfg_scale'])[0]} has no use where masks are filled: leave it out"
        )
    if how.block_causal or how.block_size:
        raise InputError("masks are filled all over a row: leave sampling.denoise.block_size out")
    writer = Denoiser(model, sampling, how, seed=seed)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    found: list[Any] = [None] * len(rows)
    with jax.set_mesh(model.mesh):
        for begin in range(0, len(order), writer.B):
            members = order[begin : begin + writer.B]
            for n, ids, logprobs in zip(members, *writer.fill([(n, rows[n]) for n in members]), strict=False):
                size = len(rows[n])
                hidden = np.asarray(rows[n]) == writer.mask
                found[n] = (ids[:size], np.where(hidden, logprobs[:size], 0.0).astype(np.float32))
    return found
