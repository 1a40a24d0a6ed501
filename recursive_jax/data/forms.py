"""The usual forms of instruction data, told apart by their columns, as conversations:

messages                       [{role, content}, ...]
ShareGPT                       conversations: [{from: human | gpt | system, value}, ...]
Alpaca                         instruction, input (may be empty), output
preference                     prompt, chosen, rejected (texts or conversations)
prompt and completion          also prompt and response
question and answer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from recursive_jax.errors import InputError

Row = Mapping[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "model": "assistant", "system": "system", "tool": "tool"}  # fmt: skip
SECTIONS = "### Instruction:\n{}\n\n### Response:\n"  # what Alpaca's models are asked with


class Form(NamedTuple):
    """name: said to people. columns: that its rows have. messages: of a row, the answer last; for preferences the
    question alone."""

    name: str
    columns: tuple[str, ...]
    messages: Callable[[Row], list[dict[str, str]]]


def _turns(question: Any, answer: Any = None, system: Any = None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": str(system)}] if system else []
    turns.append({"role": "user", "content": str(question)})
    return turns if answer is None else [*turns, {"role": "assistant", "content": str(answer)}]


def _sharegpt(row: Row) -> list[dict[str, str]]:
    turns = []
    for turn in row["conversations"]:
        who = turn.get("from") if isinstance(turn, Mapping) else None
        if who not in ROLES or not isinstance(turn.get("value"), str):
            raise InputError(
                f"a turn of ShareGPT has `from` ({', '.join(ROLES)}) and a text `value`, got {str(turn)[:80]}"
            )
        turns.append({"role": ROLES[who], "content": turn["value"]})
    return turns


def _alpaca(row: Row) -> list[dict[str, str]]:
    asked = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return _turns(asked, row["output"], row.get("system"))


def _preference(row: Row) -> list[dict[str, str]]:
    prompt = row.get("prompt", row.get("question", row.get("instruction")))
    if prompt is None and isinstance(row["chosen"], list):
        return [dict(m) for m in row["chosen"][:-1]]
    return [dict(m) for m in prompt] if isinstance(prompt, list) else _turns(prompt or "")


FORMS = (
    Form("messages", ("messages",), lambda row: [dict(m) for m in row["messages"]]),
    Form("ShareGPT", ("conversations",), _sharegpt),
    Form("preferences", ("chosen", "rejected"), _preference),
    Form("Alpaca", ("instruction", "output"), _alpaca),
    Form("prompt and completion", ("prompt", "completion"), lambda row: _turns(row["prompt"], row["completion"])),
    Form("prompt and response", ("prompt", "response"), lambda row: _turns(row["prompt"], row["response"])),
    Form("question and answer", ("question", "answer"), lambda row: _turns(row["question"], row["answer"])),
)


def form_of(rows: Sequence[Row]) -> Form | None:
    """The first form whose columns all rows have; None where there is none."""
    common = set(rows[0]).intersection(*rows) if rows else set()
    return next((form for form in FORMS if common.issuperset(form.columns)), None)


def as_conversations(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], str]:
    """(the rows with `messages`, beside their own columns; the name of their form). Preferences also have the answers
    `chosen` and `rejected` as texts. Raises InputError, naming the columns, for rows of no form, and the row for one
    whose values are not of it."""
    form = form_of(rows)
    if form is None:
        there = ", ".join(dict.fromkeys(name for row in rows for name in row)) or "none"
        known = "; ".join(f"{f.name}: {', '.join(f.columns)}" for f in FORMS)
        raise InputError(f"the rows have the columns {there}, which are those of no form known: {known}")
    found = []
    for number, row in enumerate(rows):
        try:
            made: dict[str, Any] = {**row, "messages": form.messages(row)}
            if form.name == "preferences":
                made |= {side: _last(row[side]) for side in ("chosen", "rejected")}
        except InputError as error:
            raise InputError(f"row {number}: {error}") from None
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise InputError(f"row {number} is not of the form {form.name}: {error}") from None
        found.append(made)
    return found, form.name


def _last(answer: Any) -> str:
    return str(answer[-1]["content"]) if isinstance(answer, list) else str(answer)


def as_pair(row: Row) -> dict[str, str]:
    """A row with `messages` of one question as `prompt` and `completion`, for a model without a chat template: in
    Alpaca's sections."""
    messages = row["messages"]
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if answers != [len(messages) - 1]:
        raise InputError("a conversation of several answers needs a model with a chat template")
    asked = "\n\n".join(m["content"] for m in messages[:-1])
    return {"prompt": SECTIONS.format(asked), "completion": messages[-1]["content"]}
