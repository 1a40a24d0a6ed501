"""From tokens to the text of a row: what it adds to its prompt, and where a stop text cuts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from recursive_jax.data.tokenizers import special_tokens
from recursive_jax.errors import InputError

TAIL = 16  # tokens of the prompt that the first ones of a row may merge with


class Continuation:
    """Texts of rows that go on from a prompt: the prompt's text and the row's are the text of both together. Decoders
    that strip the first blank of a text (SentencePiece, Llama) would lose it in the middle of one. before: the text of
    the end of the prompt, empty where the row begins a text."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self._decode, self._tail = tokenizer.decode, [int(t) for t in prompt[-TAIL:]]
        self.before = self._decode(self._tail)

    def __call__(self, tokens: Sequence[int]) -> str:
        whole = self._decode([*self._tail, *tokens])
        return whole[_common(self.before, whole) :]


def _common(a: str, b: str) -> int:
    """The length of the longest common beginning: of a prompt that ends within a character, that one is the row's."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def stop_texts(tokenizer: Any, stop: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(texts to look for, ids that end a row) of the stop texts: one that is a special token ends the row as that
    token, since decoded text never holds it. Raises InputError for one that only contains a special token."""
    special = special_tokens(tokenizer) if stop else {}
    found, ids = [], []
    for text in stop:
        inside = [name for name in special if name and name in text]
        if text in special:
            ids.append(special[text])
        elif inside:
            raise InputError(
                f"sampling.stop={text!r} contains the special token {inside[0]!r}, which is no text of a row: give "
                f"{inside[0]!r} alone, or the text without it"
            )
        else:
            found.append(text)
    return tuple(found), tuple(ids)


def said_for_sure(text: str, stop: Sequence[str]) -> str:
    """Of the text of a row that goes on, what will stand in it however it goes on: without a character that is not
    whole, blanks at the end, and what may be the beginning of a stop text."""
    text = text.rstrip("\ufffd").rstrip()
    cut = min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))
    begun = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return text[: min(cut, len(text) - max(begun, default=0))]


def cut_at_stop(
    tokens: Sequence[int], stop: Sequence[str], least: int, text_of: Callable[[Sequence[int]], str]
) -> tuple[int, str] | None:
    """(tokens that are kept, the text before the stop text) of the stop text that is complete first, or None. One that
    begins within the first `least` tokens is none.

    Of a token that holds the end of the text and the beginning of the stop text, the text stands in the row and the
    token is kept; else the tokens spell the text and nothing more."""
    if len(tokens) <= least:
        return None
    begin = len(text_of(tokens[:least])) if least else 0
    holds = lambda n: [at for s in stop if (at := text_of(tokens[:n]).find(s, begin)) >= 0]
    if not holds(len(tokens)):
        return None
    complete = _first(least + 1, len(tokens), lambda n: bool(holds(n)))
    text = text_of(tokens[:complete])[: min(holds(complete))]
    kept = _first(least, complete, lambda n: text_of(tokens[:n]).startswith(text))
    return kept, text


def _first(low: int, high: int, true: Callable[[int], bool]) -> int:
    """The least n in low..high that it is true of; it is true of `high`, and of all above one that it is true of."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if true(middle) else (middle + 1, high)
    return low
