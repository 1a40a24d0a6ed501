"""Frozen, packed, step-addressed batches: rows are packed once, then `batch = f(seed, step)`.

The state of the data is the step number, so a run resumes on any number of processes with the same batches.
Packed rows are one array read through Grain (shuffle, repeat, batch, prefetch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError

LOOK_BACK = 64  # open rows that first-fit tries


class PackedRows:
    """tokens_NT and segments_NT (int32). Each segment is a start token and one dataset row; 0 is padding.

    A model trained on a row predicts each token from those before it in its own segment.
    """

    def __init__(self, tokens_NT: np.ndarray, segments_NT: np.ndarray):
        self.tokens_NT, self.segments_NT = tokens_NT, segments_NT

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens_NT[index], "segments": self.segments_NT[index]}

    @property
    def targets(self) -> int:
        """Predicted tokens in one pass over all rows."""
        s = self.segments_NT
        return int(((s[:, 1:] == s[:, :-1]) & (s[:, 1:] > 0)).sum())

    @property
    def fill(self) -> float:
        """Share of the positions that hold a token."""
        return float((self.segments_NT > 0).mean())


def pack(data: Dataset | Sequence[np.ndarray], length: int, bos: int, pad: int) -> PackedRows:
    """First-fit packing in the given order into rows of `length + 1` positions (inputs and shifted targets).

    A dataset row longer than `length` becomes several segments. Raises InputError for an empty dataset.
    """
    documents = data.tokens() if isinstance(data, Dataset) else list(data)
    documents = [d[i : i + length] for d in documents for i in range(0, len(d), length)]
    if not documents:
        raise InputError("there is nothing to train on: the dataset has no tokens")
    width = length + 1
    open_rows: list[tuple[list[np.ndarray], int]] = []
    done: list[list[np.ndarray]] = []
    for document in documents:
        need = len(document) + 1
        for i, (pieces, used) in enumerate(open_rows):
            if used + need <= width:
                pieces.append(document)
                open_rows[i] = (pieces, used + need)
                break
        else:
            if len(open_rows) == LOOK_BACK:
                done.append(open_rows.pop(0)[0])
            open_rows.append(([document], need))
    done.extend(pieces for pieces, _ in open_rows)
    tokens_NT = np.full((len(done), width), pad, np.int32)
    segments_NT = np.zeros((len(done), width), np.int32)
    for n, pieces in enumerate(done):
        at = 0
        for segment, piece in enumerate(pieces, 1):
            stop = at + 1 + len(piece)
            tokens_NT[n, at] = bos
            tokens_NT[n, at + 1 : stop] = piece
            segments_NT[n, at:stop] = segment
            at = stop
    return PackedRows(tokens_NT, segments_NT)


def batches(rows: PackedRows, batch: int, seed: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start, start + 1, ...` of an endless shuffled stream, prefetched. Batch i depends on (rows, seed, i).

    Every process gets the whole batch; `mesh.put_batch` places its share.
    """
    stream = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None).batch(batch)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(stream.slice(slice(start, None)).to_iter_dataset(options))
