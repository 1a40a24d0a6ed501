"""A GGUF's header held against the size of its file, before anything is read or allocated by it: counts, lengths,
dimensions and offsets come from a stranger."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from recursive_jax.errors import InputError

#: Value types of the format: number -> bytes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_DIMENSIONS = 4
_NESTED = 4  # arrays in arrays


class _Damaged(ValueError):
    pass


class _Header:
    """Walks a header. Every step stays inside the file."""

    def __init__(self, data: Any):
        self.data, self.at, self.order = data, 0, "<"

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        if self.at + size > len(self.data):
            raise _Damaged("the header ends beyond the file")
        self.at += size
        return struct.unpack_from(self.order + form, self.data, self.at - size)[0]

    def skip(self, size: int, what: str) -> None:
        if size > len(self.data) - self.at:
            raise _Damaged(f"{what} of {size:,} bytes ends beyond the file")
        self.at += size

    def text(self, what: str) -> str:
        start, size = self.at + 8, self.number("Q")
        if size > 65_535:  # the format's own bound of keys
            raise _Damaged(f"{what} has {size:,} bytes")
        self.skip(size, what)
        try:
            return bytes(self.data[start : start + size]).decode()
        except UnicodeDecodeError:
            raise _Damaged(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str, depth: int = 0) -> int | None:
        """Steps over a value; what an unsigned 32-bit one is."""
        if kind in _BYTES:
            if kind == _UINT32:
                return self.number("I")
            self.skip(_BYTES[kind], key)
        elif kind == _STRING:
            self.skip(self.number("Q"), f"the text of {key}")
        elif kind == _ARRAY and depth < _NESTED:
            inner, count = self.number("I"), self.number("Q")
            if inner in _BYTES:
                self.skip(_BYTES[inner] * count, f"the array {key}")
            else:
                if count * 8 > len(self.data) - self.at:
                    raise _Damaged(f"the array {key} of {count:,} values ends beyond the file")
                for _ in range(count):
                    self.value(inner, key, depth + 1)
        else:
            raise _Damaged(f"{key} is of an unknown type, {kind}")
        return None


def check_header(path: Path, sizes: dict[int, tuple[int, int]]) -> None:
    """Raises InputError where a count, a length, a dimension or an offset of a GGUF does not fit into its file. sizes:
    of each tensor type, values of a block and its bytes."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise InputError(f"{path} is truncated or damaged: it has no header of a GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _check(_Header(data), sizes)
            except _Damaged as error:
                raise InputError(f"{path} is truncated or damaged, or not a GGUF file: {error}") from None


def _check(h: _Header, sizes: dict[int, tuple[int, int]]) -> None:
    if bytes(h.data[:4]) != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    h.at = 4
    version = h.number("I")
    if version & 0xFFFF == 0:  # written on a machine of the other byte order
        h.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        raise _Damaged(f"version {version} of the format; 2 and 3 are read")
    tensors, pairs = h.number("Q"), h.number("Q")
    if tensors * 24 + pairs * 12 > len(h.data):
        raise _Damaged(f"{tensors:,} tensors and {pairs:,} keys do not fit into {len(h.data):,} bytes")
    alignment = 32
    for _ in range(pairs):
        key = h.text("a key")
        found = h.value(h.number("I"), key)
        if key == "general.alignment":
            alignment = found or 0
    if alignment < 1 or alignment > 2**20 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment={alignment} is not a power of two")
    parts = [_tensor(h, sizes) for _ in range(tensors)]
    begin = -(-h.at // alignment) * alignment
    for name, offset, size in parts:
        if offset % alignment or begin + offset + size > len(h.data):
            raise _Damaged(f"the tensor {name} ends beyond the file, or its offset {offset:,} is not aligned")


def _tensor(h: _Header, sizes: dict[int, tuple[int, int]]) -> tuple[str, int, int]:
    """(name, offset, bytes) of the next tensor."""
    name = h.text("a tensor's name")
    count = h.number("I")
    if not 1 <= count <= _DIMENSIONS:
        raise _Damaged(f"the tensor {name} has {count} dimensions")
    values, first = 1, 0
    for i in range(count):
        size = h.number("Q")
        first = size if i == 0 else first
        values *= size
    kind, offset = h.number("I"), h.number("Q")
    if kind not in sizes:
        raise _Damaged(f"the tensor {name} is of an unknown type, {kind}")
    block, size = sizes[kind]
    if values < 1 or first % block:
        raise _Damaged(f"the tensor {name} has rows of {first:,} values, blocks of its type have {block}")
    return name, offset, values // block * size
