"""Tasks: rows, the template that asks them, and the reward that grades the answers; with a number for what came out.

    rj.evaluate(model, rj.tasks.gsm8k("gsm8k/test.jsonl", limit=200))
    rj.evaluate(model, rj.tasks.snips("snips/test"), temperature=0.7, n=8)

`score` is the mean of the reward with its standard error over rows, `format` the share of answers that could be read
(Wilson interval), and with n answers a row `pass_at_k` (the unbiased estimate of arXiv:2107.03374, sec. 2.1) and
`majority` (arXiv:2203.11171). The rows come back with a score each: `found.rows.where(score=0.0)` are those to learn
again.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from recursive_jax.collapse.intervals import proportion
from recursive_jax.curate.rewards import Grade, grades, score
from recursive_jax.curate.verifiers import ExactMatch, NumericMatch
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.files import read_lines
from recursive_jax.data.parsers import Answer, Label
from recursive_jax.data.task import read_rows
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.reading import failed
from recursive_jax.generate.score import token_logprobs
from recursive_jax.identity import Value
from recursive_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Task(Value):
    """rows: dicts with the columns that the template and the reward read. reward: 1 is right. answer: the column of a
    reply by which `majority` counts; none: the first that the template reads. sampling: how answers are drawn."""

    name: str
    rows: tuple[Mapping[str, Any], ...]
    template: Template
    reward: Any
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 256})
    answer: str = ""

    def __post_init__(self):
        rows = tuple(self.rows)
        if not rows:
            raise InputError(f"the task {self.name} has no rows")
        object.__setattr__(self, "rows", rows)


@dataclasses.dataclass(frozen=True)
class Choices(Value):
    """A task answered by the likelihood of each choice. rows: with `question`, `choices` (texts) and `answer` (the
    place of the right one, its text, or its letter). prompt: what stands before a choice."""

    name: str
    rows: tuple[Mapping[str, Any], ...]
    prompt: str = "{question}\nAnswer:"
    before: str = " "

    def __post_init__(self):
        rows = tuple(self.rows)
        if not rows:
            raise InputError(f"the task {self.name} has no rows")
        for number, row in enumerate(rows):
            right_choice(row, number)
        object.__setattr__(self, "rows", rows)


def right_choice(row: Mapping[str, Any], number: int = 0) -> int:
    """The place of the right choice. Raises InputError for a row without one."""
    choices, answer = list(row.get("choices") or ()), row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer.strip()) == 1 and "A" <= answer.strip().upper() < chr(65 + len(choices)):
        return ord(answer.strip().upper()) - 65
    raise InputError(f"row {number}: answer={answer!r} is none of its {len(choices)} choices")


def answered(model: Model, task: Task, sampling: Mapping[str, Any], n: int = 1, seed: int = 0) -> Dataset:
    """The task's rows with an answer each (`n` of them), read and scored: a row for each answer."""
    data = Dataset.from_rows([{"id": f"{task.name}/{i}", **_own(row)} for i, row in enumerate(task.rows)])
    settings = {**task.sampling, **({"temperature": 0.7} if n > 1 else {}), **sampling}
    replies = generate(model, data, settings, template=task.template, each=n, seed=seed)
    first = np.array(["#" not in name for name in replies.column("id")])  # of a reply that was read as several rows
    return score(replies.take(np.flatnonzero(first)), Unread(task.reward))


@dataclasses.dataclass(frozen=True)
class Unread(Value):
    """A reward by which what could not be read is wrong."""

    reward: Any

    def __call__(self, data: Dataset) -> list[float | None]:
        bad = [failed(status) for status in data.column("status")]
        found: list[Grade] = grades(self.reward, data)
        return [0.0 if b else g.score for b, g in zip(bad, found, strict=True)]


def task_numbers(task: Task, answers: Dataset, n: int = 1) -> dict[str, Any]:
    """The metrics of answered rows, `n` of each in a row."""
    scores = np.array([np.nan if s is None else s for s in answers.column("score")], float).reshape(-1, n)
    known = scores[~np.isnan(scores).any(1)]
    if not len(known):
        raise InputError(f"the reward of the task {task.name} gives no row a score: has it the column it looks at?")
    each = known.mean(1)
    formed = [not failed(status) and status != "length" for status in answers.column("status")]
    metrics: dict[str, Any] = {
        "score": float(each.mean()),
        "score_stderr": float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None,
        **proportion("format", sum(formed), len(formed)),
        "rows": len(each),
        "answers": int(scores.size),
    }
    if set(np.unique(known)) <= {0.0, 1.0}:
        if n == 1:
            metrics |= proportion("accuracy", int(known.sum()), len(known))
        right = known.sum(1).astype(int)
        for k in dict.fromkeys([1, *(2**p for p in range(1, n.bit_length())), n]) if n > 1 else ():
            metrics[f"pass_at_{k}"] = float(np.mean([pass_at_k(n, c, k) for c in right]))
        if n > 1:
            metrics["majority"] = float(np.mean(_majorities(task, answers, n)))
    return metrics


def pass_at_k(n: int, right: int, k: int) -> float:
    """The probability that one of k answers drawn from n is right, where `right` of them are: 1 - C(n - c, k) / C(n, k)
    (arXiv:2107.03374, sec. 2.1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k) if k <= n else float("nan")


def _majorities(task: Task, answers: Dataset, n: int) -> list[float]:
    """The score of each row's most frequent answer; of equally frequent ones the one that came first."""
    column = task.answer or next(iter(task.template.columns), "text")
    values, scores, status = answers.column(column), answers.column("score"), answers.column("status")
    found = []
    for begin in range(0, len(values), n):
        read = [i for i in range(begin, begin + n) if not failed(status[i])]
        counts = collections.Counter(str(values[i]) for i in read)
        best = max(read, key=lambda i: (counts[str(values[i])], -i), default=None)
        found.append(0.0 if best is None else float(scores[best] or 0.0))
    return found


