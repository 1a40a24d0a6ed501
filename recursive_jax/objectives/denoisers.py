"""A mixture of denoisers (UL2, arXiv:2205.05131, sec. 3.1): spans of a text are taken out and written behind it.

A row is [mode] text with sentinels [targets]: all of the text is in sight of every position (prefix LM), the targets
are written from left to right and alone are learnt. Seven denoisers, as often each:

    R   spans of 3 or 8 tokens, 15% of the text              ordinary span corruption
    X   (3, 50%) (8, 50%) (64, 15%) (64, 50%)                long spans, or much of it
    S   the last quarter                                     prefix language modelling

Shapes: N rows, T positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Batches, Columns
from recursive_jax.errors import InputError
from recursive_jax.identity import fingerprint
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Term
from recursive_jax.objectives.causal import targets, weighted_sum
from recursive_jax.objectives.hybrid import read

#: (mode, mean length of a span, share of the text). Of S the share is the tail.
DENOISERS = (
    ("R", 3, 0.15),
    ("R", 8, 0.15),
    ("X", 3, 0.5),
    ("X", 8, 0.5),
    ("X", 64, 0.15),
    ("X", 64, 0.5),
    ("S", 0, 0.25),
)
MODES = ("R", "S", "X")


def random_spans(rng: np.random.Generator, length: int, mean: float, share: float, most: int) -> list[tuple[int, int]]:
    """Spans (begin, end) to take out of a text of `length` tokens, in order and apart: round(length * share) tokens in
    about that / mean spans, at most `most` of them, each cut as likely (arXiv:1910.10683, app. of T5's code)."""
    noise = min(max(1, round(length * share)), length - 1)
    count = min(max(1, round(noise / mean)), most, noise, length - noise)
    inside = np.diff([0, *sorted(rng.choice(noise - 1, count - 1, replace=False) + 1), noise])
    between = np.diff([0, *sorted(rng.choice(length - noise - 1, count - 1, replace=False) + 1), length - noise])
    found, at = [], 0
    for gap, span in zip(between, inside, strict=True):
        found.append((at + int(gap), at + int(gap) + int(span)))
        at += int(gap) + int(span)
    return found


def corrupt(tokens: np.ndarray, spans: Sequence[tuple[int, int]], sentinel: int) -> tuple[np.ndarray, np.ndarray]:
    """(the text with each span replaced by its sentinel, the targets: each sentinel and what it stands for). Sentinels
    are sentinel, sentinel + 1, ... The two together give the text back (`restored`)."""
    inputs, wanted, at = [], [], 0
    for n, (begin, end) in enumerate(spans):
        inputs += [*tokens[at:begin], sentinel + n]
        wanted += [sentinel + n, *tokens[begin:end]]
        at = end
    return np.asarray([*inputs, *tokens[at:]], np.int32), np.asarray(wanted, np.int32)


def restored(inputs: np.ndarray, wanted: np.ndarray, sentinel: int) -> np.ndarray:
    """The text that `corrupt` took apart."""
    spans: dict[int, list[int]] = {}
    for token in wanted.tolist():
        if token >= sentinel:
            spans[token] = last = []
        else:
            last.append(token)
    found = [[t] if t < sentinel else spans[t] for t in inputs.tolist()]
    return np.asarray([t for part in found for t in part], np.int32)


class Corrupted:
    """Rows taken apart anew at every step: batch = f(seed, step). texts: token ids, longer than `length` allows for are
    cut; ids: of the modes, in the order of MODES, and of the first sentinel."""

    def __init__(self, texts: Sequence[np.ndarray], length: int, bos: int, eos: int, pad: int | None, spare: Any):
        self.texts = [t for t in texts if len(t) >= 4]
        if not self.texts:
            raise InputError("there is nothing to train on: no text has 4 tokens")
        self.length, self.bos, self.eos, self.pad = length, bos, eos, 0 if pad is None else pad
        self.modes, self.sentinel, self.most = spare
        # A start, a mode and an end; and at half of the text in spans of three, a third as many sentinels, twice.
        self.most_text = max(4, int((length - 3) / (1 + 1 / 3)))
        self.positions = length
        self.fingerprint = fingerprint({"corrupted": 1, "length": length, "spare": spare, "texts": self.texts})
        self.filled = [0, 0]

    def begin(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def row(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """(tokens of a row, how many of them are in sight of all)."""
        text = self.texts[rng.integers(len(self.texts))]
        if len(text) > self.most_text:
            start = rng.integers(len(text) - self.most_text + 1)
            text = text[start : start + self.most_text]
        mode, mean, share = DENOISERS[rng.integers(len(DENOISERS))]
        if mode == "S":
            cut = len(text) - max(1, round(len(text) * share))
            inputs, wanted = text[:cut], text[cut:]
        else:
            inputs, wanted = corrupt(text, random_spans(rng, len(text), mean, share, self.most), self.sentinel)
        head = [self.bos, self.modes[MODES.index(mode)], *inputs]
        tokens = np.asarray([*head, *wanted, self.eos], np.int32)[: self.length + 1]
        return tokens, min(len(head), self.length)

    def next(self, step: int, params: Any = None, state: Any = None) -> Columns:
        rng = np.random.default_rng([self.seed, step])
        tokens = np.full((self.batch, self.length + 1), self.pad, np.int32)
        segments, prefix = np.zeros_like(tokens), np.zeros(self.batch, np.int32)
        for n in range(self.batch):
            ids, prefix[n] = self.row(rng)
            tokens[n, : len(ids)], segments[n, : len(ids)] = ids, 1
        return {"tokens": tokens, "segments": segments, "prefix": prefix}

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        return {"tokens": steps * batch * self.length, "texts": len(self.texts)}


@dataclasses.dataclass(frozen=True)
class Denoisers(Objective):
    """UL2's mixture on a model with `model.causal: true`. sentinels: the most spans of a row. It wants ids beyond the
    tokenizer's (`extra_ids`): three for the modes R, S and X, and the sentinels."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "prefix")

    sentinels: int = 64

    def extra_ids(self, tokenizer: Any) -> int:
        return len(MODES) + self.sentinels

    def resolved(self, model: Model) -> Denoisers:
        if not model.network.causal:
            raise InputError("Denoisers write what was taken out, and this model has model.causal=false")
        wanted = model.tokenizer.vocab + self.extra_ids(model.tokenizer)
        if model.vocab < wanted:
            raise InputError(
                f"the modes and {self.sentinels} sentinels need ids beyond the tokenizer's: build the model with "
                f"model.vocab={wanted}, it has {model.vocab}"
            )
        return self

    def pack(self, data: Dataset, model: Model, length: int) -> Batches:
        if any(len(p) > 1 for p in data.prompts()):
            raise InputError("Denoisers learn whole texts, and rows have prompts: give their texts")
        tokenizer, first = model.tokenizer, model.tokenizer.vocab
        texts = [np.asarray(t, np.int32) for t in data.tokens()]
        texts = [t[:-1] if len(t) and t[-1] == tokenizer.eos else t for t in texts]
        spare = (tuple(range(first, first + len(MODES))), first + len(MODES), self.sentinels)
        return Corrupted(texts, length, tokenizer.bos, tokenizer.eos, tokenizer.pad, spare)

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        inputs_BT, segments_BT, labels_BT, weight_BT = targets(batch)
        behind_BT = jnp.arange(inputs_BT.shape[1])[None] >= batch["prefix"][:, None] - 1
        weight_BT = jnp.where(behind_BT, weight_BT, 0.0)
        nll_BT, _ = read(ctx, params, inputs_BT, segments_BT, labels_BT, batch["prefix"])
        return Loss({"nll": Term(weighted_sum(nll_BT, weight_BT), jnp.sum(weight_BT))})
