"""Which answer, and which of its tokens, gets how much of the credit: rewards become advantages.

Shapes: N prompts, G answers to each, B rows, T positions."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError, say
from recursive_jax.objectives.policy_losses import gae, group_advantages, leave_one_out

WRITTEN = ("ok", "length")  # statuses of rows that hold an answer

Signal = Literal["grpo", "rloo", "reinforce", "gae"]
Scale = Literal["group", "batch", "none"]
Truncated = Literal["keep", "zero", "soft", "mask"]


@dataclasses.dataclass(frozen=True)
class Credit:
    """signal: `grpo` (a reward less the mean of its group, then `scale_rewards`), `rloo` (less the mean of the others),
    `reinforce` (less the mean of all), `gae` (token by token, against a value head that trains along, gamma and lam;
    whitened over the batch unless scale_rewards is `none`).

    truncated: answers that were cut at their limit: `keep` (their reward counts), `zero` (it is 0), `soft` (every
    answer loses up to 1 over its last `overlong_buffer` tokens before `max_length`, one that was cut loses 1:
    arXiv:2503.14476, eq. 13), `mask` (their reward counts for the others, and they are not learnt from)."""

    signal: Signal = "grpo"
    scale_rewards: Scale = "group"
    truncated: Truncated = "keep"
    overlong_buffer: int = 0
    max_length: int | None = None
    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self):
        for name, kind in (("signal", Signal), ("scale_rewards", Scale), ("truncated", Truncated)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name}={getattr(self, name)!r}: {', '.join(get_args(kind))} are there")
        for name in ("gamma", "lam"):
            if not isinstance(getattr(self, name), (int, float)) or not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name}={getattr(self, name)!r}: between 0 and 1 is wanted")
        if self.truncated == "soft" and not (self.max_length and 0 < self.overlong_buffer <= self.max_length):
            raise InputError(
                f"truncated='soft' takes up to 1 off over the last overlong_buffer={self.overlong_buffer} tokens "
                f"before max_length={self.max_length}: give both, the former no more than the latter"
            )

    def rewards(self, data: Dataset, column: str) -> np.ndarray:
        """float64 `[rows]`, NaN where a row has none or failed; of truncated answers as `truncated` says."""
        status = data.column("status")
        known = [x if s in WRITTEN else None for x, s in zip(data.column(column), status, strict=True)]
        odd = next((x for x in known if x is not None and not isinstance(x, (int, float))), None)
        if odd is not None:
            raise InputError(f"column {column!r} holds {odd!r}: numbers are wanted, or nothing")
        found_B = np.array([np.nan if x is None else x for x in known], float)
        cut_B = np.array([s == "length" for s in status])
        if self.truncated == "zero":
            found_B = np.where(cut_B & ~np.isnan(found_B), 0.0, found_B)
        if self.truncated == "soft":
            length_B = np.array([len(tokens) for tokens in data.tokens()], float)
            over_B = np.clip((length_B - (self.max_length - self.overlong_buffer)) / self.overlong_buffer, 0, 1)
            found_B = found_B - np.where(cut_B, 1.0, over_B)
        return found_B

    def of_groups(self, rewards_NG: np.ndarray) -> np.ndarray:
        """Advantages float32 `[N, G]`; an answer without a reward (NaN) has 0 and counts for nothing."""
        if self.signal == "gae":
            raise InputError("signal='gae' gives tokens their advantages, with a value head: Rollouts have them")
        if self.signal == "grpo":
            return group_advantages(rewards_NG, scale=self.scale_rewards)
        if self.signal == "rloo":
            return leave_one_out(rewards_NG)
        known = rewards_NG[~np.isnan(rewards_NG)]
        return np.nan_to_num(rewards_NG - (known.mean() if len(known) else 0.0)).astype(np.float32)

    def of_tokens(
        self, rewards_B: np.ndarray, taken_BT: np.ndarray, values_BT: np.ndarray, mask_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(advantages, returns) `[B, T]` by `gae`. The reward comes with an answer's last token, taken_BT is taken off
        at every one; rows without a reward (NaN) have none."""
        mask_BT = mask_BT * ~np.isnan(rewards_B)[:, None]
        last_B = mask_BT.shape[1] - 1 - np.argmax(mask_BT[:, ::-1] > 0, axis=1)
        rewards_BT = -np.asarray(taken_BT, np.float32)
        rewards_BT[np.arange(len(last_B)), last_B] += np.nan_to_num(rewards_B).astype(np.float32)
        found = gae(jnp.asarray(rewards_BT), jnp.asarray(values_BT), mask_BT, gamma=self.gamma, lam=self.lam)
        advantages_BT, returns_BT = map(np.asarray, jax.device_get(found))
        if self.scale_rewards != "none":
            own = advantages_BT[mask_BT > 0]
            spread = own.std(ddof=1) if len(own) > 1 else 0.0
            advantages_BT = (advantages_BT - (own.mean() if len(own) else 0.0)) / (spread + 1e-8) * mask_BT
        return advantages_BT, returns_BT


