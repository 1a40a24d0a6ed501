"""The jitted programs of the engine: prefill, insert, decode, and the two halves of a decode step. Static shapes, any
number of requests: B slots hold the rows in work, and a finished row's slot is given to the next request.

A row's randomness is `fold_in(fold_in(round key, request), position)`, and its tokens stand at their own positions in
its own slot: neither depends on what else is in the batch.

Shapes: B slots, U rows of a prefill, T prompt tokens, C steps of a dispatch, K stop ids, V vocabulary, S cache slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from recursive_jax.generate.decoder import decoder
from recursive_jax.generate.sampling import NEVER, History, Rules, allowed, apply_rules, draw, request_keys
from recursive_jax.mesh import KEYS, TRACES, local, spec
from recursive_jax.models.network import Network

ROWS = spec("batch")


@struct.dataclass
class Terms:
    """What a request asks for, one entry per slot. key: data of its random key. position: index of the row's next token
    in its sequence. length: new tokens so far. limit: at most this many. stops: ids that end it, -1 where there are
    fewer. weight: of the guidance. done: nothing more is wanted."""

    key_BX: Any
    position_B: Any
    length_B: Any
    limit_B: Any
    stops_BK: Any
    weight_B: Any
    done_B: Any
    rules: Rules
    history: History


@struct.dataclass
class Slots:
    """memory: the tokens of each row; logits_BV: of its next one. guide, guide_logits_BV: the same for the second model
    or prompt of a guided generation, else None."""

    memory: Any
    logits_BV: jax.Array
    terms: Terms
    guide: Any = None
    guide_logits_BV: Any = None


@functools.cache
def prefill_program(network: Network, dtype: str, rows: int, slots: int, first: bool) -> Callable:
    """(params, memory, tokens_UT, count_U) -> (logits_UV, memory): a piece of up to T tokens of U prompts. With `first`
    there is no memory yet and it is made, with room for `slots` tokens."""
    step = decoder(network, dtype)

    def prefill(params, memory, tokens_UT, count_U):
        TRACES["prefill"] += 1
        memory = step.empty(rows, slots) if first else memory.resized(slots)
        logits_UV, memory = step.extend(params, memory, tokens_UT, count_U, fresh=first)
        return whole(logits_UV), memory

    return jax.jit(prefill)


@functools.cache
def document_program(network: Network, dtype: str, rows: int, slots: int) -> Callable:
    """(params, tokens_UT, count_U) -> memory of U texts that are read in both directions, each whole."""
    step = decoder(network, dtype)

    def read(params, tokens_UT, count_U):
        TRACES["document"] += 1
        return step.extend(params, step.empty(rows, slots), tokens_UT, count_U, fresh=True, both_ways=True)[1]

    return jax.jit(read)


@functools.cache
def spread_program() -> Callable:
    """(memory of one row, index_U) -> memory of U rows: a shared prefix before each of U prompts."""

    def spread(memory, index_U):
        TRACES["spread"] += 1
        return jax.tree.map(
            lambda x: jax.reshard(jax.reshard(x, spec()).at[index_U].get(out_sharding=spec()), ROWS), memory
        )

    return jax.jit(spread)


@functools.cache
def empty_program(network: Network, guide: Network | None, dtype: str, B: int, slots: int) -> Callable:
    """(terms) -> slots of no tokens."""

    def empty(terms):
        TRACES["empty"] += 1
        logits = lambda a: jnp.zeros((B, padded_vocab(a)), jnp.float32, out_sharding=spec("batch", None))
        second = () if guide is None else (decoder(guide, dtype).empty(B, slots), logits(guide))
        return Slots(decoder(network, dtype).empty(B, slots), logits(network), terms, *second)

    return jax.jit(empty)


def padded_vocab(network: Network) -> int:
    return network.padded_vocab


@functools.cache
def insert_program() -> Callable:
    """(slots, new, source_M, slot_M) -> slots: slot_M[m] takes row source_M[m] of `new` (a `Slots` whose memories and
    logits have U rows and whose terms have M). A slot beyond the last is not written. `slots` is donated."""

    def insert(slots: Slots, new: Slots, source_M, slot_M):
        TRACES["insert"] += 1

        def write(slots, new, source_M, slot_M):
            here = slot_M - _first_row(slots.logits_BV.shape[0])
            here = jnp.where((here >= 0) & (here < slots.logits_BV.shape[0]), here, slots.logits_BV.shape[0])
            put = lambda old, rows: old.at[here].set(rows.astype(old.dtype), mode="drop")
            terms = jax.tree.map(put, slots.terms, new.terms)
            rest = lambda s: (s.memory, s.logits_BV, s.guide, s.guide_logits_BV)

            def copy(old, rows):  # of a cache: only the part that is filled
                if old.ndim == 1:
                    return put(old, rows[source_M])
                axis = 2 if old.ndim == 4 else 1
                size = min(rows.shape[axis], old.shape[axis])
                rows = jax.lax.slice_in_dim(rows, 0, size, axis=axis)[source_M]
                at = (here, *(slice(None),) * (axis - 1), slice(size))
                return old.at[at].set(rows.astype(old.dtype), mode="drop")

            memory, logits, guide, guide_logits = jax.tree.map(copy, rest(slots), rest(new))
            return Slots(memory, logits, terms, guide, guide_logits)

        layouts = jax.tree.map(lambda x: _layout(x), slots)
        everywhere = jax.tree.map(lambda x: _replicated(x), new)
        return local(write, (layouts, everywhere, spec(), spec()), layouts)(slots, new, source_M, slot_M)

    return jax.jit(insert, donate_argnums=0)


def _layout(x: jax.Array) -> Any:
    """Slots lie along the batch axes, heads of a cache along the tensor axis."""
    return spec("batch", "kv_heads", "time", None) if x.ndim == 4 else ROWS


def _replicated(x: jax.Array) -> Any:
    return spec(None, "kv_heads", "time", None) if x.ndim == 4 else spec()


def _first_row(rows: int) -> Any:
    """Index of this device's first slot."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_auto:
        return 0
    return jax.lax.axis_index(ROWS[0]) * rows


