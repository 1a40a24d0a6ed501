"""What a server answers: an ASGI application over one model.

    POST /v1/completions, /v1/chat/completions, /v1/embeddings     GET /v1/models, /health

A choice is the row that `generate` gives for the same prompt, settings and seed: choice i of n is row i of
`rj.generate(model, [prompt] * n, seed=seed, ...)`, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recursive_jax.config import SamplingConfig
from recursive_jax.errors import InputError
from recursive_jax.generate import request as requests
from recursive_jax.generate.prefill import Row
from recursive_jax.generate.score import embed, token_alternatives
from recursive_jax.generate.text import said_for_sure
from recursive_jax.models.model import Model
from recursive_jax.serve import protocol
from recursive_jax.serve.lanes import Busy, Job, Lanes
from recursive_jax.serve.protocol import Alternatives, Answers, ApiError

LOG = logging.getLogger("recursive_jax.serve")


@dataclasses.dataclass(frozen=True)
class Limits:
    """slots: rows decoded together; waiting: rows in work or waiting, beyond which a request is answered 429; rows: of
    one request; body: bytes of one request. token: what clients must give as their key."""

    slots: int = 16
    waiting: int = 1024
    rows: int = 128
    body: int = 4 * 2**20
    token: str | None = None


class Service:
    """One model behind the API. name: what clients call it."""

    def __init__(self, model: Model, name: str, limits: Limits):
        self.model, self.name, self.limits = model, name, limits
        self.lanes = Lanes(model, limits.slots, limits.waiting)
        self._score = asyncio.Lock()  # one pass over given texts at a time: their memory is not the engine's

    # ---- what may ask

    def _allow(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.limits.token is not None and not hmac.compare_digest(given.encode(), self.limits.token.encode()):
            raise ApiError(401, "the key is missing or wrong", "authentication_error", "invalid_api_key")

    async def _read(self, request: Request, kind: Any) -> Any:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > self.limits.body:
                raise ApiError(413, f"the body is larger than {self.limits.body:,} bytes")
        body = protocol.read(kind, b"".join(parts))
        if body.model != self.name:
            message = f"there is no model {body.model!r} here, only {self.name!r}"
            raise ApiError(404, message, name="model_not_found")
        return body

    # ---- answers

    async def models(self, request: Request) -> Response:
        self._allow(request)
        one = {"id": self.name, "object": "model", "created": 0, "owned_by": "recursive-jax"}
        one["max_model_len"] = self.model.max_length
        wanted = request.path_params.get("name")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [one]})
        if wanted != self.name:
            raise ApiError(404, f"there is no model {wanted!r} here, only {self.name!r}", name="model_not_found")
        return JSONResponse(one)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def completions(self, request: Request) -> Response:
        self._allow(request)
        return await self._write(request, await self._read(request, protocol.Completion))

    async def chat(self, request: Request) -> Response:
        self._allow(request)
        return await self._write(request, await self._read(request, protocol.Chat))

    async def embeddings(self, request: Request) -> Response:
        self._allow(request)
        body = await self._read(request, protocol.Embedding)
        texts = body.texts()
        if not texts or len(texts) > self.limits.rows:
            raise ApiError(400, f"input: 1 to {self.limits.rows} texts are wanted, there are {len(texts)}")
        async with self._score:
            try:
                found = await run_in_threadpool(embed, self.model, texts)
            except InputError as error:
                raise ApiError(400, str(error)) from None
        encoded = [len(self.model.tokenizer.encode(t)) if isinstance(t, str) else len(t) for t in texts]
        return JSONResponse(protocol.embeddings(found, body.encoding_format, self.name, sum(encoded)))

    async def _write(self, request: Request, body: protocol.Completion | protocol.Chat) -> Response:
        sampling = body.sampling(self.model)
        prompts = body.prompts(self.model)
        self._check(body, prompts, sampling)
        seed = secrets.randbits(31) if body.seed is None else body.seed
        asked = [dataclasses.replace(p, id=i, sampling=sampling, seed=seed) for p in prompts for i in range(body.n)]
        answers = Answers(body, self.model, self.name, secrets.token_hex(12))
        work = _Work(asked, streamed=body.stream)
        try:
            self.lanes.put(work.jobs, sampling)
        except Busy as error:
            raise ApiError(429, str(error), "rate_limit_error", "rate_limit_exceeded") from None
        except InputError as error:
            raise ApiError(400, str(error)) from None
        if body.stream:
            return StreamingResponse(self._events(work, answers, len(prompts)), media_type="text/event-stream")
        rows = await self._all(work, request)
        scored = await self._scored(body, rows)
        return JSONResponse(answers.whole(rows, scored, len(prompts)))

    def _check(self, body: Any, prompts: Sequence[requests.Request], sampling: SamplingConfig) -> None:
        count, most = len(prompts) * body.n, self.limits.rows
        if not count:
            raise ApiError(400, "prompt: at least one is wanted", field="prompt")
        if count > most:
            raise ApiError(400, f"at most {most} choices are served for one request, these would be {count}", field="n")
        for prompt in prompts:
            ids = prompt.tokens(self.model.tokenizer.bos)
            if len(ids) and not 0 <= ids.min() <= ids.max() < self.model.vocab:
                raise ApiError(400, f"prompt: token ids are 0 to {self.model.vocab - 1}")
            if len(ids) > self.model.max_length + (sampling.max_tokens == 0):
                size = (
                    f"the prompt has {len(ids)} tokens, the model's maximum context length is {self.model.max_length}"
                )
                raise ApiError(400, size, name="context_length_exceeded")
        if sampling.beams > 1 or sampling.best_of > 1:
            raise ApiError(400, "beams and best_of are not served")
        if body.stream and body.logprobs not in (None, False):
            raise ApiError(400, "logprobs: not served in a stream")

    async def _all(self, work: _Work, request: Request) -> list[Row]:
        """The rows of a request; a client that has gone gives them up."""
        gone = asyncio.create_task(_gone(request))
        try:
            while not work.complete:
                event = asyncio.create_task(work.next())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    raise ClientDisconnect
                event.result()
            return work.rows
        finally:
            gone.cancel()
            work.cancel()

    async def _scored(self, body: Any, rows: Sequence[Row]) -> list[Alternatives | None]:
        """Log-probabilities of each row, where they are asked for; with alternatives, or of the prompt too, from a
        pass over the whole row."""
        count = body.logprobs if isinstance(body, protocol.Completion) else (body.logprobs and (body.top_logprobs or 0))
        if count is None or count is False:
            return [None] * len(rows)
        echo = getattr(body, "echo", False)
        if not echo and not count:
            none = [np.zeros((len(row.tokens), 0)) for row in rows]
            return [(np.asarray(row.logprobs), x, x) for row, x in zip(rows, none, strict=True)]
        texts = [np.asarray([*r.prompt, *r.tokens], np.int32) for r in rows]
        pass_ = lambda: list(token_alternatives(self.model, texts, max(1, count), opened=True))
        async with self._score:
            found = await run_in_threadpool(pass_)
        out: list[Alternatives | None] = []
        for row, (own, ids, best) in zip(rows, found, strict=True):
            own = np.concatenate([[np.nan], own])  # nothing comes before the first
            ids, best = (np.concatenate([x[:1] * 0, x]) for x in (ids, best))
            size = len(row.tokens) + (len(row.request.prompt) if echo else 0)
            cut = slice(len(own) - size, None)
            out.append((own[cut], ids[cut, :count], best[cut, :count]))
        return out

    async def _events(self, work: _Work, answers: Answers, prompts: int) -> AsyncIterator[str]:
        event = lambda value: f"data: {json.dumps(value)}\n\n"
        echo = getattr(answers.body, "echo", False)
        begun: set[int] = set()
        try:
            while not work.complete:
                index, text, row = await work.next()
                first = index not in begun
                begun.add(index)
                if first and echo:
                    text = answers.echoed(work.jobs[index].request) + text
                yield event(answers.piece(index, text, row, first))
            if answers.body.counted:
                yield event(answers.count(work.rows, prompts))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.body())
        finally:
            work.cancel()


class _Work:
    """The rows of one request, as they are written on the engine's thread."""

    def __init__(self, asked: Sequence[requests.Request], streamed: bool):
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self._told = [""] * len(asked)
        self._found: list[Row | None] = [None] * len(asked)
        self.jobs = [Job(one, self._says(i) if streamed else None, self._finishes(i)) for i, one in enumerate(asked)]

    def _says(self, index: int):
        def said(row: Row) -> None:
            text, told = said_for_sure(row.text_of(row.tokens), row.stop_texts), self._told[index]
            if text.startswith(told) and text != told:
                self._told[index] = text
                self._put((index, text[len(told) :], None))

        return said

    def _finishes(self, index: int):
        def done(row: Row | Exception) -> None:
            text = "" if isinstance(row, Exception) else row.text[len(self._told[index]) :]
            self._put((index, text, row))

        return done

    def _put(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> tuple[int, str, Row | None]:
        """(choice, more of its text, the row if it is done). Raises ApiError for a row that failed."""
        index, text, row = await self._events.get()
        if isinstance(row, InputError):
            raise ApiError(400, str(row))
        if isinstance(row, Exception):
            LOG.error("a row failed", exc_info=row)
            raise ApiError(500, "the row failed; the server's log says why", "server_error")
        self._found[index] = row
        return index, text, row

    @property
    def complete(self) -> bool:
        return all(row is not None for row in self._found)

    @property
    def rows(self) -> list[Row]:
        return list(self._found)

    def cancel(self) -> None:
        for job, row in zip(self.jobs, self._found, strict=True):
            if row is None:
                job.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.code == 429 else None
    return JSONResponse(error.body(), error.code, headers)


async def _http_error(request: Request, error: Any) -> Response:
    name = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", name=name)
    return JSONResponse(found.body(), error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    LOG.error("a request failed", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed; its log says why", "server_error").body(), 500)


async def _left(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


def application(model: Model, name: str, limits: Limits | None = None) -> Starlette:
    """The ASGI application that serves `model` under `name`."""
    service = Service(model, name, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.lanes.close)

    routes = [
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/embeddings", service.embeddings, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/health", service.health),
    ]
    handlers = {ApiError: _api_error, 404: _http_error, 405: _http_error, ClientDisconnect: _left, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
