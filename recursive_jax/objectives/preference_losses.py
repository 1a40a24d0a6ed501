"""The losses of learning from preferences, as functions of log-probabilities: shapes `[B]`, float32, nats.

`dpo_loss` has a table, `LOSSES`: a new loss_type is a function of `Pairs` and a line in it. Names and defaults are
those of trl 1.16; where the two differ, the docstring says so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from recursive_jax.errors import InputError
from recursive_jax.mesh import whole

sure = jax.nn.log_sigmoid


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What a loss of pairs sees. chosen_B, rejected_B: log-ratios to the reference; answers_B: log-ratio of chosen to
    rejected under the policy, reference_answers_B: under the reference. counts: tokens of the answers."""

    chosen_B: jax.Array
    rejected_B: jax.Array
    answers_B: jax.Array
    reference_answers_B: jax.Array
    beta: float
    smoothing: float
    tau: float
    counts: tuple[jax.Array, jax.Array] | None

    @property
    def margin_B(self) -> jax.Array:
        return self.chosen_B - self.rejected_B

    @property
    def mean_margin_B(self) -> jax.Array:
        """Of log-ratios per token. Raises InputError where nobody said how many there are."""
        if self.counts is None:
            raise InputError("this loss_type is of means over tokens: give chosen_count_B and rejected_count_B")
        chosen_B, rejected_B = (jnp.maximum(count_B, 1.0) for count_B in self.counts)
        return self.chosen_B / chosen_B - self.rejected_B / rejected_B


def _smoothed(p: Pairs, x_B: jax.Array) -> jax.Array:
    return -(1 - p.smoothing) * sure(x_B) - p.smoothing * sure(-x_B)


def _robust(p: Pairs) -> jax.Array:
    x_B = p.beta * p.margin_B
    return (-(1 - p.smoothing) * sure(x_B) + p.smoothing * sure(-x_B)) / (1 - 2 * p.smoothing)


def _exo_pair(p: Pairs) -> jax.Array:
    x_B = p.beta * p.margin_B
    right_B = jax.nn.sigmoid(x_B) * (sure(x_B) - math.log1p(-p.smoothing))
    return right_B + jax.nn.sigmoid(-x_B) * (sure(-x_B) - math.log(p.smoothing))


def _nca_pair(p: Pairs) -> jax.Array:
    chosen_B, rejected_B = p.beta * p.chosen_B, p.beta * p.rejected_B
    return -sure(chosen_B) - 0.5 * sure(-chosen_B) - 0.5 * sure(-rejected_B)


def _sppo_hard(p: Pairs) -> jax.Array:
    return (p.chosen_B - 0.5 / p.beta) ** 2 + (p.rejected_B + 0.5 / p.beta) ** 2


def _aot(p: Pairs) -> jax.Array:
    return _smoothed(p, p.beta * (jnp.sort(whole(p.answers_B)) - jnp.sort(whole(p.reference_answers_B))))


def _aot_unpaired(p: Pairs) -> jax.Array:
    return _smoothed(p, p.beta * (jnp.sort(whole(p.chosen_B)) - jnp.sort(whole(p.rejected_B))))


def _apo_zero(p: Pairs) -> jax.Array:
    return 1 - jax.nn.sigmoid(p.beta * p.chosen_B) + jax.nn.sigmoid(p.beta * p.rejected_B)


def _apo_down(p: Pairs) -> jax.Array:
    return jax.nn.sigmoid(p.beta * p.chosen_B) + 1 - jax.nn.sigmoid(p.beta * p.margin_B)


def _discopop(p: Pairs) -> jax.Array:
    x_B = p.beta * p.margin_B
    share_B = jax.nn.sigmoid(x_B / p.tau)
    return -sure(x_B) * (1 - share_B) + jnp.exp(-x_B) * share_B


#: loss_type -> losses of pairs.
LOSSES: dict[str, Callable[[Pairs], jax.Array]] = {
    "sigmoid": lambda p: _smoothed(p, p.beta * p.margin_B),  # arXiv:2305.18290, eq. 7; smoothed: its appendix of cDPO
    "hinge": lambda p: jax.nn.relu(1 - p.beta * p.margin_B),  # arXiv:2305.10425
    "ipo": lambda p: (p.mean_margin_B - 1 / (2 * p.beta)) ** 2,  # arXiv:2310.12036, eq. 17, per token
    "robust": _robust,  # arXiv:2403.00409
    "exo_pair": _exo_pair,  # arXiv:2402.00856, eq. 16
    "nca_pair": _nca_pair,  # arXiv:2402.05369
    "bco_pair": lambda p: -sure(p.beta * p.chosen_B) - sure(-p.beta * p.rejected_B),  # arXiv:2404.04656, without shift
    "sppo_hard": _sppo_hard,  # arXiv:2405.00675
    "apo_zero": _apo_zero,  # arXiv:2408.06266, eq. 7
    "apo_down": _apo_down,  # arXiv:2408.06266, eq. 8
    "aot": _aot,  # arXiv:2406.05882
    "aot_unpaired": _aot_unpaired,
    "discopop": _discopop,  # arXiv:2406.08414, eq. 5
    "sigmoid_norm": lambda p: -sure(p.beta * p.mean_margin_B),
}
#: Those that compare the pairs of a batch with one another.
OF_THE_BATCH = ("aot", "aot_unpaired")


