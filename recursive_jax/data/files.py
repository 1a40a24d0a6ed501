"""Files that people bring: which of a folder are data, and their texts, lines and rows. One reader for every command.

Text is UTF-8, with or without a byte-order mark, packed (.gz, .bz2, .zst) or not. Lines end at \\n or \\r\\n (those of
a text at \\r too), and nowhere else: U+2028 is a character of a line. What cannot be read is one InputError that names
the file and the line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from recursive_jax.data.dataset import python_rows
from recursive_jax.errors import InputError, say_once
from recursive_jax.storage import verify_own

PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".raw": "text",
    ".tokens": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "huggingface",
    ".array_record": "arrayrecord",
    ".arrayrecord": "arrayrecord",
}
TABLES = ("csv", "parquet")
#: Words of a file's or folder's name that say which split it belongs to, as the Hugging Face hub reads them.
SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}")
_CARDS = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog)(\.(md|txt|rst|cff))?|(dataset_infos?|dataset_dict|state)\.json",
    re.IGNORECASE,
)


def _plain(file: str | Path) -> Path:
    """The name in small letters, shard numbers (`x.array_record-00003-of-00008`) and packing apart."""
    name = Path(_SHARD.sub("", Path(file).name.lower()))
    return Path(name.stem) if name.suffix in PACKED else name


def kind_of(file: str | Path) -> str | None:
    """The kind that a file's name states; None: it states none."""
    return KINDS.get(_plain(file).suffix)


def data_files(
    path: str, kinds: Sequence[str], split: str | None, column: str | None = None, key: str = "data.path"
) -> list[Path]:
    """The files of a file name, a glob or a folder, sorted. Of a folder: those of `kinds` that are not hidden, no card
    or licence, and no CSV without `column` beside other data; where names tell splits apart
    (`train-00000-of-00002.parquet`, `test/`) and `split` is among them, none of another split. What is left out is
    named on stderr. Raises InputError where there are none."""
    root = Path(path)
    if not root.is_dir():
        files = [root] if root.is_file() else sorted(Path(f) for f in glob.glob(path, recursive=True))
        files = [f for f in files if f.is_file()]
        if not files:
            raise InputError(f"{key}={path} does not exist (a file, a folder or a glob is wanted)")
        return files
    there = sorted(f for f in root.rglob("*") if f.is_file() and not _hidden(f.relative_to(root)))
    files = [f for f in there if kind_of(f) in kinds and not _CARDS.fullmatch(f.name)]
    files = [f for f in files if kind_of(f) != "csv" or column is None or column in _header(f)] or files
    splits = {f: split_of(f.relative_to(root)) for f in files}
    if split in splits.values():
        files = [f for f in files if splits[f] in (split, None)]
    elif len(named := sorted({s for s in splits.values() if s})) > 1:
        say_once(f"{path}: all of the splits {', '.join(named)} are read, by their names none is {split!r}")
    if not files:
        wanted = " ".join(sorted(s for s, kind in KINDS.items() if kind in kinds))
        raise InputError(
            f"{key}={path} has no {wanted} files in it (hidden files, cards and licences are not data; a glob names "
            "any file)"
        )
    chosen = set(files)
    left = [str(f.relative_to(root)) for f in there if f not in chosen]
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        say_once(f"{path}: {len(files)} file(s) are read, these are not: {', '.join(left[:8])}{more}")
    return files


def _header(file: Path) -> list[str]:
    """Names of a CSV file's columns; of one that cannot be read, none."""
    try:
        with opened(file) as stream:
            return next(csv.reader(io.TextIOWrapper(stream, "utf-8-sig"), delimiter="\t" if _tabs(file) else ","), [])
    except (InputError, UnicodeDecodeError, csv.Error):
        return []


def _tabs(file: str | Path) -> bool:
    return _plain(file).suffix == ".tsv"


def _hidden(file: Path) -> bool:
    """Checkpoints of editors (`.ipynb_checkpoints/`), resource forks (`._x.txt`), `.git/` and their like."""
    return any(part.startswith(".") for part in file.parts)


def split_of(file: Path) -> str | None:
    """The split that a name states, the last part of the path first: a folder or a text by its whole name (`test/`,
    `train.txt`), other data by a word of its name (`squad-train.jsonl`). Texts speak of tests and of training."""
    for part in (_plain(file).name.split(".")[0], *reversed(file.parts[:-1])):
        whole = kind_of(file) == "text" or part in file.parts[:-1]
        words = [part.lower()] if whole else re.split(r"[^a-z]+", part.lower())
        for split, names in SPLITS.items():
            if any(name in words for name in names):
                return split
    return None


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked. InputError for one that cannot be read or unpacked to its end."""
    packing = PACKED.get(Path(file).suffix.lower())
    try:
        raw = pa.input_stream(str(file), compression=packing) if packing else None
        with io.BufferedReader(raw) if packing else open(file, "rb") as stream:
            yield stream
    except OSError as error:  # Arrow's errors of unpacking are OSErrors too
        raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_text(file: str | Path, most: int | None = None) -> str:
    """The text of a file, at most the first `most` characters of it. Line ends become \\n."""
    try:
        with opened(file) as stream:
            return io.TextIOWrapper(stream, encoding="utf-8-sig").read(most if most is not None else -1)
    except UnicodeDecodeError:
        raise _not_utf8(file) from None


def read_lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a text file."""
    try:
        with opened(file) as stream:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1):
                yield number, line.rstrip("\n")
    except UnicodeDecodeError:
        raise _not_utf8(file) from None


