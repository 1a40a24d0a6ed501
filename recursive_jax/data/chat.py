"""Chat templates: messages -> text -> tokens, and which of the tokens the assistant wrote.

Templates are the Jinja programs inside tokenizers (data/chat_template.py). `{% generation %}` marks say what the
assistant wrote; a template without them is rendered prefix by prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recursive_jax.data.chat_template import CLOSE, OPEN, render_template
from recursive_jax.data.tokenizers import Tokenizer, stop_tokens
from recursive_jax.errors import InputError

Message = dict[str, Any]  # {"role": "user", "content": "..."}


def _raw(tokenizer: Tokenizer, messages: Sequence[Message], prompt: bool, **more: Any) -> str:
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        raise InputError("this model's tokenizer has no chat template: it is not a chat model (leave --chat out)")
    name = getattr(tokenizer, "token", lambda i: "")
    tokens = {
        "bos_token": name(tokenizer.bos),
        "eos_token": name(tokenizer.eos),
        "pad_token": "" if tokenizer.pad is None else name(tokenizer.pad),
    }
    return render_template(source, messages=list(messages), add_generation_prompt=prompt, **{**tokens, **more})


def render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False, **more: Any) -> str:
    """The conversation as one text. Raises InputError without a template, or where it refuses the messages."""
    return _raw(tokenizer, messages, add_generation_prompt, **more).replace(OPEN, "").replace(CLOSE, "")


def render_spans(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """(text, spans of characters that the assistant wrote, its end-of-turn token included)."""
    marked = _raw(tokenizer, messages, False)
    if OPEN in marked:
        spans, text = [], ""
        for i, piece in enumerate(marked.split(OPEN)):
            written, _, rest = piece.partition(CLOSE) if i else ("", "", piece)
            if i:
                spans.append((len(text), len(text) + len(written)))
            text += written + rest
        return text, spans
    ends = [t for t in (getattr(tokenizer, "token", lambda i: "")(s) for s in stop_tokens(tokenizer)) if t]
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = _raw(tokenizer, messages[:i], True)
        after = _raw(tokenizer, messages[: i + 1], False)
        if not after.startswith(before) or not marked.startswith(after):
            raise InputError(
                "this chat template renders a conversation differently once it goes on, so the assistant's tokens "
                "cannot be told apart; give a template with {% generation %} marks"
            )
        trimmed = after.rstrip()
        stop = len(trimmed) if any(trimmed.endswith(e) for e in ends) else len(after)
        spans.append((len(before), stop))
    return marked, spans


def encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32, assistant mask bool), equally long: a token counts when it holds a character of a span, as in
    transformers' `return_assistant_tokens_mask`: an answer's first token may begin on the blank before it."""
    text, spans = render_spans(tokenizer, messages)
    if not hasattr(tokenizer, "encode_with_offsets"):
        return _by_pieces(tokenizer, text, spans)
    ids, offsets = tokenizer.encode_with_offsets(text)
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for a, b in spans:
        mask |= (ends > a) & (starts < b) & (starts < ends)
    return np.asarray(ids, np.int32), mask


def _by_pieces(tokenizer: Tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """For tokenizers that do not say where their tokens lie: each stretch is encoded alone, special tokens as what they
    are."""
    encode = getattr(tokenizer, "encode_rendered", None) or (lambda piece, first: tokenizer.encode(piece))
    edges = [0, *(x for span in spans for x in span), len(text)]
    pieces = [encode(text[a:b], a == 0) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    mask = [np.full(len(p), i % 2 == 1) for i, p in enumerate(pieces)]
    return np.asarray([t for p in pieces for t in p], np.int32), np.concatenate(mask)


def _lasting(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text that stay whatever follows it: a blank at its end becomes part of the next word's token, and
    is left to the answer, as it was in training."""
    ids, offsets = tokenizer.encode_with_offsets(text)
    end = len(text.rstrip(" \t"))
    while ids and offsets[len(ids) - 1][0] >= end:
        ids = ids[:-1]
    return ids


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
    """Tokens of the conversation up to where the assistant is to write, int32: the beginning of what `encode` makes of
    the conversation once it is answered."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    if hasattr(tokenizer, "encode_with_offsets"):
        return np.asarray(_lasting(tokenizer, text), np.int32)
    before, spans = render_spans(tokenizer, messages)
    spans = spans if text.startswith(before) else []
    return _by_pieces(tokenizer, text, spans)[0]
