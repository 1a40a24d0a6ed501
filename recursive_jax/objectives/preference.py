"""Learning from pairs: a chosen and a rejected answer to one prompt (DPO, arXiv:2305.18290)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Example, Packed, stack_groups
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Term
from recursive_jax.objectives.causal import summed_logprobs


def dpo_loss(
    chosen_B: jax.Array,
    rejected_B: jax.Array,
    reference_chosen_B: jax.Array,
    reference_rejected_B: jax.Array,
    *,
    beta: float = 0.1,
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Losses `[B]` from summed log-probabilities (nats) of the two answers, under the policy and under the reference.

    sigmoid: arXiv:2305.18290, eq. 7; label_smoothing: the share of pairs taken to be the wrong way round (conservative
    DPO; trl 1.16 ignores it here). hinge: SLiC (arXiv:2305.10425). Raises InputError for another loss_type.
    """
    margin_B = (chosen_B - rejected_B) - (reference_chosen_B - reference_rejected_B)
    if loss_type == "sigmoid":
        right_B, wrong_B = jax.nn.log_sigmoid(beta * margin_B), jax.nn.log_sigmoid(-beta * margin_B)
        return -(1 - label_smoothing) * right_B - label_smoothing * wrong_B
    if loss_type == "hinge":
        return jax.nn.relu(1 - beta * margin_B)
    raise InputError(f"loss_type={loss_type!r}: sigmoid or hinge is wanted")


@dataclasses.dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation. The data has, beside `prompt`, the columns `chosen` and `rejected`: texts, or
    token ids with their end token.

    reference: a frozen model; by default the model as it is before this training. beta: how far the policy may leave
    it. Logged: rewards of the chosen and the rejected answers (beta times the log-ratio), their margin, and how often
    it is positive."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "loss")

    reference: Model | None = None
    beta: float = 0.1
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0

    def models(self, model: Model) -> dict[str, Model]:
        reference = self.reference if self.reference is not None else model
        if reference.params is None:
            raise InputError("DPO starts from a trained model, or needs reference=...: this one has no params")
        return {"reference": reference}

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        return stack_groups(pairs(data, model.tokenizer), length, model.tokenizer.pad)

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        chosen, rejected = ({name: column[:, side] for name, column in batch.items()} for side in (0, 1))
        policy = [summed_logprobs(ctx.apply, params, rows)[0] for rows in (chosen, rejected)]
        reference = [summed_logprobs(ctx.others["reference"], None, rows)[0] for rows in (chosen, rejected)]
        losses_B = dpo_loss(
            *policy, *reference, beta=self.beta, loss_type=self.loss_type, label_smoothing=self.label_smoothing
        )
        rewards = [self.beta * (p_B - r_B) for p_B, r_B in zip(policy, reference, strict=True)]
        count = jnp.float32(losses_B.shape[0])
        mean = lambda values_B: (jnp.sum(values_B), count)
        metrics = {
            "rewards/chosen": mean(rewards[0]),
            "rewards/rejected": mean(rewards[1]),
            "rewards/margin": mean(rewards[0] - rewards[1]),
            "rewards/accuracy": mean((rewards[0] > rewards[1]).astype(jnp.float32)),
        }
        return Loss({"dpo": Term(jnp.sum(losses_B), count)}, metrics)


def pairs(data: Dataset, tokenizer: Tokenizer) -> list[list[Example]]:
    """[chosen, rejected] of each row, the loss on the answers. Raises InputError for a column that is not there, and an
    answer that is neither text nor ids."""
    answers = {name: data.column(name) for name in ("chosen", "rejected")}
    found = []
    for n, prompt in enumerate(data.prompts()):
        before = prompt if len(prompt) else np.array([tokenizer.bos], np.int32)
        group = []
        for name in ("chosen", "rejected"):
            ids = _ids(answers[name][n], tokenizer, f"row {n}, {name}")
            group.append(Example(np.concatenate([before, ids]), np.arange(len(before) + len(ids)) >= len(before)))
        found.append(group)
    return found


def _ids(answer: Any, tokenizer: Tokenizer, where: str) -> np.ndarray:
    if isinstance(answer, str):
        return np.asarray([*tokenizer.encode(answer), tokenizer.eos], np.int32)
    try:
        return np.asarray(answer, np.int32).reshape(-1)
    except (TypeError, ValueError):
        raise InputError(f"{where}: a text or a list of token ids is wanted, it is {type(answer).__name__}") from None
