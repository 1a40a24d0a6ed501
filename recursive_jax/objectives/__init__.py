"""Pure losses, one file for each family. A new one is a frozen dataclass in a file here, and a line in this table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from recursive_jax.errors import InputError
from recursive_jax.objectives.base import Context, Extra, Loss, Objective, Params, Term, WholeBatch
from recursive_jax.objectives.causal import Causal, causal
from recursive_jax.objectives.contrastive import InfoNCE, info_nce
from recursive_jax.objectives.credit import Credit, with_advantages
from recursive_jax.objectives.denoisers import Denoisers
from recursive_jax.objectives.diffusion import masked_diffusion_bound, masked_diffusion_loss
from recursive_jax.objectives.distillation import Distill, DistillTopK, SelfDistill
from recursive_jax.objectives.grit import Grit
from recursive_jax.objectives.hybrid import Hybrid
from recursive_jax.objectives.masked import Masked, mask_tokens
from recursive_jax.objectives.masked_diffusion import MaskedDiffusion
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
    "hybrid": Hybrid,
    "denoisers": Denoisers,
    "masked_diffusion": MaskedDiffusion,
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
    "grit": Grit,
    "negative_elbo": NegativeElbo,
}


def objective_of(settings: Mapping[str, Any]) -> Objective:
    """The objective that a config asks for: {"name": its line in the table, and fields of it}. Raises InputError for
    another name or field, and for a value of another type than the field's."""
    given = dict(settings)
    name = given.pop("name", "causal")
    if name not in OBJECTIVES:
        raise InputError(f"objective.name={name!r} is no objective; there are: {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
    unknown = [key for key in given if key not in defaults]
    if unknown:
        raise InputError(f"objective.{unknown[0]}: {name} has no such key; it has: {', '.join(defaults) or 'none'}")
    return kind(**{key: _typed(f"objective.{key}", value, defaults[key]) for key, value in given.items()})


def _typed(key: str, value: Any, default: Any) -> Any:
    """The value as the field's default is: lists as tuples, whole numbers as floats where floats are meant."""
    if isinstance(value, list | tuple):
        value = tuple(tuple(x) if isinstance(x, list) else x for x in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if default is not None and default is not dataclasses.MISSING and type(value) is not type(default):
        raise InputError(f"{key}={value!r}: {type(default).__name__} is wanted, as in {default!r}")
    return value


__all__ = [
    "DPO",
    "KTO",
    "OBJECTIVES",
    "ORPO",
    "Causal",
    "Context",
    "Credit",
    "Denoisers",
    "Distill",
    "DistillTopK",
    "Extra",
    "Grit",
    "Hybrid",
    "InfoNCE",
    "ListwiseReward",
    "Loss",
    "Masked",
    "MaskedDiffusion",
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
    "masked_diffusion_bound",
    "masked_diffusion_loss",
    "objective_of",
    "orpo_loss",
    "pairwise_reward",
    "policy_loss",
    "simpo_loss",
    "value_loss",
    "with_advantages",
    "with_reference",
]
