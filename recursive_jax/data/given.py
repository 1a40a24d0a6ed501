"""Rows to train on or to score, of what a person would write: texts, conversations, dicts, a Dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from recursive_jax.data.dataset import DECLARED, Dataset, loose_column
from recursive_jax.data.forms import as_conversations, as_pair, form_of
from recursive_jax.data.template import Template, examples_dataset
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError, say_once

#: A prompt and its answer under the names that trainers give them.
PAIR = Template("{prompt}", "{completion}")


def as_dataset(given: Any, tokenizer: Tokenizer) -> Dataset:
    """`given` as a Dataset of token ids.

    A Dataset stays as it is, but for rows that have a text and no tokens (a remote model's): their text is tokenized,
    and their prompt, whose ids are of another tokenizer, is left out. A text or texts: each is learnt whole, its end
    token included. Dicts: with `messages` (or a conversation itself) what the assistant says is learnt,
    with `prompt` and `completion` the completion (under the tokenizer's chat template, where it has one, for `messages`
    only), with `text` the text; those of ShareGPT, Alpaca and the other forms of `forms.py` as conversations, or, where
    the tokenizer has no chat template, in Alpaca's sections; which form it is, is said. Other columns go along. Raises
    InputError for anything else, naming the columns.
    """
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Dataset):
        return _tokenized(given, tokenizer)
    rows = list(given) if hasattr(given, "__iter__") and not isinstance(given, Mapping) else None
    if rows and all(isinstance(row, Mapping) and "role" in row for row in rows):
        rows = [rows]  # one conversation
    if not rows:
        what = f"a {type(given).__name__}" if rows is None else "no rows"
        raise InputError(f"texts, dicts or a Dataset are wanted to learn from, this is {what}")
    if any(isinstance(row, str) for row in rows):
        return Dataset.from_texts(rows, tokenizer)
    rows = [{"messages": row} if isinstance(row, list) else row for row in rows]
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"row {number} is a {type(row).__name__}; texts, conversations or dicts are wanted")
    common = set(rows[0]).intersection(*rows)
    if "tokens" in common:
        return Dataset.from_rows(rows)
    if "messages" in common or {"prompt", "completion"} <= common:
        return _with_own(examples_dataset(rows, PAIR, tokenizer), rows)
    if {"chosen", "rejected"} <= common:
        raise InputError(
            "rows with `chosen` and `rejected` are learnt from by an objective of preferences: rj.objectives.DPO(), "
            "ORPO, SimPO, or PairwiseReward for a model with model.head=score"
        )
    if "text" in common:
        wrong = next((n for n, row in enumerate(rows) if not isinstance(row["text"], str)), None)
        if wrong is not None:
            raise InputError(f"row {wrong} is a {type(rows[wrong]['text']).__name__}: texts are wanted")
        return _tokenized(Dataset.from_rows(rows), tokenizer)
    form = form_of(rows)
    if form is not None:
        rows, name = as_conversations(rows)
        chat = bool(getattr(tokenizer, "chat_template", None))
        say_once(f"rows read as {name}" + ("" if chat else ", without a chat template"))
        return _with_own(examples_dataset(rows if chat else [_paired(row) for row in rows], PAIR, tokenizer), rows)
    there = ", ".join(map(repr, dict.fromkeys(k for row in rows for k in row)))
    raise InputError(
        f"rows have {there}; to learn from them they need `text`, `messages`, or `prompt` and `completion`. Of other "
        "columns a template makes these: "
        'rj.examples_dataset(rows, rj.Template("{question}", "{answer}"), model.tokenizer)'
    )


def _with_own(data: Dataset, rows: list[Mapping[str, Any]]) -> Dataset:
    """The examples with the other columns of the rows that they were made of."""
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        if name != "messages" and not data.has(name) and name not in DECLARED:
            data = data.with_column(name, loose_column([row.get(name) for row in rows]))
    return data


def _paired(row: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in row.items() if name != "messages"}
    return {**own, **as_pair(row)}


def _tokenized(data: Dataset, tokenizer: Tokenizer) -> Dataset:
    """The rows with the tokens of their texts, where they have none of their own. The second row that is read of one
    reply (`ID#1`) has the text of the first, and is not learnt again."""
    if not len(data) or pc.min(pc.list_value_length(data.table["tokens"])).as_py():
        return data
    tokens, texts, names = data.tokens(), data.column("text"), data.column("id")
    bare = [n for n, ids in enumerate(tokens) if not len(ids) and texts[n] and "#" not in names[n]]
    if not bare:
        return data
    found = Dataset.from_texts([texts[n] for n in bare], tokenizer).tokens()
    prompts = data.prompts()
    for n, ids in zip(bare, found, strict=True):
        tokens[n], prompts[n] = ids, np.empty(0, np.int32)
    return data.with_column("tokens", tokens).with_column("prompt", prompts)
