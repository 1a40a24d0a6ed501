"""Rewards that ask a model: how good a row is (`Judge`, `RewardModel`), or how probable (`Likelihood`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recursive_jax.curate.rewards import TAKEN, Grade, Reward, Row, as_row_dicts, cut_in_steps, field, truth
from recursive_jax.data import chat
from recursive_jax.data.dataset import SCHEMA, Dataset
from recursive_jax.data.parsers import Label
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError, say
from recursive_jax.generate.generate import generate
from recursive_jax.generate.reading import failed
from recursive_jax.generate.score import rewards as head_scores
from recursive_jax.generate.score import token_logprobs
from recursive_jax.models.model import Model

FIRST, SECOND, TIE = "A", "B", "tie"
COMPARE = Label((FIRST, SECOND, TIE))


@dataclasses.dataclass(frozen=True)
class Judge(Reward):
    """A model that reads each row through a template (arXiv:2306.05685).

    Alone: the template's parser gives `score` (`parsers.Score`); `samples` replies of each row are averaged, those that
    cannot be read left out, and the text is the first one's reasons. against: a column whose text the row's (`of`) is
    compared with: the template has {first} and {second} and is answered A, B or tie. It is asked in both orders;
    1: the row won in both, 0: it lost in both, 0.5: a tie, or the orders disagree. `<score>_flipped` is 1 for these:
    their share is the flip rate, the judge's bias for a place. constrained: replies are held to what the parser reads.
    A judge that reads its own writing says so (arXiv:2404.13076)."""

    model: Model
    template: Template
    samples: int = 1
    against: str = ""
    of: str = "text"
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constrained: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.samples < 1:
            raise InputError(f"samples={self.samples}: at least 1 is wanted")
        if self.against and self.template.parser is None:
            object.__setattr__(self, "template", dataclasses.replace(self.template, parser=COMPARE))
        wanted = "label" if self.against else "score"
        if wanted not in self.template.columns:
            kind = "Label(('A', 'B', 'tie'))" if self.against else "Score()"
            raise InputError(f"the judge's template gives no {wanted!r}: give it a parser as rj.parsers.{kind}")

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        own = sum(row.get("model") == self.model.fingerprint for row in rows)
        if own:
            say(f"the judge wrote {own:,} of the {len(rows):,} rows that it judges: it may favour them")
        return self._compared(rows) if self.against else self._rated(rows)

    def _ask(self, rows: Sequence[Mapping[str, Any]], each: int) -> list[Row]:
        settings = {"temperature": 0.0 if each == 1 else 1.0, "max_tokens": 256} | dict(self.sampling)
        asked = Dataset.from_rows([_plain(row) for row in rows])
        replies = generate(
            self.model, asked, settings, template=self.template, each=each, constrained=self.constrained, seed=self.seed
        )
        return [row for row in as_row_dicts(replies) if "#" not in row["id"]]

    def _rated(self, rows: Sequence[Row]) -> list[Grade]:
        replies = self._ask(rows, self.samples)
        out = []
        for n in range(len(rows)):
            own = replies[n * self.samples : (n + 1) * self.samples]
            read = [r for r in own if not failed(r["status"]) and r["score"] is not None]
            mean = float(np.mean([r["score"] for r in read])) if read else None
            text = (read or own)[0].get("score_text") or None
            out.append(Grade(mean, text, "ok" if read else own[0]["status"]))
        return out

    def _compared(self, rows: Sequence[Row]) -> list[Grade]:
        pairs = [(field(row, self.of), truth(row, self.against)) for row in rows]
        forth = [{**row, "first": a, "second": b} for row, (a, b) in zip(rows, pairs, strict=True)]
        back = [{**row, "first": b, "second": a} for row, (a, b) in zip(rows, pairs, strict=True)]
        replies = self._ask([*forth, *back], self.samples)
        half = len(rows) * self.samples
        out = []
        for n in range(len(rows)):
            span = slice(n * self.samples, (n + 1) * self.samples)
            one = _share(replies[:half][span], FIRST)
            other = _share(replies[half:][span], SECOND)
            if one is None or other is None:
                out.append(Grade(None, None, replies[n * self.samples]["status"] if one is None else "parse_error"))
                continue
            flipped = (one - 0.5) * (other - 0.5) < 0
            agreed = (one > 0.5) - (one < 0.5) if (one > 0.5) == (other > 0.5) and (one < 0.5) == (other < 0.5) else 0
            out.append(Grade(0.5 + agreed / 2, None, "ok", {"flipped": float(flipped)}))
        return out


def _share(replies: Sequence[Row], mine: str) -> float | None:
    """How often this side won, a tie half."""
    read = [r["label"] for r in replies if not failed(r["status"]) and r["label"] is not None]
    return float(np.mean([1.0 if x == mine else 0.5 if x == TIE else 0.0 for x in read])) if read else None


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a question: the text of a core column stays under its name, tokens and lineage go."""
    own = {name: value for name, value in row.items() if name not in SCHEMA.names or name == "id"}
    return own | {"reply": row.get("text", "")}


