"""What an objective is: a frozen value that packs rows, adds what it needs to the params, and gives sums to minimise.

    @dataclass(frozen=True)
    class Causal(Objective):
        def loss(self, ctx, params, batch):
            logits = ctx.apply(params, batch["tokens"][:, :-1], batch["segments"][:, :-1])
            ...
            return Loss({"nll": Term(total, count)})

Everything else is done once, in `train/`: gradient accumulation, sharding, dropout keys, checkpoints, resume. An
objective that compares all rows of a batch with one another is a `WholeBatch`: its gradient goes through GradCache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.given import as_dataset
from recursive_jax.data.packing import Batches, Columns, pack_tokens
from recursive_jax.errors import InputError
from recursive_jax.identity import Value
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.models.read import Read, read_tokens


@struct.dataclass
class Term:
    """One part of a loss. sum, count: scalars over the rows of this batch. Sums and counts of micro-batches and devices
    add up before the one division (a mean of means would weight short rows more). The loss is weight * sum / count."""

    sum: jax.Array
    count: jax.Array
    weight: Any = 1.0


@struct.dataclass
class Loss:
    """terms: by name, each with its own denominator. metrics: name -> (sum, count), logged as their quotient. state:
    the objective's mutable state after this batch (None: unchanged)."""

    terms: dict[str, Term]
    metrics: dict[str, tuple[jax.Array, jax.Array]] = struct.field(default_factory=dict)
    state: Any = None


@struct.dataclass
class Params:
    """What trains. model: of the network (of an adapted one, its adapter). extra: of the objective."""

    model: Any
    extra: Any


@dataclasses.dataclass(frozen=True)
class Extra:
    """What an objective adds to a training. params: train with the model (a value head); state: carried from step to
    step without a gradient (a running mean). Pytrees of arrays."""

    params: Any = dataclasses.field(default_factory=dict)
    state: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a loss may use. apply(params, *inputs, **kw) -> outputs: the network, in the compute dtype, with its frozen
    part and its dropout; logits of a Transformer have columns beyond the vocabulary, which hold -1e30 (leave them out
    of means over the vocabulary: `model.vocab`). read(params, inputs, segments, labels) -> Read: the labels'
    log-probabilities, without the logits of all positions at once (`models/read.py`); read(..., of=name): a frozen
    model's. others: name -> `apply` of a frozen model. key: for this micro-batch of this step alone. step: int32, from
    0. progress: float32, the share of the training's steps that are done. state: the objective's."""

    apply: Callable[..., Any]
    others: Mapping[str, Callable[..., Any]]
    key: jax.Array
    step: jax.Array
    state: Any
    network: Network | None = None
    networks: Mapping[str, Network] = dataclasses.field(default_factory=dict)
    progress: Any = 0.0

    def read(self, params: Any, inputs: jax.Array, segments: jax.Array, labels: jax.Array, of: str = "") -> Read:
        apply, network = (self.others[of], self.networks.get(of)) if of else (self.apply, self.network)
        found = read_tokens(network, apply, params, inputs, segments, labels)
        return jax.lax.stop_gradient(found) if of else found


INTEGERS = ("tokens", "segments", "types", "prefix", "relation", "teacher_ids")
OF_A_ROW = ("advantage", "label", "margin", "relation", "prefix")  # the others have an entry for every position

Shapes = dict[str, jax.ShapeDtypeStruct]


def batch_shapes(fields: Sequence[str], rows: int, *positions: int) -> Shapes:
    """The columns of a batch, `[rows, *positions]`, as shapes and dtypes."""
    kind = lambda name: jnp.int32 if name in INTEGERS else jnp.float32
    shape = lambda name: (rows,) if name in OF_A_ROW else (rows, *positions)
    return {name: jax.ShapeDtypeStruct(shape(name), kind(name)) for name in fields}


class Objective(Value):
    """Base class; subclasses are `dataclass(frozen=True)` of plain values and models, and are named by them.

    version: goes up when the objective computes something else. fields: columns that its batch holds. reads: what it
    wants of a Transformer: `logits`, the `score` of a reward model's head, or `states`.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "logits"
    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments")

    def rows(self, given: Any, tokenizer: Any) -> Dataset:
        """What somebody gives to learn from, as the rows that `pack` reads (see `data.given`)."""
        return as_dataset(given, tokenizer)

    def pack(self, data: Dataset, model: Model, length: int) -> Batches:
        """The rows as batches of one shape; `length`: positions of a row."""
        return pack_tokens(data, length, model.tokenizer)

    def unpacked(self, data: Dataset, model: Model, length: int) -> Columns:
        """Each row by itself, for batches that the model writes as it learns: columns `[rows, ...]`."""
        raise InputError(f"{type(self).__name__} does not learn from what the model writes as it learns")

    def shapes(self, rows: int, length: int) -> Shapes:
        """What a batch of so many rows of `length` positions is made of: what a program is compiled for before there
        is any data. Weights are float32, wherever the data may also have booleans."""
        return batch_shapes(self.fields, rows, length + 1)

    def resolved(self, model: Model) -> Objective:
        """With what is left to the model (ids of its tokenizer, say) filled in."""
        return self

    def extra_ids(self, tokenizer: Any) -> int:
        """How many token ids it wants of a model beyond those of its tokenizer (to hide a token behind, say)."""
        return 0

    def sampling(self, model: Model, length: int) -> dict[str, Any]:
        """How a model that was trained so, on rows of `length`, writes: keys of a SamplingConfig that change by it."""
        return {}

    def models(self, model: Model) -> dict[str, Model]:
        """Frozen models by the name under which the loss finds them in `ctx.others`; `model`: the one that is trained,
        as it stands before. By default every field that holds a Model."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Model)}

    def init(self, key: jax.Array, model: Model) -> Extra:
        """Extra params and state, fresh."""
        return Extra()

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        raise InputError(f"{type(self).__name__} has no loss: write loss(self, ctx, params, batch) -> Loss")

    def check(self, columns: Mapping[str, Any]) -> None:
        """Raises InputError where a batch lacks a column."""
        missing = [name for name in self.fields if name not in columns]
        if missing:
            raise InputError(
                f"{type(self).__name__} reads the columns {', '.join(self.fields)}, and the packed data has no "
                f"{', '.join(missing)}: it has {', '.join(columns)}"
            )

    def static(self) -> Objective:
        """Itself without the params of its models, hashable: what a program is compiled for."""
        held = {f.name: None for f in dataclasses.fields(self) if isinstance(getattr(self, f.name), Model)}
        return dataclasses.replace(self, **held) if held else self


class WholeBatch(Objective):
    """An objective over the representations of all rows of a batch, over all devices and micro-batches at once.

    GradCache (arXiv:2101.06983): representations of all micro-batches are computed first, without a gradient; then the
    loss's gradient with respect to them; then each micro-batch again, with the same dropout, against its share of it.
    The gradient is that of the whole batch, the memory that of one micro-batch.
    """

    def represent(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Any:
        """A pytree of arrays `[B, ...]`, a row for each of the batch's."""
        raise NotImplementedError

    def loss_of(self, ctx: Context, params: Params, represented: Any, batch: dict[str, jax.Array]) -> Loss:
        """The loss from the representations of the whole batch."""
        raise NotImplementedError

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        return self.loss_of(ctx, params, self.represent(ctx, params, batch), batch)
