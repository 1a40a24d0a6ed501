"""The tokenizer inside a GGUF: byte-level BPE (`gpt2`) or SentencePiece-like BPE with byte fallback (`llama`).

What an absent key means, and what is refused, is llama.cpp's (`llama_vocab::impl::load` in src/llama-vocab.cpp, 2026):
the tables here are its facts. Three departures, each said when it happens: a vocabulary without scores is refused
(llama.cpp merges from left to right then), an end token that no key names is said with its text, and a pre-tokenizer
that is not in `_PRE` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import models as bpe

from recursive_jax.data.tokenizer_files import ids_of, repaired_pad
from recursive_jax.data.tokenizers import FileTokenizer, Special, Tokenizer, library_errors
from recursive_jax.errors import InputError, problems, say


class Defaults(NamedTuple):
    """What a kind of vocabulary has where its keys are absent."""

    bos: int
    eos: int
    unknown: int | None
    add_bos: bool
    add_space_prefix: bool


DEFAULTS = {"llama": Defaults(1, 2, 0, True, True), "gpt2": Defaults(11, 11, None, False, False)}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
#: How each kind cuts a text before merging: expressions, one after the other.
_CUTS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
#: tokenizer.ggml.pre -> kind.
_PRE = {
    **dict.fromkeys(("", "default"), "default"),
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de"), "gpt2"),
    **dict.fromkeys(("a.x-4.0", "mellum", "modern-bert", "exaone4"), "gpt2"),
    "smollm": "smollm",
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"), "llama3"),
    **dict.fromkeys(("midm-2.0", "lfm2"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), "qwen2"),
}
#: Texts of tokens that end a generation whatever the keys say, and that are special whatever their type says.
ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
)
#: Texts of padding, repository and file tokens of code models, which end a generation too.
_CODE_ENDS = (
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "<|file_sep|>",
)
_CONTROL, _USER = 3, 4  # token types
_ROLES = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")


def gguf_tokenizer(fields: Mapping[str, Any], vocab: int, where: str) -> Tokenizer:
    """The tokenizer of a GGUF's fields. Raises InputError for a kind that is not supported, and for lists that do not
    fit together."""
    get = lambda name, default=None: fields.get(f"tokenizer.ggml.{name}", default)
    kind = get("model")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise InputError(f"{where}: tokenizer.ggml.model={kind!r} is not supported; known: {', '.join(DEFAULTS)}")
    _check_lists(fields, kind, where)
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(get("tokens"))]
    if len(tokens) > vocab:
        raise InputError(f"{where}: the tokenizer has {len(tokens)} tokens, the embedding has {vocab} rows")
    ids = {token: i for i, token in enumerate(tokens)}
    absent = DEFAULTS[kind]

    def role(name: str, default: int | None = None) -> int | None:
        found = next(iter(ids_of(fields, f"tokenizer.ggml.{name}_token_id", where)), None)
        if found is not None and 0 <= found < len(tokens):
            return found
        if found is not None:
            say(f"{where}: tokenizer.ggml.{name}_token_id={found} is not the id of a token: as if it were not there")
        return default if default is not None and default < len(tokens) else None

    pre = get("pre", "")
    with library_errors(f"{where}: the tokenizer's lists do not fit together"):
        if kind == "gpt2":
            inner = _byte_level(pre, ids, get("merges"), where)
        else:
            unknown, prefix = role("unknown", absent.unknown), get("add_space_prefix", absent.add_space_prefix)
            inner = _byte_fallback(tokens, ids, get("scores"), unknown, prefix)
    types = get("token_type") or [1] * len(tokens)
    ends = [ids[t] for t in (*ENDS, *_CODE_ENDS) if t in ids]
    if "<|return|>" in ids and "<|call|>" in ids and "<|end|>" in ids:
        ends.remove(ids["<|end|>"])  # of these vocabularies it ends a message, not the turn
    special = [t for i, (t, k) in enumerate(zip(tokens, types, strict=False)) if k == _CONTROL or i in ends]
    inner.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    own = [t for i, (t, k) in enumerate(zip(tokens, types, strict=False)) if k == _USER and i not in ends]
    inner.add_tokens([AddedToken(t, normalized=False) for t in own])
    eos = role("eos", absent.eos)
    if eos is None:
        raise InputError(f"{where}: no tokenizer.ggml.eos_token_id, and the usual one, {absent.eos}, is not a token")
    if get("eos_token_id") is None:
        say(f"{where}: no tokenizer.ggml.eos_token_id: {eos} ({tokens[eos]!r}) ends a row, as in llama.cpp")
    bos = role("bos", absent.bos)
    stops = dict.fromkeys([eos, *(i for i in map(role, _ROLES) if i is not None), *ends])
    pad = repaired_pad(role("padding"), tuple(stops), ids.get)
    add_bos = get("add_bos_token", absent.add_bos or _PRE.get(pre) == "llama3") and bos is not None
    roles = Special(eos if bos is None else bos, eos, pad, tuple(stops), bool(add_bos))
    template = fields.get("tokenizer.chat_template")
    return FileTokenizer(inner, roles, template if isinstance(template, str) else None)


def _byte_level(pre: str, ids: Mapping[str, int], merges: Sequence[str], where: str) -> tokenizers.Tokenizer:
    kind = _PRE.get(pre) if isinstance(pre, str) else None
    if kind is None:
        known = ", ".join(filter(None, _PRE))
        raise InputError(f"{where}: tokenizer.ggml.pre={pre!r} is not supported; known: {known}")
    if not pre:
        say(f"{where}: no tokenizer.ggml.pre: texts are cut as llama.cpp does then, which may not be as in training")
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    inner = tokenizers.Tokenizer(bpe.BPE(dict(ids), pairs, ignore_merges=kind == "llama3"))
    inner.normalizer = normalizers.NFC() if kind == "qwen2" else None
    inner.pre_tokenizer, inner.decoder = _cutting(kind), decoders.ByteLevel()
    return inner


def _cutting(kind: str) -> pre_tokenizers.PreTokenizer:
    plain: Callable[[], Any] = lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "gpt2":
        return plain()
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain()])
    splits = [pre_tokenizers.Split(tokenizers.Regex(cut), behavior="isolated") for cut in _CUTS[kind]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_fallback(
    tokens: Sequence[str], ids: Mapping[str, int], scores: Sequence[float], unknown: int | None, prefix: bool
) -> tokenizers.Tokenizer:
    name = None if unknown is None else tokens[unknown]
    model = bpe.BPE(dict(ids), _merges(tokens, scores, ids), unk_token=name, fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    space = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _check_lists(fields: Mapping[str, Any], kind: str, where: str) -> None:
    """The lists of the tokenizer: there, of the right kind, long enough, and without a token that stands twice."""
    get = lambda name: fields.get(f"tokenizer.ggml.{name}")
    tokens = get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise InputError(f"{where}: tokenizer.ggml.tokens is missing, or no list of texts")
    lines = []
    named: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if token and named.setdefault(token, i) != i:
            lines.append(f"the token {token!r} stands twice, as {named[token]} and {i}")
    numbers = {"scores": (int, float), "token_type": int}
    for name, kinds in numbers.items():
        found = get(name)
        if found is not None and not (
            isinstance(found, list) and len(found) >= len(tokens) and all(isinstance(x, kinds) for x in found)
        ):
            lines.append(f"{name} is a list of {len(tokens):,} numbers, one for each token")
    merges = get("merges")
    if kind == "gpt2" and merges is None:
        lines.append("merges is missing: without them every text would be single bytes (llama.cpp refuses it too)")
    if kind == "llama" and get("scores") is None:
        lines.append("scores is missing: they say in which order pieces are merged")
    if merges is not None and not (
        isinstance(merges, list) and all(isinstance(m, str) and len(m.split(" ", 1)) == 2 for m in merges)
    ):
        lines.append("merges are texts, two parts with a blank between")
    if lines:
        raise problems(f"{where}: tokenizer.ggml:", lines[:10])


def _merges(tokens: Sequence[str], scores: Sequence[float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE: every split of a piece into two pieces, best piece first."""
    found = []
    for token, score in zip(tokens, scores, strict=False):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        found += [(score, pair) for pair in sorted(splits, key=lambda p: (ids[p[0]], ids[p[1]]))]
    return [pair for _, pair in sorted(found, key=lambda item: -item[0])]
