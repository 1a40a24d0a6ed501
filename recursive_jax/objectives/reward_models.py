"""Training reward models: a Transformer with the head `score` (`model.head=score`) learns which answers are better, or
which steps are right."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Example, Packed, stack_groups
from recursive_jax.data.preferences import preferences
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError
from recursive_jax.mesh import rows_like
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Shapes, Term, batch_shapes
from recursive_jax.objectives.preference import Grouped, answer_example
from recursive_jax.objectives.preference_losses import listwise_reward, pairwise_reward


def last_scores(apply: Any, params: Any, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The score of each sequence, on its last token: float32 `[B]`. Padding (segment 0) stands behind."""
    scores_BT = apply(params, tokens_BT, segments_BT)[..., 0]
    last_B1 = jnp.sum((segments_BT > 0).astype(jnp.int32), axis=-1, keepdims=True) - 1
    place_BT = jax.lax.broadcasted_iota(jnp.int32, scores_BT.shape, 1)
    return jnp.sum(jnp.where(place_BT == last_B1, scores_BT, 0.0), axis=-1)


class _Compared(Grouped):
    """The scores of a group's answers, `[B, G]`."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments")
    reads: ClassVar[str] = "score"

    def shapes(self, rows: int, length: int) -> Shapes:
        return batch_shapes(self.fields, rows, 2, length)

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        packed = stack_groups(self.groups(data, model.tokenizer), length - 1, model.tokenizer.pad)  # nothing is shifted
        return Packed({name: packed.columns[name] for name in ("tokens", "segments")})

    def scores(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        members = range(batch["tokens"].shape[1])
        each = [last_scores(ctx.apply, params, batch["tokens"][:, g], batch["segments"][:, g]) for g in members]
        return jnp.stack(each, 1)


@dataclasses.dataclass(frozen=True)
class PairwiseReward(_Compared):
    """The chosen answer's score is above the rejected one's (arXiv:2203.02155). The data has, beside `prompt`, `chosen`
    and `rejected`, and may have `margin`, by how much the first is better. centering: holds the scores around 0.

    Logged: how often the better one scores higher; the scores' means; `calibration`, the mean probability that the
    model gives to the order, which for a calibrated one is its accuracy."""

    centering: float = 0.0

    def shapes(self, rows: int, length: int) -> Shapes:
        return batch_shapes((*self.fields, "margin"), rows, 2, length)

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        packed = super().pack(data, model, length)
        margin = data.column("margin") if data.has("margin") else [0.0] * len(data)
        return Packed({**packed.columns, "margin": np.asarray(margin, np.float32)})

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        chosen_B, rejected_B = self.scores(ctx, params, batch).T
        margin_B = rows_like(batch["margin"], len(chosen_B))
        losses_B, count = pairwise_reward(chosen_B, rejected_B, margin_B, self.centering), jnp.float32(len(chosen_B))
        mean = lambda x_B: (jnp.sum(jax.lax.stop_gradient(x_B).astype(jnp.float32)), count)
        metrics = {
            "accuracy": mean(chosen_B > rejected_B),
            "calibration": mean(jax.nn.sigmoid(jnp.abs(chosen_B - rejected_B))),
            "scores/chosen": mean(chosen_B),
            "scores/rejected": mean(rejected_B),
        }
        return Loss({"reward": Term(jnp.sum(losses_B), count)}, metrics)


@dataclasses.dataclass(frozen=True)
class ListwiseReward(_Compared):
    """The order of several answers (Plackett and Luce; rankings of 4 to 9 as in arXiv:2203.02155). The data has, beside
    `prompt`, `ranked`: a list of answers, the best first, of one length in all rows."""

    COLUMNS: ClassVar[tuple[str, ...]] = ("ranked",)

    def groups(self, data: Dataset, tokenizer: Tokenizer) -> list[list[Example]]:
        found = []
        for n, (prompt, ranked) in enumerate(zip(data.prompts(), data.column("ranked"), strict=True)):
            if ranked is None or len(ranked) < 2:
                raise InputError(f"row {n}: `ranked` holds at least two answers, the best first")
            found.append([answer_example(prompt, x, tokenizer, f"row {n}, ranked {k}") for k, x in enumerate(ranked)])
        return found

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        scores_BK = self.scores(ctx, params, batch)
        losses_B, count = listwise_reward(scores_BK), jnp.float32(len(scores_BK))
        K = scores_BK.shape[1]
        upper_KK = np.triu(np.ones((K, K), np.float32), 1)
        right_BKK = (scores_BK[:, :, None] > scores_BK[:, None, :]).astype(jnp.float32) * upper_KK
        best_B = (jnp.argmax(scores_BK, axis=1) == 0).astype(jnp.float32)
        metrics = {
            "accuracy": (jnp.sum(right_BKK), count * float(upper_KK.sum())),
            "best": (jnp.sum(best_B), count),
        }
        return Loss({"reward": Term(jnp.sum(losses_B), count)}, metrics)


@dataclasses.dataclass(frozen=True)
class ProcessReward(Objective):
    """A score on the last token of every step: the log-odds that it is right (arXiv:2305.20050). The data has, beside
    `prompt`, `steps` (a list of texts) and `labels` (true or false for each, null: not learnt)."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "loss", "right")
    reads: ClassVar[str] = "score"

    separator: str = "\n"

    def rows(self, given: Any, tokenizer: Any) -> Dataset:
        return preferences(given, ("steps", "labels"), tokenizer)

    def shapes(self, rows: int, length: int) -> Shapes:
        return batch_shapes(self.fields, rows, length)

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        columns = zip(data.prompts(), data.column("steps"), data.column("labels"), strict=True)
        made = [step_example(*row, model.tokenizer, self.separator, f"row {n}") for n, row in enumerate(columns)]
        packed = stack_groups([[example] for example, _ in made], length - 1, model.tokenizer.pad)
        right = np.zeros(packed.columns["tokens"].shape, np.float32)
        for n, (_, marks) in enumerate(made):
            right[n, 0, : len(marks)] = marks
        return Packed({**{name: c[:, 0] for name, c in packed.columns.items()}, "right": right[:, 0]})

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        scores_BT = ctx.apply(params, batch["tokens"], batch["segments"])[..., 0]
        marked_BT, right_BT = (rows_like(batch[n], len(scores_BT)) > 0 for n in ("loss", "right"))
        losses_BT = -jax.nn.log_sigmoid(jnp.where(right_BT, scores_BT, -scores_BT))
        count = jnp.sum(marked_BT.astype(jnp.float32))
        hit_BT = marked_BT & ((scores_BT > 0) == right_BT)
        metrics = {"accuracy": (jnp.sum(hit_BT.astype(jnp.float32)), count)}
        return Loss({"reward": Term(jnp.sum(jnp.where(marked_BT, losses_BT, 0.0)), count)}, metrics)


def step_example(
    prompt: np.ndarray, steps: Any, labels: Any, tokenizer: Tokenizer, separator: str, where: str
) -> tuple[Example, np.ndarray]:
    """(prompt and steps, the loss on the last token of each that has a label; 1.0 there where it is right)."""
    if not steps or labels is None or len(steps) != len(labels):
        raise InputError(f"{where}: `steps` and `labels` are lists of one length")
    ids, marks, right = [*(prompt if len(prompt) else [tokenizer.bos])], [], []
    for step, label in zip(steps, labels, strict=True):
        ids += tokenizer.encode(step if step.endswith(separator) else step + separator)
        if label is not None:
            marks.append(len(ids) - 1)
            right.append(float(label))
    loss, values = np.zeros(len(ids), bool), np.zeros(len(ids), np.float32)
    loss[marks], values[marks] = True, right
    return Example(np.asarray(ids, np.int32), loss), values
