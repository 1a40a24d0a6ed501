"""LinkBERT (arXiv:2203.15827): masked language modelling over two segments, and what they have to do with each other.

    [CLS] A [SEP] B [SEP]          loss = MLM + cross-entropy of (contiguous, random, linked) at [CLS]

A fact of one document that needs one of another is learnt where both stand in one context."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.links import RELATIONS, Linked, LinkGraph, PairSource
from recursive_jax.data.packing import Batches, Columns
from recursive_jax.errors import InputError
from recursive_jax.identity import fingerprint
from recursive_jax.mesh import spec
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Extra, Loss, Params, Term
from recursive_jax.objectives.causal import token_nll, weighted_sum
from recursive_jax.objectives.masked import Masked


class Pairs:
    """Pairs of segments drawn anew at every step: batch = f(seed, step)."""

    def __init__(self, source: PairSource, length: int, bos: int, eos: int, pad: int | None):
        self.source, self.length, self.bos, self.eos, self.pad = source, length, bos, eos, 0 if pad is None else pad
        self.positions = length
        ids = [np.concatenate([*s, [-1]]) if len(s) else np.array([-1]) for s in source.segments]
        named = {"pairs": 1, "length": length, "relations": source.relations, "links": source.graph.neighbours}
        self.fingerprint = fingerprint({**named, "segments": ids})

    def begin(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def next(self, step: int, params: Any = None, state: Any = None) -> Columns:
        rng = np.random.default_rng([self.seed, step])
        tokens = np.full((self.batch, self.length), self.pad, np.int32)
        segments, types = np.zeros_like(tokens), np.zeros_like(tokens)
        relation = np.zeros(self.batch, np.int32)
        half = (self.length - 3) // 2
        for n in range(self.batch):
            a, b, relation[n] = self.source.draw(rng)
            a, b = a[:half], b[: self.length - 3 - min(len(a), half)]
            ids = np.concatenate([[self.bos], a, [self.eos], b, [self.eos]])
            tokens[n, : len(ids)], segments[n, : len(ids)] = ids, 1
            types[n, len(a) + 2 : len(ids)] = 1
        return {"tokens": tokens, "segments": segments, "types": types, "relation": relation}

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        return {"tokens": steps * batch * self.length, "documents": len(self.source.segments)}


@dataclasses.dataclass(frozen=True)
class LinkedPairs(Masked):
    """On a model with `model.causal: false` and `model.token_types: 2`. The data are documents with links
    (`data.links.Linked`, or dicts with `name`, `text` and `links`). relations: those that are drawn, as often each.
    segment: tokens of a segment; default: half of a row. Other fields: as in `Masked`. Its pooler and the head of the
    relations are extra params (`Trained.extra`); `rounds.linkbert.save_linkbert` exports them."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "types", "relation")

    relations: tuple[str, ...] = RELATIONS
    segment: int = 0

    def resolved(self, model: Model) -> LinkedPairs:
        config = getattr(model.network, "config", None)
        if config is None or config.causal or config.token_types < 2:
            raise InputError(
                "LinkedPairs is for an encoder of two kinds of segments: model.causal=false, token_types=2"
            )
        return super().resolved(model)

    def rows(self, given: Any, tokenizer: Any) -> list[Linked]:
        found = []
        for n, one in enumerate(given):
            if isinstance(one, Mapping):
                missing = [key for key in ("name", "text") if key not in one]
                if missing:
                    raise InputError(f"document {n}: no {missing[0]!r}; name, text and links are wanted")
                one = Linked(str(one["name"]), str(one["text"]), tuple(one.get("links") or ()))
            if not isinstance(one, Linked):
                raise InputError(
                    f"document {n} is a {type(one).__name__}: a Linked, or a dict with name, text and links"
                )
            found.append(one)
        return found

    def pack(self, data: list[Linked], model: Model, length: int) -> Batches:
        tokenizer, half = model.tokenizer, (length - 3) // 2
        size = self.segment or half
        if not 0 < size <= half:
            raise InputError(f"segment={size}: a row of {length} holds two segments of 1 to {max(half, 0)} tokens")
        if self.whole_words:
            raise InputError("whole_words is not for pairs of segments: spans hides neighbours together")
        cut = lambda ids: [np.asarray(ids[i : i + size], np.int32) for i in range(0, len(ids), size)]
        segments = [cut(tokenizer.encode(d.text)) for d in data]
        source = PairSource(segments, LinkGraph.of(data), self.relations)
        return Pairs(source, length, tokenizer.bos, tokenizer.eos, tokenizer.pad)

    def init(self, key: jax.Array, model: Model) -> Extra:
        D = model.network.states_size
        pool, relate = jax.random.split(key)
        dense = 0.02 * jax.random.normal(pool, (D, D))
        head = 0.02 * jax.random.normal(relate, (D, len(RELATIONS)))
        return Extra({"pooler": dense, "pooler_bias": jnp.zeros(D), "relation": head, "relation_bias": jnp.zeros(3)})

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        tokens_BT, segments_BT = batch["tokens"], batch["segments"]
        inputs_BT, chosen_BT = self.hide(ctx, batch, tokens_BT, ctx.key)
        states_BTD = ctx.apply(params, inputs_BT, segments_BT, batch["types"], hidden=True)
        logits_BTV = ctx.apply(params, None, states_BTD=states_BTD)
        weight_BT = chosen_BT.astype(jnp.float32)
        right_BT = (jnp.argmax(logits_BTV, axis=-1) == tokens_BT).astype(jnp.float32)
        logits_BR = relation_logits(params.extra, states_BTD)
        label_B1 = batch["relation"][:, None]
        picked = jnp.sum(jnp.where(jnp.arange(len(RELATIONS))[None] == label_B1, logits_BR, 0.0), axis=-1)
        cost_B = jax.nn.logsumexp(logits_BR, axis=-1) - picked
        found_B = (jnp.argmax(logits_BR, axis=-1) == batch["relation"]).astype(jnp.float32)
        count, rows = jnp.sum(weight_BT), jnp.float32(len(tokens_BT))
        terms = {
            "mlm": Term(weighted_sum(token_nll(logits_BTV, tokens_BT), weight_BT), count),
            "relation": Term(jnp.sum(cost_B), rows),
        }
        metrics = {
            "masked_accuracy": (jnp.sum(weight_BT * right_BT), count),
            "relation_accuracy": (jnp.sum(found_B), rows),
        }
        return Loss(terms, metrics)


def relation_logits(extra: Any, states_BTD: jax.Array) -> jax.Array:
    """Float32 `[B, 3]` of RELATIONS, from the first token's state through BERT's pooler."""
    first_BD = states_BTD[:, 0].astype(jnp.float32)
    layout = spec("batch", None)
    pooled_BD = jnp.tanh(jnp.einsum("bd,de->be", first_BD, extra["pooler"], out_sharding=layout) + extra["pooler_bias"])
    return jnp.einsum("bd,dr->br", pooled_BD, extra["relation"], out_sharding=layout) + extra["relation_bias"]
