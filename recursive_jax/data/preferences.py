"""Rows to learn preferences from, as people write them: a prompt and answers, as texts or as conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recursive_jax.data import chat
from recursive_jax.data.dataset import SCHEMA, Dataset
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError


def preferences(given: Any, answers: Sequence[str], tokenizer: Tokenizer) -> Dataset:
    """`given` with `prompt` as token ids, and the columns `answers` as texts or ids.

    A Dataset stays as it is. Dicts: `prompt` is a text (opened as the tokenizer opens one), ids, or messages; an answer
    a text, ids, messages, or a list of texts (a ranking, steps). Conversations go through the tokenizer's chat
    template. Without a prompt it is what the two answers begin with alike. Raises InputError naming the row and the
    column."""
    if isinstance(given, Dataset):
        return given
    rows = list(given) if hasattr(given, "__iter__") and not isinstance(given, (str, Mapping)) else []
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise InputError(f"rows (dicts) with `prompt` and {', '.join(f'`{a}`' for a in answers)} are wanted")
    found = []
    for number, row in enumerate(rows):
        missing = [name for name in answers if row.get(name) is None]
        if missing:
            there = ", ".join(map(str, row))
            raise InputError(
                f"row {number}: there is nothing in {', '.join(f'`{m}`' for m in missing)}; it has {there}"
            )
        try:
            found.append(_row(row, answers, tokenizer))
        except InputError as error:
            raise InputError(f"row {number}: {error}") from None
    own = dict.fromkeys(name for row in rows for name in row if name not in SCHEMA.names)
    kept = {name: [row.get(name) for row in rows] for name in own if name not in answers}
    made = [{**row, **{name: kept[name][n] for name in kept}} for n, row in enumerate(found)]
    return Dataset.from_rows(made)


def _row(row: Mapping[str, Any], answers: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    prompt, given = row.get("prompt"), {name: row[name] for name in answers}
    if prompt is None and len(answers) > 1:
        prompt, given = _shared(given)
    if _is_talk(prompt) or any(_is_talk(answer) for answer in given.values()):
        return _of_talk(prompt, given, tokenizer)
    if prompt is not None and not isinstance(prompt, str):
        return {"prompt": [int(i) for i in prompt], **given}
    opened = [tokenizer.bos] if getattr(tokenizer, "has_bos", True) else []
    return {"prompt": [*opened, *tokenizer.encode(prompt or "")], **given}


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _shared(given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(what all the answers begin with, the rest of each): messages, or the text up to a blank."""
    values = list(given.values())
    if not all(isinstance(v, str) for v in values) and not all(_is_talk(v) for v in values):
        return None, dict(given)
    length = 0
    while all(length < len(v) and v[length] == values[0][length] for v in values):
        length += 1
    if length == min(map(len, values)):
        length -= isinstance(values[0], list)  # one conversation is the other's beginning: its last message is told
    if isinstance(values[0], str) and length and values[0][length - 1] == " ":
        length -= 1
    return values[0][:length], {name: value[length:] for name, value in given.items()}


def _of_talk(prompt: Any, given: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The prompt rendered as it is asked, and the tokens that each answer adds to it."""
    asked = prompt if _is_talk(prompt) else [{"role": "user", "content": prompt or ""}]
    ids = chat.encode_prompt(tokenizer, asked)
    found: dict[str, Any] = {"prompt": ids.tolist()}
    for name, answer in given.items():
        said = answer if _is_talk(answer) else [{"role": "assistant", "content": answer}]
        whole, _ = chat.encode(tokenizer, [*asked, *said])
        if not np.array_equal(whole[: len(ids)], ids):
            raise InputError(f"`{name}` joins its first characters to the prompt's last in one token")
        found[name] = whole[len(ids) :].tolist()
    return found
