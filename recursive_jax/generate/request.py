"""What is asked of a model: a prompt, an id that addresses the randomness, and settings of its own where it has
them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from recursive_jax.config import SamplingConfig
from recursive_jax.data import chat
from recursive_jax.data.dataset import DECLARED, SCHEMA, Dataset, python_rows
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.identity import describe
from recursive_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Request:
    """prompt: token ids. id: addresses the randomness. parents: ids of the prompt's rows. opened: whether the prompt
    begins the sequence as it stands (a rendered chat); otherwise the start token is put before it. sampling, seed: of
    its own, in place of the generation's. negative: what the guide reads instead of the prompt (default: nothing).
    sample: tells candidates of one request apart (`best_of`). columns: of the prompt's row, which the rows written
    carry on. both_ways: so many first tokens of what is read (the start token among them) are read in both directions,
    as a document is that was embedded; what is kept of them serves every request that begins with the same ones."""

    id: int
    prompt: np.ndarray
    parents: tuple[str, ...] = ()
    opened: bool = False
    sampling: SamplingConfig | None = None
    negative: np.ndarray | None = None
    sample: int = 0
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    both_ways: int = 0

    def tokens(self, bos: int) -> np.ndarray:
        """What the model reads, int32; an empty prompt always starts with the start token."""
        prompt = np.asarray(self.prompt, np.int32)
        return prompt if self.opened and len(prompt) else np.concatenate([[bos], prompt]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Guide:
    """A second forward pass that steers the first. combine(logits_BV, other_BV, weight_B) -> logits_BV, a pure function
    (give the same object every time: programs are compiled for it). same_prompt: the guide reads the request's prompt
    (a weaker model, contrastive decoding), else its `negative` one (the same model, classifier-free guidance)."""

    model: Model
    combine: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    same_prompt: bool = False

    def __post_init__(self):
        if self.combine is None:
            from recursive_jax.generate.programs import classifier_free

            object.__setattr__(self, "combine", classifier_free)

    def prompt(self, request: Request, bos: int) -> np.ndarray:
        if self.same_prompt:
            return request.tokens(bos)
        negative = np.empty(0, np.int32) if request.negative is None else np.asarray(request.negative, np.int32)
        return dataclasses.replace(request, prompt=negative).tokens(bos)


@dataclasses.dataclass(frozen=True)
class Draft:
    """Speculative decoding (arXiv:2211.17192): a small model of the same vocabulary guesses `ahead` tokens, the model
    checks them in one pass. Both draw with the same random numbers, so that the rows are those of the model alone."""

    model: Model
    ahead: int = 4


def as_requests(asked: Any, tokenizer: Any) -> list[Request]:
    """Requests of what a person would write: requests as they are; a text or a list of texts, to be gone on with; a
    conversation (a list of {"role", "content"}) or a list of them, to be answered. Raises InputError for anything else,
    and for a conversation without a chat template."""
    if isinstance(asked, str) or _is_conversation(asked):
        asked = [asked]
    if not isinstance(asked, Iterable) or isinstance(asked, Mapping):
        raise InputError(f"prompts are texts, conversations or requests, not {type(asked).__name__}")
    found = []
    for number, one in enumerate(asked):
        if isinstance(one, Request):
            found.append(one)
            continue
        try:
            str(one).encode()
        except UnicodeEncodeError:
            raise InputError(f"prompt {number} holds half a character (a lone surrogate): repair or drop it") from None
        if isinstance(one, str):
            opened = not getattr(tokenizer, "has_bos", True)
            found.append(Request(number, np.asarray(tokenizer.encode(one), np.int32), opened=opened))
        elif _is_conversation(one):
            found.append(Request(number, chat.encode_prompt(tokenizer, one), opened=True))
        else:
            raise InputError(f"prompt {number} is neither a text, a conversation nor a request: {str(one)[:60]!r}")
    return found


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def unconditional(count: int, first: int = 0) -> list[Request]:
    """Requests `first .. first + count` from the start token alone."""
    return [Request(i, np.empty(0, np.int32)) for i in range(first, first + count)]


@dataclasses.dataclass(frozen=True)
class Unconditional:
    """Requests from the start token alone: `requests(first, count)` gives those with ids first .. first + count."""

    def __call__(self, first: int, count: int) -> list[Request]:
        return unconditional(count, first)


@dataclasses.dataclass(frozen=True)
class FromRows:
    """Requests whose prompts are the first `prompt_tokens` tokens of rows, cycling through the rows that are long
    enough. Columns of the user's go along. The rows are listed once, however many blocks of requests are asked for."""

    data: Dataset
    prompt_tokens: int

    @functools.cached_property
    def _usable(self) -> tuple[list[str], list[np.ndarray], list[dict[str, Any]]]:
        tokens = self.data.tokens()
        chosen = [i for i, t in enumerate(tokens) if len(t) >= self.prompt_tokens]
        if not chosen:
            raise InputError(f"no row is long enough for sampling.prompt_tokens={self.prompt_tokens}")
        ids = self.data.column("id")
        own = own_columns(self.data)
        return [ids[i] for i in chosen], [tokens[i][: self.prompt_tokens] for i in chosen], [own[i] for i in chosen]

    @property
    def types(self) -> dict[str, Any]:
        """Arrow types of the columns that rows written to these requests carry on."""
        return own_types(self.data)

    def __call__(self, first: int, count: int) -> list[Request]:
        ids, prompts, columns = self._usable
        n = len(ids)
        return [Request(r, prompts[r % n], (ids[r % n],), columns=columns[r % n]) for r in range(first, first + count)]


