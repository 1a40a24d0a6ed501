"""The engine: any number of requests through B slots. A row that ends makes room for the next request at once; what is
common to prompts is read once; several decode steps run per dispatch.

    for done in Engine(model, sampling, seed=0).run(requests):   # in the order they finish
        done.request, done.tokens, done.logprobs, done.status

Memory is constant in the number of requests: they are taken from an iterator, at most a few times B ahead of the oldest
row that is still in work.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.config import SamplingConfig
from recursive_jax.data.tokenizers import stop_tokens
from recursive_jax.errors import InputError
from recursive_jax.generate import programs
from recursive_jax.generate.request import Guide, Request
from recursive_jax.generate.sampling import History, Rules, used_rules
from recursive_jax.models.model import Model
from recursive_jax.train.step import resolve_dtype

PIECE = 512  # prompt tokens read by one dispatch, over all its rows
SHARED = 32  # a prefix shorter than this is not worth reading apart


@dataclasses.dataclass
class Row:
    """A row in work, or done. tokens: new ones only, int32; logprobs: float32, nats. status: `ok` (ended by a stop token
    or text), `length` (cut at the limit), `prompt_too_long`. text: set when it is done."""

    request: Request
    prompt: np.ndarray
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    status: str = ""
    text: str | None = None
    limit: int = 0
    sampling: SamplingConfig | None = None
    stops: tuple[int, ...] = ()


@dataclasses.dataclass
class Counts:
    """What an engine has done: rows and tokens finished or in work, seconds since it began."""

    rows: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)


class Engine:
    """See the module. seed: of the round; guide: a second model or prompt; shared: tokens that (most) prompts begin with;
    settings: those that requests bring along (which rules take part is compiled in).

    Raises InputError for a model that cannot write: without params, an encoder.
    """

    def __init__(
        self,
        model: Model,
        sampling: SamplingConfig | None = None,
        *,
        seed: int = 0,
        guide: Guide | None = None,
        shared: Sequence[int] = (),
        settings: Sequence[SamplingConfig] = (),
    ):
        check_writer(model)
        self.sampling = sampling or SamplingConfig()
        self.model, self.mesh, self.tokenizer = model.merged(), model.mesh, model.tokenizer
        self.dtype = resolve_dtype(self.sampling.dtype)
        self.counts = Counts()
        divisor = meshes.batch_divisor(self.mesh)
        self.B = self.sampling.batch + (-self.sampling.batch % divisor)
        self.slots_of: list[Row | None] = [None] * self.B
        self.guide = guide
        settings = list(dict.fromkeys([self.sampling, *settings]))
        if guide is None and any(s.guidance != 1.0 for s in settings):
            self.guide = Guide(self.model)
        self.guide_model = self.guide.model.merged() if self.guide else None
        if self.guide and self.guide_model.vocab != self.model.vocab:
            raise InputError(
                f"the guide has {self.guide_model.vocab} tokens, the model {self.model.vocab}: one vocabulary is wanted"
            )
        architectures = (self.model.architecture, self.guide_model.architecture if self.guide else None)
        self.context = min(m.context for m in (self.model, self.guide_model) if m is not None)
        self._stepper = [programs.stepper(a, self.dtype) if a else None for a in architectures]
        self._architectures = architectures
        self._combine = self.guide.combine if self.guide else None
        # Which rules take part is static, and so are the sizes of their tables: fixed here for all requests to come.
        self._uses = used_rules(settings)
        words = [self._bad_words(s) for s in settings]
        self._rules_like = Rules.of([self.sampling], [[w for row in words for w in row]]).bad_words_BWL.shape[1:]
        self._stops = max(len(self._stop_ids(s)) for s in settings)
        self._known = set(settings)
        ends = {i for s in settings for i in self._stop_ids(s)}
        never = {self.tokenizer.bos, self.tokenizer.pad, *range(self.tokenizer.vocab, self.model.vocab)} - {None} - ends
        self._banned = np.array(sorted(never), np.int32)
        with jax.set_mesh(self.mesh):
            self._key = jax.random.key(seed)
            self._params = [
                s.prepare(m.params) if s else None
                for s, m in zip(self._stepper, (self.model, self.guide_model), strict=True)
            ]
        self._state: programs.Slots | None = None
        self._size = 0
        self._shared = np.asarray(shared, np.int32)
        self._prefixes: dict[bytes, Any] = {}

    # What a request asks for.

    def _stop_ids(self, sampling: SamplingConfig) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*stop_tokens(self.tokenizer), *sampling.stop_tokens)))

    def _bad_words(self, sampling: SamplingConfig) -> list[list[int]]:
        """A word as it stands, and with the blank before it that most tokenizers make part of a word."""
        forms = [form for word in sampling.bad_words for form in dict.fromkeys((word, f" {word}"))]
        return [ids for ids in (list(self.tokenizer.encode(form)) for form in forms) if ids]

    def _open(self, request: Request) -> Row:
        sampling = request.sampling or self.sampling
        if sampling not in self._known:
            raise InputError(
                f"request {request.id} has settings of its own; name them beforehand: Engine(settings=[...])"
            )
        row = Row(request, request.tokens(self.tokenizer.bos), sampling=sampling, stops=self._stop_ids(sampling))
        if len(row.prompt) > self.context + 1:
            row.status, row.text = "prompt_too_long", ""
            return row
        if row.prompt.size and (row.prompt.min() < 0 or row.prompt.max() >= self.model.vocab):
            raise InputError(
                f"request {request.id}: its prompt holds ids outside 0..{self.model.vocab - 1}: another tokenizer's?"
            )
        asked = self.context if sampling.max_tokens is None else sampling.max_tokens
        row.limit = max(0, min(asked, self.context + 1 - len(row.prompt)))
        if row.limit == 0:
            row.status, row.text = "length", ""
        return row

    # The loop.

    def run(self, requests: Iterable[Request]) -> Iterator[Row]:
        """Rows as they finish. A request whose prompt does not fit, or that asks for nothing, is a row at once."""
        source = iter(requests)
        waiting: collections.deque[Row] = collections.deque()
        exhausted = False
        with jax.set_mesh(self.mesh):
            while True:
                free = [i for i, row in enumerate(self.slots_of) if row is None]
                while not exhausted and len(waiting) < len(free):
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                        break
                    row = self._open(request)
                    self.counts.prompt_tokens += len(row.prompt)
                    if row.status:
                        self.counts.rows += 1
                        yield row
                    else:
                        waiting.append(row)
                if waiting and free:
                    self._admit([waiting.popleft() for _ in range(min(len(free), len(waiting)))], free)
                if all(row is None for row in self.slots_of):
                    if exhausted and not waiting:
                        return
                    continue
                yield from self._work(last=exhausted and not waiting)

    def _work(self, last: bool) -> Iterator[Row]:
        """One dispatch of decode steps, and the rows it ended. last: nothing waits for a slot."""
        left = max(row.limit - len(row.tokens) for row in self.slots_of if row is not None)
        watched = any(row.sampling.stop for row in self.slots_of if row is not None)
        most = self.sampling.chunk
        steps = min(left, most * 4 if last and not watched else most)
        self._make_room(max(len(r.prompt) + len(r.tokens) for r in self.slots_of if r is not None) + steps)
        tokens_BC, logprobs_BC, count_B = self._decode(steps, most * 4)
        for slot, row in enumerate(self.slots_of):
            if row is None:
                continue
            n = int(count_B[slot])
            self.counts.tokens += n
            row.tokens += tokens_BC[slot, :n].tolist()
            row.logprobs += logprobs_BC[slot, :n].tolist()
            if self._ended(row):
                self.slots_of[slot] = None
                self.counts.rows += 1
                yield row

    def _decode(self, steps: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        program = programs.decode_program(*self._architectures, self.dtype, most, self._combine)
        self._state, *out = program(
            *self._params,
            self._state,
            self._keep(),
            np.int32(steps),
            self._key,
            meshes.replicate(self.mesh, self._banned),
        )
        return meshes.fetch(tuple(out))

    def _keep(self) -> jax.Array:
        return meshes.put_batch(self.mesh, np.array([row is not None for row in self.slots_of]))

    def _ended(self, row: Row) -> bool:
        """Whether the row is done; sets its status and text."""
        if row.sampling.stop:
            text, kept = stopped_text(row.tokens, row.sampling.stop, self.tokenizer.decode)
            if text is not None:
                row.tokens, row.logprobs = row.tokens[:kept], row.logprobs[:kept]
                row.text, row.status = text, "ok"
                return True
        stopped = bool(row.tokens) and row.tokens[-1] in row.stops
        if not stopped and len(row.tokens) < row.limit:
            return False
        row.status, row.text = "ok" if stopped else "length", self.tokenizer.decode(row.tokens)
        return True

    # Room.

    def _make_room(self, need: int) -> None:
        """A cache of at least `need` slots a row, up to the context: it grows with the rows, since attention reads all of
        it."""
        size = cache_size(need, self.context, self._layers())
        if self._state is None:
            self._size = size
            empty = programs.empty_program(*self._architectures, self.dtype, self.B, size)
            self._state = empty(meshes.put_batch(self.mesh, self._terms([None] * self.B)))
        elif size > self._size or (size * 4 <= self._size):
            self._size = size
            self._state = programs.resize_program(size)(self._state)

    def _layers(self) -> int:
        return max(a.config.layers if a.config else 1 for a in self._architectures if a)

    # Admission.

    def _admit(self, rows: list[Row], free: list[int]) -> None:
        """Reads the rows' prompts and puts them into slots; equal prompts are read once."""
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            groups.setdefault(self._prompts(row), []).append(row)
        by_width: dict[tuple, list[tuple]] = {}
        for prompts in groups:
            by_width.setdefault(tuple(self._plan(np.frombuffer(p, np.int32)) for p in prompts), []).append(prompts)
        slots = iter(free)
        held = [len(r.prompt) + len(r.tokens) for r in [*rows, *self.slots_of] if r is not None]
        self._make_room(max(held) + self.sampling.chunk)
        for plans, members in sorted(by_width.items()):
            U = prefill_rows(max(p[1] for p in plans), self.B, meshes.batch_divisor(self.mesh))
            for begin in range(0, len(members), U):
                chunk = members[begin : begin + U]
                read = []
                for side, plan in enumerate(plans):
                    read += self._prefill(side, plan, [np.frombuffer(m[side], np.int32) for m in chunk], U)
                placed = [(u, row, next(slots)) for u, member in enumerate(chunk) for row in groups[member]]
                for start in range(0, len(placed), U):
                    self._insert(read, placed[start : start + U], U)

    def _prompts(self, row: Row) -> tuple[bytes, ...]:
        """What the model, and the guide where there is one, read before the row."""
        own = np.ascontiguousarray(row.prompt).tobytes()
        if self.guide is None:
            return (own,)
        return own, np.ascontiguousarray(self.guide.prompt(row.request, self.tokenizer.bos)).tobytes()

    def _plan(self, prompt: np.ndarray) -> tuple[bool, int, int]:
        """(whether the shared prefix is its own, tokens a dispatch reads, how many dispatches)."""
        shared = len(self._shared)
        common = SHARED <= shared < len(prompt) and np.array_equal(prompt[:shared], self._shared)
        rest = len(prompt) - (shared if common else 0)
        width = min(PIECE, bucket(rest))
        return common, width, -(-rest // width)

    def _prefill(self, side: int, plan: tuple, prompts: list[np.ndarray], U: int) -> tuple[Any, Any]:
        """(logits_UV, memory) after the prompts, which all follow the same plan."""
        common, width, pieces = plan
        begin = len(self._shared) if common else 0
        slots = cache_size(begin + width * pieces, self.context, self._layers())
        memory = self._shared_memory(side, U, slots) if common else None
        for piece in range(pieces):
            tokens, count = np.zeros((U, width), np.int32), np.zeros(U, np.int32)
            for u, prompt in enumerate(prompts):
                part = prompt[begin + piece * width : begin + (piece + 1) * width]
                tokens[u, : len(part)], count[u] = part, len(part)
            first = memory is None
            program = programs.prefill_program(self._architectures[side], self.dtype, U, slots, first)
            placed = meshes.put_batch(self.mesh, (tokens, count))
            logits, memory = program(self._params[side], memory, *placed)
        return logits, memory

    def _shared_memory(self, side: int, U: int, slots: int) -> Any:
        """The shared prefix, read once, before each of U rows."""
        key = (side, self._shared.tobytes())
        if key not in self._prefixes:
            width = min(PIECE, bucket(len(self._shared)))
            rows = meshes.batch_divisor(self.mesh)
            self._prefixes[key] = self._prefill(
                side, (False, width, -(-len(self._shared) // width)), [self._shared] * rows, rows
            )[1]
        return programs.spread_program()(self._prefixes[key], np.zeros(U, np.int32))

    def _insert(self, read: list[Any], placed: list[tuple[int, Row, int]], U: int) -> None:
        source, slot = np.zeros(U, np.int32), np.full(U, self.B, np.int32)
        rows: list[Row | None] = [None] * U
        for i, (u, row, at) in enumerate(placed):
            source[i], slot[i], rows[i] = u, at, row
            self.slots_of[at] = row
        terms = meshes.replicate(self.mesh, self._terms(rows))
        logits, memory, *guide = read
        new = programs.Slots(memory, logits, terms, *guide[::-1])
        self._state = programs.insert_program()(self._state, new, source, slot)

    def _terms(self, rows: Sequence[Row | None]) -> programs.Terms:
        settings = [row.sampling if row else self.sampling for row in rows]
        W, L = self._rules_like
        rules = Rules.of(settings).replace(bad_words_BWL=np.full((len(rows), W, L), -1, np.int32), uses=self._uses)
        stops = np.full((len(rows), self._stops), -1, np.int32)
        for i, row in enumerate(rows):
            if row is None:
                continue
            stops[i, : len(row.stops)] = row.stops
            for w, word in enumerate(self._bad_words(row.sampling)):
                rules.bad_words_BWL[i, w, L - len(word) :] = word
        column = lambda value, dtype: np.array([value(r) if r else 0 for r in rows], dtype)
        prompts = [row.prompt if row else np.empty(0, np.int32) for row in rows]
        return programs.Terms(
            id_B=column(lambda r: r.request.id & 0xFFFFFFFF, np.uint32),
            position_B=column(lambda r: len(r.prompt), np.int32),
            length_B=np.zeros(len(rows), np.int32),
            limit_B=column(lambda r: r.limit, np.int32),
            stops_BK=stops,
            weight_B=np.array([s.guidance for s in settings], np.float32),
            done_B=np.array([row is None for row in rows]),
            rules=rules,
            history=History.of(prompts, programs.padded_vocab(self._architectures[0]), self._uses, L),
        )


def check_writer(model: Model) -> None:
    if model.params is None:
        raise InputError("this model has no params to generate with: train it or load one")
    if model.architecture.config is not None and not model.architecture.config.causal:
        raise InputError("this model is an encoder: it reads in both directions and cannot write")


def bucket(n: int) -> int:
    """Widths of prompts: powers of two from 16, so that few programs are compiled."""
    return max(16, 1 << max(0, (n - 1).bit_length()))


def prefill_rows(width: int, slots: int, divisor: int) -> int:
    """Prompts read by one dispatch: about PIECE tokens; a power of two that the mesh divides."""
    rows = max(1, min(PIECE // width, 1 << (slots - 1).bit_length()))
    return rows + (-rows % divisor)


def cache_size(need: int, context: int, layers: int) -> int:
    """Slots for `need` tokens: 64, 128, 192, 256, 384, 512, ...; for models of many layers, whose decode programs take
    long to compile, powers of two from 128 on. Never more than the context."""
    if layers > 8:
        size = max(128, 1 << (need - 1).bit_length())
    else:
        power = max(64, 1 << (need - 1).bit_length())
        size = power * 3 // 4 if power >= 256 and need <= power * 3 // 4 else power
    return min(size, context)


def stopped_text(
    tokens: Sequence[int], stop: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> tuple[str | None, int]:
    """(the text before the first stop text, the least number of tokens that spell it out), or (None, 0)."""
    text = decode(tokens)
    if not any(s in text for s in stop):
        return None, 0
    low, high = 1, len(tokens)  # holding a stop text is monotone in the number of tokens
    while low < high:
        middle = (low + high) // 2
        if any(s in decode(tokens[:middle]) for s in stop):
            high = middle
        else:
            low = middle + 1
    text = decode(tokens[:low])
    return text[: min(text.find(s) for s in stop if s in text)], low
