"""What training reads: rows packed or stacked once into columns of one shape, then `batch = f(seed, step)`.

    pack_tokens     texts: first-fit into rows of one length, segments apart, with any per-token column
    stack_groups    sequences that belong together: pairs, rankings, rollouts of one prompt
    stack_arrays    images, states, anything of one shape

The state of the data is the step number, so a run resumes on any number of processes with the same batches. The columns
are arrays read through Grain (shuffle, repeat, batch, prefetch).

Shapes: N packed rows or groups, G members of a group, T positions of an input; a row has T + 1, inputs and shifted
targets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError
from recursive_jax.identity import fingerprint

LOOK_BACK = 64  # open rows that first-fit tries

Columns = dict[str, np.ndarray]


class Batches(Protocol):
    """Where training draws its batches from. `begin` says how large they are and what addresses their randomness;
    `next` gives those of one step, host arrays `[batch, ...]` that are equal on every process. params, state: the
    current ones and the objective's, for batches that the model itself makes. A function of (seed, step, params, state)
    alone, so that a training resumes to the bit.

    They may have `resumable(step)`, whether a training that is saved after so many steps can go on (always, without
    it), and `close()`, called at its end."""

    fingerprint: str

    def begin(self, batch: int, seed: int) -> None: ...

    def next(self, step: int, params: Any, state: Any) -> Columns: ...

    def summary(self, steps: int, batch: int) -> dict[str, Any]: ...


ORDER = 2  # how an epoch orders its rows; part of what names a training


class Packed:
    """Rows of one shape, as columns `[N, ...]`; a `Batches` that shuffles them anew every epoch. fingerprint: names
    them, where that is not their content."""

    def __init__(self, columns: Mapping[str, np.ndarray], fingerprint: str | None = None):
        self.columns: Columns = dict(columns)
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) != 1:
            raise InputError(f"columns of a batch have one length, these have {sizes}")
        self._fingerprint = fingerprint
        self._stream: Iterator[Columns] | None = None
        self._at = -1

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Columns:
        return {name: column[index] for name, column in self.columns.items()}

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint({"order": ORDER, **self.columns})
        return self._fingerprint

    @property
    def targets(self) -> int:
        """Of packed tokens: predicted ones in one pass over all rows."""
        segments = self.columns["segments"]
        counted = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
        if "loss" in self.columns:
            counted &= self.columns["loss"][..., 1:] > 0
        return int(counted.sum())

    @property
    def fill(self) -> float:
        """Share of the positions that hold a token; 1 for arrays."""
        return float((self.columns["segments"] > 0).mean()) if "segments" in self.columns else 1.0

    @property
    def positions(self) -> int:
        """Positions of a row that are read: its inputs; 1 for arrays."""
        if "segments" not in self.columns:
            return 1
        *groups, length = self.columns["segments"].shape[1:]
        return int(np.prod(groups, dtype=int)) * (length - 1)

    def begin(self, batch: int, seed: int) -> None:
        self._settings, self._stream, self._at = (batch, seed), None, -1

    def next(self, step: int, params: Any = None, state: Any = None) -> Columns:
        if self._stream is None or step != self._at + 1:
            self._stream = batches(self, *self._settings, start=step)
        self._at = step
        return next(self._stream)

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        return {
            "tokens": steps * batch * self.positions,
            "packed_rows": len(self),
            "packed_fill": round(self.fill, 4),
            "epochs": round(steps * batch / len(self), 3),
        }


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence: a conversation, or a prompt with its completion. tokens: int32 `[n]`. loss: bool `[n]`, what is to
    be learnt (or float32: how much)."""

    tokens: np.ndarray
    loss: np.ndarray