@dataclasses.dataclass(frozen=True)
class FromTemplate:
    """Requests that ask a template's question of each row, `each` times: request `row * each + sample`. `{text}` is
    what the row says; columns of the user's go along."""

    data: Dataset
    template: Template
    tokenizer: Any
    each: int = 1

    @functools.cached_property
    def _rows(self) -> tuple[list[str], list[dict[str, Any]], list[str]]:
        return self.data.column("id"), own_columns(self.data), self.data.column("text")

    def __len__(self) -> int:
        return len(self.data) * self.each

    @property
    def types(self) -> dict[str, Any]:
        """Arrow types of the columns that rows written to these requests carry on."""
        return own_types(self.data)

    def __call__(self, first: int, count: int) -> list[Request]:
        ids, *_ = self._rows
        if first + count > len(self):
            raise InputError(f"{first + count} requests are asked for, {len(ids)} rows give {len(self)}")
        return [self._request(r, r) for r in range(first, first + count)]

    def again(self, attempt: int, which: Sequence[int]) -> list[Request]:
        """Requests `which` under ids of the attempt's own, so that they are answered with other random numbers."""
        return [self._request(r, attempt * len(self) + r) for r in which]

    def _request(self, number: int, name: int) -> Request:
        ids, rows, texts = self._rows
        row = rows[number // self.each]
        prompt = self.template.request({"text": texts[number // self.each], **row}, self.tokenizer)
        return Request(name, prompt, (ids[number // self.each],), opened=True, columns=row)


@dataclasses.dataclass(frozen=True)
class Again:
    """Some of a template's requests, asked anew: ids 0, 1, ... stand for `which`."""

    asked: FromTemplate
    which: tuple[int, ...]

    @property
    def types(self) -> dict[str, Any]:
        """Arrow types of the columns that rows written to these requests carry on."""
        return self.asked.types

    def __call__(self, first: int, count: int) -> list[Request]:
        found = self.asked.again(0, self.which[first : first + count])
        return [dataclasses.replace(r, id=first + n) for n, r in enumerate(found)]


def own_name(name: str) -> str:
    """The name of a column that rows carry on: one that is called as a core column is kept as `source_<name>`."""
    return f"source_{name}" if name in SCHEMA.names or name in DECLARED else name


def own_types(data: Dataset) -> dict[str, Any]:
    """The Arrow types of the columns of the user's."""
    return {f.name: f.type for f in data.table.schema if f.name not in SCHEMA.names and f.name not in DECLARED}


def own_columns(data: Dataset) -> list[dict[str, Any]]:
    """The columns of the user's, row by row."""
    names = list(own_types(data))
    return python_rows(data.table.select(names)) if names else [{} for _ in range(len(data))]


def from_rows(data: Dataset, prompt_tokens: int, count: int, first: int = 0) -> list[Request]:
    """Requests whose prompts are the first tokens of rows, cycling through the rows that are long enough."""
    return FromRows(data, prompt_tokens)(first, count)


def requests_fingerprint(requests: Sequence[Request]) -> str:
    """Names requests by all that decides what is written to them."""
    found = hashlib.sha256()
    for r in requests:
        own = None if r.sampling is None else describe(r.sampling)
        about = [r.id, list(r.parents), r.opened, own, r.sample, r.negative is not None, len(r.prompt)]
        about += [] if r.seed is None else [["seed", r.seed]]
        about += [["both ways", r.both_ways]] if r.both_ways else []
        found.update(json.dumps([*about, describe(r.columns)], sort_keys=True).encode())
        found.update(np.asarray(r.prompt, np.int32).tobytes())
        found.update(b"" if r.negative is None else np.asarray(r.negative, np.int32).tobytes())
    return found.hexdigest()[:16]


def shared_prefix(requests: Sequence[Request], bos: int) -> np.ndarray:
    """The tokens that all the prompts begin with (a few-shot header), int32; none for fewer than two different
    prompts."""
    prompts = [r.tokens(bos) for r in requests]
    if len({p.tobytes() for p in prompts}) < 2:
        return np.empty(0, np.int32)
    length = min(map(len, prompts)) - 1  # each keeps a token of its own to read
    first = prompts[0][:length]
    for prompt in prompts[1:]:
        differs = np.flatnonzero(first != prompt[: len(first)])
        first = first[: differs[0]] if len(differs) else first
    return first
