"""What goes over the wire: a request as the JSON of OpenAI's API, and what a server's answer means."""

from __future__ import annotations

import dataclasses
import email.utils
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from recursive_jax.config import RemoteConfig, SamplingConfig
from recursive_jax.errors import InputError

CHAT, TEXT = "chat/completions", "completions"
#: Settings under their names there. The first are OpenAI's own, the others vLLM's, SGLang's and llama.cpp's.
NAMES = {
    "top_p": "top_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_tokens",
    "stop_tokens": "stop_token_ids",
}
NOT_THERE = ("beams", "best_of", "n_best", "guidance", "bad_words", "length_penalty")
FINISHED = {"length": "length", "content_filter": "refused"}  # anything else ended by itself
TOO_LONG = ("context_length_exceeded", "maximum context length", "context length", "context size", "too many tokens")
REFUSED = ("content_filter", "content_policy", "content management policy")
OUT_OF_MONEY = ("insufficient_quota", "billing")


@dataclasses.dataclass(frozen=True)
class Question:
    """A request as it is sent. key: names all that decides the reply. ceiling: tokens that it can cost, at most, read
    and written (None: no limit of what is written is given)."""

    endpoint: str
    body: dict[str, Any]
    key: str
    ceiling: tuple[int, int | None]


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came. status: that of its row. Tokens are the server's count; logprobs: nats of each token, or none."""

    text: str
    status: str = "ok"
    input_tokens: int = 0
    output_tokens: int = 0
    logprobs: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Again:
    """A try that came to nothing, and may be made again. status: of the row where no try comes to more. after: seconds
    that the server asks for. busy: it has too much to do. of_row: another request might fare better."""

    status: str
    why: str
    after: float | None = None
    busy: bool = False
    of_row: bool = True


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A request that the server does not take. status: of its row, where it takes others; message: else."""

    status: str
    message: str


def check_sampling(sampling: SamplingConfig, model: str) -> None:
    """Raises InputError for settings that such servers do not have."""
    default = SamplingConfig()
    used = [name for name in NOT_THERE if getattr(sampling, name) != getattr(default, name)]
    if used:
        raise InputError(f"{model}: {', '.join(f'sampling.{n}' for n in used)}: a remote model has no such setting")


def body_of(asked: list[dict[str, Any]] | str, sampling: SamplingConfig, remote: RemoteConfig, model: str, seed: int):
    """(endpoint, body) of a request: of a conversation, or of a text to go on from."""
    if isinstance(asked, str) and remote.api == "chat":
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, str) and remote.api == "completions":
        raise InputError("remote.api=completions asks texts only: the prompt is a conversation")
    chat = not isinstance(asked, str)
    body: dict[str, Any] = {"model": model, "messages" if chat else "prompt": asked}
    body["temperature"] = sampling.temperature
    if sampling.max_tokens is not None:
        body["max_tokens"] = sampling.max_tokens
    default = SamplingConfig()
    for name, there in NAMES.items():
        value = getattr(sampling, name)
        if value != getattr(default, name):
            body[there] = list(value) if isinstance(value, tuple) else value
    if sampling.json_schema is not None:
        schema = {"name": "reply", "schema": json.loads(sampling.json_schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    for name in ("regex", "grammar"):
        if getattr(sampling, name) is not None:
            body["structured_outputs"] = {name: getattr(sampling, name)}  # vLLM's
    if remote.logprobs:
        body["logprobs"] = True if chat else 0
    return (CHAT if chat else TEXT), {**body, "seed": seed, **remote.body}


def meaning(code: int, headers: Mapping[str, str], data: bytes, endpoint: str) -> Reply | Again | Wrong:
    """What a server's answer says."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if code == 200:
        try:
            return _reply(value["choices"][0], value.get("usage") or {}, endpoint)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            return Again("error:malformed", f"a reply that is no JSON of the API: {data[:80]!r}")
    said = _error_text(value, data)
    low = said.lower()
    if code == 429 and any(mark in low for mark in OUT_OF_MONEY):
        return Wrong("error:429", f"the server says that the account is used up: {said}")
    if code in (408, 409, 425, 429) or code >= 500:
        busy = code in (429, 503, 529)
        return Again(f"error:{code}", f"{code} {said}".strip(), _seconds(headers.get("retry-after")), busy, code != 429)
    if code in (400, 413, 422):
        if any(mark in low for mark in TOO_LONG):
            return Wrong("prompt_too_long", said)
        if any(mark in low for mark in REFUSED):
            return Wrong("refused", said)
    return Wrong(f"error:{code}", said)


def _reply(choice: dict[str, Any], usage: dict[str, Any], endpoint: str) -> Reply:
    if endpoint == CHAT:
        message = choice["message"]
        text, refused = message.get("content"), message.get("refusal")
        found = (choice.get("logprobs") or {}).get("content") or []
        logprobs = [float(token["logprob"]) for token in found]
    else:
        text, refused = choice["text"], None
        logprobs = [float(x) for x in (choice.get("logprobs") or {}).get("token_logprobs") or [] if x is not None]
    if text is not None and not isinstance(text, str):
        raise ValueError("the content is no text")
    status = "refused" if refused else FINISHED.get(choice.get("finish_reason"), "ok")
    tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    return Reply(text or refused or "", status, *tokens, logprobs or None)


def _error_text(value: Any, data: bytes) -> str:
    """The message of an error in the API's form, its code with it; else what there is."""
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, dict):
        parts = [str(error[k]) for k in ("message", "code", "type", "detail") if error.get(k)]
        return ", ".join(parts)[:500]
    return error[:500] if isinstance(error, str) else data[:200].decode("utf-8", "replace")


def _seconds(after: str | None) -> float | None:
    """A Retry-After header: seconds, or a date."""
    if not after:
        return None
    try:
        return max(0.0, float(after))
    except ValueError:
        date = email.utils.parsedate_tz(after)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
