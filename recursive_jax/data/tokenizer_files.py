"""Tokenizers of other tools' models: from a Hugging Face folder or the fields of a GGUF, and written for export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers import models as bpe

from recursive_jax.data.language import BOS, EOS, PAD
from recursive_jax.data.tokenizers import (
    ByteTokenizer,
    FileTokenizer,
    IdTokenizer,
    LanguageTokenizer,
    SentencePieceTokenizer,
    Special,
    Tokenizer,
    library_errors,
    stop_tokens,
)
from recursive_jax.errors import InputError, say
from recursive_jax.storage import plain_json

_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = plain_json(path, "the file")
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: a mapping is wanted")
    return found


def _text(token: Any) -> str | None:
    """A token in tokenizer_config.json is a string or a mapping; what is neither is none."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and _encodes(text) else None


def _encodes(text: str) -> bool:
    """Whether a text is Unicode, without halves of surrogate pairs."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def ids_of(values: Mapping[str, Any], key: str, where: str) -> list[int]:
    """The token ids under a key: none, one, or a list of them."""
    value = values.get(key)
    found = [] if value is None else list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    found = [int(v) if isinstance(v, np.integer) else v for v in found]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in found):
        raise InputError(f"{where}: {key}={str(value)[:100]!r}: a token id, or a list of them, is wanted")
    return found


def repaired_pad(pad: int | None, stops: Sequence[int], find: Any) -> int | None:
    """A padding id that is not an end token: where the files say it is, another one is taken, with a message."""
    if pad is None or pad not in stops:
        return pad
    for name in _PAD_NAMES:
        found = find(name)
        if found is not None and found not in stops:
            say(f"the padding token is an end token in this tokenizer's files; {name} pads instead")
            return found
    say("the padding token is an end token in this tokenizer's files; masks hide padding here, so none is used")
    return None


def read_tokenizer(folder: Path, vocab: int, writes: bool = True) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, else vocab.json + merges.txt, vocab.txt, or
    tokenizer.model; token ids as text where there is none. writes: whether the model can write, and so needs an end
    token. Raises InputError when it has more ids than the embedding's `vocab`, when a start or end token that the files
    name is not in it, and when they name no end token."""
    settings = _json(folder / "tokenizer_config.json")
    named = {**_json(folder / "special_tokens_map.json"), **settings}
    config, generation = _json(folder / "config.json"), _json(folder / "generation_config.json")
    ids = lambda values, key: ids_of(values, key, str(folder))
    template = _template(settings, folder)
    inner = _library_tokenizer(folder)
    if inner is not None:
        inner.no_padding()
        inner.no_truncation()
        _add_tokens(inner, settings, folder)
    processor = None
    if inner is None and (folder / "tokenizer.model").exists():
        processor = (folder / "tokenizer.model").read_bytes()
        probe = SentencePieceTokenizer(processor, Special(0, 0, None, ()))._processor
        piece = lambda name: i if probe.id_to_piece(i := probe.piece_to_id(name)) == name else None
        added = _beside(piece, probe.get_piece_size(), settings, folder)
        find = lambda name: added[name][0] if name in added else piece(name)
    else:
        find = inner.token_to_id if inner is not None else lambda name: None

    def role(*names: str) -> int | None:
        for name in names:
            token = _text(named.get(f"{name}_token"))
            if token is not None and find(token) is not None:
                return find(token)
            if token is not None and name in ("bos", "eos") and (inner is not None or processor is not None):
                raise InputError(f"{folder}: {name}_token is {token!r}, which is not a token of its tokenizer")
        return next(iter([*ids(generation, f"{names[0]}_token_id"), *ids(config, f"{names[0]}_token_id")]), None)

    ends = [role("eos", "sep"), *ids(generation, "eos_token_id"), *ids(config, "eos_token_id")]
    stops = tuple(dict.fromkeys(e for e in ends if e is not None and 0 <= e < vocab))
    if writes and not stops:
        beyond = f"; {ends[-1]} is beyond the embedding's {vocab} rows" if [e for e in ends if e is not None] else ""
        raise InputError(
            f"{folder}: no end token: neither eos_token in tokenizer_config.json or special_tokens_map.json, nor "
            f"eos_token_id in generation_config.json or config.json names one{beyond}"
        )
    eos = stops[0] if stops else 0
    bos = role("bos", "cls")
    bos = eos if bos is None or not 0 <= bos < vocab else bos
    pad = role("pad")
    pad = repaired_pad(None if pad is None or not 0 <= pad < vocab else pad, stops, find)
    with library_errors(f"the tokenizer files in {folder} are damaged"):
        framed = inner.encode("a", add_special_tokens=True).ids[:1] == [bos] if inner is not None else False
    special = Special(bos, eos, pad, stops, bool(settings.get("add_bos_token", framed or processor is not None)))
    if inner is not None:
        found: Tokenizer = FileTokenizer(inner, special, template, settings)
    elif processor is not None:
        found = SentencePieceTokenizer(processor, special, template, settings, added)
    else:
        say(f"{folder} has no tokenizer: texts are token ids")
        return IdTokenizer(vocab, special)
    own = found._size if inner is None else max(inner.get_vocab(with_added_tokens=False).values()) + 1
    if own <= vocab < found.vocab:  # Gemma 3's text models: an image token beyond the embedding
        say(f"{found.vocab - vocab} added token(s) of the tokenizer have no row in the embedding; they cannot be used")
        found.vocab = vocab
    if found.vocab > vocab:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {found.vocab - 1}, the embedding has {vocab} rows (vocab_size); "
            "they do not belong together"
        )
    return found


