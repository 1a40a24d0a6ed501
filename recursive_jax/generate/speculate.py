"""Speculative decoding (arXiv:2211.17192): a draft model guesses some tokens ahead, the model checks them in one pass.

Model and draft draw with the same random number at the same position, so a guess is right exactly when the model itself
would have written that token: rows are those of the model alone, to the token, and not only in distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from recursive_jax.generate.decoder import decoder
from recursive_jax.generate.programs import Slots, choose, whole
from recursive_jax.mesh import TRACES, local, spec
from recursive_jax.models.network import Network


@functools.cache
def speculate_program(model: Network, draft: Network, dtype: str, most: int, ahead: int) -> Callable:
    """(params, draft params, slots, keep_B, steps, banned_N) -> (slots, tokens_BC, logprobs_BC, count_B), as
    `decode_program`; `slots.guide` is the draft's memory. Each pass of the model gives a row 1 to `ahead` + 1 tokens;
    passes go on until every live row has `steps` more tokens, or is done. Columns: C = most + ahead + 1."""
    large, small = decoder(model, dtype), decoder(draft, dtype)
    C = most + ahead + 1

    def decode(params, draft_params, slots: Slots, keep_B, steps, banned_N):
        TRACES["speculate"] += 1
        B = slots.logits_BV.shape[0]
        rows = spec("batch")

        def wanted(count_B, slots):
            return keep_B & ~slots.terms.done_B & (count_B < steps)

        def body(carry):
            slots, out_BC, logprob_BC, count_B = carry
            live_B = wanted(count_B, slots)
            # The token of the last pass's logits is certain; the draft goes on from it.
            alone = slots.replace(guide=None, guide_logits_BV=None)
            token_B, one_B, terms, _ = choose(alone, live_B, banned_N)
            sure = [(token_B, one_B, live_B)]
            guesses = [token_B]
            guess_terms = terms
            memory, draft_length_B = slots.guide, slots.guide.length_B
            for _ in range(ahead):
                logits_BV, memory = small.extend(draft_params, memory, guesses[-1][:, None], live_B.astype(jnp.int32))
                guess = alone.replace(logits_BV=whole(logits_BV), terms=guess_terms)
                token_B, _, guess_terms, _ = choose(guess, live_B, banned_N)
                guesses.append(token_B)
            _, memory = small.extend(draft_params, memory, guesses[-1][:, None], live_B.astype(jnp.int32))
            tokens_BT = jnp.stack(guesses, axis=1)
            fed_B = live_B.astype(jnp.int32) * (ahead + 1)
            length_B = slots.memory.length_B
            logits_BTV, large_memory = large.extend(params, slots.memory, tokens_BT, fed_B, every=True)
            # The model's own choice after each guess; a row goes on while the guess was that choice.
            right_B = live_B & ~terms.done_B
            last_BV = whole(logits_BTV[:, 0])
            kept_B = live_B.astype(jnp.int32)
            for t in range(ahead):
                here = alone.replace(logits_BV=last_BV, terms=terms)
                token_B, one_B, after, _ = choose(here, right_B, banned_N)
                agrees_B = right_B & (token_B == guesses[t + 1])
                terms = _select(agrees_B, after, terms)
                sure.append((token_B, one_B, agrees_B))
                kept_B = kept_B + agrees_B
                last_BV = jnp.where(agrees_B[:, None], whole(logits_BTV[:, t + 1]), last_BV)
                right_B = agrees_B & ~terms.done_B
            logits_BV = jnp.where(live_B[:, None], last_BV, slots.logits_BV)
            slots = slots.replace(
                memory=large_memory.replace(length_B=length_B + kept_B),
                guide=memory.replace(length_B=draft_length_B + kept_B),
                logits_BV=logits_BV,
                terms=terms,
            )
            for token_B, one_B, taken_B in sure:
                out_BC, logprob_BC, count_B = local(_append, ((rows,) * 6), (rows,) * 3)(
                    out_BC, logprob_BC, count_B, token_B, one_B, taken_B
                )
            return slots, out_BC, logprob_BC, count_B

        blank = lambda kind: jnp.zeros((B, C), kind, out_sharding=spec("batch", "time"))
        carry = (slots, blank(jnp.int32), blank(jnp.float32), jnp.zeros_like(slots.terms.length_B))
        return jax.lax.while_loop(lambda c: jnp.any(wanted(c[3], c[0])), body, carry)

    return jax.jit(decode, donate_argnums=2)


def _append(out_BC, logprob_BC, count_B, token_B, one_B, taken_B):
    here_BC = (jnp.arange(out_BC.shape[1])[None] == count_B[:, None]) & taken_B[:, None]
    return (
        jnp.where(here_BC, token_B[:, None], out_BC),
        jnp.where(here_BC, one_B[:, None], logprob_BC),
        count_B + taken_B,
    )


def _select(taken_B, new, old):
    """New terms for the rows that take a token, the old ones for the rest."""
    pick = lambda a, b: jnp.where(jnp.expand_dims(taken_B, range(1, a.ndim)), a, b)
    return jax.tree.map(pick, new, old)
