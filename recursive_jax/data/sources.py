"""Where real rows come from: files of text and tables, a Hugging Face folder, TFDS, the embedded language.

A document longer than the context is cut into blocks; each block is a row and starts, in training, with the start
token, so that a model can be asked for a block from nothing as well as from a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from recursive_jax.config import DataConfig
from recursive_jax.data import files
from recursive_jax.data.dataset import Dataset, real_rows
from recursive_jax.data.language import Language
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer, LanguageTokenizer, Tokenizer
from recursive_jax.errors import InputError

LIMIT_CHARACTERS = 16  # read for each token of `data.limit`: no usual tokenizer makes fewer tokens of so many


class World:
    """What stands outside the recursion: tokenizer, real training rows, held-out real rows, and, for the embedded
    language, the truth itself."""

    def __init__(self, tokenizer: Tokenizer, train: Dataset, held_out: Dataset, language: Language | None = None):
        self.tokenizer, self.train, self.held_out, self.language = tokenizer, train, held_out, language


def open_world(config: DataConfig, context: int, held_out_rows: int = 256, tokenizer: Tokenizer | None = None) -> World:
    """Reads and tokenizes the real data, with the config's tokenizer if none is given. Rows hold at most `context`
    tokens. Raises InputError."""
    if config.resolved_kind == "language":
        return _language_world(config, context, held_out_rows)
    train = list(_within_limit(documents(config, config.path), config))
    if config.validation:
        held_out = list(_within_limit(documents(config, config.validation), config))
    else:
        train, held_out = _hold_out(train, config.holdout)
    tokenizer = tokenizer or make_tokenizer(config, train)
    return World(
        tokenizer,
        _blocks(train, tokenizer, context, "real", config),
        _blocks(held_out, tokenizer, context, "held-out", config),
    )


def make_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        return FileTokenizer.train_bpe(texts, config.vocab_size)
    return FileTokenizer.open(config.tokenizer)


def _language_world(config: DataConfig, context: int, held_out_rows: int) -> World:
    language = Language(config.language)
    tokenizer = LanguageTokenizer(language)

    def sample(seed: int, count: int, prefix: str) -> Dataset:
        rows = [d[:context] for d in language.sample(seed, 0, count)]
        return real_rows(rows, [tokenizer.decode(r) for r in rows], prefix=prefix)

    count = int(np.ceil(config.real_tokens / language.expected_length))
    return World(tokenizer, sample(1, count, "real"), sample(2, 4 * held_out_rows, "held-out"), language)


def _most_characters(config: DataConfig) -> int | None:
    """Of a corpus, what `data.limit` makes worth reading: memory and time do not grow with what lies behind."""
    return None if config.limit is None else int(config.limit * LIMIT_CHARACTERS / (1 - config.holdout)) + 1


def _within_limit(texts: Iterator[str], config: DataConfig) -> Iterator[str]:
    most, read = _most_characters(config), 0
    for text in texts:
        yield text
        read += len(text)
        if most is not None and read >= most:
            return


def documents(config: DataConfig, path: str | None) -> Iterator[str]:
    """The texts of a file, a folder, a glob or a dataset name, in a fixed order."""
    if config.kind == "tfds":
        yield from _tfds(config, path)
        return
    if not path:
        raise InputError(f"data.kind={config.kind} needs data.path: a file, a folder or a glob")
    root = Path(path)
    if config.kind == "huggingface" or (config.kind in ("auto", "files") and _is_huggingface(root)):
        yield from _huggingface(root, config)
        return
    named = _files(path, config)
    found = False
    for file in named:
        kind = config.kind if config.kind not in ("auto", "files") else files.kind_of(file) or "text"
        for text in _READERS[kind](file, config):
            if text:
                found = True
                yield text
    if not found:
        raise InputError(f"data.path={path} holds no text: {len(named)} file(s), all empty")


def _files(path: str, config: DataConfig) -> list[Path]:
    """Of `data.validation` all: `data.split` is the split to learn from."""
    if config.kind in ("auto", "files"):
        kinds, column = sorted(set(files.KINDS.values())), config.field
    else:
        kinds, column = [config.kind], None
    held_out = path == config.validation and path != config.path
    split, key = (None, "data.validation") if held_out else (config.split, "data.path")
    return files.data_files(path, kinds, split, column, key)


def _is_huggingface(root: Path) -> bool:
    return root.is_dir() and ((root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file())


def _read_text(file: Path, config: DataConfig) -> Iterator[str]:
    yield files.read_text(file, _most_characters(config))


def _read_jsonl(file: Path, config: DataConfig) -> Iterator[str]:
    for where, row in files.read_json_lines(file):
        yield _field(row, config.field, where)


def _field(row: object, name: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict) or name not in row:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: no key {name!r}, there are: {keys}; set data.field")
    value = row[name]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise files.wrong_byte(f"{where}: {name!r}", error) from None
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{where}: {name!r} is {kind}, text is wanted; set data.field")
    return value


def _read_table(file: Path, config: DataConfig) -> Iterator[str]:
    kind = config.kind if config.kind in files.TABLES else None
    for where, value in files.read_column(file, config.field, kind):
        yield _field({config.field: value}, config.field, where)


def _read_arrow(file: Path, config: DataConfig) -> Iterator[str]:
    try:
        with pa.memory_map(str(file)) as source:
            try:
                reader = pa.ipc.open_stream(source)
                batches: Iterable[pa.RecordBatch] = reader
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            files.need(config.field, reader.schema.names, file)
            number = 0
            for batch in batches:
                for value in batch.column(config.field).to_pylist():
                    yield _field({config.field: value}, config.field, f"{file}, row {number}")
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as Arrow: {error}") from None


def _huggingface(root: Path, config: DataConfig) -> Iterator[str]:
    """A folder written by `datasets.save_to_disk`; the `datasets` package is not needed to read it."""
    if (root / "dataset_dict.json").is_file():
        splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
        if config.split not in splits:
            raise InputError(f"{root} has no split {config.split!r}, there are: {', '.join(splits)}; set data.split")
        root = root / config.split
    state = root / "state.json"
    if not state.is_file():
        raise InputError(f"{root} is not a folder written by datasets.save_to_disk (no state.json)")
    for part in json.loads(state.read_text())["_data_files"]:
        file = Path(str(part["filename"]))
        if file.is_absolute() or ".." in file.parts:
            raise InputError(f"{state} names {str(file)!r}, which lies outside {root}: only files below it are opened")
        yield from _read_arrow(root / file, config)


def _read_arrayrecord(file: Path, config: DataConfig) -> Iterator[str]:
    """Records are JSON objects with the text under data.field, or plain UTF-8 text."""
    import grain

    try:
        source = grain.sources.ArrayRecordDataSource([str(file)])
        for i in range(len(source)):
            record, where = source[i], f"{file}, record {i}"
            if record[:1] == b"{":
                try:
                    json.loads(record)
                except ValueError:  # text that begins with a brace, if it is text
                    pass
                else:
                    yield _field(files.parse_json(record, where), config.field, where)
                    continue
            try:
                yield record.decode("utf-8")
            except UnicodeDecodeError as error:
                raise files.wrong_byte(where, error) from None
    except (RuntimeError, OSError, IndexError) as error:
        raise InputError(f"{file} cannot be read as ArrayRecord: {error}") from None


def _tfds(config: DataConfig, name: str | None) -> Iterator[str]:
    import tensorflow_datasets as tfds

    if not name:
        raise InputError("data.kind=tfds needs data.path=<dataset name>, for example data.path=tiny_shakespeare")
    try:
        if config.data_dir is None and (Path(name) / "dataset_info.json").is_file():
            source = tfds.builder_from_directory(name).as_data_source(split=config.split)
        else:
            source = tfds.data_source(name, split=config.split, data_dir=config.data_dir)
    except Exception as error:  # tfds raises many kinds; the text says what is missing
        raise InputError(
            f"tfds cannot open {name!r} (split {config.split!r}, data_dir {config.data_dir}): {error}"
        ) from None
    for i in range(len(source)):
        yield _field(source[i], config.field, f"tfds {name}[{i}]")


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_table,
    "parquet": _read_table,
    "huggingface": _read_arrow,
    "arrayrecord": _read_arrayrecord,
}


def _hold_out(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """The last share of the characters; a document is cut at a line end where the border falls inside it."""
    want = int(sum(map(len, texts)) * share)
    held: list[str] = []
    rest = list(texts)
    while rest and want > 0:
        last = rest.pop()
        if len(last) > want:
            cut = last.rfind("\n", 0, len(last) - want) + 1 or len(last) - want
            rest.append(last[:cut])
            last = last[cut:]
        held.insert(0, last)
        want -= len(last)
    return rest, held


def held_out_blocks(texts: list[str], tokenizer: Tokenizer, context: int, config: DataConfig) -> Dataset:
    """Real rows to score a model on."""
    return _blocks(texts, tokenizer, context, "held-out", config)


def _blocks(texts: list[str], tokenizer: Tokenizer, context: int, prefix: str, config: DataConfig) -> Dataset:
    """Tokenizes documents and cuts them into rows of `context` tokens; the last row of each ends with eos."""
    encoded = tokenizer.encode_batch(texts) if isinstance(tokenizer, FileTokenizer) else map(tokenizer.encode, texts)
    rows: list[np.ndarray] = []
    parents: list[list[str]] = []
    total = 0
    for document, ids in enumerate(encoded):
        tokens = np.asarray([*ids, tokenizer.eos], np.int32)
        if config.limit and prefix == "real":
            tokens = tokens[: config.limit - total]
        for start in range(0, len(tokens), context):
            rows.append(tokens[start : start + context])
            parents.append([f"{prefix}/document-{document}"])
        total += len(tokens)
        if config.limit and prefix == "real" and total >= config.limit:
            break
    if total < 2 or (max(map(len, rows)) < context and total < context):
        where = config.validation if prefix == "held-out" and config.validation else config.path
        raise InputError(
            f"the {prefix} corpus {where} has {total} tokens, shorter than one row of {context}; "
            "give more text or lower model.max_length"
        )
    return real_rows(rows, [tokenizer.decode(r) for r in rows], prefix=prefix, parents=parents)


def source_files(config: DataConfig) -> list[Path]:
    """The files the data section names: what a run must see unchanged. None for the embedded language and TFDS."""
    if config.resolved_kind in ("language", "tfds"):
        return []
    if not config.path:
        raise InputError(f"data.kind={config.kind} needs data.path: a file, a folder or a glob")
    root = Path(config.path)
    huggingface = config.kind == "huggingface" or (config.kind in ("auto", "files") and _is_huggingface(root))
    if huggingface and not root.is_dir():
        raise InputError(
            f"data.path={config.path} does not exist (a folder written by datasets.save_to_disk is wanted)"
        )
    found = sorted(root.rglob("*.arrow")) if huggingface else _files(config.path, config)
    return found + (_files(config.validation, config) if config.validation else [])