@functools.cache
def keys_program() -> Callable:
    """(data of the round's key, or of the request's own, for each row; id_B; sample_B) -> data of each row's key: a
    second sample of a request has a key of its own."""

    def keys(key_BX, id_B, sample_B):
        own_B = request_keys(jax.random.wrap_key_data(key_BX, impl=KEYS), id_B)
        other_B = jax.vmap(jax.random.fold_in)(own_B, sample_B)
        first_B1 = (sample_B == 0)[:, None]
        return jnp.where(first_B1, jax.random.key_data(own_B), jax.random.key_data(other_B))

    return jax.jit(keys)


@functools.cache
def resize_program(slots: int) -> Callable:
    """Room for `slots` tokens in every row."""

    def resize(state: Slots) -> Slots:
        TRACES["resize"] += 1
        guide = None if state.guide is None else state.guide.resized(slots)
        return state.replace(memory=state.memory.resized(slots), guide=guide)

    return jax.jit(resize)


def whole(logits_BV: jax.Array) -> jax.Array:
    """The vocabulary of a row on one device: the rules look at all of it."""
    mesh = jax.sharding.get_abstract_mesh()
    return logits_BV if mesh.empty or mesh.are_all_axes_auto else jax.reshard(logits_BV, spec("batch", None))


Combine = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def choose(slots: Slots, live_B, banned_N, mask_BW=None, combine: Combine | None = None):
    """The next token of every row, its log-probability under the model (temperature 1, no rules; nats), the terms after
    it, and whether any token was allowed at all. live_B: rows that take one. mask_BW: bits of the tokens that a
    constraint allows."""
    inputs = (jax.tree.map(lambda _: ROWS, (slots.logits_BV, slots.guide_logits_BV, slots.terms)), ROWS, spec())

    def pick(rows, live_B, banned_N, mask_BW):
        logits_BV, other_BV, terms = rows
        z_BV = logits_BV if other_BV is None else combine(logits_BV, other_BV, terms.weight_B)
        z_BV = allowed(z_BV, terms.rules, terms.history, terms.length_B, terms.stops_BK, banned_N)
        if mask_BW is not None:
            z_BV = jnp.where(unpack(mask_BW, z_BV.shape[1]), z_BV, NEVER)
        token_B = draw(jax.random.wrap_key_data(terms.key_BX), terms.position_B, apply_rules(z_BV, terms.rules))
        open_B = jnp.max(z_BV, axis=-1) > NEVER / 2
        own_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
        logprob_B = own_B - jax.nn.logsumexp(logits_BV, axis=-1)
        length_B = terms.length_B + live_B
        ends_B = jnp.any(token_B[:, None] == terms.stops_BK, axis=-1) | (length_B >= terms.limit_B)
        after = terms.replace(
            position_B=terms.position_B + live_B,
            length_B=length_B,
            done_B=terms.done_B | (live_B & ends_B),
            history=terms.history.after(token_B, live_B),
        )
        return jnp.where(live_B, token_B, 0), jnp.where(live_B, logprob_B, 0.0), after, open_B

    masks = None if mask_BW is None else ROWS
    outputs = (ROWS, ROWS, jax.tree.map(lambda _: ROWS, slots.terms), ROWS)
    run = local(pick, (*inputs, masks), outputs)
    return run((slots.logits_BV, slots.guide_logits_BV, slots.terms), live_B, banned_N, mask_BW)


def unpack(mask_BW: jax.Array, V: int) -> jax.Array:
    """Bits, 32 to an int32, lowest first -> booleans `[B, V]`; tokens beyond the mask are not allowed."""
    B, W = mask_BW.shape
    bits = (mask_BW[:, :, None] >> jnp.arange(32)[None, None]) & 1
    flat_BV = bits.reshape(B, W * 32)[:, :V] != 0
    return jnp.pad(flat_BV, ((0, 0), (0, V - flat_BV.shape[1])))


