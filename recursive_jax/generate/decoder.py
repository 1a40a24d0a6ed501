"""How a model takes the next tokens: the built-in Transformer with its KV cache, a user's `apply` by running the prefix
again. The engine knows nothing but this.

    prepare(params, whole) -> params            once per generation: layers apart, in the compute dtype; on CPU views.
                                                whole: on every shard of the batch
    empty(rows, slots) -> memory                     of no tokens
    extend(params, memory, tokens_BT, count_B, fresh=False, every=False, both_ways=False) -> (logits_BV, memory)

`extend` gives each row its first count_B tokens of tokens_BT (0: the row stays as it is) and returns the logits after
the last of them; with every=True those after each, `[B, T, V]`. fresh: the memory is empty. both_ways (of
the Transformer, into empty memory): the new tokens see each other in both directions.

For beam search, W continuations of each row:

    branch(memory, W, steps) -> branched             with room for `steps` more tokens of each
    grow(params, branched, tokens_BW, parent_BW, n) -> (logits_BWV, branched)

`grow` is step n: continuation w becomes continuation parent_BW[:, w] with the token tokens_BW[:, w] after it.

Shapes: B rows, W continuations, T new tokens, S slots (tokens a row has room for), V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import NamedSharding, P

from recursive_jax.mesh import TRACES, local, platform, spec, unsharded
from recursive_jax.models.masks import Branches
from recursive_jax.models.network import Network
from recursive_jax.models.transformer import Cache, Transformer, unstacked


def decoder(network: Network, dtype: str) -> CachedDecoder | PrefixDecoder:
    """How a kind of network takes the next tokens; one that only gives logits runs its prefix again."""
    return DECODERS.get(network.kind, PrefixDecoder)(network, dtype)


class CachedDecoder:
    """The built-in Transformer. The KV cache is in the compute dtype."""

    def __init__(self, network: Network, dtype: str):
        self.config, self.dtype = network.config, jnp.dtype(dtype)
        self.module = Transformer(network.config, self.dtype)

    def prepare(self, params: Any, whole: bool = False) -> Any:
        leaves = jax.tree.leaves(params)
        same = all(w.dtype == self.dtype for w in leaves if jnp.issubdtype(w.dtype, jnp.floating))
        if (
            not whole
            and same
            and not isinstance(leaves[0], jax.core.Tracer)
            and platform(leaves[0].sharding.mesh) == "cpu"
        ):
            layers = [jax.tree.map(lambda w, i=i: _layer(w, i), params["blocks"]) for i in range(self.config.layers)]
            return {**params, "blocks": tuple(layers)}
        return _prepare_program(self.config, str(self.dtype), whole)(params)

    def empty(self, rows: int, slots: int) -> Cache:
        return Cache.empty(self.config, rows, slots, self.dtype)

    def extend(
        self,
        params,
        memory: Cache,
        tokens_BT,
        count_B,
        fresh: bool = False,
        every: bool = False,
        both_ways: bool = False,
    ):
        read_B = None if every else jnp.maximum(count_B - 1, 0)
        ways = {}
        if both_ways:  # what lies behind a text is not part of it
            inside_BT = jnp.arange(tokens_BT.shape[1])[None] < count_B[:, None]
            ways = {"causal": False, "segments_BT": inside_BT.astype(jnp.int32)}
        logits, grown = self.module.apply(
            {"params": params}, tokens_BT, cache=memory, fresh=fresh, read_B=read_B, **ways
        )
        return logits if every else logits[:, 0], grown.replace(length_B=memory.length_B + count_B)

    def branch(self, memory: Cache, W: int, steps: int) -> Branched:
        """The W continuations share the row's cache: its prompt stands there once, and step n puts W tokens into slots
        length + n W .. length + (n + 1) W. No cache is ever reordered; who descends from whom is a mask."""
        slots = memory.slots + W * steps
        slot_S = jnp.arange(slots)
        prompt_BS = slot_S[None] < memory.length_B[:, None]
        seen_BWS = jnp.broadcast_to(prompt_BS[:, None], (len(memory.length_B), W, slots))
        return Branched(memory.resized(slots), memory.length_B, seen_BWS)

    def grow(self, params, branched: Branched, tokens_BW, parent_BW, n):
        W, memory, length_B = tokens_BW.shape[1], branched.memory, branched.length_B
        rows = spec("batch")

        def descend(seen_BWS, length_B, parent_BW):
            slot_S = jnp.arange(seen_BWS.shape[2])
            seen_BWS = jnp.take_along_axis(seen_BWS, parent_BW[:, :, None], axis=1)
            own_BWS = slot_S[None, None] == (length_B[:, None] + n * W + jnp.arange(W)[None])[:, :, None]
            after_BS = slot_S[None] - length_B[:, None]
            return seen_BWS | own_BWS, jnp.where(after_BS < 0, slot_S[None], length_B[:, None] + after_BS // W)

        seen_BWS, position_BS = local(descend, (rows, rows, rows), (rows, rows))(branched.seen_BWS, length_B, parent_BW)
        logits_BWV, memory = self.module.apply(
            {"params": params},
            tokens_BW,
            cache=memory.replace(length_B=length_B + n * W),
            branches=Branches(length_B + n, seen_BWS, position_BS),
        )
        return logits_BWV, Branched(memory, length_B, seen_BWS)


@struct.dataclass
class Branched:
    """A cache that holds W continuations of each row. length_B: tokens of the prompts."""

    memory: Cache
    length_B: jax.Array
    seen_BWS: jax.Array


def _layer(stacked: jax.Array, i: int) -> jax.Array:
    """stacked[i] where it lies: a CPU array over the same memory (a copy, where that is not aligned)."""
    parts = [jax.device_put(np.asarray(s.data)[i], s.device) for s in stacked.addressable_shards]
    layout = NamedSharding(stacked.sharding.mesh, P(*stacked.sharding.spec[1:]))
    return jax.make_array_from_single_device_arrays(stacked.shape[1:], layout, parts)


@functools.cache
def _prepare_program(config, dtype: str, whole: bool):
    def prepare(params):
        TRACES["prepare"] += 1
        found = unstacked(params, config, dtype)
        return jax.tree.map(unsharded, found) if whole else found

    return jax.jit(prepare)


@struct.dataclass
class Prefix:
    """The tokens so far, right-padded: the memory of a model without a cache."""

    tokens_BS: jax.Array
    length_B: jax.Array

    @property
    def slots(self) -> int:
        return self.tokens_BS.shape[1]

    def resized(self, slots: int) -> Prefix:
        more = max(0, slots - self.slots)
        return self.replace(tokens_BS=jnp.pad(self.tokens_BS, ((0, 0), (0, more)))[:, :slots])


class PrefixDecoder:
    """A user's `apply`: the whole prefix is run again for every token."""

    def __init__(self, network: Network, dtype: str):
        self.apply = network.bind(dtype)

    def prepare(self, params: Any, whole: bool = False) -> Any:
        return params

    def empty(self, rows: int, slots: int) -> Prefix:
        return Prefix(
            jnp.zeros((rows, slots), jnp.int32, out_sharding=spec("batch", "time")),
            jnp.zeros((rows,), jnp.int32, out_sharding=spec("batch")),
        )

    def extend(self, params, memory: Prefix, tokens_BT, count_B, fresh: bool = False, every: bool = False):
        at_BS = jnp.arange(memory.slots)[None] - memory.length_B[:, None]
        new_BS = (at_BS >= 0) & (at_BS < count_B[:, None])
        taken_BS = jnp.take_along_axis(tokens_BT, jnp.clip(at_BS, 0, tokens_BT.shape[1] - 1), axis=1)
        tokens_BS, length_B = jnp.where(new_BS, taken_BS, memory.tokens_BS), memory.length_B + count_B
        segments_BS = (jnp.arange(memory.slots)[None] < length_B[:, None]).astype(jnp.int32)
        logits_BSV = self.apply(params, tokens_BS, segments_BS).astype(jnp.float32)
        T = tokens_BT.shape[1] if every else 1
        first_B1 = (memory.length_B if every else length_B - 1)[:, None]
        read_BT = jnp.clip(first_B1 + jnp.arange(T)[None], 0, memory.slots - 1)
        logits_BTV = jnp.take_along_axis(logits_BSV, read_BT[:, :, None], axis=1)
        return logits_BTV if every else logits_BTV[:, 0], Prefix(tokens_BS, length_B)

    def branch(self, memory: Prefix, W: int, steps: int) -> Prefix:
        """Each continuation is a row of its own."""
        copies = local(lambda x: jnp.repeat(x, W, axis=0), (spec("batch"),), spec("batch"))
        return jax.tree.map(copies, memory.resized(memory.slots + steps))

    def grow(self, params, branched: Prefix, tokens_BW, parent_BW, n):
        W, rows = tokens_BW.shape[1], spec("batch")

        def descend(x, parent_BW):
            own = x.reshape(-1, W, *x.shape[1:])
            at = parent_BW.reshape(*parent_BW.shape, *(1,) * (x.ndim - 1))
            return jnp.take_along_axis(own, at, axis=1).reshape(x.shape)

        branched = jax.tree.map(lambda x: local(descend, (rows, rows), rows)(x, parent_BW), branched)
        tokens_R1 = local(lambda t: t.reshape(-1, 1), (rows,), rows)(tokens_BW)
        logits_RV, branched = self.extend(params, branched, tokens_R1, jnp.ones_like(branched.length_B))
        V = logits_RV.shape[1]
        return local(lambda x: x.reshape(-1, W, V), (rows,), rows)(logits_RV), branched


#: Kinds of networks that keep what they have read.
DECODERS: dict[str, type] = {"transformer": CachedDecoder}
