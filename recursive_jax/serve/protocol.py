"""OpenAI's API as data: what may be asked, as settings and prompts of our own, and rows as its answers.

Settings are the API's, and vLLM's names for those that it does not have. What nobody says is the model's own way
(`Model.sampling`)."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from recursive_jax.config import SamplingConfig
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import sampling_for
from recursive_jax.generate.prefill import Row
from recursive_jax.generate.request import Request, as_requests
from recursive_jax.models.model import Model

Alternatives = tuple[np.ndarray, np.ndarray, np.ndarray]  # of each token: its log-probability, the best ids, theirs
MOST = 20  # alternatives of a token
#: Fields that clients send and that change nothing here.
UNSERVED = ("logit_bias", "tools", "tool_choice", "suffix", "dimensions")
IGNORED = ("user", "store", "metadata", "service_tier", "parallel_tool_calls", "logit_bias", "tools", "tool_choice")
SAME = ("temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty")
SAME += ("repetition_penalty", "min_tokens", "bad_words")


class ApiError(Exception):
    """An answer that is none, in the API's form."""

    def __init__(
        self,
        code: int,
        message: str,
        kind: str = "invalid_request_error",
        name: str | None = None,
        field: str | None = None,
    ):
        super().__init__(message)
        self.code, self.message, self.kind, self.name, self.field = code, message, kind, name, field

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.field, "code": self.name}}


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    n: int = pydantic.Field(1, ge=1)
    seed: int | None = pydantic.Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def counted(self) -> bool:
        """Whether a stream ends with the tokens that it used."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, model: Model) -> SamplingConfig:
        """Raises ApiError for what is no setting, or one of an unknown value."""
        asked = {name: value for name in SAME if (value := getattr(self, name)) is not None}
        asked |= {} if self.limit is None else {"max_tokens": self.limit}
        asked |= {} if self.stop is None else {"stop": [self.stop] if isinstance(self.stop, str) else self.stop}
        asked |= {} if self.stop_token_ids is None else {"stop_tokens": self.stop_token_ids}
        asked |= _constraint(self.response_format, self.structured_outputs)
        try:
            return sampling_for(model, asked)
        except InputError as error:
            lines = str(error).splitlines()  # without the name of our own section
            raise ApiError(400, "; ".join(x.strip(" -") for x in lines[1:] or lines)) from None


class Completion(_Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = pydantic.Field(None, ge=0, le=MOST)
    echo: bool = False
    best_of: int | None = None

    @property
    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # the API's default

    def prompts(self, model: Model) -> list[Request]:
        if self.best_of not in (None, self.n):
            raise ApiError(400, "best_of: only n is served")
        asked = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if asked and isinstance(asked[0], int):
            asked = [asked]
        of_ids = lambda ids: Request(0, np.asarray(ids, np.int32), opened=True)
        try:
            return [of_ids(one) if isinstance(one, list) else as_requests(one, model.tokenizer)[0] for one in asked]
        except (InputError, OverflowError) as error:
            raise ApiError(400, str(error), field="prompt") from None


class Chat(_Body):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = pydantic.Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=MOST)

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompts(self, model: Model) -> list[Request]:
        try:
            return as_requests(self.messages, model.tokenizer)
        except InputError as error:
            raise ApiError(400, str(error).replace(" (leave --chat out)", ""), field="messages") from None


class Embedding(pydantic.BaseModel):
    """POST /v1/embeddings."""

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"

    def texts(self) -> list[str | np.ndarray]:
        found = self.input if isinstance(self.input, list) else [self.input]
        found = [found] if found and isinstance(found[0], int) else found
        return [one if isinstance(one, str) else np.asarray(one, np.int32) for one in found]


def read(kind: type[pydantic.BaseModel], data: bytes) -> Any:
    """A request. Raises ApiError naming the field."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is no JSON object")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "a text of the body holds half a character (a lone surrogate)") from None
    value = {k: v for k, v in value.items() if v is not None and not (k in IGNORED and not v)}
    unserved = [k for k in UNSERVED if k in value]
    if unserved:
        raise ApiError(400, f"{', '.join(unserved)}: not served here", field=unserved[0])
    try:
        return kind.model_validate({k: v for k, v in value.items() if k not in IGNORED})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        known = ", ".join(kind.model_fields)
        what = f"unknown; known here: {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise ApiError(400, f"{field}: {what}", field=field) from None


