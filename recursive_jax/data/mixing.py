"""Batches of several kinds of rows at once, and batches whose rows come from one source each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recursive_jax.data.packing import Batches, Columns, Packed
from recursive_jax.errors import InputError
from recursive_jax.identity import fingerprint


class OneSource:
    """Rows whose batches are of one source each, sources drawn by their number of rows: negatives of the same batch are
    then of the same kind (arXiv:2402.09906, sec. 3.2). sources: of each row. Batch = f(seed, step)."""

    def __init__(self, rows: Packed, sources: Sequence[Any]):
        if len(rows) != len(sources):
            raise InputError(f"{len(rows)} rows and {len(sources)} sources: one for each row is wanted")
        self.rows = rows
        names = sorted({str(s) for s in sources})
        self.members = [np.flatnonzero([str(s) == name for s in sources]) for name in names]
        self.shares = np.array([len(m) for m in self.members]) / len(rows)
        self.columns, self.positions = rows.columns, rows.positions
        self.fingerprint = fingerprint(
            {"one source": 1, "rows": rows.fingerprint, "sources": [str(s) for s in sources]}
        )

    def begin(self, batch: int, seed: int) -> None:
        small = min(map(len, self.members))
        if small < batch:
            raise InputError(
                f"a source has {small} rows and a batch takes {batch} of one source: rows would stand in it twice, "
                "each the other's negative; lower train.batch, or give small sources one name"
            )
        self.batch, self.seed = batch, seed

    def next(self, step: int, params: Any = None, state: Any = None) -> Columns:
        rng = np.random.default_rng([self.seed, step])
        members = self.members[rng.choice(len(self.members), p=self.shares)]
        at = rng.permutation(members)[: self.batch]
        return {name: column[at] for name, column in self.rows.columns.items()}

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        return {**self.rows.summary(steps, batch), "sources": len(self.members)}


class SideBySide:
    """Several kinds of rows in one batch, columns called `<kind>/<column>`. parts: by kind. rows: how many of a kind a
    batch holds, where that is not the batch's own size."""

    def __init__(self, parts: Mapping[str, Batches], rows: Mapping[str, int]):
        self.parts, self.sizes = dict(parts), dict(rows)
        named = {kind: part.fingerprint for kind, part in parts.items()}
        self.fingerprint = fingerprint({"side by side": named, "rows": self.sizes})
        self.positions = sum(getattr(p, "positions", 1) for p in parts.values())

    @property
    def columns(self) -> Columns:
        return {f"{k}/{name}": c for k, p in self.parts.items() for name, c in p.columns.items()}

    def begin(self, batch: int, seed: int) -> None:
        for number, (kind, part) in enumerate(self.parts.items()):
            part.begin(self.sizes.get(kind) or batch, seed + number)

    def next(self, step: int, params: Any = None, state: Any = None) -> Columns:
        drawn = {kind: part.next(step, params, state) for kind, part in self.parts.items()}
        return {f"{kind}/{name}": column for kind, columns in drawn.items() for name, column in columns.items()}

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        each = {kind: p.summary(steps, self.sizes.get(kind) or batch) for kind, p in self.parts.items()}
        return {"tokens": sum(s["tokens"] for s in each.values()), **each}
