"""Constrained decoding: every row matches a regular expression, a JSON schema or a context-free grammar.

The parser is `llguidance` (benchmarks/constraints.py compares it with two others). It gives a bit mask over the
vocabulary for each row and step; the mask of the next step is made on the host while the device runs the forward pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.config import SamplingConfig
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer, SentencePieceTokenizer, stop_tokens
from recursive_jax.errors import InputError
from recursive_jax.generate import programs

KINDS = ("regex", "json_schema", "grammar")


class Constraint:
    """One grammar for all rows; each slot has a parser of its own, at the place its row has come to.

    Where a decoder strips the first blank of a text (`strips_first_blank`), a row that begins the text is written as
    that tokenizer writes one, with a blank that does not count: its parser wants it before what the grammar says."""

    def __init__(self, kind: str, text: str, tokenizer: Any, vocab: int):
        import llguidance

        matcher = llguidance.LLMatcher
        compile = {
            "regex": matcher.grammar_from_regex,
            "json_schema": lambda s: matcher.grammar_from_json_schema(s, overrides={"whitespace_flexible": False}),
            "grammar": matcher.grammar_from_lark,
        }[kind]
        found = parser_tokenizer(tokenizer, vocab)

        def fresh(grammar: Callable[[], str]) -> Any:
            try:
                made = matcher(found, grammar(), log_level=0)
            except ValueError as error:
                raise InputError(f"sampling.{kind} is not valid: {error}") from None
            if made.is_error():
                raise InputError(f"sampling.{kind} is not valid: {made.get_error().strip()}\n{text[:200]}")
            return made

        self._fresh = self._opening = fresh(lambda: compile(text))
        if strips_first_blank(tokenizer):
            inner = {
                "regex": lambda: "/(?:" + re.sub(r"(?<!\\)/", r"\/", text) + ")/",
                "json_schema": lambda: f"%json {_with_options(text)}",
                "grammar": lambda: f"%lark {{\n{text}\n}}",
            }[kind]
            self._opening = fresh(lambda: matcher.grammar_from_lark(f'start: " " inner\ninner: {inner()}'))
        self.words = -(-vocab // 32)
        self.parsers: dict[int, Any] = {}
        self._executor = llguidance.LLExecutor()
        self._masks = np.zeros((0, self.words), np.int32)
        self._stale: set[int] = set()
        self.failed: dict[int, str] = {}  # slot -> why its row cannot go on

    @classmethod
    def of(cls, sampling: SamplingConfig, tokenizer: Any, vocab: int) -> Constraint | None:
        """What the settings ask for, or None. Raises InputError for a grammar that is not valid, or a tokenizer whose
        tokens are no pieces of text."""
        for kind in KINDS:
            if getattr(sampling, kind) is not None:
                return cls(kind, getattr(sampling, kind), tokenizer, vocab)
        return None

    def start(self, slot: int, opens: bool = False) -> None:
        """opens: the row is the beginning of a text, without one in its prompt."""
        self.parsers[slot] = (self._opening if opens else self._fresh).deep_copy()
        self._stale.add(slot)

    def release(self, slot: int) -> None:
        self.parsers.pop(slot, None)
        self._stale.discard(slot)
        self.failed.pop(slot, None)

    def _fill(self) -> None:
        """Brings the masks of all slots whose row has moved up to date."""
        from llguidance import numpy as masks

        moved = [(self.parsers[slot], slot) for slot in sorted(self._stale) if slot in self.parsers]
        if moved:
            masks.fill_next_token_bitmask_par(self._executor, moved, self._masks)
        for parser, slot in moved:
            if parser.is_error():
                self.failed[slot] = parser.get_error()
            elif not self._masks[slot].any():
                self.failed[slot] = "no token of this tokenizer follows"
        self._stale.clear()

    def decode(self, network: Any, guide: Any, dtype: str, combine: Callable | None, where: str = "cpu") -> Callable:
        """The same contract as `programs.decode_program`, a step at a time."""
        choose, advance = programs.choose_program(combine), programs.advance_program(network, guide, dtype, where)

        def run(params, guide_params, state, keep_B, steps, banned_N):
            B, found = state.logits_BV.shape[0], []
            if len(self._masks) != B:
                self._masks = np.zeros((B, self.words), np.int32)
            for _ in range(int(steps)):
                self._fill()
                if self.failed:  # such a row ends here, the others go on
                    going = np.array([slot not in self.failed for slot in range(B)])
                    keep_B = meshes.put_batch(_mesh(keep_B), meshes.fetch(keep_B) & going)
                    self._masks[list(self.failed)] = -1
                masks_BW = meshes.put_batch(_mesh(keep_B), self._masks.copy())
                terms, token_B, logprob_B, live_B, stuck_B = choose(state, keep_B, banned_N, masks_BW)
                state = advance(params, guide_params, state, terms, token_B, live_B)  # runs while the host parses
                tokens, logprobs, live, stuck = meshes.fetch((token_B, logprob_B, live_B, stuck_B))
                found.append((tokens, logprobs, live))
                for slot in np.flatnonzero(stuck):
                    self.failed[int(slot)] = "the other rules leave no token that it allows"
                for slot in np.flatnonzero(live):
                    if self.parsers[slot].consume_token(int(tokens[slot])):
                        self._stale.add(int(slot))
                    else:
                        self.failed[int(slot)] = self.parsers[slot].get_error()
                if not live.any():
                    break
            tokens, logprobs, live = (np.stack(x, axis=1) for x in zip(*found, strict=True))
            return state, tokens, logprobs, live.sum(axis=1)

        return run


def _mesh(array: jax.Array) -> Any:
    return array.sharding.mesh


def parser_tokenizer(tokenizer: Any, vocab: int) -> Any:
    """The tokenizer as the parser needs it: the bytes of every token."""
    import llguidance

    ends = list(stop_tokens(tokenizer))
    if isinstance(tokenizer, FileTokenizer):
        return llguidance.LLTokenizer(tokenizer.backend_json(), n_vocab=vocab, eos_token=ends)
    if isinstance(tokenizer, ByteTokenizer):
        pieces, special = [bytes([i]) for i in range(256)], [tokenizer.bos, tokenizer.eos, tokenizer.pad]
        pieces += [b"<|bos|>", b"<|eos|>", b"<|pad|>"]
    elif isinstance(tokenizer, SentencePieceTokenizer):
        pieces, special = tokenizer.pieces()
    else:
        raise InputError(
            f"a constraint needs a tokenizer whose tokens are pieces of text, not {type(tokenizer).__name__}: "
            "bytes, a tokenizer.json or SentencePiece"
        )
    pieces += [b""] * (vocab - len(pieces))
    wrapped = llguidance.TokenizerWrapper(_Pieces(pieces, tokenizer, special))
    return llguidance.LLTokenizer(wrapped, n_vocab=vocab, eos_token=ends)


class _Pieces:
    """What llguidance asks of a tokenizer."""

    def __init__(self, pieces: list[bytes], tokenizer: Any, special: list[int]):
        self.tokens, self.special_token_ids = pieces, special
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        inside = getattr(tokenizer, "encode_rendered", None)
        self._encode = (lambda text: inside(text, first=False)) if inside else tokenizer.encode
        self._ids = {piece: i for i, piece in reversed(list(enumerate(pieces))) if piece and i not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens that spell the bytes, in the middle of a text: as the tokenizer writes them where it adds nothing,
        else the longest piece first."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        try:
            ids = list(self._encode(data.decode()))
        except UnicodeDecodeError:  # a part of a character
            ids = []
        return ids if b"".join(self.tokens[i] for i in ids) == data else self._spelled(data)

    def _spelled(self, data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((e for e in ends if data[at:e] in self._ids), None)
            if end is None:
                at += 1  # no piece begins with this byte
                continue
            ids.append(self._ids[data[at:end]])
            at = end
        return ids


def _with_options(schema: str) -> str:
    """A JSON schema that allows no white space between its parts, as `grammar_from_json_schema` is told."""
    found = json.loads(schema)
    found = found if isinstance(found, dict) else {"allOf": [found]}
    return json.dumps({**found, "x-guidance": {**found.get("x-guidance", {}), "whitespace_flexible": False}})


def strips_first_blank(tokenizer: Any) -> bool:
    """Whether words bring their blank along and decoding takes it from the first one (SentencePiece, Llama)."""
    try:
        word = list(tokenizer.encode("x"))
    except InputError:
        return False
    alone = tokenizer.decode(word)
    return tokenizer.decode([*word, *word]) == f"{alone} {alone}"
