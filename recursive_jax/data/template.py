"""`Template`: one object that renders a row to a prompt, reads an answer back, and says what is to be learnt.

Training, rollout and evaluation use the same one, so that a model is asked exactly as it was taught.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recursive_jax.config import TaskConfig
from recursive_jax.data import chat, fields
from recursive_jax.data.dataset import SCHEMA, Dataset, python_rows, real_rows
from recursive_jax.data.fields import Row
from recursive_jax.data.packing import Example, pack_tokens
from recursive_jax.data.parser import TEXT
from recursive_jax.data.parsers import Completion, ParseError, Parser
from recursive_jax.data.retrieval import Bm25, with_documents
from recursive_jax.data.task import class_field, hold_out, read_rows, texts_of
from recursive_jax.data.tokenizers import Tokenizer, stop_tokens
from recursive_jax.errors import InputError
from recursive_jax.identity import Value


@dataclasses.dataclass(frozen=True)
class Examples(Value):
    """Rows shown before the question (few-shot), drawn anew for every row that is asked.

    pools: (rows, how many of them) each, a Dataset or a list of dicts. The draw depends on the seed and on the row; a
    row is no example of itself. prompt, completion: how one is written, `{number}` counting from 1; none: as the
    template asks and answers. between: in a prompt that is a text, what stands behind each. shuffle: in any order, not
    pool after pool. fixed: the same for every row (which has its place taken by another where it is among them), so
    that they are read once for all."""

    pools: tuple[tuple[Any, int], ...]
    seed: int = 0
    prompt: str = ""
    completion: str = ""
    between: str = "\n\n"
    shuffle: bool = True
    fixed: bool = False

    def __post_init__(self):
        pools = tuple((rows, int(count)) for rows, count in self.pools)
        object.__setattr__(self, "pools", pools)
        for rows, count in pools:
            if not 0 <= count <= len(rows):
                raise InputError(f"{count} examples are wanted of a pool of {len(rows)} rows")

    @functools.cached_property
    def _rows(self) -> list[list[Row]]:
        return [python_rows(rows.table) if isinstance(rows, Dataset) else list(rows) for rows, _ in self.pools]

    def of(self, row: Row) -> list[Row]:
        """The examples of a row, in the order in which they are shown. Raises InputError where a pool has too few
        others."""
        own = {} if self.fixed else _own(row)
        key = json.dumps(own, sort_keys=True, default=str)
        draw = np.random.default_rng([self.seed, *hashlib.sha256(key.encode()).digest()])
        found: list[Row] = []
        for (_, count), rows in zip(self.pools, self._rows, strict=True):
            chosen = [rows[i] for i in draw.permutation(len(rows))[: count + 1].tolist()]
            chosen = [other for other in chosen if not _same(other, row)][:count]
            if len(chosen) < count:
                raise InputError(
                    f"{count} examples are wanted, the pool has {len(chosen)} beside the row that is asked"
                )
            found += chosen
        return [found[i] for i in draw.permutation(len(found)).tolist()] if self.shuffle else found


def _own(row: Row) -> dict[str, Any]:
    """What a row says itself: its own columns, and a text."""
    return {k: v for k, v in row.items() if k not in SCHEMA.names or (k == "text" and v)}


def _same(one: Row, other: Row) -> bool:
    """Whether two rows are one: their own columns are equal."""
    own = _own(one)
    return bool(own) and all(name in other and one[name] == other[name] for name in own)


@dataclasses.dataclass(frozen=True)
class Template(Value):
    """prompt, completion: texts with {field}s of a row. chat: rendered by the tokenizer's chat template.

    parser: reads a reply; none: the completion's form. examples: shown before the question, as turns of the
    conversation in a chat. after: a mark up to which a reply is thought, and not read (`</think>`)."""

    prompt: str
    completion: str = ""
    system: str = ""
    chat: bool = False
    parser: Parser | None = None
    examples: Examples | None = None
    after: str = ""

    @classmethod
    def of(cls, task: TaskConfig, tokenizer: Tokenizer) -> Template:
        has = bool(getattr(tokenizer, "chat_template", None))
        if task.chat and not has:
            raise InputError("task.chat=true, but the model's tokenizer has no chat template")
        return cls(task.prompt, task.completion, task.system, has if task.chat is None else task.chat)

    def __post_init__(self):
        for text in (self.prompt, self.completion):
            fields.parts(text)  # a template that cannot be filled is refused at once

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        """The columns that a reply gives, and their types where they are known."""
        if self.parser is None and not self.completion:
            return {"answer": TEXT}
        return (Completion(self.completion) if self.parser is None else self.parser).columns

    def fields(self) -> list[str]:
        """The fields that the completion answers with."""
        return fields.names(self.completion)

    def messages(self, row: Row, answered: bool = True) -> list[chat.Message]:
        """The conversation of a row, its examples as turns before it (in a template that is no chat they stand in the
        prompt, `request`)."""
        if "messages" in row:
            return _conversation(row)
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self._examples(row) if self.chat else ():
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        asked = [*turns, {"role": "user", "content": fields.filled(self.prompt, row)}]
        answer = {"role": "assistant", "content": fields.filled(self.completion, row)} if answered else None
        return [*asked, answer] if answered else asked

    def _examples(self, row: Row) -> list[tuple[str, str]]:
        """(question, answer) of each example."""
        if self.examples is None:
            return []
        prompt, completion = self.examples.prompt or self.prompt, self.examples.completion or self.completion
        numbered = [{**example, "number": n} for n, example in enumerate(self.examples.of(row), 1)]
        return [(fields.filled(prompt, e), fields.filled(completion, e)) for e in numbered]

    def asks(self, row: Row) -> str:
        """What is asked, as one text, the examples before it (of a conversation: what was said last)."""
        if self.chat or "messages" in row:
            return str(self.asked(row)[-1].get("content", ""))
        shown = [f"{q}{a}{self.examples.between}" for q, a in self._examples(row)]
        return "".join(shown) + fields.filled(self.prompt, row)

    def example(self, row: Row, tokenizer: Tokenizer) -> Example:
        """Tokens of the prompt and the completion; the loss is on the completion and the end token (in a conversation:
        on all that the assistant wrote)."""
        if self.chat or "messages" in row:
            found = Example(*chat.encode(tokenizer, self.messages(row)))
            self._check_prompt(row, tokenizer, found.tokens)
            return found
        prompt = self.request(row, tokenizer)
        answer = np.asarray([*tokenizer.encode(fields.filled(self.completion, row)), tokenizer.eos], np.int32)
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
        return np.asarray([*opened, *tokenizer.encode(self.asks(row))], np.int32)

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
        written = {field: f"{{{field}{form}}}" for _, field, form in fields.parts(self.completion) if field}
        return {
            field: fields.filled(text, row).strip() for field, text in written.items() if row.get(field) is not None
        }

    def read(self, row: Row, text: str, cut: bool = False) -> list[dict[str, Any]] | ParseError:
        """The rows that a reply to `row` gives, with the fields of the parser; or why there are none. cut: the reply
        ended at the limit of its length."""
        reply = text
        if self.after:
            _, mark, reply = text.rpartition(self.after)
            if not mark and cut:
                return ParseError(text, "cut")
        if self.parser is not None:
            found = self.parser.read(reply, cut)
        elif "messages" in row or not self.completion:
            found = [{"answer": reply.strip()}]
        else:
            found = Completion(self.completion).read(reply, cut)
        return dataclasses.replace(found, text=text) if isinstance(found, ParseError) else found

    def parse(self, text: str) -> dict[str, str] | ParseError:
        """The fields of an answer of the completion's form."""
        found = Completion(self.completion).read(text)
        return found if isinstance(found, ParseError) else found[0]

    @property
    def asking(self) -> Template:
        """The template without what reads replies: it asks the same."""
        return dataclasses.replace(self, parser=None, after="")

    def constraint(self) -> dict[str, str]:
        """Sampling settings under which every reply that ends can be read, where the parser has some."""
        if self.parser is None:
            raise InputError("the template has no parser that a constraint could be derived from")
        found = self.parser.constraint()
        if not found:
            raise InputError(f"no constraint can be derived from a parser of the kind {type(self.parser).__name__}")
        return found


