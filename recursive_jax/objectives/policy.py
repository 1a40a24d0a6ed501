"""Learning from rewards: rows that the model wrote, each with its log-probabilities and how much better it is than the
others to its prompt. The losses themselves are in policy_losses.py, what becomes of rewards in credit.py.

    rows = round.generate("rollouts", model, problems, template=ask, each=8)      # logprobs come with them
    graded = round.score("graded", rows, reward)
    groups = round.dataset("groups", rj.objectives.with_advantages, graded)
    student = round.train("student", model, groups, config, rj.objectives.PolicyGradient(loss_type="grpo"))

Batches that the policy writes as it learns are `curate/rollouts.py`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Example, Packed, examples_of, stack_groups
from recursive_jax.data.tokenizers import Tokenizer
from recursive_jax.errors import InputError
from recursive_jax.identity import fingerprint
from recursive_jax.mesh import rows_like
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Extra, Loss, Params, Shapes, Term, batch_shapes
from recursive_jax.objectives.causal import targets
from recursive_jax.objectives.credit import Credit
from recursive_jax.objectives.passes import values_of
from recursive_jax.objectives.policy_losses import LOSS_TYPES, kl_estimate, policy_sums, policy_tokens, value_tokens
from recursive_jax.objectives.preference import Referenced

CHOICES = {"loss_type": LOSS_TYPES, "kl": ("k1", "k2", "k3"), "importance_sampling_level": ("token", "sequence")}
#: Settings that are numbers: 0 where that is allowed, else above it.
LEAST = {"beta": 0, "value_coef": 0, "epsilon": None, "epsilon_high": None, "delta": None, "value_clip": None}
LEAST |= {"importance_sampling_cap": None, "kl_target": None, "kl_horizon": None}


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Credit, Referenced):
    """The clipped policy loss over rows that a model wrote (`policy_losses.policy_loss` has its settings and papers;
    `Credit` what becomes of rewards). The data has `prompt`, `tokens`, `logprobs` (of the model that wrote, as
    generation gives them) and `advantage` (`with_advantages`).

    beta: weight of the divergence from the reference, by default the model as it is before this training. It is a part
    of the loss, by the estimator `kl`; with kl_in_reward it is taken off the rewards, token by token, by the
    log-ratio (InstructGPT, arXiv:2203.02155). kl_target: beta is raised while an answer's divergence is above this many
    nats, and lowered below, over kl_horizon answers (arXiv:1909.08593, sec. 2.2). entropy_coef: weight of the policy's
    entropy. max_length: most tokens of an answer, for `dr_grpo`. value_coef, value_clip: of the value head's loss, with
    signal `gae`. importance_sampling_cap: where rows were drawn from another distribution than the policy (a
    temperature, top-p, an older policy), the weight of a token, its probability over the one it was drawn with, is at
    most this (truncated importance sampling).

    Logged: clip_ratio, ratio, kl, entropy, and `sampling/logp_difference`, the mean distance of the policy from the
    log-probabilities that the rows were drawn with: in the first step on them 0 within 1e-4 in float32, since sampler
    and trainer are one model."""

    version: ClassVar[int] = 2
    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "loss", "old", "advantage")

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    importance_sampling_cap: float = 2.0
    beta: float = 0.0
    kl: str = "k3"
    kl_in_reward: bool = False
    kl_target: float | None = None
    kl_horizon: int = 10_000
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    value_coef: float = 0.1
    value_clip: float = 0.2
    reference: Model | None = None
    reference_in_step: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.loss_type == "dr_grpo" and self.max_length is None:
            raise InputError("loss_type='dr_grpo' wants max_length, the most tokens that an answer may have")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)!r}: {' or '.join(choices)} is wanted")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and (value > 0 or value == least)):
                raise InputError(f"{name}={value!r}: a number {'of 0 or more' if least == 0 else 'above 0'} is wanted")
        if (self.kl_target is not None or self.kl_in_reward) and not self.beta > 0:
            raise InputError(f"beta={self.beta}: kl_target and kl_in_reward want a weight to start with, above 0")
        if self.kl_in_reward and self.reference_in_step:
            raise InputError("reference_in_step: with kl_in_reward the reference is asked before the step, not in it")

    def models(self, model: Model) -> dict[str, Model]:
        return super().models(model) if self.beta else {}

    def init(self, key: jax.Array, model: Model) -> Extra:
        """A value head that expects 0 of everything, and the weight of the divergence where that adapts."""
        params, state = {}, {}
        if self.signal == "gae":
            width = model.network.states_size
            if width is None:
                raise InputError("signal='gae' puts a value head on the states, and a model of user functions has none")
            params["value"] = {"weight": jnp.zeros((width,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}
        if self.kl_target is not None:
            zero = jnp.float32(0.0)
            state |= {"beta": jnp.float32(self.beta), "gap": zero, "rows": zero, "step": jnp.int32(-1)}
        return Extra(params, state)

    def rows(self, given: Any, tokenizer: Any) -> Dataset:
        if not isinstance(given, Dataset):
            raise InputError(
                "a policy learns from rows that it wrote: a Dataset with `tokens`, `logprobs`, `advantage`"
            )
        return given

    def shapes(self, rows: int, length: int) -> Shapes:
        """With the extra columns that the kind of its signal has."""
        columns = ["reference"] if self.beta and not self.reference_in_step else []
        found = batch_shapes((*self.fields, *columns), rows, 1, length + 1)
        if self.signal == "gae":  # an advantage, and a return, for every token
            places = found["old"]
            found |= {"advantage": places, "return": places, "value": places}
        return found

    def groups(self, data: Dataset, tokenizer: Tokenizer) -> list[list[Example]]:
        cut = [self.truncated == "mask" and s == "length" for s in data.column("status")]
        examples = zip(examples_of(data, tokenizer), cut, strict=True)
        return [[dataclasses.replace(e, loss=np.zeros_like(e.loss)) if left else e] for e, left in examples]

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        if not data.has("advantage"):
            raise InputError("the rows have no column `advantage`: rj.objectives.with_advantages(rows) gives one")
        if self.kl_in_reward or self.kl_target is not None or self.signal == "gae":
            what = "signal='gae'" if self.signal == "gae" else "kl_in_reward" if self.kl_in_reward else "kl_target"
            raise InputError(
                f"{what} follows the policy as it learns: train on Rollouts, which ask it anew at every step"
            )
        packed = self.packed(data, model, length)
        advantage = np.asarray(data.column("advantage"), np.float32)
        columns = {**packed.columns, "advantage": advantage}
        return Packed(columns, fingerprint([packed.fingerprint, advantage]))

    def packed(self, data: Dataset, model: Model, length: int) -> Packed:
        """The rows with the log-probabilities that they were written with (`old`) and the reference's."""
        groups = self.groups(data, model.tokenizer)
        written = data.lists("logprobs")
        sizes = zip(data.tokens(), written, strict=True)
        short = [n for n, (tokens, logprobs) in enumerate(sizes) if len(tokens) != len(logprobs)]
        if short:
            raise InputError(f"row {short[0]} has no log-probability for every token: keep those that generation gives")
        packed = super().pack(data, model, length) if self.beta else stack_groups(groups, length, model.tokenizer.pad)
        old = np.zeros(packed.columns["tokens"].shape, np.float32)
        for n, ((example,), logprobs) in enumerate(zip(groups, written, strict=True)):
            stop = len(example.tokens)
            old[n, 0, stop - len(logprobs) : stop] = logprobs
        return Packed({**packed.columns, "old": old}, fingerprint([packed.fingerprint, old]))

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        rows = {name: batch[name][:, 0] for name in ("tokens", "segments", "loss")}
        inputs, segments, labels, mask_BT = targets(rows)
        read = ctx.read(params, inputs, segments, labels)
        logprobs_BT, B = read.logprobs_BT, len(mask_BT)
        of_tokens = lambda name: rows_like(batch[name][:, 0, 1:], B)
        old_BT, reference_BT = of_tokens("old"), self._reference(ctx, rows, batch)
        advantage = (
            of_tokens("advantage") if batch["advantage"].ndim == 3 else rows_like(batch["advantage"], B)[:, None]
        )
        held = None if self.kl_target is None else self._held(ctx)
        losses_BT, logged = policy_tokens(
            logprobs_BT, old_BT, advantage, mask_BT, loss_type=self.loss_type, epsilon=self.epsilon,
            epsilon_high=self.epsilon_high, delta=self.delta, importance_sampling_level=self.importance_sampling_level,
            importance_BT=of_tokens("importance") if "importance" in batch else None,
            beta=self.beta if held is None else held["beta"],
            reference_logprobs_BT=None if self.kl_in_reward else reference_BT, kl=self.kl,
            use_bias_correction_kl=self.use_bias_correction_kl,
        )  # fmt: skip
        total, count = policy_sums(losses_BT, mask_BT, self.loss_type, self.max_length)
        terms, tokens = {"policy": Term(total, count)}, jnp.sum(mask_BT)
        of = lambda x_BT: jnp.sum(jnp.where(mask_BT > 0, x_BT, 0.0))
        if self.entropy_coef:
            terms["entropy"] = Term(of(read.entropy_BT), tokens, -self.entropy_coef)
        if self.signal == "gae":
            each_BT = value_tokens(
                values_of(read, params.extra["value"]), of_tokens("value"), of_tokens("return"), clip=self.value_clip
            )
            terms["value"] = Term(of(each_BT), tokens, self.value_coef)
        if self.kl_in_reward:
            logged["kl"] = jnp.where(mask_BT > 0, kl_estimate(logprobs_BT, reference_BT, self.kl), 0.0)
        sampled_BT = of_tokens("sampled") if "sampled" in batch else old_BT
        logged |= {"entropy": read.entropy_BT, "sampling/logp_difference": jnp.abs(logprobs_BT - sampled_BT)}
        if "importance" in batch:
            logged["sampling/importance"] = of_tokens("importance")
        metrics = {name: (jax.lax.stop_gradient(of(x_BT)), tokens) for name, x_BT in logged.items()}
        state = None
        if held is not None:
            state = self._seen(held, logprobs_BT, reference_BT, mask_BT, batch)
            metrics["beta"] = (state["beta"], jnp.float32(1.0))
        return Loss(terms, {**metrics, **_of_rollouts(batch, mask_BT)}, state)

    def _reference(self, ctx: Context, rows: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array | None:
        if not self.beta:
            return None
        if not self.reference_in_step:
            return rows_like(batch["reference"][:, 0, 1:], len(rows["tokens"]))
        return ctx.read(None, *targets(rows)[:3], of="reference").logprobs_BT

    def settled(self, state: Any) -> jax.Array:
        """The weight of the divergence after the steps so far: how far answers that were seen for the first time are
        from the reference, against the target."""
        away = state["gap"] / jnp.maximum(state["rows"], 1.0) / self.kl_target - 1.0
        return state["beta"] * (1.0 + jnp.clip(away, -0.2, 0.2) * state["rows"] / self.kl_horizon)

    def _held(self, ctx: Context) -> Any:
        """The state as this step begins: one weight for all its micro-batches."""
        before, first = ctx.state, ctx.step > ctx.state["step"]
        fresh = {"beta": self.settled(before), "gap": jnp.float32(0.0), "rows": jnp.float32(0.0), "step": ctx.step}
        return jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, before)

    def _seen(self, state: Any, logprobs_BT, reference_BT, mask_BT, batch: dict[str, jax.Array]) -> Any:
        first_B = rows_like(batch["first"], len(mask_BT)) if "first" in batch else jnp.ones(len(mask_BT))
        gap_BT = jnp.where(mask_BT > 0, logprobs_BT - reference_BT, 0.0) * first_B[:, None]
        added = {**state, "gap": state["gap"] + jnp.sum(gap_BT), "rows": state["rows"] + jnp.sum(first_B)}
        return jax.lax.stop_gradient(added)


def _of_rollouts(batch: dict[str, jax.Array], mask_BT: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What rollouts bring along (`curate/rollouts.py`): the mean reward, the share of rows whose group teaches nothing,
    the share that was cut at its limit, the length of the answers."""
    if "reward" not in batch:
        return {}
    rewarded_B, rows = batch["rewarded"], jnp.float32(len(batch["reward"]))
    return {
        "reward": (jnp.sum(batch["reward"] * rewarded_B), jnp.sum(rewarded_B)),
        **({"frac_reward_zero_std": (jnp.sum(batch["even"]), rows)} if "even" in batch else {}),
        "completions/clipped_ratio": (jnp.sum(batch["cut"]), rows),
        "completions/mean_length": (jnp.sum(batch["length"]), rows),
    }
