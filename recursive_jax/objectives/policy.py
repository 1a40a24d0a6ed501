"""Learning from rewards: rows that the model wrote, each with its log-probabilities and how much better it is than the
others to its prompt. The losses themselves are in policy_losses.py.

    rows = round.generate("rollouts", model, problems, template=ask, each=8)      # logprobs come with them
    graded = round.score("graded", rows, reward)
    groups = round.dataset("groups", rj.objectives.with_advantages, graded)
    student = round.train("student", model, groups, config, rj.objectives.PolicyGradient(loss_type="grpo"))"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Example, Packed, stack_groups
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError, say
from recursive_jax.identity import fingerprint
from recursive_jax.mesh import rows_like
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Params, Term
from recursive_jax.objectives.causal import targets, token_nll
from recursive_jax.objectives.policy_losses import (
    LOSS_TYPES,
    advantages,
    policy_sums,
    policy_tokens,
)
from recursive_jax.objectives.preference import Referenced

WRITTEN = ("ok", "length")  # statuses of rows that hold an answer


def with_advantages(
    data: Dataset,
    column: str = "score",
    signal: Literal["grpo", "rloo", "reinforce"] = "grpo",
    scale: Literal["group", "batch", "none"] = "group",
) -> Dataset:
    """The rows that can be learnt from, with a column `advantage`. Rows to one prompt, by their first parent, are a
    group. signal: `grpo` (the group's mean taken off, then `scale`), `rloo` (the mean of the others), `reinforce` (the
    mean of all rows). A row without a reward, or that failed, is left out and counts for nothing in its group.

    Says how many groups have rewards that are all equal: nothing is learnt from them. Raises InputError where no group
    has two different ones, and where rows have no column of that name."""
    if not data.has(column):
        raise InputError(f"there is no column {column!r} with the rewards: round.score(...) or rj.score gives one")
    status = data.column("status")
    known = [s if st in WRITTEN else None for s, st in zip(data.column(column), status, strict=True)]
    rewards = np.array([np.nan if s is None else s for s in known], float)
    names = [(p or [i])[0] for p, i in zip(data.column("parents"), data.column("id"), strict=True)]
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(name, []).append(place)
    size = max(map(len, groups.values()))
    table_NG = np.full((len(groups), size), np.nan)
    for n, places in enumerate(groups.values()):
        table_NG[n, : len(places)] = rewards[places]
    spread = [len(set(row[~np.isnan(row)])) > 1 for row in table_NG]
    if not any(spread):
        found = sorted({float(x) for x in rewards[~np.isnan(rewards)]})[:5]
        raise InputError(
            f"no group has two different rewards (there are {found}): every answer is as good as the others to its "
            "prompt, and nothing can be learnt. Take easier or harder prompts, more answers to each, or another reward"
        )
    if not all(spread):
        even = len(spread) - sum(spread)
        say(f"{even:,} of {len(spread):,} groups have rewards that are all equal: they teach nothing")
    advantages_NG = advantages(table_NG, signal, scale)
    out = np.zeros(len(data), np.float32)
    for n, places in enumerate(groups.values()):
        out[places] = advantages_NG[n, : len(places)]
    data = data.with_column("advantage", out.tolist())
    return data.take(np.flatnonzero(~np.isnan(rewards)))


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Referenced):
    """The clipped policy loss over rows that a model wrote (`policy_losses.policy_loss` has its settings and papers).
    The data has `prompt`, `tokens`, `logprobs` (of the model that wrote, as generation gives them) and `advantage`
    (`with_advantages`).

    beta: weight of the divergence from the reference, by default the model as it is before this training. entropy_coef:
    weight of the policy's entropy. mask_truncated: answers that were cut at the limit are not learnt from. max_length:
    most tokens of an answer, for `dr_grpo`. Logged: clip_ratio, ratio, kl, entropy, and `logp_difference`, the mean
    distance of the policy from the rows' own log-probabilities: 0 where sampler and trainer agree, before the first
    step."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "loss", "old", "advantage")

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    beta: float = 0.0
    kl: str = "k3"
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    mask_truncated: bool = False
    max_length: int | None = None
    reference: Model | None = None
    reference_in_step: bool = False

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES:
            raise InputError(f"loss_type={self.loss_type!r}: {', '.join(LOSS_TYPES)} are there")
        if self.loss_type == "dr_grpo" and self.max_length is None:
            raise InputError("loss_type='dr_grpo' wants max_length, the most tokens that an answer may have")

    def models(self, model: Model) -> dict[str, Model]:
        return super().models(model) if self.beta else {}

    def rows(self, given: Any, tokenizer: Any) -> Dataset:
        if not isinstance(given, Dataset):
            raise InputError(
                "a policy learns from rows that it wrote: a Dataset with `tokens`, `logprobs`, `advantage`"
            )
        return given

    def groups(self, data: Dataset, tokenizer: Tokenizer) -> list[list[Example]]:
        found = []
        cut = [self.mask_truncated and s == "length" for s in data.column("status")]
        for prompt, tokens, left in zip(data.prompts(), data.tokens(), cut, strict=True):
            before = prompt if len(prompt) else np.array([tokenizer.bos], np.int32)
            ids = np.concatenate([before, tokens]).astype(np.int32)
            found.append([Example(ids, (np.arange(len(ids)) >= len(before)) & (not left))])
        return found

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        if not data.has("advantage"):
            raise InputError("the rows have no column `advantage`: rj.objectives.with_advantages(rows) gives one")
        sizes = zip(data.tokens(), data.lists("logprobs"), strict=True)
        short = [n for n, (tokens, logprobs) in enumerate(sizes) if len(tokens) != len(logprobs)]
        if short:
            raise InputError(f"row {short[0]} has no log-probability for every token: keep those that generation gives")
        groups = self.groups(data, model.tokenizer)
        packed = super().pack(data, model, length) if self.beta else stack_groups(groups, length, model.tokenizer.pad)
        old = np.zeros(packed.columns["tokens"].shape, np.float32)
        for n, ((example,), logprobs) in enumerate(zip(groups, data.lists("logprobs"), strict=True)):
            stop = len(example.tokens)
            old[n, 0, stop - len(logprobs) : stop] = logprobs
        advantage = np.asarray(data.column("advantage"), np.float32)
        columns = {**packed.columns, "old": old, "advantage": advantage}
        return Packed(columns, fingerprint([packed.fingerprint, old, advantage]))

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        rows = {name: batch[name][:, 0] for name in ("tokens", "segments", "loss")}
        inputs, segments, labels, mask_BT = targets(rows)
        logits_BTV = ctx.apply(params, inputs, segments)
        logprobs_BT = -token_nll(logits_BTV, labels)
        old_BT = rows_like(batch["old"][:, 0, 1:], len(logprobs_BT))
        advantage_B1 = rows_like(batch["advantage"], len(logprobs_BT))[:, None]
        losses_BT, logged = policy_tokens(
            logprobs_BT, old_BT, advantage_B1, mask_BT, loss_type=self.loss_type, epsilon=self.epsilon,
            epsilon_high=self.epsilon_high, delta=self.delta, importance_sampling_level=self.importance_sampling_level,
            beta=self.beta, reference_logprobs_BT=self._reference(ctx, rows, batch), kl=self.kl,
            use_bias_correction_kl=self.use_bias_correction_kl,
        )  # fmt: skip
        entropy_BT = _entropy(logits_BTV if self.entropy_coef else jax.lax.stop_gradient(logits_BTV))
        total, count = policy_sums(losses_BT, mask_BT, self.loss_type, self.max_length)
        terms, tokens = {"policy": Term(total, count)}, jnp.sum(mask_BT)
        of = lambda x_BT: jnp.sum(jnp.where(mask_BT > 0, x_BT, 0.0))
        if self.entropy_coef:
            terms["entropy"] = Term(of(entropy_BT), tokens, -self.entropy_coef)
        logged |= {"entropy": entropy_BT, "logp_difference": jnp.abs(logprobs_BT - old_BT)}
        metrics = {name: (jax.lax.stop_gradient(of(x_BT)), tokens) for name, x_BT in logged.items()}
        return Loss(terms, {**metrics, **_of_rollouts(batch, mask_BT)})

    def _reference(self, ctx: Context, rows: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array | None:
        if not self.beta:
            return None
        if not self.reference_in_step:
            return rows_like(batch["reference"][:, 0, 1:], len(rows["tokens"]))
        inputs, segments, labels, _ = targets(rows)
        return jax.lax.stop_gradient(-token_nll(ctx.others["reference"](None, inputs, segments), labels))


def _of_rollouts(batch: dict[str, jax.Array], mask_BT: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What rollouts bring along (`curate/rollouts.py`): the mean reward, the share of rows whose group teaches nothing,
    the length of the answers."""
    if "reward" not in batch:
        return {}
    rewarded_B, rows = batch["rewarded"], jnp.float32(len(batch["reward"]))
    return {
        "reward": (jnp.sum(batch["reward"] * rewarded_B), jnp.sum(rewarded_B)),
        "zero_variance": (jnp.sum(batch["zero_variance"]), rows),
        "answer_length": (jnp.sum(mask_BT), rows),
    }


def _entropy(logits_BTV: jax.Array) -> jax.Array:
    """Of the next token, nats, `[B, T]`."""
    logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
