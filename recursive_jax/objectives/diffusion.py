"""Masked diffusion: a text is hidden token by token, and the model guesses what is behind (MDLM, arXiv:2406.07524;
D3PM's absorbing case, arXiv:2107.03006; LLaDA, arXiv:2502.09992; block diffusion, arXiv:2503.09573).

At noise level t in [0, 1] each token is hidden with probability 1 - alpha(t). The bound on -log p(x) is

    integral over t of  -alpha'(t) / (1 - alpha(t)) * E[ sum of -log p(x_i | what is seen) over hidden i ]

which is the same for every schedule: the mean, over all orders, of what writing x token by token in that order costs.
With T steps instead of a continuous t it is a little larger, and falls to it.

Shapes: B rows, T positions, V vocabulary, M sets of hidden positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.errors import InputError
from recursive_jax.mesh import rows_like

Denoise = Callable[[jax.Array], jax.Array]
EXACT = 14  # hidden positions whose sets are all summed: 2**14 rows


def hidden_share(schedule: str, t: Any) -> Any:
    """1 - alpha(t), the probability that a token is hidden at level t. Raises InputError for another schedule."""
    if schedule == "log_linear":
        return t
    if schedule == "cosine":
        return jnp.cos(0.5 * jnp.pi * (1.0 - t))
    raise InputError(f"schedule={schedule!r}: log_linear or cosine is wanted")


def weight(schedule: str, t: Any) -> Any:
    """-alpha'(t) / (1 - alpha(t)): what the loss of hidden tokens at level t counts for."""
    if schedule == "log_linear":
        return 1.0 / t
    return 0.5 * jnp.pi * jnp.tan(0.5 * jnp.pi * (1.0 - t)) if schedule == "cosine" else hidden_share(schedule, t)


def levels(key: jax.Array, rows: int, *, eps: float = 1e-3, steps: int = 0, antithetic: bool = True) -> jax.Array:
    """A noise level in (0, 1] for each of so many rows, float32. antithetic: spread evenly over the interval
    (arXiv:2107.00630, app. I.1), else each by itself. steps: one of 1 / steps, ..., 1. eps: the least continuous
    one."""
    if antithetic:
        u_B = (jax.random.uniform(key) + jnp.arange(rows) / rows) % 1.0
    else:
        u_B = jax.random.uniform(key, (rows,))
    if steps:
        return (jnp.minimum(jnp.floor(u_B * steps), steps - 1) + 1) / steps
    return eps + (1.0 - eps) * u_B


def level_weight(schedule: str, t: Any, steps: int = 0) -> Any:
    """What the loss of the hidden tokens at level t counts for, where t is drawn uniformly: of the continuous bound, or
    of the one with so many steps (`steps * (alpha(t - 1 / steps) - alpha(t)) / (1 - alpha(t))`)."""
    if not steps:
        return weight(schedule, t)
    hidden = hidden_share(schedule, t)
    return steps * (hidden - hidden_share(schedule, jnp.maximum(t - 1.0 / steps, 0.0))) / hidden


def behind(logp_BTV: jax.Array, tokens_BT: jax.Array, mask_id: int) -> jax.Array:
    """log p of the tokens at each position, float32 `[B, T]`, where the mask itself is never what is hidden (SUBS,
    arXiv:2406.07524, sec. 3.2.3). logp_BTV: log-probabilities, or logits."""
    column_V = jnp.arange(logp_BTV.shape[-1])
    logits_BTV = jnp.where(column_V == mask_id, -1e30, logp_BTV.astype(jnp.float32))
    picked_BT = jnp.sum(jnp.where(column_V == tokens_BT[..., None], logits_BTV, 0.0), axis=-1)
    return picked_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def masked_diffusion_loss(
    denoise: Denoise,
    tokens_BT: jax.Array,
    key: jax.Array,
    *,
    mask_id: int,
    schedule: str = "log_linear",
    steps: int = 0,
    antithetic: bool = True,
    eps: float = 1e-3,
    noised_BT: jax.Array | None = None,
) -> jax.Array:
    """An estimate of the bound on -log p of each row from one noise level: nats, float32 `[B]`; its mean over keys is
    `masked_diffusion_bound` (but for `eps`, which leaves out the least levels).

    denoise: (tokens_BT with hidden ones as mask_id) -> log-probabilities (or logits) `[B, T, V]`. schedule: log_linear
    or cosine. steps: D3PM with so many steps; 0: continuous. noised_BT: which tokens may be hidden (an answer, not its
    prompt); default: all."""
    draw, hide = jax.random.split(key)
    t_B = levels(draw, len(tokens_BT), eps=eps, steps=steps, antithetic=antithetic)
    hidden_BT = rows_like(jax.random.uniform(hide, tokens_BT.shape), len(tokens_BT))
    hidden_BT = hidden_BT < hidden_share(schedule, t_B)[:, None]
    if noised_BT is not None:
        hidden_BT &= noised_BT.astype(bool)
    logp_BT = behind(denoise(jnp.where(hidden_BT, mask_id, tokens_BT)), tokens_BT, mask_id)
    return level_weight(schedule, t_B, steps) * jnp.sum(jnp.where(hidden_BT, -logp_BT, 0.0), axis=1)