def pack_tokens(data: Dataset, length: int, tokenizer: Tokenizer, extra: Sequence[str] = ()) -> Packed:
    """Dataset rows, each its `prompt` (or the start token) and its `tokens`, first-fit in the given order into columns
    `tokens`, `segments` (0 is padding) int32 `[N, length + 1]`; with `loss` (bool, or float32 weights) where not every
    token counts alike.

    A row of tokens alone that is longer than `length` becomes several segments; one with a prompt or a column `loss` is
    packed whole. A prompt is never learnt; `loss` says which of the tokens are, `weight` how much the row counts.
    extra: names of per-token columns (`logprobs`, ...) that go along, float32, 0 where there is no token.

    Raises InputError for no rows, one that does not fit (with its number and length), and a per-token column of another
    length than its row.
    """
    prompts, tokens = data.prompts(), data.tokens()
    losses = _per_token(data, "loss", tokens) if data.has("loss") else [None] * len(data)
    weights = None
    if data.has("weight"):
        weights = [1.0 if w is None else float(w) for w in data.column("weight")]
    others = {name: _per_token(data, name, tokens) for name in extra}
    lead = np.array([tokenizer.bos], np.int32)
    pieces: list[np.ndarray] = []
    masks: list[np.ndarray | None] = []
    more: dict[str, list[np.ndarray]] = {name: [] for name in extra}
    for n, (prompt, row, loss) in enumerate(zip(prompts, tokens, losses, strict=True)):
        if not len(row):
            continue  # nothing was written
        before = prompt if len(prompt) else lead
        whole = len(prompt) > 1 or loss is not None
        if whole and len(before) + len(row) > length + 1:
            _refuse_long(prompts, tokens, losses, length)
        for i in range(0, len(row), len(row) if whole else length):
            part = row[i : i + (len(row) if whole else length)]
            pieces.append(np.concatenate([before, part]).astype(np.int32))
            masks.append(_mask(before, part, loss, whole, None if weights is None else weights[n]))
            for name in extra:
                values = others[name][n]
                behind = np.zeros(len(part)) if values is None else values[i : i + len(part)]
                more[name].append(np.concatenate([np.zeros(len(before)), behind]).astype(np.float32))
    if not pieces:
        raise InputError("there is nothing to train on: the dataset has no tokens")
    columns: dict[str, list[np.ndarray]] = dict(more)
    if any(mask is not None for mask in masks):
        full = [np.ones(len(p), bool) if m is None else m for p, m in zip(pieces, masks, strict=True)]
        if not any(m[1:].any() for m in full):
            raise InputError("no token of any example counts in the loss: every one is a prompt")
        columns = {"loss": full, **columns}
    return _first_fit(pieces, columns, length + 1, tokenizer.pad)


def _mask(before: np.ndarray, part: np.ndarray, loss: Any, whole: bool, weight: float | None) -> np.ndarray | None:
    """What counts of a piece, and how much; None: all of it alike."""
    if not whole:
        return None if weight is None else np.full(len(before) + len(part), weight, np.float32)
    learnt = np.ones(len(part), bool) if loss is None else loss
    found = np.concatenate([np.zeros(len(before), learnt.dtype), learnt])
    return found if weight is None else found * np.float32(weight)


