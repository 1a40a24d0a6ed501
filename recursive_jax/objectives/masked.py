"""Masked language modelling: tokens are hidden and guessed from both sides (BERT, arXiv:1810.04805, sec. 3.1; drawn
anew at every step as in RoBERTa, arXiv:1907.11692)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Packed, pack_tokens
from recursive_jax.data.tokenizers import word_starts
from recursive_jax.errors import InputError
from recursive_jax.mesh import rows_like
from recursive_jax.models.hidden import is_shifted, mask_id, own_logits, spare_ids
from recursive_jax.models.masks import begins
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Shapes, Term, batch_shapes
from recursive_jax.objectives.causal import token_nll, weighted_sum


def mask_tokens(
    key: jax.Array,
    tokens_BT: jax.Array,
    special_BT: jax.Array,
    *,
    share: Any = 0.15,
    mask_id: int,
    vocab: int,
    replaced: float = 0.8,
    random: float = 0.1,
    groups_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(inputs int32 `[B, T]`, chosen bool `[B, T]`): each token that is not special is chosen with probability `share`
    (which may be traced); a chosen one becomes `mask_id` (probability `replaced`), any id below `vocab` (`random`), or
    stays as it is.

    groups_BT: int32 in 0 .. T - 1, tokens that are chosen together or not at all (`words`, `spans`); each by itself
    without it. What becomes of a chosen token is drawn for each one alone, as `transformers` does for whole words."""
    choose, kind, other = jax.random.split(key, 3)
    lay = lambda x: rows_like(x, len(x))
    draw_BT = jax.random.uniform(choose, tokens_BT.shape)
    if groups_BT is not None:
        draw_BT = jnp.take_along_axis(draw_BT, groups_BT, axis=1)
    chosen_BT = (lay(draw_BT) < share) & ~special_BT.astype(bool)
    kind_BT = lay(jax.random.uniform(kind, tokens_BT.shape))
    random_BT = lay(jax.random.randint(other, tokens_BT.shape, 0, vocab, tokens_BT.dtype))
    changed_BT = jnp.where(kind_BT < replaced, mask_id, jnp.where(kind_BT < replaced + random, random_BT, tokens_BT))
    return jnp.where(chosen_BT, changed_BT, tokens_BT).astype(tokens_BT.dtype), chosen_BT


def words(starts_BT: jax.Array) -> jax.Array:
    """The number of the word that each token is part of, for `mask_tokens`: int32 `[B, T]`. starts_BT: whether a token
    begins a word."""
    starts_BT = starts_BT.astype(jnp.int32)
    return jnp.cumsum(starts_BT, axis=1) - starts_BT[:, :1]


