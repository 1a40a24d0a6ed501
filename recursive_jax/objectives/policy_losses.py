"""What policy-gradient methods compute, as functions: advantages of groups, generalised advantage estimates, the
clipped losses, divergences. Shapes: N prompts, G answers to each, B rows, T positions, V vocabulary; float32, nats.

Names and defaults are those of trl 1.16 (`loss_type`, `epsilon`, `delta`, `importance_sampling_level`, ...)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.errors import InputError

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "ppo")
SAME = 1e-4  # added to a standard deviation, as trl does


def group_advantages(rewards_NG: np.ndarray, *, scale: Literal["group", "batch", "none"] = "group") -> np.ndarray:
    """How much better an answer is than the others to its prompt: float32 `[N, G]` (GRPO, arXiv:2402.03300).

    scale: divided by the standard deviation of its group, of the whole batch (arXiv:2501.03262), or not at all
    (arXiv:2503.20783). An answer without a reward (NaN) has advantage 0 and counts for nothing; so has a group of which
    one answer or none has a reward. Raises InputError for another scale."""
    if scale not in ("group", "batch", "none"):
        raise InputError(f"scale={scale!r}: group, batch or none is wanted")
    rewards_NG = np.asarray(rewards_NG, np.float64)
    known_NG = ~np.isnan(rewards_NG)
    count_N1 = known_NG.sum(1, keepdims=True)
    filled_NG = np.where(known_NG, rewards_NG, 0.0)
    mean_N1 = filled_NG.sum(1, keepdims=True) / np.maximum(count_N1, 1)
    away_NG = np.where(known_NG & (count_N1 > 1), filled_NG - mean_N1, 0.0)
    if scale == "group":
        spread_N1 = np.sqrt((away_NG**2).sum(1, keepdims=True) / np.maximum(count_N1 - 1, 1))
        away_NG = away_NG / (spread_N1 + SAME)
    elif scale == "batch" and known_NG.sum() > 1:
        away_NG = away_NG / (rewards_NG[known_NG].std(ddof=1) + SAME)
    return away_NG.astype(np.float32)


def leave_one_out(rewards_NG: np.ndarray) -> np.ndarray:
    """Each reward less the mean of the others to its prompt (RLOO, arXiv:2402.14740): float32 `[N, G]`; NaN as in
    `group_advantages`."""
    rewards_NG = np.asarray(rewards_NG, np.float64)
    count_N1 = (~np.isnan(rewards_NG)).sum(1, keepdims=True)
    away_NG = group_advantages(rewards_NG, scale="none").astype(np.float64)
    return (away_NG * count_N1 / np.maximum(count_N1 - 1, 1)).astype(np.float32)


def gae(
    rewards_BT: jax.Array, values_BT: jax.Array, mask_BT: jax.Array, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """(advantages, returns) `[B, T]` by generalised advantage estimation (arXiv:1506.02438). mask_BT: 1 on the tokens
    of the answer, which stand together; what comes after its last token is worth 0."""
    mask_BT = jnp.asarray(mask_BT, jnp.float32)

    def back(carry, column):
        later_B, next_value_B, next_mask_B = carry
        reward_B, value_B, mask_B = column
        error_B = reward_B + gamma * next_value_B * next_mask_B - value_B
        advantage_B = mask_B * (error_B + gamma * lam * later_B * next_mask_B)
        return (advantage_B, value_B, mask_B), advantage_B

    columns = tuple(jnp.asarray(x, jnp.float32).T for x in (rewards_BT, values_BT, mask_BT))
    zero_B = jnp.zeros_like(columns[0][0])
    _, advantages_TB = jax.lax.scan(back, (zero_B, zero_B, zero_B), columns, reverse=True)
    return advantages_TB.T, advantages_TB.T + values_BT * mask_BT


def kl_estimate(logprobs_BT: jax.Array, reference_BT: jax.Array, kind: Literal["k1", "k2", "k3"] = "k3") -> jax.Array:
    """The divergence of the policy from its reference, token by token `[B, T]`, by the estimators of Schulman's note
    (joschu.net/blog/kl-approx.html): k1 is without bias, k2 has little variance, k3 both and is never negative."""
    gap_BT = reference_BT - logprobs_BT
    if kind == "k1":
        return -gap_BT
    if kind == "k2":
        return 0.5 * gap_BT**2
    if kind == "k3":
        return jnp.exp(gap_BT) - gap_BT - 1.0
    raise InputError(f"kind={kind!r}: k1, k2 or k3 is wanted")


def policy_tokens(
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    advantages_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: Literal["token", "sequence"] = "token",
    beta: float = 0.0,
    reference_logprobs_BT: jax.Array | None = None,
    kl: Literal["k1", "k2", "k3"] = "k3",
    use_bias_correction_kl: bool = True,
    importance_BT: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(losses, what is logged of each token), all `[B, T]`; `policy_loss` says what they are. The divergence counts
    where reference_logprobs_BT is given. importance_BT: weights of the tokens' policy losses."""
    if loss_type not in LOSS_TYPES:
        raise InputError(f"loss_type={loss_type!r}: {', '.join(LOSS_TYPES)} are there")
    high = epsilon if epsilon_high is None else epsilon_high
    log_ratio_BT = jnp.where(mask_BT > 0, logprobs_BT - old_logprobs_BT, 0.0)
    if importance_sampling_level == "sequence" or loss_type == "gspo":
        count_B1 = jnp.maximum(jnp.sum(mask_BT, axis=-1, keepdims=True), 1.0)
        mean_B1 = jnp.sum(log_ratio_BT * mask_BT, axis=-1, keepdims=True) / count_B1
        log_ratio_BT = jnp.broadcast_to(mean_B1, log_ratio_BT.shape)
    elif importance_sampling_level != "token":
        raise InputError(f"importance_sampling_level={importance_sampling_level!r}: token or sequence is wanted")
    ratio_BT = jnp.exp(log_ratio_BT)
    low_BT, high_BT = ratio_BT < 1 - epsilon, ratio_BT > 1 + high
    if loss_type == "cispo":
        weight_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, high))
        losses_BT, clipped_BT = -weight_BT * advantages_BT * logprobs_BT, (ratio_BT > high) & (advantages_BT > 0)
    else:
        bounded_BT = jnp.clip(ratio_BT, 1 - epsilon, 1 + high)
        free_BT = ratio_BT if delta is None else jnp.minimum(ratio_BT, delta)
        losses_BT = -jnp.minimum(free_BT * advantages_BT, bounded_BT * advantages_BT)
        clipped_BT = (low_BT & (advantages_BT < 0)) | (high_BT & (advantages_BT > 0))
    logged = {"clip_ratio": clipped_BT.astype(jnp.float32), "ratio": ratio_BT}
    if importance_BT is not None:
        losses_BT = losses_BT * importance_BT
    if reference_logprobs_BT is not None:
        kl_BT = jnp.where(mask_BT > 0, kl_estimate(logprobs_BT, reference_logprobs_BT, kl), 0.0)
        losses_BT = losses_BT + beta * kl_BT * (ratio_BT if use_bias_correction_kl else 1.0)
        logged["kl"] = kl_BT
    return losses_BT, logged