def _not_utf8(file: str | Path) -> InputError:
    """Says where: a decoder of streams knows the place in its buffer only."""
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return InputError(f"{file} is UTF-16, UTF-8 is wanted: `iconv -f utf-16 -t utf-8` converts it")
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return wrong_byte(f"{file}, line {number}", error)
    return InputError(f"{file} is not UTF-8")


def wrong_byte(where: str, error: UnicodeDecodeError) -> InputError:
    """What is said of bytes that are no text."""
    return InputError(
        f"{where}: byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8; convert the file, e.g. from "
        "Latin-1 by `iconv -f latin1 -t utf-8`"
    )


def parse_json(line: bytes | str, where: str) -> Any:
    """One JSON value. InputError names `where` for bytes that are not UTF-8, no JSON, a key that stands twice in one
    object, and half a surrogate pair, which is no character and could not be written again."""
    try:
        line = line.decode("utf-8") if isinstance(line, bytes) else line
        value = json.loads(line, object_pairs_hook=_each_once)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise wrong_byte(where, error) from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{where}: {half} is half a character (a lone surrogate); repair or drop the row") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Of a key that stands twice a reader would silently keep one value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def read_json_lines(file: str | Path) -> Iterator[tuple[str, Any]]:
    """(`FILE, line N`, value) of a JSONL file, blank lines left out; of a .json file that is one array, its items."""
    with opened(file) as stream:
        first = stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first == b"[" and _plain(file).suffix == ".json":
            items = parse_json(stream.read().removeprefix(codecs.BOM_UTF8), str(file))
            yield from ((f"{file}, item {number}", item) for number, item in enumerate(items, 1))
            return
        for number, line in enumerate(stream, 1):
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise _not_utf8(file)
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{file}, line {number}", parse_json(line, f"{file}, line {number}")


def read_column(file: str | Path, column: str, kind: str | None = None) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of one column of a table; InputError names those that are there where it is not. kind:
    `csv` or `parquet`, whatever the name says."""
    for where, row in _table_rows(file, kind or kind_of(file), column):
        yield where, row[column]


def _table_rows(file: str | Path, kind: str | None, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    return _csv_rows(file, column) if kind == "csv" else _parquet_rows(file, column)


def _parquet_rows(file: str | Path, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    verify_own(file)
    try:
        table = pq.ParquetFile(file)
        need(column, table.schema_arrow.names, file)
        for batch in table.iter_batches(1024, columns=None if column is None else [column]):
            for row in python_rows(batch):
                yield f"{file}, row {number}", row
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as Parquet: {error}") from None


def _csv_rows(file: str | Path, column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names stand in the first line. Values are the texts that are there: nothing is taken for a number, or for none.
    A .csv may quote a text that holds commas and line ends; a .tsv has neither tabs nor line ends in a text."""
    csv.field_size_limit(2**31 - 1)  # a document may be long
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if _tabs(file) else {"strict": True}
    try:
        with opened(file) as stream:
            reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), **form)
            names = next(reader, [])
            need(column, names, file)
            for number, values in enumerate(reader):
                where = f"{file}, row {number}"
                if not values:
                    continue
                if len(values) != len(names):
                    raise InputError(f"{where}: {len(values)} values, the first line names {len(names)} columns")
                yield where, dict(zip(names, values, strict=True))
    except UnicodeDecodeError:
        raise _not_utf8(file) from None
    except csv.Error as error:
        raise InputError(f"{file} cannot be read as a table: {error}") from None


def need(column: str | None, names: list[str], file: str | Path) -> None:
    """InputError for a column that a table does not have, or has twice. None: any column, each of them once."""
    if column is not None and column not in names:
        raise InputError(f"{file}: no column {column!r}, there are: {', '.join(names)}; set data.field")
    twice = sorted({name for name in names if names.count(name) > 1 and column in (None, name)})
    if twice:
        raise InputError(f"{file} has the column {twice[0]!r} twice: give them names of their own")


def read_rows(file: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of a table or of JSON objects."""
    if kind_of(file) in TABLES:
        yield from _table_rows(file, kind_of(file), None)
        return
    for where, row in read_json_lines(file):
        if not isinstance(row, dict):
            raise InputError(f"{where}: a JSON object is wanted, it is a {type(row).__name__}")
        yield where, row