def masked_diffusion_bound(
    denoise: Denoise,
    tokens_T: Any,
    *,
    mask_id: int,
    samples: int = 128,
    exact: bool = False,
    steps: int = 0,
    noised_T: Any = None,
    key: jax.Array | None = None,
) -> float:
    """The bound on -log p of one row, nats of the whole row.

    LLaDA's estimator (arXiv:2502.09992, app. A.2): how many tokens are hidden, l, is spread evenly over 1 .. L, which l
    is drawn, and the loss of the hidden ones counts L / l; of `samples` draws the mean. exact: over all sets of hidden
    positions instead, where there are at most 14 of them. steps: the bound of D3PM with so many (log-linear; exact
    only). noised_T: the tokens whose probability is asked, given the others; default: all.

    Raises InputError for a row too long to be exact."""
    tokens_T = np.asarray(tokens_T, np.int32)
    noised_T = np.ones(len(tokens_T), bool) if noised_T is None else np.asarray(noised_T, bool)
    places = np.flatnonzero(noised_T)
    if not len(places):
        return 0.0
    if not exact:
        if steps:
            raise InputError(f"steps={steps}: the bound of so many steps is computed with exact=True")
        words = jax.random.key_data(jax.random.key(0) if key is None else key)
        rng = np.random.default_rng(np.asarray(words).ravel().tolist())
        hidden_MT, weight_MT = drawn_sets(rng, len(tokens_T), [places], samples)
        return float(np.mean(np.sum(weight_MT * _costs(denoise, tokens_T, hidden_MT, mask_id), axis=1)))
    if len(places) > EXACT:
        raise InputError(f"exact sums all sets of {len(places)} positions; at most {EXACT} are: leave exact out")
    sets = itertools.product((False, True), repeat=len(places))
    hidden_MT = np.zeros((2 ** len(places), len(tokens_T)), bool)
    hidden_MT[:, places] = np.array(list(sets))
    hidden_MT = hidden_MT[hidden_MT.any(1)]
    weights = np.array([set_weight(int(n), len(places), steps) for n in hidden_MT.sum(1)])
    return float(np.sum(weights * np.sum(_costs(denoise, tokens_T, hidden_MT, mask_id), axis=1)))


def set_weight(hidden: int, length: int, steps: int = 0) -> float:
    """What the loss of one set of hidden positions counts for in the bound: the integral of t**l (1 - t)**(L - l) / t,
    which is 1 / (l C(L, l)); or its sum over t = 1 / steps, ..., 1."""
    if not steps:
        return 1.0 / (hidden * math.comb(length, hidden))
    t = np.arange(1, steps + 1) / steps
    return float(np.sum(t ** (hidden - 1) * (1.0 - t) ** (length - hidden)) / steps)


def drawn_sets(
    rng: np.random.Generator, length: int, blocks: Sequence[np.ndarray], samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """(hidden positions bool `[samples, T]`, what the cost of each counts for, float64 `[samples, T]`) of LLaDA's
    estimator: of each block's L positions l are hidden and count L / l, the sizes spread evenly over 1 .. L with a
    random start, so that the estimate varies less than with independent ones."""
    hidden_MT, weight_MT = np.zeros((samples, length), bool), np.zeros((samples, length))
    for places in blocks:
        L = len(places)
        if L:
            sizes = (np.floor((rng.random() + rng.permutation(samples) / samples) % 1.0 * L) + 1).astype(int)
            ranks = rng.random((samples, L)).argsort(axis=1).argsort(axis=1)
            hidden_MT[:, places] = ranks < sizes[:, None]
            weight_MT[:, places] = (L / sizes)[:, None]
    return hidden_MT, weight_MT


def _costs(denoise: Denoise, tokens_T: np.ndarray, hidden_MT: np.ndarray, mask_id: int) -> np.ndarray:
    """-log p of the hidden tokens, 0 at the others: float64 `[M, T]`."""
    found = []
    for begin in range(0, len(hidden_MT), 256):
        hidden = hidden_MT[begin : begin + 256]
        rows = jnp.asarray(np.where(hidden, mask_id, tokens_T), jnp.int32)
        logp = behind(denoise(rows), jnp.broadcast_to(jnp.asarray(tokens_T), rows.shape), mask_id)
        found.append(np.where(hidden, -np.asarray(logp, np.float64), 0.0))
    return np.concatenate(found)
