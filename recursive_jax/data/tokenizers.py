"""Text <-> token ids: bytes with no set-up, the embedded language's words, or any `tokenizer.json`."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from recursive_jax.config import LanguageConfig
from recursive_jax.data.language import BOS, EOS, PAD, Language
from recursive_jax.errors import InputError


class Tokenizer(Protocol):
    """vocab: number of ids. bos, eos, pad: ids of the special tokens. Padding is hidden by masks, not by its id: pad is
    None where a tokenizer has no id of its own for it, and never eos.

    A tokenizer may also have: mask (the id that hides a token), special_ids, stops (ids that end a row, eos among
    them), has_bos (False: a prompt is not opened with bos), chat_template (Jinja), encode_batch."""

    vocab: int
    bos: int
    eos: int
    pad: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def to_json(self) -> dict: ...


class NamedByValue:
    """A tokenizer is named by all that it would store."""

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self)


class ByteTokenizer(NamedByValue):
    """UTF-8 bytes, then start, end and padding. Any text round-trips."""

    vocab, bos, eos, pad = 259, 256, 257, 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(int(t) for t in tokens if t < 256).decode("utf-8", errors="replace")

    def to_json(self) -> dict:
        return {"kind": "byte"}


class LanguageTokenizer(NamedByValue):
    """The words of the embedded language."""

    bos, eos, pad = BOS, EOS, PAD

    def __init__(self, language: Language):
        self.language, self.vocab = language, language.vocab

    def encode(self, text: str) -> list[int]:
        try:
            return [self.language.ids[word] for word in text.split()]
        except KeyError as error:
            some = " ".join(self.language.words[3:9])
            raise InputError(
                f"{error.args[0]!r} is not a word of the embedded language this model was trained on; its "
                f"{self.vocab - 3} words "
                f"begin with: {some}"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return self.language.text([t for t in tokens if EOS < t < self.vocab])

    def to_json(self) -> dict:
        return {"kind": "language", "language": self.language.config.model_dump()}


SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")
_KNOWN = {
    "bos": ("<|bos|>", "<s>", "<bos>", "<|begin_of_text|>", "[CLS]", "<|im_start|>"),
    "eos": ("<|eos|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
}


@dataclasses.dataclass(frozen=True)
class Special:
    """The roles of a tokenizer's ids, as its own files say."""

    bos: int
    eos: int
    pad: int | None
    stops: tuple[int, ...]
    has_bos: bool = True  # whether a prompt is opened with bos


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a generated row, eos first."""
    return tuple(dict.fromkeys((tokenizer.eos, *getattr(tokenizer, "stops", ()))))


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Name -> id of the tokens that stand for no text: `decode` leaves them out."""
    ids = getattr(tokenizer, "special_ids", ())
    return {tokenizer.token(i): int(i) for i in ids}


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """What the `tokenizers` library raises, bare exceptions and panics of its Rust code, as one message."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {str(error)[:300]}") from None


class FileTokenizer(NamedByValue):
    """A `tokenizer.json` of the `tokenizers` library.

    special: roles of the ids; without it they are found by their usual names, and missing start, end or padding tokens
    are added after the file's own ids, for a model that is yet to be trained. settings: `tokenizer_config.json`, kept
    for export.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special: Special | None = None,
        chat_template: str | None = None,
        settings: dict | None = None,
    ):
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.special, self.chat_template, self.settings = special, chat_template, settings or {}
        self.has_bos, self.stops = True, ()
        if special is not None:
            self.bos, self.eos, self.pad = special.bos, special.eos, special.pad
            self.has_bos, self.stops = special.has_bos, special.stops
        for role, names in _KNOWN.items() if special is None else ():
            found = next((n for n in names if tokenizer.token_to_id(n) is not None), None)
            if found is None:
                found = names[0]
                tokenizer.add_special_tokens([found])
            setattr(self, role, tokenizer.token_to_id(found))
        self.vocab = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def open(cls, path: str | Path) -> FileTokenizer:
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"data.tokenizer={path} does not exist; give byte, bpe, or the path of a tokenizer.json")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path} is not a tokenizer.json: {error}") from None

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab: int) -> FileTokenizer:
        """A byte-level BPE with `vocab` ids, specials included."""
        if vocab < 256 + len(SPECIALS):
            raise InputError(
                f"data.vocab_size={vocab} is too small: a byte-level BPE needs at least {256 + len(SPECIALS)}"
            )
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=list(SPECIALS),
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        with library_errors(f"the tokenizer cannot encode {text[:40]!r}"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, the span of characters each stands for)."""
        with library_errors(f"the tokenizer cannot encode {text[:40]!r}"):
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def encode_framed(self, texts: list[str]) -> list[list[int]]:
        """With the special tokens that the file puts around a text ([CLS] ... [SEP])."""
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=True)]

    @property
    def mask(self) -> int | None:
        """The id that hides a token (BERT's [MASK]), where the file has one."""
        found = (self._tokenizer.token_to_id(name) for name in ("[MASK]", "<mask>", "<|mask|>"))
        return next((i for i in found if i is not None), None)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of all tokens that the file calls special."""
        return tuple(sorted(i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special))

    def backend_json(self) -> str:
        """The tokenizer as the text of a `tokenizer.json`."""
        return self._tokenizer.to_str()

    def token(self, index: int) -> str:
        """The token's own text, special tokens included."""
        return self._tokenizer.id_to_token(int(index)) or ""

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)

    def to_json(self) -> dict:
        stored = {"kind": "file", "tokenizer": json.loads(self._tokenizer.to_str())}
        if self.special is not None:
            stored |= {
                "special": dataclasses.asdict(self.special),
                "chat_template": self.chat_template,
                "settings": self.settings,
            }
        return stored


