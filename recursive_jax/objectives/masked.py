"""Masked language modelling: tokens are hidden and guessed from both sides (BERT, arXiv:1810.04805, sec. 3.1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Packed, pack_tokens
from recursive_jax.errors import InputError
from recursive_jax.mesh import rows_like
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Term
from recursive_jax.objectives.causal import token_nll, weighted_sum


def mask_tokens(
    key: jax.Array,
    tokens_BT: jax.Array,
    special_BT: jax.Array,
    *,
    share: float = 0.15,
    mask_id: int,
    vocab: int,
    replaced: float = 0.8,
    random: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """(inputs int32 `[B, T]`, chosen bool `[B, T]`): each token that is not special is chosen with probability `share`;
    a chosen one becomes `mask_id` (probability `replaced`), any id below `vocab` (`random`), or stays as it is."""
    choose, kind, other = jax.random.split(key, 3)
    lay = lambda x: rows_like(x, len(x))
    chosen_BT = (lay(jax.random.uniform(choose, tokens_BT.shape)) < share) & ~special_BT.astype(bool)
    kind_BT = lay(jax.random.uniform(kind, tokens_BT.shape))
    random_BT = lay(jax.random.randint(other, tokens_BT.shape, 0, vocab, tokens_BT.dtype))
    changed_BT = jnp.where(kind_BT < replaced, mask_id, jnp.where(kind_BT < replaced + random, random_BT, tokens_BT))
    return jnp.where(chosen_BT, changed_BT, tokens_BT).astype(tokens_BT.dtype), chosen_BT


@dataclasses.dataclass(frozen=True)
class Masked(Objective):
    """The mean negative log-likelihood of the chosen tokens, given a row in which most of them are hidden; drawn anew
    at every step. Special tokens (start, end, padding, the mask itself) are never chosen. For a model that reads both
    ways (`model.causal: false`) and whose tokenizer has a mask token.

    share: of tokens that are chosen; replaced, random: of the chosen ones, what becomes the mask token and what any
    token; the rest stays. mask_id, special, vocab: by default the tokenizer's."""

    share: float = 0.15
    replaced: float = 0.8
    random: float = 0.1
    mask_id: int | None = None
    special: tuple[int, ...] = ()
    vocab: int = 0

    def resolved(self, model: Model) -> Masked:
        """With the ids of the model's tokenizer, where `mask_id` does not say otherwise."""
        tokenizer = model.tokenizer
        mask = getattr(tokenizer, "mask", None) if self.mask_id is None else self.mask_id
        if mask is None:
            raise InputError(
                "this tokenizer has no mask token, which masked language modelling needs: Masked(mask_id=...)"
            )
        known = {
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.pad,
            mask,
            *getattr(tokenizer, "special_ids", ()),
            *self.special,
        }
        vocab = self.vocab or tokenizer.vocab
        return dataclasses.replace(self, mask_id=mask, special=tuple(sorted(known - {None})), vocab=vocab)

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        packed = pack_tokens(data, length - 1, model.tokenizer)  # no shift: a row is its own target
        return Packed({k: v for k, v in packed.columns.items() if k in ("tokens", "segments", "loss")})

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        tokens_BT, segments_BT = batch["tokens"], batch["segments"]
        special_BT = segments_BT == 0
        if "loss" in batch:  # a prompt is read, not guessed
            special_BT |= batch["loss"] <= 0
        for i in self.special:
            special_BT |= tokens_BT == i
        inputs_BT, chosen_BT = mask_tokens(
            ctx.key,
            tokens_BT,
            special_BT,
            share=self.share,
            mask_id=self.mask_id,
            vocab=self.vocab,
            replaced=self.replaced,
            random=self.random,
        )
        return masked_loss(ctx, params, inputs_BT, segments_BT, tokens_BT, chosen_BT)


def masked_loss(
    ctx: Context,
    params: Params,
    inputs_BT: jax.Array,
    segments_BT: jax.Array,
    labels_BT: jax.Array,
    chosen_BT: jax.Array,
) -> Loss:
    """The loss of the chosen positions, and how many of them the model's best guess has right."""
    logits_BTV = ctx.apply(params, inputs_BT, segments_BT)
    weight_BT = chosen_BT.astype(jnp.float32)
    right_BT = (jnp.argmax(logits_BTV, axis=-1) == labels_BT).astype(jnp.float32)
    count = jnp.sum(weight_BT)
    total = weighted_sum(token_nll(logits_BTV, labels_BT), weight_BT)
    return Loss({"nll": Term(total, count)}, {"masked_accuracy": (jnp.sum(weight_BT * right_BT), count)})