def advance(step, guide_step, params, guide_params, slots: Slots, token_B, live_B) -> Slots:
    """Every live row's memory takes its new token."""
    count_B = live_B.astype(jnp.int32)
    logits_BV, memory = step.extend(params, slots.memory, token_B[:, None], count_B)
    slots = slots.replace(logits_BV=whole(logits_BV), memory=memory)
    if slots.guide is None:
        return slots
    logits_BV, guide = guide_step.extend(guide_params, slots.guide, token_B[:, None], count_B)
    return slots.replace(guide_logits_BV=whole(logits_BV), guide=guide)


@functools.cache
def decode_program(
    network: Network, guide: Network | None, dtype: str, most: int, combine: Combine | None = None, where: str = "cpu"
) -> Callable:
    """(params, guide params, slots, keep_B, steps, banned_N) -> (slots, tokens_BC, logprobs_BC, count_B).

    Up to `steps` <= C = `most` tokens for every row that is kept and not done; the first count_B entries of a row are
    its new tokens. Stops early when no row is left. `slots` is donated. where: the platform of the mesh it runs on."""
    step, guide_step = decoder(network, dtype), decoder(guide, dtype) if guide else None

    def decode(params, guide_params, slots: Slots, keep_B, steps, banned_N):
        TRACES["generate"] += 1
        B = slots.logits_BV.shape[0]
        blank = lambda kind: jnp.zeros((B, most), kind, out_sharding=spec("batch", "time"))

        def body(carry):
            n, slots, out_BC, logprob_BC, count_B = carry
            live_B = keep_B & ~slots.terms.done_B
            token_B, one_B, terms, _ = choose(slots, live_B, banned_N, combine=combine)
            out_BC = jax.lax.dynamic_update_slice_in_dim(out_BC, token_B[:, None], n, 1)
            logprob_BC = jax.lax.dynamic_update_slice_in_dim(logprob_BC, one_B[:, None], n, 1)
            slots = advance(step, guide_step, params, guide_params, slots.replace(terms=terms), token_B, live_B)
            return n + 1, slots, out_BC, logprob_BC, count_B + live_B

        more = lambda c: (c[0] < steps) & jnp.any(keep_B & ~c[1].terms.done_B)
        carry = (jnp.int32(0), slots, blank(jnp.int32), blank(jnp.float32), jnp.zeros_like(slots.terms.length_B))
        return jax.lax.while_loop(more, body, carry)[1:]

    return jax.jit(decode, donate_argnums=2, compiler_options=_options(where))


def _options(where: str) -> dict[str, Any]:
    """XLA's CPU backend keeps to 256-bit vectors where there are 512: a fifth of the time of one row's products."""
    return {"xla_cpu_prefer_vector_width": 512} if where == "cpu" else {}


@functools.cache
def choose_program(combine: Combine | None = None) -> Callable:
    """(slots, keep_B, banned_N, mask_BW) -> (terms, token_B, logprob_B, live_B, stuck_B): half a step, under a
    constraint. stuck_B: rows that no token is left for, between the constraint and the other rules."""

    def one(slots: Slots, keep_B, banned_N, mask_BW):
        TRACES["choose"] += 1
        live_B = keep_B & ~slots.terms.done_B
        token_B, logprob_B, terms, open_B = choose(slots, live_B, banned_N, mask_BW, combine)
        return terms, token_B, logprob_B, live_B & open_B, live_B & ~open_B

    return jax.jit(one)


@functools.cache
def advance_program(network: Network, guide: Network | None, dtype: str, where: str = "cpu") -> Callable:
    """(params, guide params, slots, terms, token_B, live_B) -> slots: the other half. `slots` is donated."""
    step, guide_step = decoder(network, dtype), decoder(guide, dtype) if guide else None

    def forward(params, guide_params, slots: Slots, terms, token_B, live_B):
        TRACES["advance"] += 1
        return advance(step, guide_step, params, guide_params, slots.replace(terms=terms), token_B, live_B)

    return jax.jit(forward, donate_argnums=2, compiler_options=_options(where))


def classifier_free(logits_BV: jax.Array, other_BV: jax.Array, weight_B: jax.Array) -> jax.Array:
    """Guidance by the same model without the prompt (arXiv:2306.17806, eq. 7): log p' + w (log p - log p')."""
    with_BV, without_BV = jax.nn.log_softmax(logits_BV), jax.nn.log_softmax(other_BV)
    return without_BV + weight_B[:, None] * (with_BV - without_BV)


@functools.cache
def contrastive(alpha: float = 0.1) -> Combine:
    """Contrastive decoding (arXiv:2210.15097, sec. 3): tokens of at least alpha times the best one's probability, by
    log p of the model minus w times log p of the other, weaker model. (Guidance weight w = 1 is the paper's.)"""

    def combine(logits_BV: jax.Array, other_BV: jax.Array, weight_B: jax.Array) -> jax.Array:
        expert_BV, amateur_BV = jax.nn.log_softmax(logits_BV), jax.nn.log_softmax(other_BV)
        plausible_BV = expert_BV >= jnp.max(expert_BV, axis=-1, keepdims=True) + np.log(alpha)
        return jnp.where(plausible_BV, expert_BV - weight_B[:, None] * amateur_BV, NEVER)

    return combine
