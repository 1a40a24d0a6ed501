"""`Remote`: a model behind an OpenAI-compatible server, where a model is wanted that writes or judges."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import queue
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from recursive_jax import waiting
from recursive_jax.config import RemoteConfig, SamplingConfig
from recursive_jax.config.loader import with_settings
from recursive_jax.data import chat
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError, say
from recursive_jax.generate.prefill import Row
from recursive_jax.generate.remote import journal
from recursive_jax.generate.remote.client import BudgetReached, Client, Unreachable
from recursive_jax.generate.remote.wire import Question, Reply, body_of, check_sampling
from recursive_jax.generate.request import Request
from recursive_jax.identity import describe, digest

SCHEME = "openai:"
FORM = "openai:MODEL@URL, as openai:my-model@http://127.0.0.1:8000/v1 (or set OPENAI_BASE_URL to the URL)"


class RemoteTokenizer(ByteTokenizer):
    """Prompts as UTF-8 bytes, so that they are kept and compared as other models' are. A conversation is CHAT and a
    JSON line for each message: the server renders it. Tokens of the server's own are not known here."""

    CHAT = 259
    vocab = 260
    has_bos = False
    _MARK = "<|messages|>"
    chat_template = _MARK + "{% for message in messages %}{{ message | tojson }}\n{% endfor %}"

    def encode_rendered(self, text: str, first: bool) -> list[int]:
        return [self.CHAT, *self.encode(text.removeprefix(self._MARK))] if first else self.encode(text)

    def asked(self, ids: np.ndarray) -> list[chat.Message] | str:
        """The conversation, or the text, that ids of a prompt stand for."""
        text = self.decode(ids)
        return [json.loads(line) for line in text.split("\n") if line] if self.CHAT in ids[:1] else text

    def to_json(self) -> dict:
        return {"kind": "remote"}


@dataclasses.dataclass(frozen=True)
class Remote:
    """A model of another program: `Remote.of("openai:MODEL@http://host:port/v1")`, or `load_model` of it.

    It writes (`generate`, with every template) and judges; it has no params, so that it is not trained, scored or
    embedded. Its rows have a `prompt` (bytes), a `text` and a status, no `tokens`; what a reply cost stands in
    `reply_input_tokens` and `reply_output_tokens`. A row's text depends on what the server makes of its seed."""

    name: str
    url: str
    settings: RemoteConfig = dataclasses.field(default_factory=RemoteConfig)
    mesh: None = None
    max_length: int = 2**31 - 1
    vocab: int = RemoteTokenizer.vocab

    @classmethod
    def of(cls, text: str, settings: RemoteConfig | Mapping[str, Any] | None = None) -> Remote:
        """settings: a RemoteConfig, or a dict of its keys. Raises InputError for another form, or a URL that holds a
        name, a password, a query."""
        name, at, url = text.removeprefix(SCHEME).partition("@http")
        url = f"http{url}" if at else os.environ.get("OPENAI_BASE_URL", "")
        if not name or not re.fullmatch(r"https?://[^\s@?#]+", url):
            raise InputError(f"{text!r} is no remote model: {FORM}, without a password or a query in it")
        return cls(name, url.rstrip("/"), with_settings(RemoteConfig, settings, {}))

    @property
    def source(self) -> str:
        return f"{SCHEME}{self.name}@{self.url}"

    @functools.cached_property
    def tokenizer(self) -> RemoteTokenizer:
        found = RemoteTokenizer()
        if self.settings.api == "completions":
            found.chat_template = ""  # templates ask texts
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        return {}

    @property
    def fingerprint(self) -> str:
        """Names the model by what it is called and where it is (`remote.name`, where that is given), and by the
        settings that decide its replies."""
        named = self.settings.name or self.source
        more = describe(self.settings.model_copy(update={"name": ""}))
        plain = describe(RemoteConfig())
        return named if more == plain else f"{named} {digest(json.dumps(more, sort_keys=True).encode())}"

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("params", "network", "with_params", "on", "merged", "initialized", "logits", "states"):
            raise InputError(f"{self.source} is behind a server: it writes and judges, its weights are not here")
        raise AttributeError(name)

    def _check(self, client: Client) -> None:
        there = client.check()
        if there and self.name not in there:
            say(f"{self.url} names no model {self.name!r}; it names {', '.join(there[:10])}")

    def _client(self, spent: tuple[int, int] = (0, 0)) -> Client:
        return Client(self.url, self.settings, os.environ.get(self.settings.key_env) or None, spent)

    def question(self, request: Request, sampling: SamplingConfig, seed: int) -> Question:
        """What is sent for a request. Its seed is of the generation's seed, the request's id and sample."""
        sampling = request.sampling or sampling
        check_sampling(sampling, self.source)
        prompt = request.tokens(self.tokenizer.bos)
        asked = self.tokenizer.asked(prompt)
        own = hashlib.sha256(json.dumps([seed, request.id, request.sample]).encode()).digest()
        endpoint, body = body_of(asked, sampling, self.settings, self.name, int.from_bytes(own[:4]) >> 1)
        more = [seed, request.id, request.sample] if body.get("seed") is None else None
        key = digest(json.dumps([self.fingerprint, endpoint, body, more], sort_keys=True).encode())
        read = len(prompt) + 16 * len(asked) if isinstance(asked, list) else len(prompt) + 16  # a byte a token at most
        return Question(endpoint, body, key, (read, sampling.max_tokens))

    def stream(
        self, requests: Iterable[Request | None], sampling: SamplingConfig | None = None, *, seed: int = 0
    ) -> Iterator[Row]:
        """Rows as their replies come, as `generate.stream`. Replies that are kept are not asked for again; what is
        asked is kept before its row is given.

        Raises InputError for settings that there are none of, for a server that takes no such requests, and when the
        budget is used up (after the rows that were under way); Unreachable."""
        if jax.process_count() > 1:
            raise InputError("a remote model is asked by a program of one process: generate its rows in a run of one")
        sampling = sampling or SamplingConfig()
        kept = journal.current()
        own = journal.Replies(self.settings.journal) if kept is None and self.settings.journal else None
        try:
            yield from _Asking(self, sampling, seed, kept or own).rows(iter(requests))
        finally:
            if own is not None:
                own.close()

    def row(self, request: Request, sampling: SamplingConfig, reply: Reply) -> Row:
        columns = {**request.columns, "reply_input_tokens": reply.input_tokens}
        columns["reply_output_tokens"] = reply.output_tokens
        if self.settings.logprobs:
            columns["reply_logprobs"] = list(reply.logprobs or [])
        request = dataclasses.replace(request, columns=columns)
        sampling = request.sampling or sampling
        return Row(request, request.tokens(self.tokenizer.bos), sampling, (), text=reply.text, status=reply.status)