_MARK = "\n"  # in no vocabulary part of a word


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """One of the names, the longest first."""
    return re.compile("(" + "|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) + ")")


class SentencePieceTokenizer(NamedByValue):
    """A SentencePiece `tokenizer.model` (needs the package `sentencepiece`). added: tokens that stand beside it in
    companion files, text -> (id, whether it stands for no text); they are found in any text, before SentencePiece."""

    def __init__(
        self,
        model: bytes,
        special: Special,
        chat_template: str | None = None,
        settings: dict | None = None,
        added: Mapping[str, tuple[int, bool]] | None = None,
    ):
        try:
            import sentencepiece
        except ImportError:
            raise InputError(
                "this tokenizer is a SentencePiece tokenizer.model: pip install 'recursive-jax[sentencepiece]'"
            ) from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the library raises bare RuntimeError
            raise InputError(f"tokenizer.model is damaged: {error}") from None
        self.model, self.special, self.chat_template, self.settings = model, special, chat_template, settings or {}
        self.bos, self.eos, self.pad = special.bos, special.eos, special.pad
        self.has_bos, self.stops = special.has_bos, special.stops
        self.added = {text: (int(i), bool(special)) for text, (i, special) in sorted((added or {}).items())}
        self._added = {i: text for text, (i, _) in self.added.items()}
        self._size = self._processor.get_piece_size()
        self.vocab = max([self._size, *(i + 1 for i in self._added)])

    def encode(self, text: str) -> list[int]:
        return self._split(self._added_names, text, True) if self.added else self._processor.encode(text)

    def encode_rendered(self, text: str, first: bool = True) -> list[int]:
        """A rendered conversation, or a part of it: the names of special tokens in it become those tokens
        (SentencePiece itself reads them as text), and only the beginning of the whole gets the library's dummy blank.
        first: whether `text` is that beginning."""
        return self._split(self._specials, text, first)

    def _split(self, names: re.Pattern[str], text: str, first: bool) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(names.split(text)):
            if i % 2:
                ids.append(self.added[part][0] if part in self.added else self._processor.piece_to_id(part))
            elif part:
                ids += self._processor.encode(part) if first and not ids else self._inside(part)
        return ids

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the control pieces, and of added tokens that stand for no text."""
        added = [i for i, special in self.added.values() if special]
        return tuple(sorted({i for i in range(self._size) if self._processor.is_control(i)} | {*added}))

    def _inside(self, text: str) -> list[int]:
        """Without a blank before it: encoded behind a letter that is taken off again."""
        marked = self._processor.encode(_MARK + text)
        lead = self._processor.encode(_MARK)
        return marked[len(lead) :] if marked[: len(lead)] == lead else self._processor.encode(text)

    @functools.cached_property
    def _specials(self) -> re.Pattern[str]:
        """The names of the special tokens, longest first."""
        p = self._processor
        named = {p.id_to_piece(i) for i in range(self._size) if p.is_control(i)} | {*self.added}
        named |= {p.id_to_piece(int(i)) for i in (self.bos, self.eos, *self.stops) if 0 <= int(i) < self._size}
        return _any_of(named)

    @functools.cached_property
    def _added_names(self) -> re.Pattern[str]:
        return _any_of(self.added)

    def token(self, index: int) -> str:
        """The token's own text; of a row of the embedding that no token has, none."""
        known = int(index) < self._size
        return self._added.get(int(index)) or (self._processor.id_to_piece(int(index)) if known else "")

    def pieces(self) -> tuple[list[bytes], list[int]]:
        """(the bytes each token stands for, the ids of special tokens). The byte of a blank stands for nothing: it is a
        blank that the decoder does not strip from the beginning, and that no text is encoded to."""
        p, ids = self._processor, range(self._size)
        special = [i for i in ids if p.is_control(i) or p.is_unknown(i)] + [i for i, hid in self.added.values() if hid]
        text = lambda i: p.id_to_piece(i).replace("\u2581", " ").encode()
        byte = lambda i: bytes([int(p.id_to_piece(i)[1:-1], 16)]).replace(b" ", b"")
        found = [byte(i) if p.is_byte(i) else text(i) for i in ids] + [b""] * (self.vocab - self._size)
        for i, name in self._added.items():
            found[i] = name.encode()
        return found, sorted(special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens that stand for some: special ones, and rows of the embedding that no token has, do not."""
        parts: list[list[int] | str] = [[]]
        for t in map(int, tokens):
            if t in self._added:
                parts += [] if self.added[self._added[t]][1] else [self._added[t], []]
            elif t < self._size and not self._processor.is_control(t):
                parts[-1].append(t)
        lead = self._processor.encode(_MARK)
        inside = lambda ids: self._processor.decode([*lead, *ids]).removeprefix(self._processor.decode(lead))
        text = [x if isinstance(x, str) else inside(x) if n else self._processor.decode(x) for n, x in enumerate(parts)]
        return "".join(text)

    def to_json(self) -> dict:
        return {
            "kind": "sentencepiece",
            "model": base64.b64encode(self.model).decode(),
            "special": dataclasses.asdict(self.special),
            "chat_template": self.chat_template,
            "settings": self.settings,
            **({"added": {text: [i, special] for text, (i, special) in self.added.items()}} if self.added else {}),
        }


class IdTokenizer(NamedByValue):
    """For a model whose folder has no tokenizer: a text is its ids, separated by blanks."""

    chat_template = None

    def __init__(self, vocab: int, special: Special):
        self.vocab, self.special = vocab, special
        self.bos, self.eos, self.pad = special.bos, special.eos, special.pad
        self.has_bos, self.stops = special.has_bos, special.stops

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
            if any(not 0 <= i < self.vocab for i in ids):
                raise InputError(f"token ids must be in 0..{self.vocab - 1}, got {text[:60]!r}")
            return ids
        except ValueError:
            raise InputError(
                f"{text[:40]!r} is not a list of token ids, and this model came without a tokenizer to read text with"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(str(int(t)) for t in tokens if t not in stop_tokens(self))

    def to_json(self) -> dict:
        return {"kind": "ids", "vocab": self.vocab, "special": dataclasses.asdict(self.special)}


def tokenizer_from_json(stored: dict) -> Tokenizer:
    """The inverse of `to_json`: what a checkpoint folder carries."""
    if stored["kind"] == "byte":
        return ByteTokenizer()
    if stored["kind"] == "language":
        return LanguageTokenizer(Language(LanguageConfig(**stored["language"])))
    special = (
        Special(**{**stored["special"], "stops": tuple(stored["special"]["stops"])}) if "special" in stored else None
    )
    if stored["kind"] == "ids":
        return IdTokenizer(stored["vocab"], special)
    if stored["kind"] == "sentencepiece":
        model = base64.b64decode(stored["model"])
        more = stored["chat_template"], stored["settings"], stored.get("added")
        return SentencePieceTokenizer(model, special, *more)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored["tokenizer"]))
    return FileTokenizer(tokenizer, special, stored.get("chat_template"), stored.get("settings"))


def fingerprint(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """Whether each id begins a word: bool `[vocab]`. By the marks of its kind: a blank before the word (byte-level BPE,
    SentencePiece), no `##` (WordPiece); every word of the embedded language; of bytes, a blank, which goes with the
    word behind it. Special tokens stand alone."""
    if isinstance(tokenizer, ByteTokenizer):
        found = np.isin(np.arange(tokenizer.vocab), [9, 10, 13, 32])
        found[256:] = True
        return found
    if not isinstance(tokenizer, FileTokenizer):
        return np.ones(tokenizer.vocab, bool)
    tokens = [tokenizer.token(i) or "" for i in range(tokenizer.vocab)]
    continued = sum(t.startswith("##") for t in tokens)
    if continued:
        found = np.array([not t.startswith("##") for t in tokens])
    else:
        found = np.array([t[:1] in ("Ġ", "▁", " ", "Ċ", "\n") for t in tokens])
    found[[i for i in tokenizer.special_ids if i < len(found)]] = True
    return found
