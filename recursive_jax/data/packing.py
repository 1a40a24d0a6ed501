"""Frozen, packed, step-addressed batches: rows are packed once, then `batch = f(seed, step)`.

The state of the data is the step number, so a run resumes on any number of processes with the same batches.
Packed rows are one array read through Grain (shuffle, repeat, batch, prefetch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError

LOOK_BACK = 64  # open rows that first-fit tries


class PackedRows:
    """tokens_NT and segments_NT (int32). Each segment is a start token and one dataset row; 0 is padding.

    A model trained on a row predicts each token from those before it in its own segment. loss_NT (bool, or
    float32 weights): which tokens count in the loss, of those, and how much; all the same where it is None.
    """

    def __init__(self, tokens_NT: np.ndarray, segments_NT: np.ndarray, loss_NT: np.ndarray | None = None):
        self.tokens_NT, self.segments_NT, self.loss_NT = tokens_NT, segments_NT, loss_NT

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = {"tokens": self.tokens_NT[index], "segments": self.segments_NT[index]}
        return row if self.loss_NT is None else {**row, "loss": self.loss_NT[index]}

    @property
    def targets(self) -> int:
        """Predicted tokens in one pass over all rows."""
        s = self.segments_NT
        counted = (s[:, 1:] == s[:, :-1]) & (s[:, 1:] > 0)
        return int((counted if self.loss_NT is None else counted & (self.loss_NT[:, 1:] > 0)).sum())

    @property
    def fill(self) -> float:
        """Share of the positions that hold a token."""
        return float((self.segments_NT > 0).mean())


def pack(
    data: Dataset | Sequence[np.ndarray], length: int, bos: int, pad: int | None, weights: Sequence[float] | None = None
) -> PackedRows:
    """First-fit packing in the given order into rows of `length + 1` positions (inputs and shifted targets).

    A dataset row longer than `length` becomes several segments. weights: of each row's tokens in the loss. Raises
    InputError for an empty dataset.
    """
    documents = data.tokens() if isinstance(data, Dataset) else list(data)
    starts = [(n, i) for n, d in enumerate(documents) for i in range(0, len(d), length)]
    opened = [np.concatenate([[bos], documents[n][i : i + length]]).astype(np.int32) for n, i in starts]
    if not opened:
        raise InputError("there is nothing to train on: the dataset has no tokens")
    losses = None
    if weights is not None:
        losses = [np.full(len(x), weights[n], np.float32) for x, (n, _) in zip(opened, starts, strict=True)]
    return _first_fit(opened, losses, length + 1, pad)


def pack_examples(examples: Sequence[Example], length: int, pad: int | None) -> PackedRows:
    """Packs examples with loss masks (or weights), whole and as they are: nothing is put in front, and none is cut.

    Raises InputError for no examples, and for one longer than a row, with its number and length.
    """
    if not examples:
        raise InputError("there is nothing to train on: no examples")
    long = [(i, len(e.tokens)) for i, e in enumerate(examples) if len(e.tokens) > length + 1]
    if long:
        raise InputError(
            f"{len(long)} of {len(examples)} examples are longer than a row of {length + 1} tokens, the first is number "
            f"{long[0][0]} with {long[0][1]}; raise train.length (at most model.context) or leave them out"
        )
    if not any(e.loss[1:].any() for e in examples):
        raise InputError("no token of any example counts in the loss: every one is a prompt")
    return _first_fit([e.tokens for e in examples], [e.loss for e in examples], length + 1, pad)


def pack_dataset(data: Dataset, length: int, tokenizer: Tokenizer) -> PackedRows:
    """Rows with a column `loss` are packed whole and as they are; others behind a start token each. A column `weight`
    weights the loss of a row's tokens against the other rows'."""
    columns = data.table.column_names
    weights = data.column("weight") if "weight" in columns else None
    if "loss" not in columns:
        return pack(data, length, tokenizer.bos, tokenizer.pad, weights)
    losses = [np.asarray(x, bool) for x in data.column("loss")]
    if weights is not None:
        losses = [x * np.float32(w) for x, w in zip(losses, weights, strict=True)]
    examples = [Example(t, l) for t, l in zip(data.tokens(), losses, strict=True)]
    return pack_examples(examples, length, tokenizer.pad)


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation or prompt with its completion. tokens: int32 `[n]`. loss: bool `[n]`, what is to be learnt
    (or float32: how much)."""

    tokens: np.ndarray
    loss: np.ndarray


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
    pieces: Sequence[np.ndarray], losses: Sequence[np.ndarray] | None, width: int, pad: int | None
) -> PackedRows:
    done = first_fit([len(piece) for piece in pieces], width)
    tokens_NT = np.full((len(done), width), 0 if pad is None else pad, np.int32)
    segments_NT = np.zeros((len(done), width), np.int32)
    loss_NT = None if losses is None else np.zeros((len(done), width), losses[0].dtype)
    for n, members in enumerate(done):
        at = 0
        for segment, number in enumerate(members, 1):
            stop = at + len(pieces[number])
            tokens_NT[n, at:stop] = pieces[number]
            segments_NT[n, at:stop] = segment
            if loss_NT is not None:
                loss_NT[n, at:stop] = losses[number]
            at = stop
    return PackedRows(tokens_NT, segments_NT, loss_NT)


def batches(rows: PackedRows, batch: int, seed: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start, start + 1, ...` of an endless shuffled stream, prefetched. Batch i depends on (rows, seed, i).

    Every process gets the whole batch; `mesh.put_batch` places its share.
    """
    stream = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None).batch(batch)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(stream.slice(slice(start, None)).to_iter_dataset(options))