def check_loss(loss_type: str, label_smoothing: float) -> None:
    """Raises InputError for a loss_type that there is not, and a share of wrong pairs that it cannot have."""
    if loss_type not in LOSSES:
        raise InputError(f"loss_type={loss_type!r}: {', '.join(LOSSES)} are there")
    if not 0.0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing={label_smoothing}: 0 to less than 0.5, the share of pairs that are reversed")
    if loss_type == "exo_pair" and not label_smoothing:
        raise InputError("loss_type='exo_pair' needs label_smoothing > 0 (its paper has 0.001)")


def dpo_loss(
    chosen_B: jax.Array,
    rejected_B: jax.Array,
    reference_chosen_B: jax.Array,
    reference_rejected_B: jax.Array,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_count_B: jax.Array | None = None,
    rejected_count_B: jax.Array | None = None,
    discopop_tau: float = 0.05,
) -> jax.Array:
    """Losses `[B]` from summed log-probabilities of the two answers, under the policy and under the reference.

    loss_type: of `LOSSES`, each with its paper. label_smoothing: the share of pairs taken to be the wrong way round
    (`sigmoid`: conservative DPO, which trl 1.16 leaves out; `robust`, `exo_pair`, `aot`). `ipo` and `sigmoid_norm` are
    of means: they want the numbers of tokens. `aot` sorts over the whole batch: its losses belong to ranks, not rows.
    Raises InputError as `check_loss` does, and where the numbers of tokens are missing."""
    check_loss(loss_type, label_smoothing)
    counts = None if chosen_count_B is None or rejected_count_B is None else (chosen_count_B, rejected_count_B)
    given = (chosen_B - reference_chosen_B, rejected_B - reference_rejected_B)
    answers = (chosen_B - rejected_B, reference_chosen_B - reference_rejected_B)
    return LOSSES[loss_type](Pairs(*given, *answers, beta, label_smoothing, discopop_tau, counts))


def kto_loss(
    ratio_B: jax.Array,
    desirable_B: jax.Array,
    kl: jax.Array | float = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto",
) -> jax.Array:
    """Losses `[B]` of single answers that were liked or not (arXiv:2402.01306, eq. 7). ratio_B: log-ratios to the
    reference; desirable_B: bool; kl: how far the policy is from the reference, nats, without a gradient.
    apo_zero_unpaired (arXiv:2408.06266): without it. Raises InputError for another loss_type."""
    if loss_type not in ("kto", "apo_zero_unpaired"):
        raise InputError(f"loss_type={loss_type!r}: kto or apo_zero_unpaired is wanted")
    x_B = beta * (ratio_B - (kl if loss_type == "kto" else 0.0))
    liked_B = desirable_weight * (1 - jax.nn.sigmoid(x_B))
    return jnp.where(desirable_B, liked_B, undesirable_weight * jax.nn.sigmoid(x_B))


def orpo_loss(chosen_mean_B: jax.Array, rejected_mean_B: jax.Array) -> jax.Array:
    """Losses `[B]` of the odds ratio (arXiv:2403.07691, eq. 6 and 7) from mean log-probabilities per token; the
    objective is the chosen answers' own loss and beta times this."""
    odds = lambda mean_B: mean_B - jnp.log(-jnp.expm1(jnp.minimum(mean_B, -1e-7)))
    return -sure(odds(chosen_mean_B) - odds(rejected_mean_B))


def simpo_loss(
    chosen_mean_B: jax.Array,
    rejected_mean_B: jax.Array,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Losses `[B]` without a reference (arXiv:2405.14734, eq. 6) from mean log-probabilities per token. gamma: the
    margin that the chosen answer's reward, beta times its mean, is to have."""
    x_B = beta * (chosen_mean_B - rejected_mean_B) - gamma
    return -(1 - label_smoothing) * sure(x_B) - label_smoothing * sure(-x_B)


def pairwise_reward(
    chosen_B: jax.Array, rejected_B: jax.Array, margin_B: jax.Array | None = None, centering: float = 0.0
) -> jax.Array:
    """Losses `[B]` of a reward model's scores (Bradley and Terry; arXiv:2203.02155, eq. 1). margin_B: by how much the
    chosen answer is better (arXiv:2307.09288, sec. 3.2.2). centering: weight of the squared sum of the two scores,
    which holds their mean at 0 (arXiv:2312.09244)."""
    margin_B = 0.0 if margin_B is None else margin_B
    return -sure(chosen_B - rejected_B - margin_B) + centering * (chosen_B + rejected_B) ** 2


def listwise_reward(scores_BK: jax.Array) -> jax.Array:
    """Losses `[B]` of rankings, the best answer first: the negative log-likelihood of the order under Plackett and
    Luce's model; of two answers it is `pairwise_reward`."""
    K = scores_BK.shape[1]
    rest = [scores_BK[:, k] - jax.nn.logsumexp(scores_BK[:, k:], axis=-1) for k in range(K - 1)]
    return -sum(rest)
