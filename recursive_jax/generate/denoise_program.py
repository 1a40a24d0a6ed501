"""The jitted program that writes out of order: a canvas of hidden tokens, some of which come to light in every step
(MDLM, arXiv:2406.07524; LLaDA's sampler, arXiv:2502.09992, sec. 2.4; mask-predict, arXiv:1904.09324; Gibbs sampling of
a masked model, arXiv:1902.04094; block diffusion, arXiv:2503.09573; confidence thresholds, arXiv:2505.22618).

Shapes: B rows, T positions of the canvas, s positions of a block, V vocabulary, K stop ids, X words of a key."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import P

from recursive_jax.generate.sampling import NEVER, Rules, apply_rules, draw
from recursive_jax.mesh import KEYS, TRACES, local, spec
from recursive_jax.models.hidden import own_logits
from recursive_jax.models.network import Network, TransformerNetwork
from recursive_jax.models.transformer import Cache

ROWS = spec("batch")
STEPS = 1 << 16  # of a block, at most: what addresses their random numbers is told apart


def rowwise(function: Callable[..., Any], *arguments: Any, count: int = 1) -> Any:
    """`function` of each device's own rows; numbers among the arguments are the same for all. count: of the results."""
    inputs = tuple(ROWS if isinstance(x, Canvas) or jnp.ndim(x) else P() for x in arguments)
    return local(function, inputs, ROWS if count == 1 else (ROWS,) * count)(*arguments)


def taken(x_BT: jax.Array, at_Bs: jax.Array) -> jax.Array:
    """Of each row the entries `at`: `[B, s]`, or `[B, s, V]`."""
    at = at_Bs if x_BT.ndim == 2 else at_Bs[:, :, None]
    return jnp.take_along_axis(x_BT, at, axis=1)


@struct.dataclass
class Canvas:
    """tokens_BT: the prompt, then hidden ones, then padding. free_BT: which of them may be written. length_B: of
    prompt and answer; start_B: where the answer begins. first_B: where its first block does. steps_B: of each block.
    key_BX: data of each row's key. weight_B: of the guidance. least_B: an answer does not end before it has so many
    tokens. stops_BK: ids that end it (-1: none)."""

    tokens_BT: Any
    free_BT: Any
    start_B: Any
    length_B: Any
    first_B: Any
    steps_B: Any
    key_BX: Any
    weight_B: Any
    least_B: Any
    stops_BK: Any
    rules: Rules


def written_here(c: Canvas, at_Bs: jax.Array) -> jax.Array:
    """Which positions of a block may be written: bool `[B, s]`."""
    T = c.tokens_BT.shape[1]
    return taken(c.free_BT, jnp.minimum(at_Bs, T - 1)) & (at_Bs < c.length_B[:, None])