def spans(key: jax.Array, shape: tuple[int, int], most: int) -> jax.Array:
    """Rows cut into spans of 1 to `most` tokens, each length as likely, for `mask_tokens`: int32 `[B, T]`
    (arXiv:2410.24159, sec. 3: lengths 1 to 3 share one random number)."""
    ends_BT = jnp.cumsum(jax.random.randint(key, shape, 1, most + 1), axis=1)
    at_T = jnp.arange(shape[1])
    return jax.vmap(lambda ends_T: jnp.searchsorted(ends_T, at_T, side="right"))(ends_BT).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Masked(Objective):
    """The mean negative log-likelihood of the chosen tokens, given a row in which most of them are hidden; drawn anew
    at every step. Special tokens (start, end, padding, the mask itself) are never chosen.

    A model that reads both ways (`model.causal: false`) says what stands at each position. One that writes from left to
    right is trained to read both ways, and says it at the position before (`models/hidden.py`).

    share: of tokens that are chosen; final_share: what it falls to, linearly over the training (0.30 to 0.15 in
    arXiv:2410.24159). whole_words: all tokens of a word or none; spans: up to so many neighbours together. replaced,
    random: of the chosen ones, what becomes the mask token and what any token; the rest stays. mask_id, special, vocab:
    by default the tokenizer's, the mask else the first id beyond them."""

    share: float = 0.15
    final_share: float | None = None
    whole_words: bool = False
    spans: int = 1
    replaced: float = 0.8
    random: float = 0.1
    mask_id: int | None = None
    special: tuple[int, ...] = ()
    vocab: int = 0

    def __post_init__(self):
        for name, value in (("share", self.share), ("final_share", self.final_share)):
            if value is not None and not 0 < value <= 1:
                raise InputError(f"{name}={value}: the share of tokens that are hidden is above 0, and at most 1")
        if min(self.replaced, self.random) < 0 or self.replaced + self.random > 1:
            raise InputError(f"replaced={self.replaced} and random={self.random}: two shares of one whole")
        if self.whole_words and self.spans > 1:
            raise InputError(f"whole_words=true and spans={self.spans}: one of the two says what is hidden together")
        if self.spans < 1:
            raise InputError(f"spans={self.spans}: the longest span has one token at least")

    def extra_ids(self, tokenizer: Any) -> int:
        return spare_ids(tokenizer, self.mask_id)

    def resolved(self, model: Model) -> Masked:
        """With the ids of the model's tokenizer, where the fields do not say otherwise."""
        hides = mask_id(model, self.mask_id)
        special = special_ids(model.tokenizer, hides, self.special)
        return dataclasses.replace(self, mask_id=hides, special=special, vocab=self.vocab or model.tokenizer.vocab)

    def sampling(self, model: Model, length: int) -> dict[str, Any]:
        if model.network.causal or self.mask_id is None:
            return {}
        return {"denoise": {**(model.sampling.get("denoise") or {}), "mask_id": self.mask_id}}

    def shapes(self, rows: int, length: int) -> Shapes:
        return self._with_starts(batch_shapes(self.fields, rows, length))

    def _with_starts(self, shapes: Shapes) -> Shapes:
        of_words = jax.ShapeDtypeStruct(shapes["tokens"].shape, jnp.bool_)
        return {**shapes, "starts": of_words} if self.whole_words else shapes

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        packed = pack_tokens(data, length - 1, model.tokenizer)  # no shift: a row is its own target
        return self.with_words(packed, model, ("tokens", "segments", "loss"))

    def with_words(self, packed: Packed, model: Model, kept: tuple[str, ...]) -> Packed:
        columns = {k: v for k, v in packed.columns.items() if k in kept}
        if self.whole_words:
            starts = word_starts(model.tokenizer)
            table_V = np.concatenate([starts, np.ones(model.vocab - len(starts), bool)])
            columns["starts"] = table_V[columns["tokens"]] | np.isin(columns["tokens"], self.special)
        return Packed(columns)

    def hide(self, ctx: Context, batch: dict[str, jax.Array], tokens_BT: jax.Array, key: jax.Array):
        """(inputs, chosen) of the first T positions of a batch, `[B, T]` like tokens_BT."""
        T = tokens_BT.shape[1]
        segments_BT = batch["segments"][:, :T]
        special_BT = segments_BT == 0
        if is_shifted(ctx.network):  # nobody says anything of the first token of a text
            special_BT |= begins(segments_BT)
        if "loss" in batch:  # a prompt is read, not guessed
            special_BT |= batch["loss"][:, :T] <= 0
        for i in self.special:
            special_BT |= tokens_BT == i
        draw, cut = jax.random.split(key)
        groups_BT = None
        if self.whole_words:
            groups_BT = words(batch["starts"][:, :T])
        elif self.spans > 1:
            groups_BT = spans(cut, tokens_BT.shape, self.spans)
        share = self.share
        if self.final_share is not None:
            share = self.share + (self.final_share - self.share) * jnp.minimum(ctx.progress, 1.0)
        return mask_tokens(
            draw,
            tokens_BT,
            special_BT,
            share=share,
            mask_id=self.mask_id,
            vocab=self.vocab,
            replaced=self.replaced,
            random=self.random,
            groups_BT=groups_BT,
        )

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        tokens_BT = batch["tokens"]
        inputs_BT, chosen_BT = self.hide(ctx, batch, tokens_BT, ctx.key)
        return masked_loss(ctx, params, inputs_BT, batch["segments"], tokens_BT, chosen_BT, batch.get("loss"))


def special_ids(tokenizer: Any, mask: int, more: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Ids that are never hidden: those that stand for no text, and the mask itself."""
    known = {tokenizer.bos, tokenizer.eos, tokenizer.pad, mask, *getattr(tokenizer, "special_ids", ()), *more}
    return tuple(sorted(int(i) for i in known - {None}))


def masked_loss(
    ctx: Context,
    params: Params,
    inputs_BT: jax.Array,
    segments_BT: jax.Array,
    labels_BT: jax.Array,
    chosen_BT: jax.Array,
    how_much_BT: jax.Array | None = None,
) -> Loss:
    """The loss of the chosen positions (how_much_BT: what each counts), and how many of them the model's best guess
    has right."""
    logits_BTV = own_logits(ctx.apply, is_shifted(ctx.network), params, inputs_BT, segments_BT)
    weight_BT = chosen_BT.astype(jnp.float32) * (1.0 if how_much_BT is None else how_much_BT)
    right_BT = (jnp.argmax(logits_BTV, axis=-1) == labels_BT).astype(jnp.float32)
    count = jnp.sum(weight_BT)
    total = weighted_sum(token_nll(logits_BTV, labels_BT), weight_BT)
    return Loss({"nll": Term(total, count)}, {"masked_accuracy": (jnp.sum(weight_BT * right_BT), count)})