@dataclasses.dataclass(frozen=True)
class Likelihood(Reward):
    """Nats per token (negative: the mean log-probability) that a model gives to the row's `tokens` after its `prompt`;
    none for a row without tokens, and for one that the context does not hold whole."""

    model: Model
    dtype: str = "float32"

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        start = [self.model.tokenizer.bos]
        pieces = [np.asarray([*(row.get("prompt") or start), *field(row, "tokens")], np.int32) for row in rows]
        counts = [len(row["tokens"]) for row in rows]
        out = []
        given = [len(piece) - count for piece, count in zip(pieces, counts, strict=True)]
        passes = token_logprobs(self.model, pieces, opened=True, given=given, dtype=self.dtype)
        for piece, count, found in zip(pieces, counts, passes, strict=True):
            whole = count and len(found) == len(piece) - 1
            out.append(Grade(float(np.mean(found[-count:], dtype=np.float64)) if whole else None))
        return out


@dataclasses.dataclass(frozen=True)
class ProcessModel(Reward):
    """The probabilities that the steps of a row are right, by a model with the head `score` that `ProcessReward`
    taught, taken together: `min`, `prod`, `last` or `mean` (arXiv:2305.20050). A step is a piece of the row's `text`
    up to `separator`; it is read behind the row's `prompt` and all steps before it. The text names the numbers. A row
    that the context does not hold whole has no score."""

    model: Model
    separator: str = "\n"
    how: str = "min"

    def __post_init__(self):
        if self.how not in TAKEN:
            raise InputError(f"how={self.how!r}: {', '.join(TAKEN)} are there")

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        tokenizer = self.model.tokenizer
        pieces: list[np.ndarray] = []
        counts = []
        for row in rows:
            steps = cut_in_steps(str(field(row, "text")), self.separator)
            ids = list(row.get("prompt") if row.get("prompt") is not None and len(row["prompt"]) else [tokenizer.bos])
            own = []
            for step in steps:
                ids += tokenizer.encode(step + self.separator)
                own.append(np.asarray(ids, np.int32))
            whole = bool(own) and len(own[-1]) <= self.model.max_length
            counts.append(len(own) if whole else 0)
            pieces += own if whole else []
        found = iter((1.0 / (1.0 + np.exp(-head_scores(self.model, pieces)))).tolist() if pieces else ())
        out = []
        for count in counts:
            values = [next(found) for _ in range(count)]
            if values:
                out.append(Grade(float(TAKEN[self.how](values)), " ".join(f"{v:.3f}" for v in values)))
            else:
                out.append(Grade(None, None, "prompt_too_long"))
        return out


@dataclasses.dataclass(frozen=True)
class RewardModel(Reward):
    """The score that a reward model's head gives to a row, on its last token (arXiv:1706.03741). model: with the head
    `score`: trained here, or a Hugging Face `...ForSequenceClassification` of one label.

    template: its `example` of the row is read (prompt and completion, a chat where it is one); none: the row's
    `messages` under the model's chat template, else its `prompt` and `tokens` where it has them, else its `prompt` (a
    text, or ids) and its `text` with the end token, as `PairwiseReward` learns it, else its `text`. A row that the
    context does not hold whole has no score."""

    model: Model
    template: Template | None = None
    dtype: str = "float32"

    def grade(self, rows: Sequence[Row]) -> list[Grade]:
        pieces = [self._read(row) for row in rows]
        whole = [len(piece) <= self.model.max_length for piece in pieces]
        found = iter(head_scores(self.model, [p for p, w in zip(pieces, whole, strict=True) if w], dtype=self.dtype))
        return [Grade(float(next(found))) if w else Grade(None, None, "prompt_too_long") for w in whole]

    def _read(self, row: Row) -> np.ndarray:
        tokenizer = self.model.tokenizer
        if self.template is not None:
            return self.template.example(row, tokenizer).tokens
        if row.get("messages"):
            return chat.encode(tokenizer, row["messages"])[0]
        if row.get("tokens") is not None and len(row["tokens"]):
            return np.asarray([*(row.get("prompt") or ()), *row["tokens"]], np.int32)
        opened = [tokenizer.bos] if getattr(tokenizer, "has_bos", True) else []
        prompt, text = row.get("prompt"), tokenizer.encode(str(field(row, "text")))
        if isinstance(prompt, str):
            return np.asarray([*opened, *tokenizer.encode(prompt), *text, tokenizer.eos], np.int32)
        if prompt is not None and len(prompt) and "reply_output_tokens" not in row:  # a remote prompt's ids are bytes
            return np.asarray([*prompt, *text, tokenizer.eos], np.int32)
        return np.asarray([*opened, *text], np.int32)