class _Asking:
    """One generation: what is under way, and its client, which is made when there is something to ask."""

    def __init__(self, remote: Remote, sampling: SamplingConfig, seed: int, kept: journal.Replies | None):
        self.remote, self.sampling, self.seed, self.kept = remote, sampling, seed, kept
        self.client: Client | None = None
        self.done: queue.SimpleQueue[tuple[Request, Any]] = queue.SimpleQueue()
        self.under_way = self.count = 0
        self.stop: Exception | None = None  # nothing more is asked

    def rows(self, source: Iterator[Request | None]) -> Iterator[Row]:
        try:
            more = True
            while more or self.under_way:
                while more and self.stop is None and self.under_way < self.remote.settings.concurrency:
                    request = next(source, False)
                    if request is False or request is None:
                        more = request is None
                        break
                    kept = self._ask(request)
                    if kept is not None:
                        yield self.remote.row(request, self.sampling, kept)
                if self.under_way:
                    row = self._next()
                    if row is not None:
                        yield row
                if self.stop is not None and not self.under_way:
                    raise self.stop
        finally:
            if self.client is not None:
                self.client.close()

    def _ask(self, request: Request) -> Reply | None:
        """The reply that is kept; None: it is asked."""
        question = self.remote.question(request, self.sampling, self.seed)
        found = self.kept and self.kept.get(question.key)
        if found is not None:
            return Reply(**found)
        if self.client is None:
            spent = (0, 0) if self.kept is None else self.kept.spent(self.remote.fingerprint)
            self.client = self.remote._client(spent)
            self.remote._check(self.client)
        self.under_way += 1
        future = self.client.submit(question, lambda reply: self._keep(question, reply))
        future.add_done_callback(lambda done: self.done.put((request, done)))
        return None

    def _keep(self, question: Question, reply: Reply) -> None:
        if self.kept is not None:
            self.kept.add(question.key, self.remote.fingerprint, dataclasses.asdict(reply))

    def _next(self) -> Row | None:
        """The row of the next reply. A reason to stop asking is kept until what is under way has come."""
        request, future = self.done.get()
        self.under_way -= 1
        try:
            reply = future.result()
        except (BudgetReached, Unreachable) as error:
            self.stop = error
            return None
        self.count += 1
        spent, gate = self.client.spending, self.client.gate
        cost = self.remote.settings.cost(spent.read, spent.written)
        told = [f"{self.count:,} replies", f"{min(int(gate.limit), self.under_way + 1)} at once"]
        told += [f"{self.client.retried:,} tries again"] if self.client.retried else []
        told += [f"{spent.read + spent.written:,} tokens"] + ([f"${cost:.4f}"] if cost else [])
        waiting.note(", ".join(told))
        return self.remote.row(request, self.sampling, reply)
