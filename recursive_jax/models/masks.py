"""Who may see whom: causal or both ways, packed, windowed, after a prefix, side by side.

Shapes: B rows, T query positions, S key positions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


def begins(segments_BT: jax.Array) -> jax.Array:
    """Whether a position is the first of its segment: bool `[B, T]`."""
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return segments_BT != before_BT


@struct.dataclass
class Branches:
    """T continuations of one row in one cache (beam search): their new tokens stand side by side at one position.

    position_B: of the new tokens. seen_BTS: the slots each continuation sees, its own new one among them. position_BS:
    of the slots' tokens."""

    position_B: jax.Array
    seen_BTS: jax.Array
    position_BS: jax.Array


@struct.dataclass
class Mask:
    """Who may see whom. Every field is optional; a position is visible when all given rules allow it.

    causal: keys up to the query. prefix_B: keys before this index are seen by every query, for all that (prefix LM).
    window: at most this many keys back, the query included (and as many ahead, where the mask is not causal).
    segments: equal and non-zero segment ids only (packing). branches: rows hold several continuations side by side.
    visible_BTS: who sees whom, said one by one, in place of causality, prefix and window (block diffusion, masks that
    change as a training goes on). fresh: the cache is empty, so that the new tokens are all there is to see."""

    causal: bool = struct.field(pytree_node=False, default=True)
    fresh: bool = struct.field(pytree_node=False, default=False)
    window: Any = struct.field(pytree_node=False, default=None)  # int; traced where layers of several kinds are scanned
    segments_BT: jax.Array | None = None
    branches: Branches | None = None
    prefix_B: jax.Array | None = None
    visible_BTS: jax.Array | None = None

    @property
    def plain(self) -> bool:
        """Whether causality, window and segments say all of it."""
        return self.prefix_B is None and self.visible_BTS is None

    def visible(self, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
        """Boolean `[1 or B, T, S]` for the given query indices (`[T]`, or `[B, T]` where rows differ) and key
        indices."""
        distance_TS = jnp.atleast_2d(query_T)[:, :, None] - key_S
        seen = distance_TS >= 0 if self.causal else jnp.ones(distance_TS.shape, bool)
        if self.branches is not None:
            distance_TS = (self.branches.position_B[:, None] - self.branches.position_BS)[:, None]
            seen = self.branches.seen_BTS
        if self.causal and self.prefix_B is not None:
            seen = seen | (key_S[None, None, :] < self.prefix_B[:, None, None])
        if self.visible_BTS is not None:
            seen = self.visible_BTS[:, query_T][:, :, key_S]
        elif self.window is not None:
            seen = seen & (distance_TS < self.window) & (distance_TS > -self.window)
        if self.segments_BT is not None:
            query_BT, key_BS = self.segments_BT[:, query_T], self.segments_BT[:, key_S]
            seen = seen & (query_BT[:, :, None] == key_BS[:, None, :]) & (key_BS > 0)[:, None, :]
        return seen
