"""Tokens that are hidden from a model, and what it says is behind them, reading in both directions.

A network with `model.causal: false` gives at each position the token that stands there. One with `model.causal: true`
gives the next one, in whichever direction it reads: what it says of a position stands at the position before
("masked next-token prediction", arXiv:2410.24159, sec. 2; right-shifted logits). So the same weights write from left to
right and fill gaps, and no switch says which.

Shapes: B rows, T positions, V vocabulary, D width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network, TransformerNetwork


def mask_id(model: Model, asked: int | None = None) -> int:
    """The id that hides a token: `asked`, or the tokenizer's own ([MASK], <mask>), or the first id that the model has
    beyond its tokenizer's. Raises InputError where there is none, and for an id that the model does not have."""
    own = getattr(model.tokenizer, "mask", None) if asked is None else asked
    if own is None and model.vocab > model.tokenizer.vocab:
        own = model.tokenizer.vocab
    if own is None:
        raise InputError(
            "tokens have to be hidden behind an id, and this tokenizer has no mask token: build the model with "
            f"model.vocab={model.tokenizer.vocab + 1}, or name an id that no text uses: mask_id of the objective, and "
            "sampling.denoise.mask_id"
        )
    if not 0 <= own < model.vocab:
        raise InputError(f"mask_id={own} is none of the model's {model.vocab} ids")
    return int(own)


def spare_ids(tokenizer: Any, asked: int | None) -> int:
    """How many ids beyond its tokenizer's a model needs to hide tokens: none where one is named, or it has a mask."""
    return int(asked is None and getattr(tokenizer, "mask", None) is None)


def is_shifted(network: Network | None) -> bool:
    """Whether what the network says of a position stands at the position before."""
    return isinstance(network, TransformerNetwork) and network.causal


def own_logits(
    apply: Callable[..., Any], shifted: bool, params: Any, tokens_BT: jax.Array, segments_BT: Any, **keywords: Any
) -> jax.Array:
    """Float32 logits `[B, T, V]` of the token that stands at each position, read in both directions. apply: of a
    network, bound to a dtype; keywords: of the Transformer. Where it is shifted, nothing is known of the first token of
    a row, and what is said of it means nothing."""
    if not shifted:
        return apply(params, tokens_BT, segments_BT, **keywords)
    if not {"prefix_B", "visible_BTS"} & set(keywords):
        keywords["causal"] = False
    states_BTD = apply(params, tokens_BT, segments_BT, hidden=True, **keywords)
    states_BTD = jnp.concatenate([states_BTD[:, :1], states_BTD[:, :-1]], axis=1)
    return apply(params, None, states_BTD=states_BTD)
