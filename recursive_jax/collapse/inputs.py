"""What `collapse_profile` takes: texts, token ids, vectors, images, files, as one of two kinds."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recursive_jax.collapse.diversity import take_budget
from recursive_jax.collapse.embeddings import vectors
from recursive_jax.collapse.suite import TEXT, VECTORS, Counts, Measured
from recursive_jax.data import files
from recursive_jax.errors import InputError

_WORD = re.compile(r"\w+|[^\w\s]")


class Words:
    """Words and punctuation marks as ids, in the order they are met."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self.ids.setdefault(w, len(self.ids)) for w in _WORD.findall(text.lower())]


@dataclasses.dataclass
class Texts:
    """Rows of token ids, with their texts where they came as such."""

    tokens: list[np.ndarray]
    name: str
    tokenizer: Any = None
    texts: list[str] | None = None
    vocab: int = 0  # ids below this are counted: see `one_vocabulary`
    unit = "tokens"
    least = 2

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def metrics(self) -> tuple[Measured, ...]:
        return TEXT

    def group_size(self, groups: int, seed: int) -> int:
        """Tokens that each of so many groups of rows can hold."""
        return min(sum(map(len, part)) for part in self._parts(groups, seed))

    def _parts(self, groups: int, seed: int) -> list[list[np.ndarray]]:
        """Rows dealt out: every group has nearly as many tokens."""
        order = np.random.default_rng(seed).permutation(len(self.tokens))
        return [[self.tokens[i] for i in order[g::groups]] for g in range(groups)]

    @functools.lru_cache(2)  # noqa: B019 (a sample lives as long as the profile that is made of it)
    def groups(self, groups: int, size: int, seed: int) -> list[Counts]:
        return [Counts(take_budget(part, size), self.vocab) for part in self._parts(groups, seed)]

    @functools.lru_cache(2)  # noqa: B019
    def rests(self, groups: int, size: int, seed: int) -> list[Counts]:
        """The reference without one group, for each group."""
        parts = [take_budget(part, size) for part in self._parts(groups, seed)]
        return [
            Counts([row for j, part in enumerate(parts) if j != g for row in part], self.vocab) for g in range(groups)
        ]

    def __hash__(self) -> int:
        return id(self)

    __eq__ = object.__eq__


@dataclasses.dataclass
class Cloud:
    """Rows of features."""

    x_ND: np.ndarray
    name: str
    tokenizer: Any = None
    unit = "rows"
    least = 10

    def __post_init__(self):
        self.x_ND = vectors(self.x_ND, self.name)

    @property
    def rows(self) -> int:
        return len(self.x_ND)

    def metrics(self) -> tuple[Measured, ...]:
        return VECTORS

    def group_size(self, groups: int, seed: int) -> int:
        return self.rows // groups

    def groups(self, groups: int, size: int, seed: int) -> list[np.ndarray]:
        order = np.random.default_rng(seed).permutation(self.rows)
        return [self.x_ND[order[g * size : (g + 1) * size]] for g in range(groups)]

    def rests(self, groups: int, size: int, seed: int) -> list[np.ndarray]:
        """One other group of the reference: clouds are compared at equal sizes."""
        parts = self.groups(groups, size, seed)
        return [parts[(g + 1) % groups] for g in range(groups)]


def as_samples(x: Any, name: str, tokenizer: Any = None, like: Texts | Cloud | None = None) -> Texts | Cloud:
    """One of the two kinds. Raises InputError for nothing at all, NaN, or another kind than `like`."""
    found = _read(x, name, tokenizer)
    if like is not None and type(found) is not type(like):
        kinds = {Texts: "texts or token ids", Cloud: "vectors"}
        raise InputError(f"{name} holds {kinds[type(found)]}, {like.name} {kinds[type(like)]}: give one kind")
    if isinstance(found, Texts):
        empty = sum(len(t) == 0 for t in found.tokens)
        if empty == found.rows:
            raise InputError(f"{name}: there is no token in {found.rows} rows")
    return found


def one_vocabulary(samples: Sequence[Texts | Cloud]) -> None:
    """Types are counted over the ids of all samples together."""
    texts = [s for s in samples if isinstance(s, Texts)]
    vocab = max((int(t.max()) + 1 for s in texts for t in s.tokens if len(t)), default=0)
    for s in texts:
        s.vocab = vocab


def _read(x: Any, name: str, tokenizer: Any) -> Texts | Cloud:
    if hasattr(x, "table") and hasattr(x, "tokens"):  # a Dataset
        return Texts([np.asarray(t, np.int64) for t in x.tokens()], name, tokenizer, list(x.column("text")))
    if isinstance(x, str | Path):
        x = _texts_of_file(Path(x), name)
    if hasattr(x, "shape") and getattr(x, "ndim", 0) >= 2:
        return Cloud(np.asarray(x), name)
    rows = list(x)
    if not rows:
        raise InputError(f"{name}: there are no rows")
    if all(isinstance(r, str) for r in rows):
        tokenizer = tokenizer or Words()
        return Texts([_ids(tokenizer.encode(r)) for r in rows], name, tokenizer, rows)
    arrays = [np.asarray(r) for r in rows]
    if all(a.ndim == 1 and (a.dtype.kind in "iu" or a.size == 0) for a in arrays):
        if any((a < 0).any() for a in arrays):
            raise InputError(f"{name}: token ids are not negative")
        return Texts([a.astype(np.int64) for a in arrays], name, tokenizer)
    if len({a.shape for a in arrays}) == 1 and arrays[0].dtype.kind == "f":
        return Cloud(np.stack(arrays), name)
    raise InputError(f"{name}: rows are neither texts, nor arrays of token ids, nor vectors of one length")


def _ids(encoded: Any) -> np.ndarray:
    return np.asarray(getattr(encoded, "ids", encoded), np.int64)


def _texts_of_file(path: Path, name: str) -> list[str]:
    """One text a line, or the column `text` of a .jsonl, .csv or .parquet file."""
    if not path.is_file():
        raise InputError(f"{name}: {path} {'is not a file' if path.exists() else 'does not exist'}")
    kind = files.kind_of(path)
    if kind not in ("jsonl", *files.TABLES):
        return [line for _, line in files.read_lines(path) if line.strip()]
    rows = files.read_rows(path) if kind == "jsonl" else ((w, {"text": x}) for w, x in files.read_column(path, "text"))
    texts = []
    for where, row in rows:
        if not isinstance(row.get("text"), str):
            raise InputError(f"{name}: {where}: there is no text under `text`; there are: {', '.join(row)}")
        texts.append(row["text"])
    return texts
