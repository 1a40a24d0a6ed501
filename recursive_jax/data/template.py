"""`Template`: one object that renders a row to a prompt, reads an answer back, and says what is to be learnt.

Training, rollout and evaluation use the same one, so that a model is asked exactly as it was taught.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recursive_jax.config import TaskConfig
from recursive_jax.data import chat
from recursive_jax.data.dataset import Dataset, python_rows, real_rows
from recursive_jax.data.packing import Example, pack_tokens
from recursive_jax.data.task import class_field, hold_out, read_rows
from recursive_jax.data.tokenizers import Tokenizer, stop_tokens
from recursive_jax.errors import InputError
from recursive_jax.identity import Value

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ParseError:
    """An answer that is not of the completion's form. text: the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class Template(Value):
    """prompt, completion: texts with {field}s of a row. chat: rendered by the tokenizer's chat template."""

    prompt: str
    completion: str
    system: str = ""
    chat: bool = False

    @classmethod
    def of(cls, task: TaskConfig, tokenizer: Tokenizer) -> Template:
        has = bool(getattr(tokenizer, "chat_template", None))
        if task.chat and not has:
            raise InputError("task.chat=true, but the model's tokenizer has no chat template")
        return cls(task.prompt, task.completion, task.system, has if task.chat is None else task.chat)

    def __post_init__(self):
        for text in (self.prompt, self.completion):
            _parts(text)  # a template that cannot be filled is refused at once

    def fields(self) -> list[str]:
        """The fields that the completion answers with."""
        return list(dict.fromkeys(field for _, field, _ in _parts(self.completion) if field))

    def messages(self, row: Row, answered: bool = True) -> list[chat.Message]:
        if "messages" in row:
            return _conversation(row)
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*system, {"role": "user", "content": _filled(self.prompt, row)}]
        return [*asked, {"role": "assistant", "content": _filled(self.completion, row)}] if answered else asked

    def example(self, row: Row, tokenizer: Tokenizer) -> Example:
        """Tokens of the prompt and the completion; the loss is on the completion and the end token (in a conversation:
        on all that the assistant wrote)."""
        if self.chat or "messages" in row:
            found = Example(*chat.encode(tokenizer, self.messages(row)))
            self._check_prompt(row, tokenizer, found.tokens)
            return found
        prompt = self.request(row, tokenizer)
        answer = np.asarray([*tokenizer.encode(_filled(self.completion, row)), tokenizer.eos], np.int32)
        return Example(np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt))

    def _check_prompt(self, row: Row, tokenizer: Tokenizer, tokens: np.ndarray) -> None:
        """Raises InputError where the model would be asked with other tokens than it is taught behind: where the answer
        begins with blanks that the tokenizer joins to the prompt's."""
        asked, messages = self.asked(row), self.messages(row)
        if len(asked) == len(messages):
            return  # nothing is answered
        prompt = chat.encode_prompt(tokenizer, asked)
        if np.array_equal(prompt, tokens[: len(prompt)]):
            return
        if chat.render(tokenizer, messages).startswith(chat.render(tokenizer, asked, True)):
            answer = str(messages[len(asked)].get("content", ""))[:40]
            raise InputError(
                f"the answer {answer!r} joins its first characters to the prompt's last in one token, so that the "
                "model would be asked otherwise than it is taught: take the blanks from the beginning of the answer"
            )

    def request(self, row: Row, tokenizer: Tokenizer) -> np.ndarray:
        """Tokens that the model goes on from, int32; the start of `example`'s."""
        if self.chat or "messages" in row:
            return chat.encode_prompt(tokenizer, self.asked(row))
        opened = [tokenizer.bos] if getattr(tokenizer, "has_bos", True) else []
        return np.asarray([*opened, *tokenizer.encode(_filled(self.prompt, row))], np.int32)

    def asked(self, row: Row) -> list[chat.Message]:
        """The messages before the (last) answer."""
        messages = self.messages(row, answered=False)
        if "messages" not in row:
            return messages
        return messages[
            : max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=len(messages))
        ]

    def wanted(self, row: Row) -> dict[str, str]:
        """The right answer's fields; of a conversation the text of its last answer, as `answer`."""
        if "messages" in row:
            rest = self.messages(row)[len(self.asked(row)) :]
            return {"answer": str(rest[0].get("content", "")).strip()} if rest else {}
        written = {field: f"{{{field}{form}}}" for _, field, form in _parts(self.completion) if field}
        return {field: _filled(text, row).strip() for field, text in written.items() if row.get(field) is not None}

    def read(self, row: Row, text: str) -> dict[str, str] | ParseError:
        """What `text` answers to `row`, in the fields of `wanted`."""
        return {"answer": text.strip()} if "messages" in row else self.parse(text)

    def parse(self, text: str) -> dict[str, str] | ParseError:
        """The fields of an answer of the completion's form, blanks around it left out. Each field is as short as what
        follows it allows; one that stands twice must be equal. One pass over the text, whatever a model wrote."""
        rest, found, waiting = text.strip(), {}, None
        parts = _parts(self.completion.strip())
        for n, (literal, field, _) in enumerate(parts):
            at = _find(rest, literal, waiting is None, n == len(parts) - 1 and not field)
            if at < 0:
                return ParseError(text)
            if waiting is not None and not _take(found, waiting, rest[:at]):
                return ParseError(text)
            rest, waiting = rest[at + len(literal) :], field or None
        if waiting is not None:
            return found if _take(found, waiting, rest) else ParseError(text)
        return ParseError(text) if rest else found


