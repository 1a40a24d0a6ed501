"""Pure losses, one file for each family. A new one is a frozen dataclass in a file here, and a line in this table."""

from __future__ import annotations

from recursive_jax.objectives.base import Context, Extra, Loss, Objective, Params, Term, WholeBatch
from recursive_jax.objectives.causal import Causal, causal
from recursive_jax.objectives.contrastive import InfoNCE, info_nce
from recursive_jax.objectives.credit import Credit, with_advantages
from recursive_jax.objectives.distillation import Distill, DistillTopK, SelfDistill
from recursive_jax.objectives.masked import Masked, mask_tokens
from recursive_jax.objectives.policy import PolicyGradient
from recursive_jax.objectives.policy_losses import (
    gae,
    generalized_jsd,
    group_advantages,
    leave_one_out,
    policy_loss,
    value_loss,
)
from recursive_jax.objectives.preference import DPO, KTO, ORPO, SimPO, with_reference
from recursive_jax.objectives.preference_losses import (
    dpo_loss,
    kto_loss,
    listwise_reward,
    orpo_loss,
    pairwise_reward,
    simpo_loss,
)
from recursive_jax.objectives.reward_models import ListwiseReward, PairwiseReward, ProcessReward
from recursive_jax.objectives.variational import NegativeElbo

#: Objectives by the name under which a config asks for them.
OBJECTIVES: dict[str, type[Objective]] = {
    "causal": Causal,
    "masked": Masked,
    "dpo": DPO,
    "kto": KTO,
    "orpo": ORPO,
    "simpo": SimPO,
    "policy_gradient": PolicyGradient,
    "distill": Distill,
    "distill_top_k": DistillTopK,
    "self_distill": SelfDistill,
    "pairwise_reward": PairwiseReward,
    "listwise_reward": ListwiseReward,
    "process_reward": ProcessReward,
    "info_nce": InfoNCE,
    "negative_elbo": NegativeElbo,
}

__all__ = [
    "DPO",
    "KTO",
    "OBJECTIVES",
    "ORPO",
    "Causal",
    "Context",
    "Credit",
    "Distill",
    "DistillTopK",
    "Extra",
    "InfoNCE",
    "ListwiseReward",
    "Loss",
    "Masked",
    "NegativeElbo",
    "Objective",
    "PairwiseReward",
    "Params",
    "PolicyGradient",
    "ProcessReward",
    "SelfDistill",
    "SimPO",
    "Term",
    "WholeBatch",
    "causal",
    "dpo_loss",
    "gae",
    "generalized_jsd",
    "group_advantages",
    "info_nce",
    "kto_loss",
    "leave_one_out",
    "listwise_reward",
    "mask_tokens",
    "orpo_loss",
    "pairwise_reward",
    "policy_loss",
    "simpo_loss",
    "value_loss",
    "with_advantages",
    "with_reference",
]