def choices_numbers(model: Model, task: Choices) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, rows with what was chosen): `accuracy` by the log-probability of each choice, `accuracy_norm` by that
    over its bytes, as lm-evaluation-harness counts both."""
    tokenizer = model.tokenizer
    start = [tokenizer.bos] if getattr(tokenizer, "has_bos", True) else []
    pieces, counts, sizes = [], [], []
    for row in task.rows:
        prompt = Template(task.prompt).asks(row)
        read = tokenizer.encode(prompt)
        for choice in row["choices"]:
            whole = tokenizer.encode(f"{prompt}{task.before}{choice}")
            shared = next((i for i, (a, b) in enumerate(zip(read, whole, strict=False)) if a != b), len(read))
            pieces.append(np.asarray([*start, *whole], np.int32))
            counts.append(len(whole) - min(shared, len(whole) - 1))
            sizes.append(len(f"{task.before}{choice}".encode()))
            if len(pieces[-1]) > model.max_length:
                size = len(pieces[-1])
                raise InputError(f"a choice of {task.name} has {size} tokens, the model reads {model.max_length}")
    prompts = [len(piece) - count for piece, count in zip(pieces, counts, strict=True)]
    passes = token_logprobs(model, pieces, opened=True, given=prompts)
    totals = iter([float(np.sum(x[-c:], dtype=np.float64)) for x, c in zip(passes, counts, strict=True)])
    lengths = iter(sizes)
    rows = []
    for number, row in enumerate(task.rows):
        likely = [next(totals) for _ in row["choices"]]
        each = [total / next(lengths) for total in likely]
        right = right_choice(row, number)
        chosen, normed = int(np.argmax(likely)), int(np.argmax(each))
        found = {"text": str(row["choices"][chosen]), "chosen": chosen, "logprobs_of_choices": likely}
        graded = {"answer": right, "score": float(chosen == right), "score_norm": float(normed == right)}
        rows.append({"id": f"{task.name}/{number}", **_own(row), **found, **graded})
    count = len(rows)
    metrics = proportion("accuracy", int(sum(r["score"] for r in rows)), count)
    metrics |= proportion("accuracy_norm", int(sum(r["score_norm"] for r in rows)), count)
    return {**metrics, "rows": count}, rows


def _own(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "id"}


# Built in.


def rows_of(path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a JSONL, CSV or Parquet file."""
    return read_rows(path)[:limit]


def gsm8k(path: str, limit: int | None = None, chat: bool = False) -> Task:
    """Grade-school word problems (arXiv:2110.14168): `question`, and `answer` with the number behind `####`."""
    ask = "{question}\n\nSolve this step by step. Give the answer as a number on the last line, behind ####."
    template = Template(ask, "{answer}", chat=chat, parser=Answer("any", "found"))
    return Task("gsm8k", tuple(rows_of(path, limit)), template, NumericMatch("answer", of="found"))


def mawps(path: str, limit: int | None = None, chat: bool = False) -> Task:
    """Word problems of the form of MAWPS: `Question` (behind its `Body`, where it does not hold it), with
    `number0` standing for the first of `Numbers`, and `Answer`."""
    rows = []
    for row in rows_of(path, limit):
        given = str(row.get("Numbers", "")).split() if not isinstance(row.get("Numbers"), list) else row["Numbers"]
        text = str(row["Question"])
        body = str(row.get("Body") or "")
        text = text if body[:40] in text else f"{body} {text}"
        for place in reversed(range(len(given))):
            text = text.replace(f"number{place}", f"{float(given[place]):g}")
        value = float(row["Answer"])
        rows.append({**row, "question": text, "answer": value, "solution": f"{value:.12g}"})
    template = Template("{question}\nAnswer:", " {solution}", chat=chat, parser=Answer("any", "found"))
    sampling = {"temperature": 0.0, "max_tokens": 64}
    return Task("mawps", tuple(rows), template, NumericMatch("answer", of="found"), sampling)


def snips(path: str, limit: int | None = None, chat: bool = False) -> Task:
    """Spoken commands and their intent (arXiv:1805.10190): a file of rows with `text` and `intent` (or `label`), or a
    folder with the files `seq.in` and `label`."""
    if os.path.isdir(path):
        said, named = ([line for _, line in read_lines(os.path.join(path, f))] for f in ("seq.in", "label"))
        if len(said) != len(named):
            raise InputError(f"{path}: seq.in has {len(said)} lines, label {len(named)}")
        rows = [{"text": a.strip(), "intent": b.strip()} for a, b in zip(said, named, strict=True)][:limit]
    else:
        rows = rows_of(path, limit)
    rows = [{"command": str(row["text"]), "intent": str(row.get("intent", row.get("label")))} for row in rows]
    labels = tuple(sorted({row["intent"] for row in rows}))
    prompt = "{command}\n\nWhich of these is it: " + ", ".join(labels) + "?\n"
    template = Template(prompt, "{intent}", chat=chat, parser=Label(labels, "found", lenient=True))
    sampling = {"temperature": 0.0, "max_tokens": 16}
    return Task("snips", tuple(rows), template, ExactMatch("intent", of="found"), sampling)


def multiple_choice(path: str, limit: int | None = None) -> Choices:
    """Rows with `question`, `choices` and `answer`, answered by likelihood."""
    return Choices("multiple_choice", tuple(rows_of(path, limit)))


TASKS = {"gsm8k": gsm8k, "mawps": mawps, "snips": snips, "multiple_choice": multiple_choice}
