"""Sampling rules as pure functions on logits. Every setting is data, one value per row of the batch, so that a new
temperature never compiles again; which rules take part at all is static, so that a rule nobody asked for costs nothing.

Shapes: B rows, V vocabulary, W bad words, L tokens of the longest bad word.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from recursive_jax.config import SamplingConfig

NEVER = -1e30


@struct.dataclass
class Rules:
    """The settings of B rows. temperature 0: greedy; top_k 0, top_p 1, min_p 0, typical_p 1, repetition 1, presence 0,
    frequency 0: off. min_tokens: rows may not end before. bad_words_BWL: right-aligned ids, -1 before a shorter word
    and in a row without one.

    uses: the rules that take part (`truncate`, `min_p`, `typical`, `penalties`, `bad_words`, `min_tokens`); static.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    min_tokens: jax.Array
    bad_words_BWL: jax.Array
    uses: frozenset[str] = struct.field(pytree_node=False, default=frozenset())

    @classmethod
    def of(cls, settings: Sequence[SamplingConfig], bad_words: Sequence[Sequence[Sequence[int]]] = ()) -> Rules:
        """One row for each setting; bad_words: for each row its words as token ids. NumPy arrays."""
        column = lambda name, dtype: np.array([getattr(c, name) for c in settings], dtype)
        words = [list(w) for w in bad_words] or [[] for _ in settings]
        # A power of two, so that requests with other words rarely compile again.
        W = _power(max([0, *map(len, words)]))
        L = _power(max([0, *(len(word) for row in words for word in row)]))
        table = np.full((len(settings), W, L), -1, np.int32)
        for row, of_row in enumerate(words):
            for i, word in enumerate(of_row):
                table[row, i, L - len(word) :] = word
        return cls(
            column("temperature", np.float32),
            column("top_k", np.int32),
            column("top_p", np.float32),
            column("min_p", np.float32),
            column("typical_p", np.float32),
            column("repetition_penalty", np.float32),
            column("presence_penalty", np.float32),
            column("frequency_penalty", np.float32),
            column("min_tokens", np.int32),
            table,
            uses=used_rules(settings),
        )


def used_rules(settings: Sequence[SamplingConfig]) -> frozenset[str]:
    """The rules that at least one of the settings turns on."""
    on = {
        "truncate": lambda c: c.top_k > 0 or c.top_p < 1.0,
        "min_p": lambda c: c.min_p > 0,
        "typical": lambda c: c.typical_p < 1.0,
        "penalties": lambda c: c.repetition_penalty != 1.0 or c.presence_penalty != 0.0 or c.frequency_penalty != 0.0,
        "bad_words": lambda c: bool(c.bad_words),
        "min_tokens": lambda c: c.min_tokens > 0,
    }
    return frozenset(name for name, test in on.items() if any(test(c) for c in settings))


def _power(n: int) -> int:
    return 0 if n == 0 else 1 << (n - 1).bit_length()


@struct.dataclass
class History:
    """What penalties and bad words look back on. prompt_BV: whether the prompt holds the token; count_BV: how often the
    row does; last_BL: the last L - 1 tokens of prompt and row, -1 where there are fewer. Empty where no rule needs
    it."""

    prompt_BV: jax.Array
    count_BV: jax.Array
    last_BL: jax.Array

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], vocab: int, uses: frozenset[str], longest: int) -> History:
        """After the prompts alone. longest: L of the bad words. NumPy arrays."""
        V = vocab if "penalties" in uses else 0
        keep = max(0, longest - 1) if "bad_words" in uses else 0
        prompt_BV = np.zeros((len(prompts), V), bool)
        last_BL = np.full((len(prompts), keep), -1, np.int32)
        for row, prompt in enumerate(prompts):
            if V:
                prompt_BV[row, prompt] = True
            if keep and len(prompt):
                tail = prompt[-keep:]
                last_BL[row, keep - len(tail) :] = tail
        return cls(prompt_BV, np.zeros((len(prompts), V), np.int32), last_BL)

    def after(self, token_B: jax.Array, live_B: jax.Array) -> History:
        """With one more token in every live row."""
        count_BV, last_BL = self.count_BV, self.last_BL
        if count_BV.shape[1]:
            count_BV = count_BV + ((jnp.arange(count_BV.shape[1])[None] == token_B[:, None]) & live_B[:, None])
        if last_BL.shape[1]:
            shifted_BL = jnp.concatenate([last_BL[:, 1:], token_B[:, None]], axis=1)
            last_BL = jnp.where(live_B[:, None], shifted_BL, last_BL)
        return self.replace(count_BV=count_BV, last_BL=last_BL)


