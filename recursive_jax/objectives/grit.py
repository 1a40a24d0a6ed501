"""Generative representational instruction tuning: one model that embeds and writes (GRIT, arXiv:2402.09906).

To embed, it reads in both directions and takes the mean state of a text's own tokens: the instruction before them is
read, not pooled. To write, it reads from left to right. The loss is L_rep + L_gen (eq. 3): InfoNCE among all passages
of the batch, over all devices and micro-batches (GradCache), and next-token prediction on answers.

Shapes: B rows, G members of a group (query, passage, hard negatives), T positions, D width."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.given import as_dataset
from recursive_jax.data.mixing import OneSource, SideBySide
from recursive_jax.data.packing import Batches, Example, Packed, pack_tokens, stack_groups
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Params, Shapes, Term, WholeBatch, batch_shapes
from recursive_jax.objectives.causal import targets, token_nll
from recursive_jax.objectives.contrastive import in_batch, normalized, pooled_states

MEMBERS = ("query", "positive", "negative")


def framed(text: str, instruction: str = "", tokenizer: Any = None) -> tuple[list[int], int]:
    """(ids, how many of them are not pooled): the start token, GritLM's frame and the instruction, then the text; no
    end token."""
    head = f"<|user|>\n{instruction}\n<|embed|>\n" if instruction else "<|embed|>\n"
    start = [tokenizer.bos] if getattr(tokenizer, "has_bos", True) else []
    before = [*start, *tokenizer.encode(head)]
    return [*before, *tokenizer.encode(text)], len(before)


@dataclasses.dataclass(frozen=True)
class Grit(WholeBatch):
    """Rows with `query` and `positive` (and `negative`: each a text, or a pair of instruction and text) are embedded;
    all other rows are learnt as `Causal` learns them. A column `source` says where a row of the first kind is from:
    each batch has one source.

    temperature: of InfoNCE. generative: the weight of L_gen. dimensions: first so many entries of a vector that have to
    do alone, too (Matryoshka, arXiv:2205.13147). generative_batch: rows of a batch that are written; default: as many
    as are embedded."""

    fields: ClassVar[tuple[str, ...]] = ("embed/tokens", "embed/segments", "embed/pool")

    temperature: float = 0.02
    generative: float = 1.0
    dimensions: tuple[int, ...] = ()
    generative_batch: int = 0

    def rows(self, given: Any, tokenizer: Any) -> Dataset:
        if isinstance(given, Dataset):
            return given
        given = list(given)
        pairs = [r for r in given if isinstance(r, dict) and "query" in r]
        others = [r for r in given if not (isinstance(r, dict) and "query" in r)]
        if not pairs:
            raise InputError("GRIT learns to embed from rows with `query` and `positive`; there is none")
        names = [*MEMBERS] if any("negative" in r for r in pairs) else [*MEMBERS[:2]]
        for n, row in enumerate(pairs):
            missing = [name for name in names if not row.get(name)]
            if missing:
                raise InputError(f"pair {n} has no {missing[0]!r}: all pairs have {', '.join(names)}")
        names.append("source")
        listed = lambda x: None if x is None else [x] if isinstance(x, str) else list(x)
        table = [{n: r.get(n) if n == "source" else listed(r.get(n)) for n in names} for r in pairs]
        embedded = Dataset.from_rows(table)
        if not others:
            return embedded
        written = as_dataset(others, tokenizer)
        kept = [n for n in written.table.column_names if n in embedded.table.column_names or n in ("loss", "weight")]
        written = Dataset(written.table.select(kept))
        for name in names:
            kind = embedded.table.schema.field(name).type
            written = written.with_column(name, pa.nulls(len(written), kind))
        if written.has("loss"):
            embedded = embedded.with_column("loss", pa.nulls(len(embedded), written.table.schema.field("loss").type))
        return Dataset.concat([embedded, written])

    def shapes(self, rows: int, length: int) -> Shapes:
        found = batch_shapes(("tokens", "segments", "pool"), rows, 2, length)
        found = {f"embed/{name}": shape for name, shape in found.items()}
        if self.generative:
            written = batch_shapes(("tokens", "segments"), self.generative_batch or rows, length + 1)
            found |= {f"write/{name}": shape for name, shape in written.items()}
        return found

    def pack(self, data: Dataset, model: Model, length: int) -> Batches:
        tokenizer = model.tokenizer
        if not data.has("query") or not data.has("positive"):
            raise InputError("GRIT learns to embed from the columns `query` and `positive`")
        is_pair = [q is not None for q in data.column("query")]
        pairs = data.where(lambda row: row["query"] is not None) if not all(is_pair) else data
        names = [n for n in MEMBERS if data.has(n)]

        def example(member: Any) -> Example:
            instruction, text = member if not isinstance(member, str) and len(member) == 2 else ("", _text(member))
            ids, before = framed(text, instruction, tokenizer)
            ids = ids[:length]
            if len(ids) <= before:
                raise InputError(f"train.length={length} leaves nothing of {text[:40]!r} behind its instruction")
            return Example(np.asarray(ids, np.int32), np.arange(len(ids)) >= before)

        groups = [[example(m) for m in row] for row in zip(*(pairs.column(n) for n in names), strict=True)]
        columns = stack_groups(groups, length - 1, tokenizer.pad).columns
        stacked = Packed({"tokens": columns["tokens"], "segments": columns["segments"], "pool": columns["loss"]})
        sources = pairs.column("source") if pairs.has("source") else [None] * len(pairs)
        parts: dict[str, Batches] = {"embed": OneSource(stacked, sources)}
        if not all(is_pair) and self.generative:
            parts["write"] = pack_tokens(data.where(lambda row: row["query"] is None), length, tokenizer)
        return SideBySide(parts, {"write": self.generative_batch})

    def represent(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """vectors `[B, G, D]`, not scaled; of the written rows the sum of their losses, and of their weights, `[B]`."""
        members = []
        for g in range(batch["embed/tokens"].shape[1]):
            tokens_BT, segments_BT = batch["embed/tokens"][:, g], batch["embed/segments"][:, g]
            states_BTD = ctx.apply(params, tokens_BT, segments_BT, hidden=True, causal=False)
            members.append(pooled_states(states_BTD, batch["embed/pool"][:, g].astype(jnp.float32)))
        found = {"vectors": jnp.stack(members, axis=1)}
        if "write/tokens" in batch:
            written = {k.removeprefix("write/"): v for k, v in batch.items() if k.startswith("write/")}
            inputs, segments, labels, weight_BT = targets(written)
            nll_BT = token_nll(ctx.apply(params, inputs, segments), labels)
            found["nll"] = jnp.sum(jnp.where(weight_BT > 0, weight_BT * nll_BT, 0.0), axis=1)
            found["count"] = jnp.sum(weight_BT, axis=1)
        return found

    def loss_of(self, ctx: Context, params: Params, represented: Any, batch: dict[str, jax.Array]) -> Loss:
        vectors_BGD = represented["vectors"]
        sizes = (vectors_BGD.shape[-1], *self.dimensions)
        each = [in_batch(normalized(vectors_BGD[..., :size]), self.temperature) for size in sizes]
        count = jnp.float32(len(vectors_BGD))
        terms = {"rep": Term(sum(jnp.sum(losses_B) for losses_B, _ in each) / len(sizes), count)}
        if "nll" in represented:
            terms["gen"] = Term(jnp.sum(represented["nll"]), jnp.sum(represented["count"]), self.generative)
        return Loss(terms, {"accuracy": (jnp.sum(each[0][1]), count)})


def _text(member: Any) -> str:
    return member if isinstance(member, str) else member[0]
