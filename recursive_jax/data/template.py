"""`Template`: one object that renders a row to a prompt, reads an answer back, and says what is to be learnt.

Training, rollout and evaluation use the same one, so that a model is asked exactly as it was taught.
"""

from __future__ import annotations

import dataclasses
import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recursive_jax.config import TaskConfig
from recursive_jax.data import chat
from recursive_jax.data.dataset import Dataset, real_rows
from recursive_jax.data.packing import Example
from recursive_jax.data.tokenizers import Tokenizer, stop_tokens
from recursive_jax.errors import InputError

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ParseError:
    """An answer that is not of the completion's form. text: the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class Template:
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

    def fields(self) -> list[str]:
        """The fields that the completion answers with."""
        return [name for _, name, _, _ in string.Formatter().parse(self.completion) if name]

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
            return Example(*chat.encode(tokenizer, self.messages(row)))
        prompt = self.request(row, tokenizer)
        answer = np.asarray([*tokenizer.encode(_filled(self.completion, row)), tokenizer.eos], np.int32)
        return Example(np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt))

    def request(self, row: Row, tokenizer: Tokenizer) -> np.ndarray:
        """Tokens that the model goes on from, int32; the start of `example`'s."""
        if self.chat or "messages" in row:
            return chat.encode_prompt(tokenizer, self.asked(row))
        opened = [tokenizer.bos] if getattr(tokenizer, "starts", True) else []
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
        return {f: str(row.get(f, "")).strip() for f in self.fields()}

    def read(self, row: Row, text: str) -> dict[str, str] | ParseError:
        """What `text` answers to `row`, in the fields of `wanted`."""
        return {"answer": text.strip()} if "messages" in row else self.parse(text)

    def parse(self, text: str) -> dict[str, str] | ParseError:
        """The fields of an answer of the completion's form, blanks around it left out."""
        match = _pattern(self.completion).fullmatch(text.strip())
        return {k: v.strip() for k, v in match.groupdict().items()} if match else ParseError(text)


def _conversation(row: Row) -> list[chat.Message]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in messages
    ):
        raise InputError(f"messages must be a list of {{role, content}} with texts, got {str(messages)[:80]}")
    return [dict(m) for m in messages]


def _filled(text: str, row: Row) -> str:
    try:
        return text.format_map(row)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        there = ", ".join(map(str, row))
        raise InputError(f"the template {text!r} wants {error}; the row's fields are: {there}") from None


def _pattern(completion: str) -> re.Pattern[str]:
    parts, seen = [], set()
    for literal, name, _, _ in string.Formatter().parse(completion.strip()):
        parts.append(re.escape(literal))
        if name and not name.isidentifier():
            raise InputError(f"task.completion has the field {{{name}}}: a plain name is wanted, to read answers back")
        if name:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>.+?)")
            seen.add(name)
    return re.compile("".join(parts), re.DOTALL)


def read_rows(path: str) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file. Raises InputError naming the file and line."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"task file {path} does not exist (.jsonl or .parquet is wanted)")
    if file.suffix == ".parquet":
        try:
            found = pq.read_table(file).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file} cannot be read as Parquet: {error}") from None
        if not found:
            raise InputError(f"{file} has no rows")
        return found
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8; convert the file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number}: a JSON object is wanted, it is a {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise InputError(f"{file} has no rows")
    return rows


def examples_dataset(rows: Sequence[Row], template: Template, tokenizer: Tokenizer, prefix: str = "task") -> Dataset:
    """The rows as training rows: tokens as they are read, and a column `loss` that says which are learnt."""
    examples = [template.example(row, tokenizer) for row in rows]
    data = real_rows([e.tokens for e in examples], [tokenizer.decode(e.tokens) for e in examples], prefix=prefix)
    prompts = [int(e.loss.argmax()) if e.loss.any() else len(e.loss) for e in examples]
    data = data.with_column("prompt_tokens", pa.array(prompts, pa.int32()))
    return data.with_column("loss", pa.array([e.loss.tolist() for e in examples], pa.list_(pa.bool_())))


def preview(data: Dataset, tokenizer: Tokenizer, length: int) -> str:
    """The first packed row as text, what counts in the loss between «marks»."""
    from recursive_jax.data.packing import pack_dataset

    row = pack_dataset(data, length, tokenizer)[0]
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
