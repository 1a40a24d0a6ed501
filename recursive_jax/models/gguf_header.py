"""A GGUF's header, held against the size of its file before anything is read or allocated by it: counts, lengths,
dimensions and offsets come from a stranger. The package's reader makes an array of every token's bytes, which takes
seconds where this takes 0.3 (SmolLM2)."""

from __future__ import annotations

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from recursive_jax.errors import InputError

#: Value types of the format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRUCTS = {form: struct.Struct("<" + form) for form in _NUMBERS.values()}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4
_NESTED = 4  # arrays in arrays


class _Damaged(ValueError):
    pass


@dataclasses.dataclass(frozen=True)
class Tensor:
    """shape: as the file has it, the fastest dimension first. data: its bytes, uint8, mapped."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: np.ndarray


class _Header:
    """Walks a header. Every step stays inside the file."""

    def __init__(self, data: Any):
        self.data, self.at, self.size = data, 0, len(data)

    def number(self, form: str) -> Any:
        found = _STRUCTS[form]
        if self.at + found.size > self.size:
            raise _Damaged("the header ends beyond the file")
        self.at += found.size
        return found.unpack_from(self.data, self.at - found.size)[0]

    def take(self, size: int, what: str) -> bytes:
        if size > self.size - self.at:
            raise _Damaged(f"{what} of {size:,} bytes ends beyond the file")
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self, what: str, most: int | None = None) -> str:
        size = self.number("Q")
        if most is not None and size > most:
            raise _Damaged(f"{what} has {size:,} bytes")
        try:
            return self.take(size, what).decode()
        except UnicodeDecodeError:
            raise _Damaged(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text(f"the text of {key}")
        if kind != _ARRAY or depth == _NESTED:
            raise _Damaged(f"{key} is of an unknown type, {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            form = np.dtype("<" + _NUMBERS[inner]) if inner != 7 else np.dtype(bool)
            return np.frombuffer(self.take(form.itemsize * count, f"the array {key}"), form).tolist()
        if count * 8 > self.size - self.at:
            raise _Damaged(f"the array {key} of {count:,} values ends beyond the file")
        return [self.value(inner, key, depth + 1) for _ in range(count)]


NAME = 65_535  # bytes of a key or of a tensor's name, by the format


def read_header(path: Path, sizes: dict[int, tuple[int, int]]) -> tuple[dict[str, Any], list[Tensor]]:
    """(the fields, the tensors) of a GGUF. Raises InputError where a count, a length, a dimension or an offset does not
    fit into its file, for text that is not UTF-8, and for a file of a big-endian machine. sizes: of each tensor type,
    values of a block and its bytes."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise InputError(f"{path} is truncated or damaged: it has no header of a GGUF")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _read(_Header(data), sizes)
    except _Damaged as error:
        raise InputError(f"{path} is truncated or damaged, or not a GGUF file: {error}") from None


def _read(h: _Header, sizes: dict[int, tuple[int, int]]) -> tuple[dict[str, Any], list[Tensor]]:
    if h.data[:4] != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    h.at = 4
    version = h.number("I")
    if version & 0xFFFF == 0:
        raise _Damaged("it is of a big-endian machine, or of no version; little-endian files are read")
    if version not in (2, 3):
        raise _Damaged(f"version {version} of the format; 2 and 3 are read")
    tensors, pairs = h.number("Q"), h.number("Q")
    if tensors * 24 + pairs * 12 > h.size:
        raise _Damaged(f"{tensors:,} tensors and {pairs:,} keys do not fit into {h.size:,} bytes")
    fields: dict[str, Any] = {}
    for _ in range(pairs):
        key = h.text("a key", NAME)
        if key in fields:
            raise _Damaged(f"the key {key} stands twice")
        fields[key] = h.value(h.number("I"), key)
    alignment = fields.get("general.alignment", 32)
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment={str(alignment)[:40]} is not a power of two")
    parts = [_tensor(h, sizes) for _ in range(tensors)]
    if len({name for name, *_ in parts}) != tensors:
        raise _Damaged("two tensors have one name")
    begin = -(-h.at // alignment) * alignment
    found = []
    for name, shape, kind, offset, size in parts:
        if offset % alignment or begin + offset + size > h.size:
            raise _Damaged(f"the tensor {name} ends beyond the file, or its offset {offset:,} is not aligned")
        found.append(Tensor(name, shape, kind, np.frombuffer(h.data, np.uint8, size, begin + offset)))
    return fields, found


def _tensor(h: _Header, sizes: dict[int, tuple[int, int]]) -> tuple[str, tuple[int, ...], int, int, int]:
    """(name, shape, type, offset, bytes) of the next tensor."""
    name = h.text("a tensor's name", NAME)
    count = h.number("I")
    if not 1 <= count <= _DIMENSIONS:
        raise _Damaged(f"the tensor {name} has {count} dimensions")
    shape = tuple(h.number("Q") for _ in range(count))
    values = 1
    for size in shape:
        values *= size
    kind, offset = h.number("I"), h.number("Q")
    if kind not in sizes:
        raise _Damaged(f"the tensor {name} is of an unknown type, {kind}")
    block, size = sizes[kind]
    if values < 1 or shape[0] % block:
        raise _Damaged(f"the tensor {name} has rows of {shape[0]:,} values, blocks of its type have {block}")
    return name, shape, kind, offset, values // block * size