def _find(text: str, literal: str, here: bool, last: bool) -> int:
    """Where a literal stands: at the beginning, after a field of at least one character, or at the end; -1: nowhere."""
    if here:
        return 0 if text.startswith(literal) else -1
    if last:
        at = len(text) - len(literal)
        return at if at > 0 and text.endswith(literal) else -1
    return text.find(literal, 1) if literal else min(1, len(text))


def _take(found: dict[str, str], field: str, value: str) -> bool:
    """Notes a field's value; False for an empty one, and for another than it had."""
    value = value.strip() if value else ""
    if not value or found.get(field, value) != value:
        return False
    found[field] = value
    return True


def _conversation(row: Row) -> list[chat.Message]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in messages
    ):
        raise InputError(f"messages must be a list of {{role, content}} with texts, got {str(messages)[:80]}")
    return [dict(m) for m in messages]


def _parts(text: str) -> list[tuple[str, str, str]]:
    """(literal, field, conversion and format as written) of a template, in order. Fields are plain names: `{a.b}` and
    `{a[0]}` would reach into objects. Raises InputError."""
    if not isinstance(text, str):
        raise InputError(f"a template is a text with {{field}}s, not {type(text).__name__}")
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InputError(
            f"the template {text!r} is not valid: {error}; write {{{{ and }}}} for braces that are text"
        ) from None
    parts = []
    for literal, field, form, conversion in parsed:
        if field is not None and not field.isidentifier():
            raise InputError(
                f"the template {text!r} has the field {{{field}}}: a plain name of a row's field is wanted; write {{{{ "
                f"and }}}} "
                "for braces that are text"
            )
        if form and "{" in form:
            raise InputError(f"the template {text!r}: a format may not hold fields of its own")
        written = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        parts.append((literal, field or "", written))
    return parts


def _filled(text: str, row: Row) -> str:
    """The template with the row's fields in it. Only the fields themselves are read, never their attributes."""
    missing = [field for _, field, _ in _parts(text) if field and field in row and row[field] is None]
    if missing:
        raise InputError(f"the template {text!r} wants {missing[0]!r}, and this row has none (null)")
    try:
        return string.Formatter().vformat(text, (), row)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        there = ", ".join(map(str, row))
        raise InputError(f"the template {text!r} wants {error}; the row's fields are: {there}") from None


def examples_dataset(
    rows: Sequence[Row] | Dataset, template: Template, tokenizer: Tokenizer, prefix: str = "task"
) -> Dataset:
    """The rows as training rows: `prompt` is what the model reads before the first token that is learnt, `tokens` the
    rest, and, where not all of it is learnt (a conversation of several turns), a column `loss` says what is. Rows of a
    Dataset are the parents of theirs, and keep their columns, who wrote them and whence they come."""
    prompts, tokens, losses = [], [], []
    for row in rows if not isinstance(rows, Dataset) else python_rows(rows.table):
        e = template.example(row, tokenizer)
        first = max(1, int(e.loss.argmax()) if e.loss.any() else len(e.loss) - 1)
        prompts.append(e.tokens[:first])
        tokens.append(e.tokens[first:])
        losses.append(e.loss[first:])
    texts = [tokenizer.decode(t) for t in tokens]
    if isinstance(rows, Dataset):
        data = rows.with_column("parents", [[name] for name in rows.column("id")])
        data = data.with_column("id", [f"{prefix}/{i}" for i in range(len(rows))]).with_column("prompt", prompts)
        data = data.with_column("tokens", tokens).with_column("text", texts).with_column("logprobs", [[]] * len(rows))
    else:
        data = real_rows(tokens, texts, prefix=prefix, prompts=prompts)
    if all(loss.all() for loss in losses):
        return data
    return data.with_column("loss", pa.array([loss.tolist() for loss in losses], pa.large_list(pa.bool_())))


def task_rows(task: TaskConfig, seed: int) -> tuple[list[dict], list[dict], str]:
    """(rows to learn from, held-out rows, how they were chosen): of the classes that the completion names, where it
    does, each in equal shares; else a draw of the seed."""
    rows = read_rows(task.path)
    if task.validation:
        held_out, how = read_rows(task.validation), f"held out: {task.validation}"
    else:
        by = task.stratify or class_field(rows, Template(task.prompt, task.completion).fields())
        rows, held_out, how = hold_out(rows, task.holdout, seed, by)
    return rows[: task.limit], held_out, how


def preview(data: Dataset, tokenizer: Tokenizer, length: int) -> str:
    """The first packed row as text, what counts in the loss between «marks»."""
    row = pack_tokens(data, length, tokenizer)[0]
    tokens, segments, loss = row["tokens"], row["segments"], row.get("loss")
    loss = segments > 0 if loss is None else loss
    text = []
    name = getattr(tokenizer, "token", None)
    runs = np.flatnonzero(np.diff(np.r_[-1, (loss > 0).astype(int) + 2 * segments]))
    for start, stop in zip(runs, [*runs[1:], len(tokens)], strict=True):
        if segments[start] == 0:
            text.append(f"  ({len(tokens) - start} positions of padding)")
            break
        written = _with_specials(tokens[start:stop], tokenizer, name)
        text.append(f"«{written}»" if loss[start] > 0 else written)
    counted = int((loss > 0).sum())
    return f"{''.join(text)}\n[{counted} of {int((segments > 0).sum())} tokens count in the loss, between « and »]"


def _with_specials(tokens: np.ndarray, tokenizer: Tokenizer, name: Any) -> str:
    """Text with its special tokens shown by name."""
    out, plain = [], []
    special = {tokenizer.bos, tokenizer.pad, *stop_tokens(tokenizer)}
    for t in tokens.tolist():
        if t in special:
            out += [tokenizer.decode(plain), name(t) if name else f"<{t}>"]
            plain = []
        else:
            plain.append(t)
    return "".join([*out, tokenizer.decode(plain)])
