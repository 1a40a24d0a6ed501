"""Jitted prefill and decode: one dispatch for a whole batch of rows.

Prompts are left-padded to one width, so that all rows write the same cache slot. A row's randomness is
`fold_in(fold_in(round key, request), position)`, whatever else is in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from recursive_jax.generate.sampling import Rules, apply_rules, draw, request_keys
from recursive_jax.mesh import TRACES, spec
from recursive_jax.models.model import Architecture
from recursive_jax.models.transformer import Transformer


@functools.cache
def decode_program(architecture: Architecture, prompt: int, new: int, dtype: str) -> Callable:
    """(params, prompts_BP, first_B, request_B, limit_B, rules, key, stops, banned) -> (tokens_BN, logprobs_BN, length_B).

    first_B: index of the first real token of each left-padded prompt. limit_B: at most this many new tokens.
    logprobs are the model's own (temperature 1, no truncation), nats. Past a row's end tokens are 0.
    stops: ids that end a row. banned: ids that are never produced (start and padding tokens).
    """
    stepper = (
        _cached_stepper(architecture, prompt, new, dtype) if architecture.config else _plain_stepper(architecture, new)
    )

    def generate(params, prompts_BP, first_B, request_B, limit_B, rules: Rules, key, stops, banned):
        TRACES["generate"] += 1
        B = prompts_BP.shape[0]
        rows = spec("batch")
        keys_B = request_keys(key, request_B)
        logits_BV, memory = stepper.prefill(params, prompts_BP, first_B)

        def pick(logits_BV, n):
            logits_BV = jax.reshard(logits_BV, spec("batch", None))
            allowed_BV = _ban(logits_BV, banned)
            token_B = draw(keys_B, prompt - first_B + n, apply_rules(allowed_BV, rules))
            hit_BV = jnp.arange(logits_BV.shape[-1])[None] == token_B[:, None]
            logprob_B = jnp.sum(jnp.where(hit_BV, logits_BV, 0.0), -1) - jax.nn.logsumexp(logits_BV, axis=-1)
            return token_B, logprob_B

        def body(carry):
            n, memory, logits_BV, out_BN, logprob_BN, length_B, done_B = carry
            token_B, logprob_B = pick(logits_BV, n)
            live_B = ~done_B
            out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, jnp.where(live_B, token_B, 0)[:, None], n, 1)
            logprob_BN = jax.lax.dynamic_update_slice_in_dim(
                logprob_BN, jnp.where(live_B, logprob_B, 0.0)[:, None], n, 1
            )
            length_B = length_B + live_B
            done_B = done_B | jnp.any(token_B[:, None] == stops[None], axis=-1) | (length_B >= limit_B)
            logits_BV, memory = stepper.step(params, token_B, memory, n)
            return n + 1, memory, logits_BV, out_BN, logprob_BN, length_B, done_B

        init = (
            jnp.int32(0),
            memory,
            logits_BV,
            jnp.zeros((B, new), jnp.int32, out_sharding=spec("batch", None)),
            jnp.zeros((B, new), jnp.float32, out_sharding=spec("batch", None)),
            jnp.zeros((B,), jnp.int32, out_sharding=rows),
            limit_B <= 0,
        )
        carry = init
        for stop in stages(new):  # the cache grows in a few steps: attention reads what is there, not what will be
            carry = (carry[0], stepper.grow(carry[1], prompt + stop), *carry[2:])
            carry = jax.lax.while_loop(lambda c, stop=stop: (c[0] < stop) & ~jnp.all(c[6]), body, carry)
        return carry[3], carry[4], carry[5]

    return jax.jit(generate)


def stages(new: int, least: int = 64, most: int = 4) -> list[int]:
    """New tokens after which the cache grows: at most four stages (each is compiled), none shorter than 64 tokens."""
    width = max(least, -(-new // most))
    return [*range(width, new, width), new]


def _ban(logits_BV: jax.Array, banned: jax.Array) -> jax.Array:
    hit_BV = jnp.any(jnp.arange(logits_BV.shape[-1])[None, :, None] == banned[None, None, :], axis=-1)
    return jnp.where(hit_BV, -1e30, logits_BV)


class _cached_stepper:
    """The built-in Transformer with its KV cache."""

    def __init__(self, architecture: Architecture, prompt: int, new: int, dtype: str):
        self.module, self.slots = Transformer(architecture.config, jnp.dtype(dtype)), prompt + stages(new)[0]

    def prefill(self, params, prompts_BP, first_B):
        logits, cache = self.module.apply(
            {"params": params}, prompts_BP, first_B=first_B, keep_cache=self.slots, last_only=True
        )
        return logits[:, -1], cache

    def grow(self, cache, slots):
        return cache.grown(slots)

    def step(self, params, token_B, cache, n):
        logits, cache = self.module.apply({"params": params}, token_B[:, None], cache=cache)
        return logits[:, 0], cache


class _plain_stepper:
    """A user's `apply`: the prefix so far is run again for each token. The batch is kept right-padded for it."""

    def __init__(self, architecture: Architecture, new: int):
        self.apply, self.new = architecture.apply, new

    def grow(self, memory, slots):
        return memory

    def _logits(self, params, buffer_BT, length_B):
        segments = (jnp.arange(buffer_BT.shape[1])[None] < length_B[:, None]).astype(jnp.int32)
        logits_BTV = self.apply(params, buffer_BT, segments).astype(jnp.float32)
        at_B1V = jnp.take_along_axis(logits_BTV, (length_B - 1)[:, None, None], axis=1)
        return at_B1V[:, 0]

    def prefill(self, params, prompts_BP, first_B):
        P = prompts_BP.shape[1]
        buffer_BT = jnp.pad(prompts_BP, ((0, 0), (0, self.new)))
        index = (jnp.arange(P + self.new)[None] + first_B[:, None]) % (P + self.new)  # left-pad -> right-pad
        buffer_BT = jnp.take_along_axis(buffer_BT, index, axis=1)
        length_B = P - first_B
        return self._logits(params, buffer_BT, length_B), (buffer_BT, length_B)

    def step(self, params, token_B, memory, n):
        buffer_BT, length_B = memory
        here = jnp.arange(buffer_BT.shape[1])[None] == length_B[:, None]
        buffer_BT = jnp.where(here, token_B[:, None], buffer_BT)
        return self._logits(params, buffer_BT, length_B + 1), (buffer_BT, length_B + 1)
