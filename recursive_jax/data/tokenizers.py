"""Text <-> token ids: bytes with no set-up, the embedded language's words, or any `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from recursive_jax.config import LanguageConfig
from recursive_jax.data.language import BOS, EOS, PAD, Language
from recursive_jax.errors import InputError


class Tokenizer(Protocol):
    """vocab: number of ids. bos, eos, pad: ids of the special tokens; pad is never eos."""

    vocab: int
    bos: int
    eos: int
    pad: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def to_json(self) -> dict: ...


class ByteTokenizer:
    """UTF-8 bytes, then start, end and padding. Any text round-trips."""

    vocab, bos, eos, pad = 259, 256, 257, 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(int(t) for t in tokens if t < 256).decode("utf-8", errors="replace")

    def to_json(self) -> dict:
        return {"kind": "byte"}


class LanguageTokenizer:
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
                f"{error.args[0]!r} is not a word of the embedded language this model was trained on; its {self.vocab - 3} words "
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


class FileTokenizer:
    """A `tokenizer.json` of the `tokenizers` library. Missing start, end or padding tokens are added after the
    file's own ids, so that padding is never equal to the end token."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        for role, names in _KNOWN.items():
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
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)

    def to_json(self) -> dict:
        return {"kind": "file", "tokenizer": json.loads(self._tokenizer.to_str())}


def tokenizer_from_json(stored: dict) -> Tokenizer:
    """The inverse of `to_json`: what a checkpoint folder carries."""
    if stored["kind"] == "byte":
        return ByteTokenizer()
    if stored["kind"] == "language":
        return LanguageTokenizer(Language(LanguageConfig(**stored["language"])))
    return FileTokenizer(tokenizers.Tokenizer.from_str(json.dumps(stored["tokenizer"])))


def fingerprint(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(json.dumps(tokenizer.to_json(), sort_keys=True).encode()).hexdigest()[:16]
