"""One set of weights that writes from left to right and fills gaps: rows read causally and rows read both ways.

    GPT-BERT (arXiv:2410.24159)     Hybrid(causal=1 / 16): so many rows are causal, the others masked, in one batch
    AntLM (arXiv:2412.03275)        Hybrid(phases=(("causal", 4), ("masked", 16), ("causal", 4))): one after the other
    a weighted sum of both losses   Hybrid(causal=0.5, both=True): every row is read twice

What is masked is guessed at the position before ("masked next-token prediction"), so that one head serves both and the
checkpoint is an ordinary decoder: exported, `transformers` gives both kinds of logits (`is_causal=False`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Packed, pack_tokens
from recursive_jax.errors import InputError
from recursive_jax.mesh import rows_like
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Params, Shapes, Term, batch_shapes
from recursive_jax.objectives.causal import targets, token_nll, weighted_sum
from recursive_jax.objectives.masked import Masked

KINDS = ("causal", "masked")


@dataclasses.dataclass(frozen=True)
class Hybrid(Masked):
    """Next-token prediction and masked next-token prediction on one model with `model.causal: true`.

    causal: the share of rows that are read from left to right (both: the weight of their loss; the other's is 1 less
    it). phases: in their place, which of the two is trained when, (name, length) one after the other; the lengths are
    relative to each other. The loss is the mean over rows of each one's own mean; with `both` each kind's is the mean
    over its tokens. Other fields: as in `Masked`."""

    causal: float = 1 / 16
    both: bool = False
    phases: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.causal <= 1:
            raise InputError(f"causal={self.causal}: a share of the rows, between 0 and 1")
        wrong = [p for p in self.phases if len(p) != 2 or p[0] not in KINDS or not p[1] > 0]
        if wrong:
            raise InputError(f"phases={wrong[0]!r}: a pair of {' or '.join(KINDS)} and a length above 0 is wanted")
        if self.phases and self.both:
            raise InputError("phases and both: the two losses one after the other, or both at once")

    def resolved(self, model: Model) -> Hybrid:
        if not model.network.causal:
            raise InputError("Hybrid trains one model for both, and this one has model.causal=false: it cannot write")
        return super().resolved(model)

    def shapes(self, rows: int, length: int) -> Shapes:
        return self._with_starts(batch_shapes(self.fields, rows, length + 1))

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        packed = pack_tokens(data, length, model.tokenizer)
        return self.with_words(packed, model, ("tokens", "segments", "loss"))

    def share_of_causal(self, progress: Any) -> Any:
        """The share of rows that are causal now."""
        if not self.phases:
            return self.causal
        ends = np.cumsum([length for _, length in self.phases])
        which = jnp.searchsorted(jnp.asarray(ends / ends[-1], jnp.float32), progress, side="right")
        is_causal = jnp.asarray([name == "causal" for name, _ in self.phases], jnp.float32)
        return is_causal[jnp.minimum(which, len(self.phases) - 1)]

    def loss(self, ctx: Context, params: Params, batch: Mapping[str, jax.Array]) -> Loss:
        inputs_BT, segments_BT, labels_BT, weight_BT = targets(batch)
        B, T = inputs_BT.shape
        pick, draw = jax.random.split(ctx.key)
        hidden_BT, chosen_BT = self.hide(ctx, batch, inputs_BT, draw)
        share = self.share_of_causal(ctx.progress)
        # The label of a position is the token behind it: what is hidden there is guessed here.
        masked_BT = jnp.pad(chosen_BT[:, 1:], ((0, 0), (0, 1))) * weight_BT
        if self.both:
            nll_BT, right_BT = read(ctx, params, hidden_BT, segments_BT, labels_BT, jnp.full((B,), T))
            plain_BT, _ = read(ctx, params, inputs_BT, segments_BT, labels_BT, jnp.zeros((B,), jnp.int32))
            return losses(plain_BT, weight_BT, nll_BT, masked_BT, right_BT, share)
        causal_B = rows_like(jax.random.uniform(pick, (B,)), B) < share
        rows_BT = jnp.where(causal_B[:, None], inputs_BT, hidden_BT)
        nll_BT, right_BT = read(ctx, params, rows_BT, segments_BT, labels_BT, jnp.where(causal_B, 0, T))
        causal_BT = jnp.where(causal_B[:, None], weight_BT, 0.0)
        masked_BT = jnp.where(causal_B[:, None], 0.0, masked_BT)
        # The mean over rows of each row's own mean: a kind counts by its rows, however few of them a micro-batch has.
        count_B = jnp.sum(causal_BT + masked_BT, axis=1)
        sum_B = jnp.sum(jnp.where(causal_BT + masked_BT > 0, (causal_BT + masked_BT) * nll_BT, 0.0), axis=1)
        learnt_B = (count_B > 0).astype(jnp.float32)
        metrics = {
            "nll_causal": (weighted_sum(nll_BT, causal_BT), jnp.sum(causal_BT)),
            "nll_masked": (weighted_sum(nll_BT, masked_BT), jnp.sum(masked_BT)),
            "masked_accuracy": (jnp.sum(masked_BT * right_BT), jnp.sum(masked_BT)),
        }
        return Loss({"nll": Term(jnp.sum(sum_B / jnp.maximum(count_B, 1e-9)), jnp.sum(learnt_B))}, metrics)


def read(
    ctx: Context, params: Params, inputs_BT: jax.Array, segments_BT: jax.Array, labels_BT: jax.Array, prefix_B: Any
) -> tuple[jax.Array, jax.Array]:
    """(-log p of the labels, whether the best guess is right), each position with the first `prefix_B` tokens of its
    row and all before it in sight."""
    prefix_B = rows_like(jnp.asarray(prefix_B, jnp.int32), len(inputs_BT))
    logits_BTV = ctx.apply(params, inputs_BT, segments_BT, prefix_B=prefix_B)
    right_BT = (jnp.argmax(jax.lax.stop_gradient(logits_BTV), axis=-1) == labels_BT).astype(jnp.float32)
    return token_nll(logits_BTV, labels_BT), right_BT


def losses(causal_nll_BT, causal_BT, masked_nll_BT, masked_BT, right_BT, share: Any) -> Loss:
    terms = {
        "causal": Term(weighted_sum(causal_nll_BT, causal_BT), jnp.sum(causal_BT), jnp.float32(share)),
        "masked": Term(weighted_sum(masked_nll_BT, masked_BT), jnp.sum(masked_BT), 1.0 - jnp.float32(share)),
    }
    return Loss(terms, {"masked_accuracy": (jnp.sum(masked_BT * right_BT), jnp.sum(masked_BT))})