def policy_sums(losses_BT: jax.Array, mask_BT: jax.Array, loss_type: str, max_length: int | None = None):
    """(sum, count) of the mean that a loss_type takes: of rows' means (grpo, gspo), of all tokens (bnpo, dapo, cispo,
    ppo), or of rows' sums over max_length (dr_grpo)."""
    total_B = jnp.sum(jnp.where(mask_BT > 0, losses_BT, 0.0) * mask_BT, axis=-1)
    rows = jnp.float32(len(total_B))
    if loss_type in ("grpo", "gspo"):
        return jnp.sum(total_B / jnp.maximum(jnp.sum(mask_BT, axis=-1), 1.0)), rows
    if loss_type == "dr_grpo":
        if max_length is None:
            raise InputError("loss_type='dr_grpo' divides by max_length, the most tokens of an answer: give it")
        return jnp.sum(total_B) / max_length, rows
    return jnp.sum(total_B), jnp.sum(mask_BT)


def policy_loss(
    logprobs_BT: jax.Array,
    old_logprobs_BT: jax.Array,
    advantages_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: Literal["token", "sequence"] = "token",
    beta: float = 0.0,
    reference_logprobs_BT: jax.Array | None = None,
    max_length: int | None = None,
    kl: Literal["k1", "k2", "k3"] = "k3",
    use_bias_correction_kl: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics): the clipped policy loss of a batch, and what is logged of it (clip_ratio, ratio, kl).

    logprobs_BT: of the policy now, old_logprobs_BT: when it wrote. advantages_BT: of the rows, on every token (`[B, 1]`
    will do). mask_BT: 1 on the tokens that count. loss_type: `grpo` (arXiv:2402.03300), `bnpo`, `dapo`
    (arXiv:2503.14476), `dr_grpo` (arXiv:2503.20783), `cispo` (arXiv:2506.13585), `gspo` (arXiv:2507.18071), `ppo`
    (arXiv:1707.06347). epsilon, epsilon_high: the ratio counts between 1 - epsilon and 1 + epsilon_high (cispo: to
    epsilon_high). delta: and never more than this. beta: weight of the divergence from the reference, by the estimator
    `kl`; with use_bias_correction_kl times the ratio, as trl does by default. Raises InputError for what is
    missing."""
    if beta and reference_logprobs_BT is None:
        raise InputError(f"beta={beta}: the divergence is from a reference: give reference_logprobs_BT")
    mask_BT = jnp.asarray(mask_BT, jnp.float32)
    losses_BT, logged = policy_tokens(
        logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, loss_type=loss_type, epsilon=epsilon,
        epsilon_high=epsilon_high, delta=delta, importance_sampling_level=importance_sampling_level, beta=beta,
        reference_logprobs_BT=reference_logprobs_BT if beta else None, kl=kl,
        use_bias_correction_kl=use_bias_correction_kl,
    )  # fmt: skip
    total, count = policy_sums(losses_BT, mask_BT, loss_type, max_length)
    tokens = jnp.maximum(jnp.sum(mask_BT), 1.0)
    return total / jnp.maximum(count, 1.0), {name: jnp.sum(x_BT * mask_BT) / tokens for name, x_BT in logged.items()}


def value_loss(
    values_BT: jax.Array, old_values_BT: jax.Array, returns_BT: jax.Array, mask_BT: jax.Array, *, clip: float = 0.2
) -> jax.Array:
    """Half the squared error of a value head, clipped around its old values (arXiv:1707.06347, as in InstructGPT): the
    mean over the tokens that count."""
    each_BT = value_tokens(values_BT, old_values_BT, returns_BT, clip=clip)
    return jnp.sum(each_BT * mask_BT) / jnp.maximum(jnp.sum(mask_BT), 1.0)


def value_tokens(
    values_BT: jax.Array, old_values_BT: jax.Array, returns_BT: jax.Array, *, clip: float = 0.2
) -> jax.Array:
    """`value_loss` token by token, `[B, T]`."""
    held_BT = jnp.clip(values_BT, old_values_BT - clip, old_values_BT + clip)
    return 0.5 * jnp.maximum((values_BT - returns_BT) ** 2, (held_BT - returns_BT) ** 2)


def generalized_jsd(
    student_BTV: jax.Array, teacher_BTV: jax.Array, mask_BT: jax.Array, *, beta: float = 0.5, temperature: float = 1.0
) -> jax.Array:
    """The generalised Jensen-Shannon divergence of two models' logits (arXiv:2306.13649, eq. 1): nats, the mean over
    the tokens that count. beta: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the mixture
    beta * teacher + (1 - beta) * student lies. temperature: of both."""
    mask_BT = jnp.asarray(mask_BT, jnp.float32)
    each_BT = jsd_tokens(student_BTV, teacher_BTV, beta=beta, temperature=temperature)
    return jnp.sum(each_BT * mask_BT) / jnp.maximum(jnp.sum(mask_BT), 1.0)


def jsd_tokens(
    student_BTV: jax.Array, teacher_BTV: jax.Array, *, beta: float = 0.5, temperature: float = 1.0
) -> jax.Array:
    """`generalized_jsd` token by token, `[B, T]`."""
    student_BTV, teacher_BTV = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (student_BTV, teacher_BTV))
    kl = lambda p_BTV, q_BTV: jnp.sum(jnp.exp(p_BTV) * (p_BTV - q_BTV), axis=-1)
    if beta == 0.0:
        return kl(teacher_BTV, student_BTV)
    if beta == 1.0:
        return kl(student_BTV, teacher_BTV)
    mixed_BTV = jnp.logaddexp(jnp.log(beta) + teacher_BTV, jnp.log1p(-beta) + student_BTV)
    return beta * kl(teacher_BTV, mixed_BTV) + (1 - beta) * kl(student_BTV, mixed_BTV)
