"""Retrieval by embeddings: an exact index, and how well it finds what is relevant.

Shapes: Q queries, P passages, D width, k found."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.errors import InputError
from recursive_jax.generate.score import embed
from recursive_jax.models.model import Model
from recursive_jax.objectives.grit import framed

BLOCK = 4096  # queries that are scored at once


def embed_texts(model: Model, texts: Sequence[str], instruction: str = "", dtype: str = "float32") -> np.ndarray:
    """Unit vectors as GRIT has them, float32 `[N, D]`: read in both directions, the mean over a text's own tokens; of
    an encoder, the mean over all of them."""
    if not model.network.causal:
        if instruction:
            raise InputError("an encoder's queries have no instruction of GRIT's; put it into the texts")
        return embed(model, texts, dtype=dtype)
    pieces = [framed(text, instruction, model.tokenizer) for text in texts]
    ids = [np.asarray(p[: model.max_length], np.int32) for p, _ in pieces]
    return embed(model, ids, both_ways=True, skip=[before for _, before in pieces], dtype=dtype)


def nearest(queries_QD: np.ndarray, passages_PD: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the k passages with the largest inner product, the nearest first: int32 `[Q, k]`; their products,
    float32 `[Q, k]`). Exact: every passage is looked at; of equals, the first. Raises InputError for no passages."""
    if not len(passages_PD):
        raise InputError("there are no passages to look through")
    k = min(k, len(passages_PD))
    found = [_nearest(np.asarray(queries_QD[i : i + BLOCK], np.float32), np.asarray(passages_PD, np.float32), k)
             for i in range(0, len(queries_QD), BLOCK)]  # fmt: skip
    if not found:
        return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
    products, numbers = (np.concatenate(parts) for parts in zip(*jax.device_get(found), strict=True))
    return numbers.astype(np.int32), products


@functools.partial(jax.jit, static_argnums=2)
def _nearest(queries_QD, passages_PD, k):
    return jax.lax.top_k(jnp.matmul(queries_QD, passages_PD.T, precision=jax.lax.Precision.HIGHEST), k)


def retrieval_metrics(ranked: Sequence[Sequence[int]], relevant: Sequence[Any], k: int = 10) -> dict[str, float]:
    """`mrr` (1 / rank of the first relevant passage, 0 where none is found), `ndcg_<k>` (gains 1, discounts log2) and
    `recall_1`, `recall_<k>` (the share of a query's relevant passages among the first), means over queries.

    ranked: passages of each query, the best first. relevant: of each query the right passage, or several. Raises
    InputError for lists of unlike length and a query without any."""
    sets = [{int(r)} if np.ndim(r) == 0 else {int(x) for x in r} for r in relevant]
    if len(ranked) != len(sets) or not all(sets):
        raise InputError(f"{len(ranked)} rankings and {len(sets)} queries: each with one relevant passage at least")
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    mrr, ndcg, first, recall = [], [], [], []
    for found, right in zip(ranked, sets, strict=True):
        hits = np.array([int(p) in right for p in found[:k]], float)
        mrr.append(1.0 / (1 + int(np.argmax(hits))) if hits.any() else 0.0)
        ndcg.append((hits * discount[: len(hits)]).sum() / discount[: len(right)].sum())
        first.append(hits[:1].sum() / len(right))
        recall.append(hits.sum() / len(right))
    means = {"mrr": mrr, f"ndcg_{k}": ndcg, "recall_1": first, f"recall_{k}": recall}
    return {name: float(np.mean(values)) for name, values in means.items()}


def evaluate_retrieval(
    model: Model, queries: Sequence[str], passages: Sequence[str], relevant: Sequence[Any], *, k: int = 10,
    instruction: str = "",
) -> dict[str, float]:  # fmt: skip
    """How well the model's embeddings find the relevant passages (`retrieval_metrics`). instruction: before queries."""
    vectors_QD, vectors_PD = embed_texts(model, queries, instruction), embed_texts(model, passages)
    return retrieval_metrics(nearest(vectors_QD, vectors_PD, k)[0].tolist(), relevant, k)
