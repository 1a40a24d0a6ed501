"""Reads prompts: what a request asks for in numbers, and the memory of a model after its prompt.

Prompts of like length are read together; long ones in pieces; a prefix that many prompts share is read once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.config import SamplingConfig
from recursive_jax.data.tokenizers import stop_tokens
from recursive_jax.errors import InputError
from recursive_jax.generate import programs
from recursive_jax.generate.request import Request
from recursive_jax.generate.sampling import History, Rules, used_rules
from recursive_jax.generate.text import Continuation, stop_texts
from recursive_jax.models.model import Model
from recursive_jax.models.network import TransformerNetwork

#: Settings of a whole generation: what is compiled, and how many rows a request gives.
OF_ALL = ("denoise", "regex", "json_schema", "grammar", "beams", "best_of", "n_best", "length_penalty", "dtype")
PIECE = 512  # prompt tokens read by one dispatch, over all its rows
KNOWN = 8192  # settings that joined an engine, at most
DOCUMENTS = 16  # texts read in both directions whose memory is kept
WHOLE = 0.4  # of a device's memory for weights that are not split
SHARED = 32  # a prefix shorter than this is not worth reading apart


@dataclasses.dataclass
class Row:
    """A row in work, or done. tokens: new ones only; logprobs: the model's own (temperature 1, no rules), nats. status:
    `ok` (ended by a stop token or text, or by its constraint), `length` (cut at the limit), `prompt_too_long`,
    `cancelled` (nobody wants it any more). text:
    set when it is done. rank: 0 for the best of a request's rows. score: what they are ranked by. last: none of the
    request follows."""

    request: Request
    prompt: np.ndarray
    sampling: SamplingConfig
    stops: tuple[int, ...]
    stop_texts: tuple[str, ...] = ()
    tokenizer: Any = None
    limit: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    status: str = ""
    text: str | None = None
    rank: int = 0
    score: float = 0.0
    last: bool = True

    @functools.cached_property
    def text_of(self) -> Continuation:
        """The text that tokens after its prompt stand for."""
        return Continuation(self.tokenizer, self.prompt)


class Plan(NamedTuple):
    """How a prompt is read: the prefix (int32 bytes) that is read once for all prompts with it, whether in both
    directions; tokens that a dispatch reads of the rest, and how many dispatches."""

    prefix: bytes
    both_ways: bool
    width: int
    pieces: int


class Prefill:
    """What the engine and beam search have in common. models: the one that writes, and a second one that goes along (a
    guide or a draft). settings: those that requests bring along. shared: tokens that (most) prompts begin with.

    Raises InputError for a model that cannot write (without params, an encoder), or two that do not share a vocabulary.
    """

    def __init__(
        self,
        models: Sequence[Model],
        sampling: SamplingConfig,
        seed: int = 0,
        shared: Sequence[int] = (),
        settings: Sequence[SamplingConfig] = (),
    ):
        for model in models:
            check_writer(model)
        self.models = [model.merged() for model in models]
        self.model, self.mesh, self.tokenizer = self.models[0], models[0].mesh, models[0].tokenizer
        if len({m.vocab for m in models}) > 1:
            raise InputError(
                f"the two models have {' and '.join(str(m.vocab) for m in models)} tokens: not one vocabulary"
            )
        self.sampling, self.seed, self.dtype = sampling, seed, meshes.resolve_dtype(sampling.dtype, self.mesh)
        self.max_length = min(m.max_length for m in models)
        self.divisor = meshes.batch_divisor(self.mesh)
        self.networks = [m.network for m in self.models]
        self.layers = max(n.layers for n in self.networks)
        # Which rules take part is compiled in, and so are the sizes of their tables: fixed here for all requests to
        # come.
        settings = list(dict.fromkeys([sampling, *settings]))
        for own in settings:
            other = [k for k in OF_ALL if getattr(own, k) != getattr(sampling, k)]
            if other:
                raise InputError(
                    f"{', '.join(other)}: one for all rows of a generation, a request cannot bring its own"
                )
        self.uses = used_rules(settings)
        self._joined: list[SamplingConfig] = []
        self.words: dict[SamplingConfig, list[list[int]]] = {}
        self.stop_texts: dict[SamplingConfig, tuple[str, ...]] = {}
        self.stops: dict[SamplingConfig, tuple[int, ...]] = {}
        for own in settings:
            self._add(own)
        self.words_shape = Rules.of(settings, [self.words[s] for s in settings]).bad_words_BWL.shape[1:]
        self.most_stops = max(map(len, self.stops.values()))
        ends = {i for ids in self.stops.values() for i in ids}
        never = never_written(self.model, ends)
        self._never = frozenset(never)
        with jax.set_mesh(self.mesh):
            self.banned = meshes.put_replicated(self.mesh, np.array(sorted(never), np.int32))
            self.params = [self._prepared(m) for m in self.models]
        self.shared = np.asarray(shared, np.int32)
        self._prefixes: dict[tuple[int, bytes, bool], Any] = {}

    def _prepared(self, model: Model) -> Any:
        whole = whole_weights(self.sampling.weights, model.params, self.dtype, self.mesh)
        return programs.decoder(model.network, self.dtype).prepare(model.params, whole)

    def _add(self, sampling: SamplingConfig) -> None:
        self.words[sampling] = bad_words(self.tokenizer, sampling)
        self.stop_texts[sampling], self.stops[sampling] = ends_of(self.tokenizer, sampling)

    def _join(self, sampling: SamplingConfig) -> bool:
        """Takes up settings that were not named beforehand, where what is compiled has room for them."""
        if any(getattr(sampling, k) != getattr(self.sampling, k) for k in OF_ALL):
            return False
        if not used_rules([sampling]) <= self.uses or sampling.guidance != 1.0 or sampling.bad_words:
            return False
        if len(self._joined) >= KNOWN:  # in a server that never ends; rows in work have their own already
            for old in self._joined[: KNOWN // 2]:
                del self.stops[old], self.stop_texts[old], self.words[old]
            del self._joined[: KNOWN // 2]
        self._add(sampling)
        stops = self.stops[sampling]
        if len(stops) <= self.most_stops and not self._never & set(stops):
            self._joined.append(sampling)
            return True
        del self.stops[sampling], self.stop_texts[sampling], self.words[sampling]
        return False

    def open(self, request: Request) -> Row:
        """The row of a request, with its limit; done at once where nothing can or need be written."""
        sampling = request.sampling or self.sampling
        if sampling not in self.stops and not self._join(sampling):
            raise InputError(f"request {request.id} has settings of its own; name them beforehand: settings=[...]")
        prompt = request.tokens(self.tokenizer.bos)
        row = Row(request, prompt, sampling, self.stops[sampling], self.stop_texts[sampling], self.tokenizer)
        check_prompt(request, prompt, self.model.vocab)
        if request.both_ways:
            readable = [isinstance(n, TransformerNetwork) for n in self.networks]
            if not all(readable) or not 0 < request.both_ways < len(row.prompt):
                raise InputError(
                    f"request {request.id}: both_ways={request.both_ways} of a prompt of {len(row.prompt)} tokens: a "
                    "Transformer reads some first ones in both directions, and goes on from at least one more"
                )
        asked = self.max_length if sampling.max_tokens is None else sampling.max_tokens
        row.limit = max(0, min(asked, self.max_length + 1 - len(row.prompt)))
        if len(row.prompt) > self.max_length + 1:
            row.status, row.text = "prompt_too_long", ""
        elif row.limit == 0:
            row.status, row.text = "length", ""
        return row

    def terms(self, rows: Sequence[Row | None]) -> programs.Terms:
        """What the rows ask for, as NumPy arrays; None: an empty slot, done."""
        settings = [row.sampling if row else self.sampling for row in rows]
        W, L = self.words_shape
        words = np.full((len(rows), W, L), -1, np.int32)
        stops = np.full((len(rows), self.most_stops), -1, np.int32)
        for i, row in enumerate(rows):
            if row is not None:
                stops[i, : len(row.stops)] = row.stops
                for w, word in enumerate(self.words[row.sampling]):
                    words[i, w, L - len(word) :] = word
        column = lambda value, dtype: np.array([value(r) if r else 0 for r in rows], dtype)
        prompts = [row.prompt if row else np.empty(0, np.int32) for row in rows]
        ids = column(lambda r: r.request.id & 0xFFFFFFFF, np.uint32)
        own = lambda r: self.seed if r is None or r.request.seed is None else r.request.seed
        keys = np.stack([meshes.seed_words(own(row)) for row in rows])
        return programs.Terms(
            key_BX=np.asarray(programs.keys_program()(keys, ids, column(lambda r: r.request.sample, np.uint32))),
            position_B=column(lambda r: len(r.prompt), np.int32),
            length_B=np.zeros(len(rows), np.int32),
            limit_B=column(lambda r: r.limit, np.int32),
            stops_BK=stops,
            weight_B=np.array([s.guidance for s in settings], np.float32),
            done_B=np.array([row is None for row in rows]),
            rules=Rules.of(settings).replace(bad_words_BWL=words, uses=self.uses),
            history=History.of(prompts, programs.padded_vocab(self.networks[0]), self.uses, L),
        )

    def plan(self, prompt: np.ndarray, both_ways: int = 0) -> Plan:
        """How a prompt is read. both_ways: so many first tokens in both directions."""
        shared = len(self.shared)
        if both_ways:
            prefix = np.ascontiguousarray(prompt[:both_ways], np.int32)
        elif SHARED <= shared < len(prompt) and np.array_equal(prompt[:shared], self.shared):
            prefix = self.shared
        else:
            prefix = prompt[:0]
        rest = len(prompt) - len(prefix)
        width = min(PIECE, bucket(rest))
        return Plan(prefix.tobytes(), bool(both_ways), width, -(-rest // width))

    def read(self, side: int, plan: Plan, prompts: Sequence[np.ndarray], U: int) -> tuple[Any, Any]:
        """(logits_UV, memory) of model `side` after the prompts, which all follow the same plan; rows beyond are
        empty."""
        width, pieces = plan.width, plan.pieces
        begin = len(plan.prefix) // 4
        slots = self.size(begin + width * pieces)
        memory, logits = self._prefix_memory(side, plan, U) if begin else None, None
        for piece in range(pieces):
            tokens, count = np.zeros((U, width), np.int32), np.zeros(U, np.int32)
            for u, prompt in enumerate(prompts):
                part = prompt[begin + piece * width : begin + (piece + 1) * width]
                tokens[u, : len(part)], count[u] = part, len(part)
            program = programs.prefill_program(self.networks[side], self.dtype, U, slots, memory is None)
            placed = meshes.put_batch(self.mesh, (tokens, count))
            logits, memory = program(self.params[side], memory, *placed)
        return logits, memory

    def _prefix_memory(self, side: int, plan: Plan, U: int) -> Any:
        """The memory after the plan's prefix, read once, for each of U rows."""
        key = (side, plan.prefix, plan.both_ways)
        if key not in self._prefixes:
            prefix = np.frombuffer(plan.prefix, np.int32)
            kept = [k for k in self._prefixes if k[2]]
            if len(kept) >= DOCUMENTS:
                del self._prefixes[kept[0]]
            if plan.both_ways:
                width = min(bucket(len(prefix)), self.max_length)
                tokens = np.zeros((self.divisor, width), np.int32)
                tokens[:, : len(prefix)] = prefix
                count = np.full(self.divisor, len(prefix), np.int32)
                program = programs.document_program(self.networks[side], self.dtype, self.divisor, self.size(width))
                self._prefixes[key] = program(self.params[side], *meshes.put_batch(self.mesh, (tokens, count)))
            else:
                width = min(PIECE, bucket(len(prefix)))
                own = Plan(b"", False, width, -(-len(prefix) // width))
                self._prefixes[key] = self.read(side, own, [prefix] * self.divisor, self.divisor)[1]
        else:
            self._prefixes[key] = self._prefixes.pop(key)  # used last
        return programs.spread_program()(self._prefixes[key], np.zeros(U, np.int32))

    def size(self, need: int) -> int:
        return cache_slots(need, self.layers, self.max_length)


def whole_weights(asked: str, params: Any, dtype: str, mesh: Any, memory: float | None = None) -> bool:
    """Whether every shard of a batch keeps all weights while it writes (`sampling.weights`). memory: bytes of a device;
    default: what the device says, on a CPU nothing."""
    if asked != "auto" or mesh.shape["fsdp"] == 1:
        return asked == "whole"
    if memory is None:
        memory = meshes.device_memory(mesh.local_devices[0]) or 0
    size = sum(x.size for x in jax.tree.leaves(params)) * np.dtype(dtype).itemsize / mesh.shape["tensor"]
    return meshes.platform(mesh) != "cpu" and size <= WHOLE * memory


def cache_slots(need: int, layers: int, max_length: int) -> int:
    """Slots of a cache for `need` tokens: 64, 128, 192, 256, 384, 512, ...; for models of many layers, whose programs
    take long to compile, powers of two from 128 on. Never more than the model reads."""
    power = 1 << (need - 1).bit_length()
    if layers > 8:
        return min(max(128, power), max_length)
    tight = power >= 256 and need <= power * 3 // 4
    return min(power * 3 // 4 if tight else max(64, power), max_length)


def ends_of(tokenizer: Any, sampling: SamplingConfig) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(texts to look for, ids) that end a row of these settings, the tokenizer's own first."""
    texts, ids = stop_texts(tokenizer, sampling.stop)
    return texts, tuple(dict.fromkeys((*stop_tokens(tokenizer), *sampling.stop_tokens, *ids)))


def never_written(model: Model, ends: set[int]) -> set[int]:
    """Ids that stand for no text: the start, padding, and what the model has beyond its tokenizer; but for those that
    end a row."""
    tokenizer = model.tokenizer
    return {tokenizer.bos, tokenizer.pad, *range(tokenizer.vocab, model.vocab)} - {None} - ends


def check_prompt(request: Request, prompt: np.ndarray, vocab: int) -> None:
    if prompt.size and (prompt.min() < 0 or prompt.max() >= vocab):
        raise InputError(f"request {request.id}: its prompt holds ids outside 0..{vocab - 1}: another tokenizer's?")


def check_writer(model: Model, out_of_order: bool = False) -> None:
    if model.params is None:
        raise InputError("this model has no params to generate with: train it or load one")
    if not (model.network.causal or out_of_order):
        raise InputError("this model is an encoder: it reads in both directions and cannot write")
    if not model.network.has_head:
        raise InputError("this model gives scores or states, no tokens: it cannot write")


def bad_words(tokenizer: Any, sampling: SamplingConfig) -> list[list[int]]:
    """Each text as it stands, and with the blank before it that most tokenizers make part of a word."""
    forms = [form for word in sampling.bad_words for form in dict.fromkeys((word, f" {word}"))]
    found = {tuple(tokenizer.encode(form)) for form in forms}
    return sorted(list(ids) for ids in found if ids)


def bucket(n: int) -> int:
    """Widths of prompts: powers of two from 16, so that few programs are compiled."""
    return max(16, 1 << max(0, (n - 1).bit_length()))


def prefill_rows(width: int, slots: int, divisor: int) -> int:
    """Prompts read by one dispatch: about PIECE tokens; a power of two that the mesh divides."""
    rows = max(1, min(PIECE // width, 1 << (slots - 1).bit_length()))
    return rows + (-rows % divisor)
