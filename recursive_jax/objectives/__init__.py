"""Pure losses, one file for each family. A new one is a frozen dataclass in a file here, and a line in this table."""

from __future__ import annotations

from recursive_jax.objectives.base import Context, Extra, Loss, Objective, Params, Term, WholeBatch
from recursive_jax.objectives.causal import Causal, causal
from recursive_jax.objectives.contrastive import InfoNCE, info_nce
from recursive_jax.objectives.masked import Masked, mask_tokens
from recursive_jax.objectives.preference import DPO, dpo_loss
from recursive_jax.objectives.variational import NegativeElbo

#: Objectives by the name under which a config asks for them.
OBJECTIVES: dict[str, type[Objective]] = {
    "causal": Causal,
    "masked": Masked,
    "dpo": DPO,
    "info_nce": InfoNCE,
    "negative_elbo": NegativeElbo,
}

__all__ = [
    "DPO",
    "OBJECTIVES",
    "Causal",
    "Context",
    "Extra",
    "InfoNCE",
    "Loss",
    "Masked",
    "NegativeElbo",
    "Objective",
    "Params",
    "Term",
    "WholeBatch",
    "causal",
    "dpo_loss",
    "info_nce",
    "mask_tokens",
]
