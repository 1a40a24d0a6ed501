"""Words and n-grams of many texts as hashes, by Arrow and NumPy: nothing in Python runs once for every word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, vol. 3, sec. 6.4)


def hashed_words(texts: pa.Array | pa.ChunkedArray | Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, offsets): the words of text n are uint64 `hashes[offsets[n]:offsets[n + 1]]`. A word is a run of letters
    and digits of any script, in small letters; equal words have equal hashes, in every process."""
    column = texts if isinstance(texts, (pa.Array, pa.ChunkedArray)) else pa.array(texts, pa.large_string())
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    column = pc.fill_null(column.cast(pa.large_string()), "")
    plain = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(column), r"[^\p{L}\p{N}]+", " "))
    lists = pc.split_pattern(plain, " ")
    encoded = pc.dictionary_encode(lists.flatten())
    encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
    known = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in encoded.dictionary.to_pylist()], np.uint64)
    ids = encoded.indices.to_numpy(zero_copy_only=False)
    hashes = known[ids] if len(known) else np.empty(0, np.uint64)
    counts = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    blank = pc.equal(plain, "").to_numpy(zero_copy_only=False)  # a text without words splits into one empty word
    if blank.any():
        keep = np.repeat(~blank, counts)
        hashes, counts = hashes[keep], np.where(blank, 0, counts)
    return hashes, np.concatenate([[0], np.cumsum(counts)])


def ngrams(hashes: np.ndarray, offsets: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, offsets) of the n-grams within each text, as `hashed_words` gives words; none in a text of fewer."""
    if len(hashes) < n:
        return np.empty(0, np.uint64), np.zeros_like(offsets)
    starts = len(hashes) - n + 1
    mixed = np.zeros(starts, np.uint64)
    for k in range(n):
        mixed = (mixed ^ hashes[k : k + starts]) * _MULTIPLIER
        mixed ^= mixed >> np.uint64(29)
    counts = np.diff(offsets)
    rest = np.repeat(offsets[1:], counts) - np.arange(len(hashes))  # words from here to the end of the text
    return mixed[rest[:starts] >= n], np.concatenate([[0], np.cumsum(np.maximum(0, counts - n + 1))])