def _per_token(data: Dataset, name: str, tokens: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """A per-token column; None for a row without it."""
    if not data.has(name):
        raise InputError(
            f"there is no column {name!r}, which this training reads; there are: {', '.join(data.table.column_names)}"
        )
    missing = data.table[name].is_null().to_pylist()
    found: list[np.ndarray | None] = []
    for n, (values, row, none) in enumerate(zip(data.lists(name), tokens, missing, strict=True)):
        if not none and len(values) != len(row):
            raise InputError(
                f"row {n}: column {name!r} has {len(values)} values for {len(row)} tokens; one for each is wanted"
            )
        found.append(None if none else values if values.dtype == bool else values.astype(np.float32))
    return found


def _refuse_long(
    prompts: Sequence[np.ndarray], tokens: Sequence[np.ndarray], losses: Sequence[Any], length: int
) -> None:
    sizes = [max(1, len(p)) + len(t) for p, t in zip(prompts, tokens, strict=True)]
    whole = [len(p) > 1 or x is not None for p, x in zip(prompts, losses, strict=True)]
    long = [(i, n) for i, (n, w) in enumerate(zip(sizes, whole, strict=True)) if w and n > length + 1]
    raise InputError(
        f"{len(long)} of {len(sizes)} examples are longer than a row of {length + 1} tokens, the first is number "
        f"{long[0][0]} with {long[0][1]}; raise train.length (at most the model's max_length) or leave them out"
    )


def stack_groups(groups: Sequence[Sequence[Example]], length: int, pad: int | None) -> Packed:
    """Sequences that belong together, one to a row: `tokens`, `segments` (1 on tokens, 0 on padding) int32 and `loss`
    `[N, G, length + 1]`. Raises InputError for none, groups of unlike size, and a sequence that does not fit."""
    if not groups:
        raise InputError("there is nothing to train on: no groups")
    sizes = {len(group) for group in groups}
    if len(sizes) != 1:
        raise InputError(f"groups have one size, these have {sorted(sizes)}")
    N, G, width = len(groups), sizes.pop(), length + 1
    longest = max((len(e.tokens), n) for n, group in enumerate(groups) for e in group)
    if longest[0] > width:
        raise InputError(
            f"group {longest[1]} has a sequence of {longest[0]} tokens, a row holds {width}; raise train.length or "
            "leave it out"
        )
    tokens = np.full((N, G, width), 0 if pad is None else pad, np.int32)
    segments = np.zeros((N, G, width), np.int32)
    loss = np.zeros((N, G, width), np.result_type(*(e.loss.dtype for group in groups for e in group)))
    for n, group in enumerate(groups):
        for g, example in enumerate(group):
            stop = len(example.tokens)
            tokens[n, g, :stop], segments[n, g, :stop], loss[n, g, :stop] = example.tokens, 1, example.loss
    return Packed({"tokens": tokens, "segments": segments, "loss": loss})


def examples_of(data: Dataset, tokenizer: Tokenizer) -> list[Example]:
    """Each row whole, its prompt (or the start token) and its tokens, of which `loss` says which are learnt."""
    tokens = data.tokens()
    losses = _per_token(data, "loss", tokens) if data.has("loss") else [None] * len(data)
    found = []
    for prompt, row, loss in zip(data.prompts(), tokens, losses, strict=True):
        before = prompt if len(prompt) else np.array([tokenizer.bos], np.int32)
        learnt = np.ones(len(row), bool) if loss is None else loss
        ids = np.concatenate([before, row]).astype(np.int32)
        found.append(Example(ids, np.concatenate([np.zeros(len(before), learnt.dtype), learnt])))
    return found


def stack_arrays(columns: Mapping[str, Any]) -> Packed:
    """Arrays `[N, ...]` as they are. Raises InputError for none, and for columns of unlike length."""
    found = {name: np.asarray(column) for name, column in columns.items()}
    if not found or not len(next(iter(found.values()))):
        raise InputError("there is nothing to train on: no rows")
    return Packed(found)


def pack(documents: Sequence[np.ndarray], length: int, bos: int, pad: int | None) -> Packed:
    """Token ids alone, each document behind a start token: what `pack_tokens` makes of rows without prompts."""
    pieces = [
        np.concatenate([[bos], d[i : i + length]]).astype(np.int32) for d in documents for i in range(0, len(d), length)
    ]
    if not pieces:
        raise InputError("there is nothing to train on: the dataset has no tokens")
    return _first_fit(pieces, {}, length + 1, pad)


def first_fit(lengths: Sequence[int], width: int, most: int | None = None) -> list[list[int]]:
    """Which pieces (by number) go into each row of `width` positions, in the given order; at most `most` to a row. Only
    the last LOOK_BACK rows are still open: the work does not grow with their number."""
    open_rows: list[tuple[list[int], int]] = []
    done: list[list[int]] = []
    for number, length in enumerate(lengths):
        for i, (members, used) in enumerate(open_rows):
            if used + length <= width and (most is None or len(members) < most):
                members.append(number)
                open_rows[i] = (members, used + length)
                break
        else:
            if len(open_rows) == LOOK_BACK:
                done.append(open_rows.pop(0)[0])
            open_rows.append(([number], length))
    return done + [members for members, _ in open_rows]


def _first_fit(
    pieces: Sequence[np.ndarray], more: Mapping[str, Sequence[np.ndarray]], width: int, pad: int | None
) -> Packed:
    rows = first_fit([len(piece) for piece in pieces], width)
    columns = {"tokens": np.full((len(rows), width), 0 if pad is None else pad, np.int32)}
    columns["segments"] = np.zeros((len(rows), width), np.int32)
    for name, values in more.items():
        columns[name] = np.zeros((len(rows), width), np.result_type(*{v.dtype for v in values}))
    for n, members in enumerate(rows):
        at = 0
        for segment, number in enumerate(members, 1):
            stop = at + len(pieces[number])
            columns["tokens"][n, at:stop] = pieces[number]
            columns["segments"][n, at:stop] = segment
            for name, values in more.items():
                columns[name][n, at:stop] = values[number]
            at = stop
    return Packed(columns)


class _Endless:
    """Rows without end, every epoch in an order of its own: row i is of epoch i // N.

    Grain's own shuffle walks a block cipher over 2**16 places at least: 35 ms an epoch on a slow core, however few the
    rows are, where a permutation of 1,000 takes 0.03 ms."""

    def __init__(self, rows: Packed, seed: int):
        self._rows, self._seed = rows, seed
        self._order = functools.lru_cache(maxsize=4)(self._drawn)

    def _drawn(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    def __len__(self) -> int:
        return 2**60

    def __getitem__(self, index: int) -> Columns:
        epoch, place = divmod(index, len(self._rows))
        return self._rows[int(self._order(epoch)[place])]


def batches(rows: Packed, batch: int, seed: int, start: int = 0) -> Iterator[Columns]:
    """Batches `start, start + 1, ...` of an endless shuffled stream, prefetched. Batch i depends on (rows, seed, i).

    Every process gets the whole batch; `mesh.put_batch` places its share.
    """
    stream = grain.MapDataset.source(_Endless(rows, seed)).batch(batch)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(stream.slice(slice(start, None)).to_iter_dataset(options))
