"""Learning representations: what belongs together is near, all else in the batch is far (InfoNCE, arXiv:1807.03748)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Example, Packed, stack_groups
from recursive_jax.errors import InputError
from recursive_jax.mesh import rows_like, whole
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Params, Shapes, Term, WholeBatch, batch_shapes


def info_nce(queries_QD: jax.Array, passages_PD: jax.Array, *, temperature: float, positives_Q: jax.Array) -> jax.Array:
    """-log softmax over all passages of (query . passage / temperature) at each query's positive: float32 `[Q]`.
    Vectors are taken as they are given. positives_Q: int32, which passage belongs to each query."""
    scores_QP = queries_QD @ passages_PD.T / temperature
    column_QP = jax.lax.broadcasted_iota(jnp.int32, scores_QP.shape, 1)
    positive_Q = jnp.sum(jnp.where(column_QP == positives_Q[:, None], scores_QP, 0.0), axis=-1)
    return jax.nn.logsumexp(scores_QP, axis=-1) - positive_Q


def pooled_states(states_BTD: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """The weighted mean of each row's states: float32 `[B, D]`."""
    states_BTD, weight_BT = (rows_like(x, len(weight_BT)) for x in (states_BTD.astype(jnp.float32), weight_BT))
    pooled_BD = jnp.einsum("btd,bt->bd", states_BTD, weight_BT)
    return pooled_BD / jnp.maximum(jnp.sum(weight_BT, axis=1, keepdims=True), 1.0)


def normalized(x: jax.Array) -> jax.Array:
    """Scaled to length 1 along the last axis."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def mean_states(states_BTD: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """The weighted mean of each row's states, scaled to length 1: float32 `[B, D]`."""
    return normalized(pooled_states(states_BTD, weight_BT))


@dataclasses.dataclass(frozen=True)
class InfoNCE(WholeBatch):
    """Queries find their passages among all passages of the batch, hard negatives included. The data has the columns
    `query` and `positive`, and may have `negative`: texts, or token ids.

    temperature: of the softmax. Representations are the mean of the last states over a text's tokens, scaled to length
    1. Gradients are those of the whole batch over all devices, for any train.gradient_accumulation (GradCache)."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments")
    reads: ClassVar[str] = "states"

    temperature: float = 0.05

    def shapes(self, rows: int, length: int) -> Shapes:
        return batch_shapes(self.fields, rows, 2, length)

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        names = ["query", "positive", *(["negative"] if data.has("negative") else [])]
        texts = [data.column(name) for name in names]
        tokenizer = model.tokenizer
        framed = getattr(tokenizer, "encode_framed", None) or (lambda ts: [tokenizer.encode(t) for t in ts])

        def ids(text: str | list[int]) -> np.ndarray:
            found = np.asarray(framed([text])[0] if isinstance(text, str) else text, np.int32)[:length]
            if not len(found):
                raise InputError("a query or passage has no tokens; leave such rows out")
            return found

        groups = [[Example(ids(t), np.ones(len(ids(t)), bool)) for t in row] for row in zip(*texts, strict=True)]
        packed = stack_groups(groups, length - 1, tokenizer.pad)  # no shift: states are pooled
        return Packed({name: packed.columns[name] for name in ("tokens", "segments")})

    def represent(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """`[B, G, D]`: query, positive and, where there is one, negative."""
        members = []
        for g in range(batch["tokens"].shape[1]):
            segments_BT = batch["segments"][:, g]
            states_BTD = ctx.apply(params, batch["tokens"][:, g], segments_BT, hidden=True)
            members.append(mean_states(states_BTD, segments_BT.astype(jnp.float32)))
        return jnp.stack(members, axis=1)

    def loss_of(self, ctx: Context, params: Params, represented: jax.Array, batch: dict[str, jax.Array]) -> Loss:
        losses_B, right_B = in_batch(represented, self.temperature)
        count = jnp.float32(len(losses_B))
        return Loss({"info_nce": Term(jnp.sum(losses_B), count)}, {"accuracy": (jnp.sum(right_B), count)})


def in_batch(vectors_BGD: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(loss of each query against all passages of the batch, whether its own is the nearest): float32 `[B]` each.
    Members: query, its passage, and its hard negatives."""
    B, G = vectors_BGD.shape[:2]
    queries_BD = vectors_BGD[:, 0]
    # Every device scores its own queries against all passages: the positives first, then the negatives.
    passages_PD = jnp.concatenate([whole(vectors_BGD[:, g]) for g in range(1, G)])
    positives_B = jnp.arange(B, dtype=jnp.int32)
    losses_B = info_nce(queries_BD, passages_PD, temperature=temperature, positives_Q=positives_B)
    best_B = jnp.argmax(jax.lax.stop_gradient(queries_BD @ passages_PD.T), axis=-1)
    return losses_B, (best_B == positives_B).astype(jnp.float32)