def even(rewards_NG: np.ndarray) -> np.ndarray:
    """Which groups have no two different rewards, `[N]`: they teach nothing."""
    return np.array([len(set(row[~np.isnan(row)])) < 2 for row in rewards_NG], bool)


def why_even(rewards_NG: np.ndarray) -> str:
    """What the rewards of groups without variance are, in words."""
    known = [row[~np.isnan(row)] for row in rewards_NG]
    values = [float(row[0]) for row in known if len(row)]
    common = sorted(set(values), key=values.count, reverse=True)[:3]
    told = [f"{values.count(value):,} of them {value:g} throughout" for value in common]
    bare = len(known) - len(values)
    return ", ".join([*told, *([f"{bare:,} of them without any"] if bare else [])])


def with_advantages(data: Dataset, column: str = "score", credit: Credit | None = None, **settings: Any) -> Dataset:
    """The rows that can be learnt from, with a column `advantage`. Rows to one prompt, by their first parent, are a
    group. credit: a `Credit` (every `PolicyGradient` is one); settings: its fields by name, `signal="rloo"`. A row
    without a reward, or that failed, is left out and counts for nothing in its group.

    Says how many groups have rewards that are all equal: nothing is learnt from them. Raises InputError where no group
    has two different ones, and where rows have no column of that name."""
    if credit is not None and not isinstance(credit, Credit):
        raise InputError(f"credit={credit!r}: a Credit is wanted, such as a PolicyGradient; or settings, signal='rloo'")
    if not len(data):
        raise InputError("there are no rows to compare")
    unknown = sorted(set(settings) - {f.name for f in dataclasses.fields(Credit)})
    if unknown:
        raise InputError(f"{unknown[0]} is no setting of a Credit: {', '.join(Credit.__dataclass_fields__)} are there")
    credit = dataclasses.replace(credit or Credit(), **settings)
    if not data.has(column):
        raise InputError(f"there is no column {column!r} with the rewards: round.score(...) or rj.score gives one")
    rewards_B = credit.rewards(data, column)
    names = [(p or [i])[0] for p, i in zip(data.column("parents"), data.column("id"), strict=True)]
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(name, []).append(place)
    size = max(map(len, groups.values()))
    rewards_NG = np.full((len(groups), size), np.nan)
    for n, places in enumerate(groups.values()):
        rewards_NG[n, : len(places)] = rewards_B[places]
    compared = credit.signal in ("grpo", "rloo")
    if compared and size < 2:
        raise InputError("every prompt has one answer: answers to one prompt are compared, those with equal `parents`")
    even_N = even(rewards_NG if compared else rewards_NG.reshape(1, -1))
    if even_N.all():
        raise InputError(
            f"no group has two different rewards ({why_even(rewards_NG)}): every answer is as good as the others to "
            "its prompt, and nothing can be learnt. Take easier or harder prompts, more answers to each, another reward"
        )
    if even_N.any():
        why = why_even(rewards_NG[even_N])
        say(f"{even_N.sum():,} of {len(even_N):,} groups have rewards that are all equal ({why}): they teach nothing")
    advantages_NG = credit.of_groups(rewards_NG)
    found_B = np.zeros(len(data), np.float32)
    for n, places in enumerate(groups.values()):
        found_B[places] = advantages_NG[n, : len(places)]
    keep_B = ~np.isnan(rewards_B)
    if credit.truncated == "mask":
        keep_B &= np.array([s != "length" for s in data.column("status")])
    return data.with_column("advantage", found_B.tolist()).take(np.flatnonzero(keep_B))
