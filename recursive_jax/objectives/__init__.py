"""Pure losses, one file for each family. A new one is a frozen dataclass in a file here, and a line in this table."""

from __future__ import annotations

from recursive_jax.objectives.base import Context, Extra, Loss, Objective, Params, Term, WholeBatch
from recursive_jax.objectives.causal import Causal, causal
from recursive_jax.objectives.contrastive import InfoNCE, info_nce
from recursive_jax.objectives.masked import Masked, mask_tokens
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
    "Extra",
    "InfoNCE",
    "ListwiseReward",
    "Loss",
    "Masked",
    "NegativeElbo",
    "Objective",
    "PairwiseReward",
    "Params",
    "ProcessReward",
    "SimPO",
    "Term",
    "WholeBatch",
    "causal",
    "dpo_loss",
    "info_nce",
    "kto_loss",
    "listwise_reward",
    "mask_tokens",
    "orpo_loss",
    "pairwise_reward",
    "simpo_loss",
    "with_reference",
]