def _constraint(form: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of a response format, or of vLLM's structured outputs."""
    kind = (form or {}).get("type", "text")
    found: dict[str, Any] = {}
    if kind == "json_object":
        found["json_schema"] = json.dumps({"type": "object"})
    elif kind == "json_schema":
        schema = form.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise ApiError(400, "response_format.json_schema.schema: an object is wanted")
        found["json_schema"] = json.dumps(schema["schema"])
    elif kind != "text":
        raise ApiError(400, f"response_format.type={kind!r}: text, json_object or json_schema are served")
    for name, value in (own or {}).items():
        if name == "json":
            found["json_schema"] = value if isinstance(value, str) else json.dumps(value)
        elif name == "choice":
            found["regex"] = "|".join(re.escape(str(one)) for one in value)
        elif name in ("regex", "grammar"):
            found[name] = value
        else:
            raise ApiError(400, f"structured_outputs.{name}: regex, json, choice or grammar are served")
    return found


# ---- answers

REASONS = {"length": "length", "prompt_too_long": "length"}  # anything else ended by itself


class Answers:
    """The answers to one request, whole or in pieces."""

    def __init__(self, body: Completion | Chat, model: Model, name: str, number: str):
        self.body, self.model, self.name = body, model, name
        self.chat = isinstance(body, Chat)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{number}"
        self.created = int(time.time())

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        kind += ".chunk" if self.chat and streamed else ""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.name}
        return {**head, "system_fingerprint": self.model.fingerprint}

    def whole(self, rows: Sequence[Row], scored: Sequence[Alternatives | None], prompts: int) -> dict[str, Any]:
        """rows: the choices, prompt after prompt; scored: of each, where log-probabilities are asked for."""
        choices = [self._choice(i, row, found) for i, (row, found) in enumerate(zip(rows, scored, strict=True))]
        return {**self._head(False), "choices": choices, "usage": usage(rows, prompts)}

    def _choice(self, index: int, row: Row, found: Alternatives | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": REASONS.get(row.status, "stop"), "logprobs": None}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": row.text, "refusal": None}
        else:
            choice["text"] = (self.echoed(row.request) if self.body.echo else "") + row.text
        if found is not None:
            choice["logprobs"] = self._logprobs(row, found)
        return choice

    def echoed(self, request: Request) -> str:
        return self.model.tokenizer.decode(request.prompt)

    def _logprobs(self, row: Row, found: Alternatives) -> dict[str, Any]:
        own, ids, best = found
        tokens = [*(row.request.prompt if not self.chat and self.body.echo else ()), *row.tokens]
        text = lambda i: self.model.tokenizer.decode([int(i)])
        number = lambda x: None if np.isnan(x) else float(x)
        if self.chat:
            entry = lambda i, x: {"token": text(i), "logprob": float(x), "bytes": list(text(i).encode())}
            top = [[entry(i, x) for i, x in zip(a, b, strict=True)] for a, b in zip(ids, best, strict=True)]
            pairs = zip(tokens, own, top, strict=True)
            return {"content": [{**entry(i, x), "top_logprobs": t} for i, x, t in pairs], "refusal": None}
        pieces = [text(i) for i in tokens]
        offsets = np.cumsum([0, *map(len, pieces)])[:-1]
        top = None
        if self.body.logprobs:
            best_of = lambda a, b: {text(i): float(x) for i, x in reversed(list(zip(a, b, strict=True)))}
            top = [best_of(a, b) for a, b in zip(ids, best, strict=True)]
            top = [None if np.isnan(x) else t for x, t in zip(own, top, strict=True)]
        found = {"tokens": pieces, "token_logprobs": [number(x) for x in own], "top_logprobs": top}
        return {**found, "text_offset": offsets.tolist()}

    def piece(self, index: int, text: str, row: Row | None = None, first: bool = False) -> dict[str, Any]:
        """One event of a stream: more text of a choice. row: where it is its last."""
        choice: dict[str, Any] = {"index": index, "logprobs": None}
        choice["finish_reason"] = None if row is None else REASONS.get(row.status, "stop")
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return {**self._head(True), "choices": [choice]}

    def count(self, rows: Sequence[Row], prompts: int) -> dict[str, Any]:
        """The event that ends a stream with the tokens it used."""
        return {**self._head(True), "choices": [], "usage": usage(rows, prompts)}


def usage(rows: Sequence[Row], prompts: int) -> dict[str, int]:
    """Tokens: a prompt counts once, whatever is written to it."""
    each = len(rows) // max(1, prompts)
    read, written = sum(len(row.prompt) for row in rows[::each]), sum(len(row.tokens) for row in rows)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def embeddings(found: np.ndarray, form: str, name: str, tokens: int) -> dict[str, Any]:
    """found: float32 `[N, D]`."""
    values = [base64.b64encode(x.astype("<f4").tobytes()).decode() if form == "base64" else x.tolist() for x in found]
    data = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)]
    return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