def allowed(
    logits_BV: jax.Array, rules: Rules, history: History, length_B: jax.Array, stops_BK: jax.Array, banned_N: jax.Array
) -> jax.Array:
    """Logits after the rules that look back on the row: penalties, bad words, minimum length, tokens never written.

    length_B: tokens the row holds already. stops_BK: ids that end each row (-1: none). banned_N: ids never produced.
    """
    V = logits_BV.shape[-1]
    if "penalties" in rules.uses:
        logits_BV = penalise(logits_BV, rules, history)
    if "bad_words" in rules.uses:
        logits_BV = jnp.where(_completes_bad_word(rules.bad_words_BWL, history.last_BL, V), NEVER, logits_BV)
    if "min_tokens" in rules.uses:
        early_B1 = (length_B < rules.min_tokens)[:, None]
        logits_BV = jnp.where(early_B1 & _among(stops_BK, V), NEVER, logits_BV)
    return jnp.where(_among(banned_N[None], V), NEVER, logits_BV)


def penalise(logits_BV: jax.Array, rules: Rules, history: History) -> jax.Array:
    """Repetition penalty (arXiv:1909.05858, sec. 4.1): the logits of tokens in prompt or row are divided by it where
    positive, multiplied where negative. Presence and frequency penalties: subtracted for tokens of the row alone."""
    held_BV = history.count_BV > 0
    factor_B1 = rules.repetition[:, None]
    punished_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
    logits_BV = jnp.where(held_BV | history.prompt_BV, punished_BV, logits_BV)
    taken_BV = rules.presence[:, None] * held_BV + rules.frequency[:, None] * history.count_BV
    return logits_BV - taken_BV


def _completes_bad_word(words_BWL: jax.Array, last_BL: jax.Array, V: int) -> jax.Array:
    """Tokens `[B, V]` that would complete a bad word, given the tokens before."""
    before_BWl = words_BWL[:, :, :-1]
    match_BW = jnp.all((before_BWl < 0) | (before_BWl == last_BL[:, None]), axis=-1)
    return _among(jnp.where(match_BW, words_BWL[:, :, -1], -1), V)


def _among(ids_BN: jax.Array, V: int) -> jax.Array:
    """Which of the vocabulary are among the ids of each row, `[B, V]`."""
    return jnp.any(jnp.arange(V)[None, :, None] == ids_BN[:, None], axis=2)


def apply_rules(logits_BV: jax.Array, rules: Rules) -> jax.Array:
    """Logits of the distribution to sample from: divided by the temperature, then everything that top-k, top-p
    (arXiv:1904.09751), min-p (arXiv:2407.01082) or locally typical sampling (arXiv:2202.00666) excludes set to NEVER;
    each acts on what the one before left. The most likely token always stays; tokens tied with the last kept stay too.
    """
    greedy_B1 = (rules.temperature <= 0)[:, None]
    z = logits_BV / jnp.where(greedy_B1, 1.0, rules.temperature[:, None])
    if "truncate" in rules.uses:
        z = _truncate(z, rules)
    top_B1 = jnp.max(z, axis=-1, keepdims=True)
    if "min_p" in rules.uses:
        floor = jnp.where(rules.min_p > 0, jnp.log(jnp.maximum(rules.min_p, 1e-30)), -jnp.inf)[:, None]
        z = jnp.where(z >= top_B1 + floor, z, NEVER)
    if "typical" in rules.uses:
        z = _typical(z, rules)
    return jnp.where(greedy_B1, jnp.where(logits_BV >= jnp.max(logits_BV, -1, keepdims=True), 0.0, NEVER), z)


def _truncate(z: jax.Array, rules: Rules) -> jax.Array:
    V = z.shape[-1]
    k_B = jnp.where(rules.top_k > 0, jnp.minimum(rules.top_k, V), V).astype(jnp.float32)
    z = jnp.where(z >= threshold(z, jnp.ones_like(z), k_B)[:, None], z, NEVER)
    nucleus_B1 = threshold(z, jax.nn.softmax(z, axis=-1), rules.top_p)[:, None]
    return jnp.where((z >= nucleus_B1) | (rules.top_p >= 1.0)[:, None], z, NEVER)


