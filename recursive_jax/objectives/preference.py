"""Learning from preferences: pairs of answers (DPO and its kin, ORPO, SimPO), single answers that were liked or not
(KTO). The losses themselves are in preference_losses.py."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Example, Packed, stack_groups
from recursive_jax.data.preferences import preferences
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError
from recursive_jax.identity import fingerprint
from recursive_jax.mesh import rows_like
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Shapes, Term, WholeBatch, batch_shapes
from recursive_jax.objectives.causal import targets
from recursive_jax.objectives.passes import learnt_logprobs
from recursive_jax.objectives.preference_losses import (
    OF_THE_BATCH,
    check_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
)


class Grouped(Objective):
    """Answers that belong together: `groups` says which, `represent` what is known of each group's."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "loss")
    ld_alpha: ClassVar[float | None] = None

    COLUMNS: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    def rows(self, given: Any, tokenizer: Any) -> Dataset:
        return preferences(given, self.COLUMNS, tokenizer)

    def groups(self, data: Dataset, tokenizer: Tokenizer) -> list[list[Example]]:
        """The sequences of each row, the loss on the answers."""
        return pairs(data, tokenizer)

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        return stack_groups(self.groups(data, model.tokenizer), length, model.tokenizer.pad)

    def shapes(self, rows: int, length: int) -> Shapes:
        return batch_shapes(self.fields, rows, 2, length + 1)

    def answers(self, read: Any, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Of each answer `[B, G]`: `sum` of its log-probabilities (with ld_alpha those beyond the shorter answer of its
        group weigh less, arXiv:2409.06411), `count` of its tokens."""
        G = batch["tokens"].shape[1]
        each = [answer_logprobs(read, params, {n: batch[n][:, g] for n in Grouped.fields}) for g in range(G)]
        counts = [count_B for _, count_B in each]
        sums = [self._summed(logp_BT, batch["loss"][:, g, 1:], counts) for g, (logp_BT, _) in enumerate(each)]
        return {"sum": jnp.stack(sums, 1), "count": jnp.stack(counts, 1)}

    def _summed(self, logp_BT: jax.Array, learnt_BT: jax.Array, counts: list[jax.Array]) -> jax.Array:
        if self.ld_alpha is None:
            return jnp.sum(logp_BT, axis=-1)
        place_BT = jnp.cumsum((learnt_BT > 0).astype(jnp.float32), axis=-1)
        shared_B = functools.reduce(jnp.minimum, counts)
        return jnp.sum(jnp.where(place_BT > shared_B[:, None], self.ld_alpha, 1.0) * logp_BT, axis=-1)


def answer_logprobs(read: Any, params: Any, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(log-probability of every learnt token, 0 elsewhere, float32 `[B, T]`; how many there are `[B]`)."""
    inputs, segments, labels, weight_BT = targets(rows)
    logp_BT = read(params, inputs, segments, labels).logprobs_BT
    return jnp.where(weight_BT > 0, weight_BT * logp_BT, 0.0), jnp.sum(weight_BT, axis=-1)


def check_beta(beta: float) -> None:
    if not beta > 0:
        raise InputError(f"beta={beta}: more than 0 is wanted")


# ---- against a reference


class Referenced(Grouped):
    """With a reference: its log-probabilities are a column, from one pass before the training (`with_reference` stores
    them), or, with `reference_in_step`, a frozen model in every step."""

    reference: Model | None
    reference_in_step: bool

    def shapes(self, rows: int, length: int) -> Shapes:
        found = super().shapes(rows, length)
        if self.reference_in_step:
            return found
        return {**found, "reference": jax.ShapeDtypeStruct(found["tokens"].shape, jnp.float32)}

    def the_reference(self, model: Model) -> Model:
        found = self.reference if self.reference is not None else model
        if not isinstance(found, Model):
            raise InputError(f"reference={found!r}: a model is wanted, rj.load_model(...) opens one")
        if found.params is None:
            name = type(self).__name__
            raise InputError(f"{name} starts from a trained model, or needs reference=...: this one has no params")
        return found

    def models(self, model: Model) -> dict[str, Model]:
        reference = self.the_reference(model)
        return {"reference": reference} if self.reference_in_step else {}

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        groups = self.groups(data, model.tokenizer)
        packed = stack_groups(groups, length, model.tokenizer.pad)
        if self.reference_in_step:
            return packed
        reference = self.the_reference(model)
        if data.has("reference"):
            found_NGT = _placed(data.column("reference"), groups, packed)
            return Packed({**packed.columns, "reference": found_NGT})
        # Named by the model, not by its numbers, whose last bits another mesh rounds otherwise.
        named = fingerprint([packed.fingerprint, reference.fingerprint])
        return Packed({**packed.columns, "reference": learnt_logprobs(reference, packed.columns)}, named)

    def of_reference(self, ctx: Context, batch: dict[str, jax.Array]) -> jax.Array:
        """The sums of the reference, `[B, G]`."""
        if self.reference_in_step:
            return self.answers(functools.partial(ctx.read, of="reference"), None, batch)["sum"]
        learnt_BGT = batch["loss"][:, :, 1:]
        counts = [jnp.sum((learnt_BGT[:, g] > 0).astype(jnp.float32), -1) for g in range(learnt_BGT.shape[1])]
        each = [
            self._summed(batch["reference"][:, g, 1:], learnt_BGT[:, g], counts) for g in range(learnt_BGT.shape[1])
        ]
        return jnp.stack(each, 1)

    def represent(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = self.answers(ctx.read, params, batch)
        return {**found, "reference": jax.lax.stop_gradient(self.of_reference(ctx, batch))}


def with_reference(data: Dataset, model: Model, objective: Referenced, length: int | None = None) -> Dataset:
    """The rows with a column `reference`: for each answer the log-probabilities of its tokens under the reference (the
    objective's own, or `model`). In a run: `round.dataset("pairs", with_reference, data, model, objective)`."""
    groups = objective.groups(data, model.tokenizer)
    packed = stack_groups(groups, length or model.max_length, model.tokenizer.pad)
    found_NGT = learnt_logprobs(objective.the_reference(model), packed.columns)
    lists = [
        [found_NGT[n, g, : len(e.tokens)][e.loss > 0].tolist() for g, e in enumerate(group)]
        for n, group in enumerate(groups)
    ]
    return data.with_column("reference", lists)


def _placed(lists: list[Any], groups: list[list[Example]], packed: Packed) -> np.ndarray:
    """The column `reference` at its tokens' places. Raises InputError where it is of other answers."""
    found_NGT = np.zeros(packed.columns["tokens"].shape, np.float32)
    for n, (row, group) in enumerate(zip(lists, groups, strict=True)):
        sizes = [int((e.loss > 0).sum()) for e in group]
        lists = isinstance(row, list) and all(isinstance(x, list) for x in row)
        if not lists or [len(x) for x in row] != sizes:
            raise InputError(f"row {n}: `reference` is not the log-probabilities of its answers, of {sizes} tokens")
        for g, e in enumerate(group):
            found_NGT[n, g, : len(e.tokens)][e.loss > 0] = row[g]
    return found_NGT


@dataclasses.dataclass(frozen=True)
class DPO(Referenced):
    """Direct preference optimisation. The data has, beside `prompt`, the columns `chosen` and `rejected`: texts, or
    token ids with their end token.

    loss_type: of `preference_losses.LOSSES`, or `sft` (the chosen answers' own loss, per token); several are added up
    with `loss_weights`. reference: a frozen model; by default the model as it is before this training. beta: how far
    the policy may leave it. Logged: log-probabilities and rewards (beta times the log-ratio) of the chosen and the
    rejected answers, their margin, and how often it is positive."""

    version: ClassVar[int] = 2

    reference: Model | None = None
    beta: float = 0.1
    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    discopop_tau: float = 0.05
    reference_in_step: bool = False

    def __post_init__(self):
        check_beta(self.beta)
        kinds = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        if isinstance(self.loss_type, list):
            object.__setattr__(self, "loss_type", kinds)
        for kind in kinds:
            if kind != "sft":
                check_loss(kind, self.label_smoothing)
        if not kinds or len(self.loss_weights or kinds) != len(kinds):
            raise InputError(f"loss_weights={self.loss_weights}: one for each loss_type, {', '.join(kinds)}")

    @property
    def weighted(self) -> dict[str, float]:
        """loss_type -> weight."""
        kinds = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        return dict(zip(kinds, self.loss_weights or (1.0,) * len(kinds), strict=True))

    def resolved(self, model: Model) -> Objective:
        if type(self) is DPO and any(kind in OF_THE_BATCH for kind in self.weighted):
            return SortedDPO(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return self

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        return self.loss_of(ctx, params, self.represent(ctx, params, batch), batch)

    def loss_of(self, ctx: Context, params: Params, represented: dict[str, jax.Array], batch: Any) -> Loss:
        (chosen_B, rejected_B), (chosen_count_B, rejected_count_B) = (represented[n].T for n in ("sum", "count"))
        reference = represented["reference"].T
        settings = {"beta": self.beta, "label_smoothing": self.label_smoothing, "discopop_tau": self.discopop_tau}
        settings |= {"chosen_count_B": chosen_count_B, "rejected_count_B": rejected_count_B}
        count = jnp.float32(len(chosen_B))
        terms, several = {}, len(self.weighted) > 1
        for kind, weight in self.weighted.items():
            name = kind if several else "dpo"
            if kind == "sft":
                terms[name] = Term(-jnp.sum(chosen_B), jnp.sum(chosen_count_B), weight)
            else:
                losses_B = dpo_loss(chosen_B, rejected_B, *reference, loss_type=kind, **settings)
                terms[name] = Term(jnp.sum(losses_B), count, weight)
        rewards = [self.beta * (p_B - r_B) for p_B, r_B in zip((chosen_B, rejected_B), reference, strict=True)]
        return Loss(terms, pair_metrics((chosen_B, rejected_B), rewards))


@dataclasses.dataclass(frozen=True)
class SortedDPO(DPO, WholeBatch):
    """DPO with a loss_type that sorts the pairs of a batch: over all devices and micro-batches (GradCache)."""


def pair_metrics(logps: Any, rewards: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    count = jnp.float32(len(rewards[0]))
    mean = lambda values_B: (jnp.sum(jax.lax.stop_gradient(values_B)), count)
    return {
        "logps/chosen": mean(logps[0]),
        "logps/rejected": mean(logps[1]),
        "rewards/chosen": mean(rewards[0]),
        "rewards/rejected": mean(rewards[1]),
        "rewards/margin": mean(rewards[0] - rewards[1]),
        "rewards/accuracy": mean((rewards[0] > rewards[1]).astype(jnp.float32)),
    }


@dataclasses.dataclass(frozen=True)
class KTO(Referenced, WholeBatch):
    """Answers that were liked or not (arXiv:2402.01306). The data has, beside `prompt`, `completion` (a text, or ids
    with their end token) and `label` (true: liked).

    How far the policy is from its reference is estimated on each prompt with the next row's answer, over the whole
    batch, and bounded by 0 from below. Weights as in the paper: desirable_weight times the number of liked answers
    should be 1 to 4/3 times undesirable_weight times that of the others."""

    reference: Model | None = None
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: str = "kto"
    reference_in_step: bool = False

    def __post_init__(self):
        check_beta(self.beta)

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "loss", "label")
    COLUMNS: ClassVar[tuple[str, ...]] = ("completion",)

    def groups(self, data: Dataset, tokenizer: Tokenizer) -> list[list[Example]]:
        answers = data.column("completion")
        return [
            [answer_example(prompt, answers[m], tokenizer, f"row {m}, completion") for m in (n, (n + 1) % len(answers))]
            for n, prompt in enumerate(data.prompts())
        ]

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        label = data.column("label")
        odd = [n for n, x in enumerate(label) if not isinstance(x, bool)]
        if odd:
            raise InputError(f"row {odd[0]}: label={label[odd[0]]!r}; true (liked) or false is wanted")
        packed = super().pack(data, model, length)
        columns = {**packed.columns, "label": np.asarray(label, np.float32)}
        return Packed(columns, fingerprint([packed.fingerprint, label]))

    def loss_of(self, ctx: Context, params: Params, represented: dict[str, jax.Array], batch: Any) -> Loss:
        ratio_BG = represented["sum"] - represented["reference"]
        kl = jnp.maximum(jnp.mean(jax.lax.stop_gradient(ratio_BG[:, 1])), 0.0)
        liked_B = rows_like(batch["label"], len(ratio_BG)) > 0
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        losses_B = kto_loss(ratio_BG[:, 0], liked_B, kl, beta=self.beta, loss_type=self.loss_type, **weights)
        rewards_B = self.beta * jax.lax.stop_gradient(ratio_BG[:, 0])
        count = jnp.float32(len(losses_B))
        of = lambda which_B: (jnp.sum(jnp.where(which_B, rewards_B, 0.0)), jnp.sum(which_B.astype(jnp.float32)))
        metrics = {"kl": (kl * count, count), "rewards/chosen": of(liked_B), "rewards/rejected": of(~liked_B)}
        return Loss({"kto": Term(jnp.sum(losses_B), count)}, metrics)


# ---- without one


@dataclasses.dataclass(frozen=True)
class ORPO(Grouped):
    """The chosen answers' own loss and beta times that of the odds ratio (arXiv:2403.07691); data as for DPO."""

    beta: float = 0.1

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        found = self.answers(ctx.read, params, batch)
        (chosen_B, rejected_B), counts = found["sum"].T, found["count"].T
        means = [sum_B / jnp.maximum(c_B, 1.0) for sum_B, c_B in zip((chosen_B, rejected_B), counts, strict=True)]
        losses_B, count = orpo_loss(*means), jnp.float32(len(chosen_B))
        terms = {"sft": Term(-jnp.sum(chosen_B), jnp.sum(counts[0])), "odds": Term(jnp.sum(losses_B), count, self.beta)}
        return Loss(terms, pair_metrics(means, [self.beta * m_B for m_B in means]))


@dataclasses.dataclass(frozen=True)
class SimPO(Grouped):
    """Mean log-probabilities as rewards, with a margin (arXiv:2405.14734); data as for DPO."""

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        found = self.answers(ctx.read, params, batch)
        means = list((found["sum"] / jnp.maximum(found["count"], 1.0)).T)
        losses_B = simpo_loss(*means, beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing)
        terms = {"simpo": Term(jnp.sum(losses_B), jnp.float32(len(losses_B)))}
        return Loss(terms, pair_metrics(means, [self.beta * m_B for m_B in means]))


# ---- rows


def pairs(data: Dataset, tokenizer: Tokenizer) -> list[list[Example]]:
    """[chosen, rejected] of each row, the loss on the answers. Raises InputError for a column that is not there, and an
    answer that is neither text nor ids."""
    answers = {name: data.column(name) for name in ("chosen", "rejected")}
    return [
        [answer_example(prompt, found[n], tokenizer, f"row {n}, {name}") for name, found in answers.items()]
        for n, prompt in enumerate(data.prompts())
    ]


def answer_example(prompt: np.ndarray, answer: Any, tokenizer: Tokenizer, where: str) -> Example:
    before = prompt if len(prompt) else np.array([tokenizer.bos], np.int32)
    ids = _ids(answer, tokenizer, where)
    return Example(np.concatenate([before, ids]), np.arange(len(before) + len(ids)) >= len(before))


def _ids(answer: Any, tokenizer: Tokenizer, where: str) -> np.ndarray:
    if isinstance(answer, str):
        return np.asarray([*tokenizer.encode(answer), tokenizer.eos], np.int32)
    try:
        return np.asarray(answer, np.int32).reshape(-1)
    except (TypeError, ValueError):
        raise InputError(f"{where}: a text or a list of token ids is wanted, it is {type(answer).__name__}") from None