@functools.cache
def denoise_program(
    network: Network,
    dtype: str,
    size: int,
    remasking: str,
    threshold: float,
    guided: bool,
    causal_blocks: bool,
    mask: int,
) -> Callable:
    """(params, canvas, blocks, steps, banned_BN) -> (tokens_BT, logprobs_BT float32): each block of `size` positions in
    at most `steps` steps, one block after the other; no more of them once every row has ended.

    A logprob is the model's own (temperature 1, no rules) of the token when it came to light last, nats. Their sum over
    an answer is the log-probability of writing it along this path; what bounds the answer's own is
    `hidden_score.bound_logprobs`."""
    apply = network.bind(dtype)
    shifted = isinstance(network, TransformerNetwork) and network.causal

    def whole_row(params, tokens_BT, length_B, block_BT):
        """Logits of the tokens that stand at each position."""
        segments_BT = (jnp.arange(tokens_BT.shape[1])[None] < length_B[:, None]).astype(jnp.int32)
        seen = {}
        if causal_blocks:
            seen["visible_BTS"] = block_BT[:, :, None] >= block_BT[:, None, :]
        return own_logits(apply, shifted, params, tokens_BT, segments_BT, **seen)

    def read_all(params, memory, tokens_BT, at_Bs, c: Canvas):
        """Logits at the block's positions, from the whole canvas."""
        logits_BTV = whole_row(params, tokens_BT, c.length_B, jnp.zeros_like(tokens_BT))
        if guided:  # the prompt hidden, its first token not
            prompt_BT = jnp.arange(tokens_BT.shape[1])[None] < c.start_B[:, None]
            prompt_BT &= jnp.arange(tokens_BT.shape[1])[None] > 0
            blind_BTV = whole_row(params, jnp.where(prompt_BT, mask, tokens_BT), c.length_B, jnp.zeros_like(tokens_BT))
            logits_BTV = blind_BTV + c.weight_B[:, None, None] * (logits_BTV - blind_BTV)
        return rowwise(taken, logits_BTV, at_Bs)

    def read_block(params, memory, tokens_BT, at_Bs, c: Canvas):
        """Logits at the block's positions, given what is kept of the blocks before."""
        return apply(params, rowwise(taken, tokens_BT, at_Bs), cache=memory, causal=False)[0]

    def keep(params, memory, tokens_BT, at_Bs):
        """The memory with the block as it now stands."""
        grown = apply(params, rowwise(taken, tokens_BT, at_Bs), cache=memory, causal=False, hidden=True)
        return grown[1]

    def prompt_memory(params, c: Canvas):
        """What is kept of the blocks before each row's first one."""
        B, T = c.tokens_BT.shape
        slots = T + size
        block_T = jnp.arange(T) // size
        visible_BTS = jnp.broadcast_to((block_T[:, None] >= block_T[None])[None], (B, T, T))
        memory = Cache.empty(network.config, B, slots, jnp.dtype(dtype))
        memory = apply(params, c.tokens_BT, cache=memory, fresh=True, visible_BTS=visible_BTS, hidden=True)[1]
        return memory.replace(length_B=c.first_B)

    def reveal(logits_BsV, tokens_Bs, sure_Bs, at_Bs, count_B, share_B, last_B, step, c: Canvas, banned_BN):
        """The block's tokens and log-probabilities after one step. count_B: how many of it stay hidden; share_B: for
        `ancestral`, the probability that one does."""
        B, s, V = logits_BsV.shape
        column_V = jnp.arange(V)
        inside_Bs = written_here(c, at_Bs)
        logits_BsV = jnp.where(column_V == mask, NEVER, logits_BsV.astype(jnp.float32))
        banned_BV = jnp.any(column_V[None, :, None] == banned_BN[:, None], axis=2)
        allowed_BsV = jnp.where(banned_BV[:, None], NEVER, logits_BsV)
        early_Bs = at_Bs - c.start_B[:, None] < c.least_B[:, None]
        stops_BV = jnp.any(column_V[None, :, None] == c.stops_BK[:, None], axis=2)
        allowed_BsV = jnp.where(early_Bs[:, :, None] & stops_BV[:, None], NEVER, allowed_BsV)
        each = lambda x: jnp.repeat(x, s, axis=0)
        rules = jax.tree.map(each, c.rules)
        key_BX = jax.vmap(jax.random.fold_in, in_axes=(0, None))(jax.random.wrap_key_data(c.key_BX, impl=KEYS), step)
        z = apply_rules(allowed_BsV.reshape(B * s, V), rules)
        drawn_Bs = draw(each(key_BX), at_Bs.reshape(-1), z).reshape(B, s)
        logp_BsV = jax.nn.log_softmax(logits_BsV, axis=-1)
        logp_Bs = jnp.take_along_axis(logp_BsV, drawn_Bs[..., None], axis=-1)[..., 0]
        hidden_Bs = (tokens_Bs == mask) & inside_Bs
        chance = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 2**30), (s,)))
        if remasking == "mask_predict":  # all are guessed; the least sure are hidden again, formerly shown ones too
            sure_Bs = jnp.where(hidden_Bs, logp_Bs, sure_Bs)
            filled_Bs = jnp.where(hidden_Bs, drawn_Bs, tokens_Bs)
            again_Bs = rank(jnp.where(inside_Bs, -sure_Bs, -jnp.inf)) < count_B[:, None]
            return jnp.where(again_Bs & inside_Bs, mask, filled_Bs), sure_Bs
        if remasking == "low_confidence":
            score_Bs = logp_Bs
        elif remasking == "entropy":
            score_Bs = jnp.sum(jnp.exp(logp_BsV) * logp_BsV, axis=-1)
        elif remasking == "left_to_right":
            score_Bs = -at_Bs.astype(jnp.float32)
        else:
            score_Bs = chance(key_BX)
        if threshold:
            best_Bs = rank(jnp.where(hidden_Bs, score_Bs, -jnp.inf)) == 0
            shown_Bs = best_Bs | (logp_Bs > jnp.log(threshold))
        elif remasking == "ancestral":
            shown_Bs = (chance(key_BX) >= share_B[:, None]) | last_B[:, None]
        else:
            shown = jnp.sum(hidden_Bs, axis=1) - count_B
            shown_Bs = rank(jnp.where(hidden_Bs, score_Bs, -jnp.inf)) < shown[:, None]
        shown_Bs = shown_Bs & hidden_Bs
        return jnp.where(shown_Bs, drawn_Bs, tokens_Bs), jnp.where(shown_Bs, logp_Bs, sure_Bs)

    def hide_one(tokens_Bs, at_Bs, c: Canvas, step, s):
        """For Gibbs sampling: a position of each row's block, drawn evenly, is hidden; before the first step all
        are."""
        inside_Bs = written_here(c, at_Bs)
        key_BX = jax.vmap(jax.random.fold_in, in_axes=(0, None))(jax.random.wrap_key_data(c.key_BX, impl=KEYS), step)
        draws = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 2**30 + 1), at_Bs.shape[1:]))(key_BX)
        one_Bs = rank(jnp.where(inside_Bs, draws, -jnp.inf)) == 0
        wanted_B = (s > 0) & (s <= c.steps_B)  # a row takes its own steps, whatever others of the batch take
        return jnp.where(one_Bs & inside_Bs & wanted_B[:, None], mask, tokens_Bs)

    def ended(tokens_BT, c: Canvas, at):
        """Whether each row has a stop id, or nothing more to write, before position `at` of its blocks."""
        where_T = jnp.arange(tokens_BT.shape[1])[None]
        until_B = jnp.minimum(c.first_B + at, c.length_B)
        done_BT = (where_T >= c.start_B[:, None]) & (where_T < until_B[:, None])
        stop_BT = jnp.any(tokens_BT[:, :, None] == c.stops_BK[:, None], axis=2) & done_BT
        return jnp.any(stop_BT, axis=1) | (c.first_B + at >= c.length_B)

    def put(x_BT, at_Bs, new_Bs):
        """Positions beyond the canvas are not written."""
        return x_BT.at[jnp.arange(x_BT.shape[0])[:, None], at_Bs].set(new_Bs, mode="drop")

    def run(params, canvas: Canvas, blocks, steps, banned_BN):
        TRACES["denoise"] += 1
        T = canvas.tokens_BT.shape[1]
        read = read_block if causal_blocks else read_all
        memory = prompt_memory(params, canvas) if causal_blocks else None

        def block(carry):
            n, tokens_BT, sure_BT, memory = carry
            at_Bs = canvas.first_B[:, None] + n * size + jnp.arange(size)[None]
            safe_Bs = jnp.minimum(at_Bs, T - 1)
            inside = rowwise(written_here, canvas, at_Bs)
            total_B = jnp.sum(inside, axis=1)

            def step(s, carry):
                tokens_BT, sure_BT = carry
                address = n * STEPS + s
                tokens_Bs = rowwise(taken, tokens_BT, safe_Bs)
                if remasking == "gibbs":
                    tokens_Bs = rowwise(hide_one, tokens_Bs, at_Bs, canvas, address, s)
                    tokens_BT = rowwise(put, tokens_BT, at_Bs, tokens_Bs)
                logits_BsV = read(params, memory, tokens_BT, safe_Bs, canvas)
                done_B = jnp.minimum(s + 1, canvas.steps_B)
                left_B = total_B * (canvas.steps_B - done_B) // canvas.steps_B
                left_B = jnp.zeros_like(left_B) if remasking == "gibbs" else left_B
                share_B = (canvas.steps_B - done_B) / jnp.maximum(canvas.steps_B - done_B + 1, 1)
                last_B = s + 1 >= canvas.steps_B
                sure_Bs = rowwise(taken, sure_BT, safe_Bs)
                tokens_Bs, sure_Bs = rowwise(
                    reveal, logits_BsV, tokens_Bs, sure_Bs, at_Bs, left_B, share_B, last_B, address, canvas, banned_BN,
                    count=2,
                )  # fmt: skip
                return rowwise(put, tokens_BT, at_Bs, tokens_Bs), rowwise(put, sure_BT, at_Bs, sure_Bs)

            if threshold:
                hidden = lambda tokens: jnp.any((rowwise(taken, tokens, safe_Bs) == mask) & inside)
                more = lambda carry: hidden(carry[1]) & (carry[0] < size)
                again = lambda carry: (carry[0] + 1, *step(carry[0], carry[1:]))
                _, tokens_BT, sure_BT = jax.lax.while_loop(more, again, (jnp.int32(0), tokens_BT, sure_BT))
            else:
                tokens_BT, sure_BT = jax.lax.fori_loop(0, steps, step, (tokens_BT, sure_BT))
            if causal_blocks:
                memory = keep(params, memory, tokens_BT, safe_Bs)
            return n + 1, tokens_BT, sure_BT, memory

        go_on = lambda carry: (carry[0] < blocks) & ~jnp.all(rowwise(ended, carry[1], canvas, carry[0] * size))
        sure_BT = jnp.zeros_like(canvas.tokens_BT, jnp.float32)
        _, tokens_BT, sure_BT, _ = jax.lax.while_loop(go_on, block, (jnp.int32(0), canvas.tokens_BT, sure_BT, memory))
        return tokens_BT, sure_BT

    return jax.jit(run)


def rank(score_Bs: jax.Array) -> jax.Array:
    """The place of each entry of a row by score, the largest first, the first of equals first: int32 `[B, s]`."""
    order_Bs = jnp.argsort(-score_Bs, axis=1, stable=True)
    return jnp.argsort(order_Bs, axis=1, stable=True).astype(jnp.int32)