def _typical(z: jax.Array, rules: Rules) -> jax.Array:
    """Keeps the tokens whose surprise is nearest to the entropy, until they hold typical_p."""
    logp_BV = jax.nn.log_softmax(z, axis=-1)
    p_BV = jnp.exp(logp_BV)
    entropy_B1 = -jnp.sum(jnp.where(p_BV > 0, p_BV * logp_BV, 0.0), axis=-1, keepdims=True)
    near_BV = jnp.where(p_BV > 0, -jnp.abs(-logp_BV - entropy_B1), -jnp.inf)
    kept_BV = near_BV >= threshold(near_BV, p_BV, rules.typical_p)[:, None]
    return jnp.where(kept_BV | (rules.typical_p >= 1.0)[:, None], z, NEVER)


def threshold(value_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """The largest of the values such that those at or above it weigh at least target_B; the least where all weigh less.

    Bisection over the bits of float32, at most 32 passes: XLA's sort takes twenty times as long on a CPU.
    """
    sign = np.int32(2**31 - 1)
    ordered = lambda bits: bits ^ ((bits >> 31) & sign)  # integers in the order of the floats; its own inverse
    key_BV = ordered(jax.lax.bitcast_convert_type(value_BV.astype(jnp.float32), jnp.int32))

    def halve(bounds):
        low_B, high_B = bounds
        middle_B = (low_B >> 1) + (high_B >> 1) + ((low_B | high_B) & 1)  # the upper middle, without overflow
        enough_B = jnp.sum(jnp.where(key_BV >= middle_B[:, None], weight_BV, 0.0), axis=-1) >= target_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B - 1)

    start = (jnp.min(key_BV, axis=-1), jnp.max(key_BV, axis=-1))
    low_B, _ = jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, start)
    return jax.lax.bitcast_convert_type(ordered(low_B), jnp.float32)


def request_keys(key: jax.Array, request_B: jax.Array) -> jax.Array:
    """One key per request: a row's randomness depends on nothing but the round's key and its own id. key: one, or one
    for each."""
    return jax.vmap(jax.random.fold_in, in_axes=(0 if key.ndim else None, 0))(key, request_B)


BLOCK = 64  # vocabulary entries that `draw` sums together


def draw(keys_B: jax.Array, position_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """One token per row by inverse transform: one uniform number per request and position.

    Gumbel noise would need a number per vocabulary entry. The cumulative sum runs over blocks first, then inside the
    one block that holds the number: one pass over the vocabulary."""
    u_B = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t)))(keys_B, position_B)
    B, V = logits_BV.shape
    z_BNW = jnp.pad(logits_BV, ((0, 0), (0, -V % BLOCK)), constant_values=NEVER).reshape(B, -1, BLOCK)
    top_B = jnp.max(z_BNW, axis=(1, 2))
    mass_BN = jnp.sum(jnp.exp(z_BNW - top_B[:, None, None]), axis=-1)
    until_BN = jnp.cumsum(mass_BN, axis=-1)
    goal_B = u_B * until_BN[:, -1]
    block_B, before_B = _first_beyond(until_BN, mass_BN, goal_B)
    p_BW = jnp.exp(jnp.take_along_axis(z_BNW, block_B[:, None, None], axis=1)[:, 0] - top_B[:, None])
    within_B, _ = _first_beyond(jnp.cumsum(p_BW, axis=-1), p_BW, goal_B - before_B)
    return (block_B * BLOCK + within_B).astype(jnp.int32)


def _first_beyond(until_BN: jax.Array, mass_BN: jax.Array, goal_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the first entry with mass whose cumulative sum exceeds the goal, the sum before it). Rounding can neither pick
    an entry without mass nor run off the end: then it is the last with mass."""
    beyond_BN = (until_BN > goal_B[:, None]) & (mass_BN > 0)
    last_B = mass_BN.shape[-1] - 1 - jnp.argmax(mass_BN[:, ::-1] > 0, axis=-1)
    at_B = jnp.where(jnp.any(beyond_BN, axis=-1), jnp.argmax(beyond_BN, axis=-1), last_B)
    before_B = jnp.take_along_axis(until_BN - mass_BN, at_B[:, None], axis=1)[:, 0]
    return at_B, before_B