def _conversation(row: Row) -> list[chat.Message]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in messages
    ):
        raise InputError(f"messages must be a list of {{role, content}} with texts, got {str(messages)[:80]}")
    return [dict(m) for m in messages]


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
    rows = rows[: task.limit]
    if task.retrieve is not None:
        found = Bm25(texts_of(task.retrieve.path, task.retrieve.field))
        rows, held_out = (with_documents(r, found, task.retrieve.query, task.retrieve.k) for r in (rows, held_out))
    return rows, held_out, how


def preview(data: Dataset, tokenizer: Tokenizer, length: int) -> str:
    """The first packed row as text, what counts in the loss between «marks»."""
    row = pack_tokens(data, length, tokenizer)[0]
    tokens, segments, loss = row["tokens"], row["segments"], row.get("loss")
    loss = segments > 0 if loss is None else loss
    text = []
    runs = np.flatnonzero(np.diff(np.r_[-1, (loss > 0).astype(int) + 2 * segments]))
    for start, stop in zip(runs, [*runs[1:], len(tokens)], strict=True):
        if segments[start] == 0:
            text.append(f"  ({len(tokens) - start} positions of padding)")
            break
        written = with_specials(tokens[start:stop], tokenizer)
        text.append(f"«{written}»" if loss[start] > 0 else written)
    counted = int((loss > 0).sum())
    return f"{''.join(text)}\n[{counted} of {int((segments > 0).sum())} tokens count in the loss, between « and »]"


def with_specials(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """Text with its special tokens shown by name."""
    out, plain = [], []
    name = getattr(tokenizer, "token", None)
    special = {tokenizer.bos, tokenizer.pad, *stop_tokens(tokenizer)}
    for t in tokens.tolist():
        if t in special:
            out += [tokenizer.decode(plain), name(t) if name else f"<{t}>"]
            plain = []
        else:
            plain.append(t)
    return "".join([*out, tokenizer.decode(plain)])