def _template(settings: Mapping[str, Any], folder: Path) -> str | None:
    """The chat template: a file of its own, else that of the settings, of several the one called default."""
    own = folder / "chat_template.jinja"
    if own.exists():
        try:
            return own.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise InputError(f"{own} is damaged: {error}") from None
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is a text, or a list of named ones")
    return found


def _added_tokens(settings: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    """Tokens of the companion files: added_tokens.json, and added_tokens_decoder of the settings."""
    wanted: dict[int, AddedToken] = {}
    for text, index in _json(folder / "added_tokens.json").items():
        wanted[_index(index, folder)] = AddedToken(text, normalized=False, special=False)
    decoder = settings.get("added_tokens_decoder")
    for index, token in (decoder if isinstance(decoder, Mapping) else {}).items():
        text = _text(token)
        if text is None:
            raise InputError(f"{folder}: added_tokens_decoder[{index!r}] of tokenizer_config.json has no `content`")
        flags = {k: bool(token.get(k, False)) for k in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        wanted[_index(index, folder)] = AddedToken(text, **flags)
    return wanted


def _add_tokens(inner: tokenizers.Tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    """Those that only the companion files have. Raises InputError where they name another id for one than the tokenizer
    has."""
    for index, token in sorted(_added_tokens(settings, folder).items()):
        if inner.token_to_id(token.content) is None:
            (inner.add_special_tokens if token.special else inner.add_tokens)([token])
        if inner.token_to_id(token.content) != index:
            raise InputError(
                f"{folder}: the added token {token.content!r} has the id {index} in its companion files and "
                f"{inner.token_to_id(token.content)} in the tokenizer"
            )


def _beside(
    find: Callable[[str], int | None], size: int, settings: Mapping[str, Any], folder: Path
) -> dict[str, tuple[int, bool]]:
    """The tokens beside a tokenizer.model: text -> (id, special). Those that are pieces of it are not added. Raises
    InputError where an id is another piece's."""
    found = {}
    for index, token in _added_tokens(settings, folder).items():
        own = find(token.content)
        if own not in (None, index) or (own is None and index < size):
            has = f"{own} in the tokenizer" if own is not None else f"which is another piece of its {size}"
            raise InputError(
                f"{folder}: the added token {token.content!r} has the id {index} in its companion files, {has}"
            )
        if own is None:
            found[token.content] = (index, token.special)
    return found


def _index(value: Any, folder: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"{folder}: the id {str(value)[:40]!r} of an added token is not a number") from None


def _library_tokenizer(folder: Path) -> tokenizers.Tokenizer | None:
    with library_errors(f"the tokenizer files in {folder} are damaged"):
        if (folder / "tokenizer.json").exists():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            files = str(folder / "vocab.json"), str(folder / "merges.txt")
            return _with_specials(
                tokenizers.Tokenizer.from_str(tokenizers.ByteLevelBPETokenizer(*files).to_str()), folder
            )
        if (folder / "vocab.txt").exists():
            lower = bool(_json(folder / "tokenizer_config.json").get("do_lower_case", True))
            pieces = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lower)
            return tokenizers.Tokenizer.from_str(pieces.to_str())
    return None


def _with_specials(inner: tokenizers.Tokenizer, folder: Path) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt do not say which tokens are special; the files beside them do."""
    settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    named = [_text(v) for k, v in settings.items() if k.endswith("_token") and isinstance(v, str | Mapping)]
    usual = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>"]
    special = [t for t in dict.fromkeys([*named, *usual]) if t and inner.token_to_id(t) is not None]
    inner.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    if _json(folder / "config.json").get("model_type") == "roberta":
        ids = {t: inner.token_to_id(t) for t in ("<s>", "</s>")}
        inner.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    return inner


# ---- export


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in plain}
    for i, b in enumerate(b for b in range(256) if b not in names):
        names[b] = chr(256 + i)
    return [names[b] for b in range(256)]


def library_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Any of our tokenizers as one of the `tokenizers` library, with equal ids."""
    if isinstance(tokenizer, FileTokenizer):
        return tokenizer._tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        inner = tokenizers.Tokenizer(bpe.BPE({c: i for i, c in enumerate(_byte_characters())}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
        return inner
    if isinstance(tokenizer, LanguageTokenizer):
        words = list(tokenizer.language.words)
        inner = tokenizers.Tokenizer(bpe.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[PAD]))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens([words[i] for i in (BOS, EOS, PAD)])
        return inner
    raise InputError(f"a {type(tokenizer).__name__} cannot be written as tokenizer.json")


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special ids as `config.json` and `generation_config.json` name them."""
    stops = list(stop_tokens(tokenizer))
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "pad_token_id": tokenizer.pad,
    }


MASK = "<|mask|>"


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int, mask: int | None = None) -> None:
    """tokenizer.json (or tokenizer.model), tokenizer_config.json, chat_template.jinja and generation_config.json. mask:
    the id that hides a token; the first one beyond the tokenizer's is written as `<|mask|>`."""
    write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    write("generation_config.json", token_ids(tokenizer))
    if isinstance(tokenizer, IdTokenizer):
        return
    settings = dict(getattr(tokenizer, "settings", {}))
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
        settings.setdefault("tokenizer_class", "LlamaTokenizer")
        name = tokenizer.token
    else:
        inner = tokenizers.Tokenizer.from_str(library_tokenizer(tokenizer).to_str())
        bos = inner.id_to_token(tokenizer.bos)
        if getattr(tokenizer, "has_bos", True) and inner.post_processor is None:
            inner.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos)]
            )
        if mask == tokenizer.vocab:
            inner.add_special_tokens([tokenizers.AddedToken(MASK, special=True, normalized=False)])
        inner.save(str(folder / "tokenizer.json"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        name = inner.id_to_token
    settings |= {"bos_token": name(tokenizer.bos), "eos_token": name(tokenizer.eos), "model_max_length": context}
    if mask is not None and name(mask):
        settings["mask_token"] = name(mask)
    settings.pop("pad_token", None)
    if tokenizer.pad is not None:
        settings["pad_token"] = name(tokenizer.pad)
    settings |= {"clean_up_tokenization_spaces": False, "add_bos_token": bool(getattr(tokenizer, "has_bos", True))}
    settings.pop("chat_template", None)
    template = getattr(tokenizer, "chat_template", None)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings["chat_template"] = template
    write("tokenizer_config.json", settings)
