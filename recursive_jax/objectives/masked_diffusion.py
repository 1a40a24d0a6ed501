"""Training a model to denoise: what `objectives/diffusion.py` defines, over rows of a model.

    MDLM, D3PM            MaskedDiffusion(), MaskedDiffusion(steps=1000)
    LLaDA                 MaskedDiffusion(random_lengths=0.01); on prompts with answers
    MaskedDiffusion(normalize="answer") block diffusion       MaskedDiffusion(block_size=4): blocks from left to right,
    each of them denoised a decoder turned into a denoiser (arXiv:2410.17891)   MaskedDiffusion(anneal=0.5) on a model
    with model.causal=true

Shapes: B rows, T positions, N blocks of a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Example, Packed, examples_of, pack_tokens, stack_groups
from recursive_jax.errors import InputError
from recursive_jax.mesh import rows_like
from recursive_jax.models.hidden import is_shifted, mask_id, own_logits, spare_ids
from recursive_jax.models.masks import begins
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Shapes, Term, batch_shapes
from recursive_jax.objectives.diffusion import behind, hidden_share, level_weight, levels

NORMALIZE = ("tokens", "answer")
ENDS = ("fill", "packed")


@dataclasses.dataclass(frozen=True)
class MaskedDiffusion(Objective):
    """The bound on the negative log-likelihood, nats per token, of rows of which only what is to be learnt is hidden.

    schedule: log_linear or cosine. steps: levels of D3PM; 0: a continuous one. antithetic: the levels of a batch are
    spread evenly. eps: the least level.
    ends: what stands behind a text. `fill`: end tokens up to the length of a row, learnt as part of the text (LLaDA's
    policy: the model says itself where a text ends); `packed`: the next text, which it does not see.
    normalize: `tokens`: one mean over all tokens; `answer`: each row's loss is divided by the length of its answer
    first (LLaDA, algorithm 2).
    random_lengths: the share of rows that are cut to a length drawn evenly, so that shorter canvases are known too.
    block_size: tokens of a block that is denoised with the blocks before it in sight, clean (0: the whole row).
    anneal: over this share of the training, what lies ahead comes into sight little by little, for a model that has
    learnt to look back only."""

    schedule: str = "log_linear"
    steps: int = 0
    antithetic: bool = True
    eps: float = 1e-3
    ends: str = "fill"
    normalize: str = "tokens"
    random_lengths: float = 0.0
    block_size: int = 0
    anneal: float = 0.0
    mask_id: int | None = None

    def __post_init__(self):
        hidden_share(self.schedule, 0.5)
        for name, value, known in (("ends", self.ends, ENDS), ("normalize", self.normalize, NORMALIZE)):
            if value not in known:
                raise InputError(f"{name}={value!r}: {' or '.join(known)} is wanted")
        if self.ends == "packed" and (self.normalize == "answer" or self.random_lengths):
            raise InputError("normalize=answer and random_lengths want a row to a text: ends=fill")
        if self.ends == "packed" and self.block_size:
            raise InputError("ends=packed and block_size: blocks are counted from the start of a text: ends=fill")
        if not self.eps:
            raise InputError("eps=0: at the least level nothing is hidden, and its weight has no bound")
        for name, value in (("eps", self.eps), ("random_lengths", self.random_lengths), ("anneal", self.anneal)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value}: a share between 0 and 1")
        if min(self.steps, self.block_size) < 0:
            raise InputError(f"steps={self.steps} and block_size={self.block_size}: 0, or how many")

    def extra_ids(self, tokenizer: Any) -> int:
        return spare_ids(tokenizer, self.mask_id)

    def resolved(self, model: Model) -> MaskedDiffusion:
        shifted = is_shifted(model.network)
        if shifted and self.block_size:
            raise InputError(
                f"block_size={self.block_size}: a model that gives the next token says of the first of a block in the "
                "block before; train block diffusion with model.causal=false"
            )
        if (
            (self.block_size or self.anneal)
            and getattr(model.network, "config", None)
            and model.network.config.sliding_window
        ):
            raise InputError("block_size and anneal say who sees whom, and this model has a sliding window of its own")
        if self.anneal and not shifted:
            raise InputError(f"anneal={self.anneal} is for a model with model.causal=true, which looks back only")
        return dataclasses.replace(self, mask_id=mask_id(model, self.mask_id))

    def sampling(self, model: Model, length: int) -> dict[str, Any]:
        blocks = {"block_size": self.block_size, "block_causal": True} if self.block_size else {}
        return {
            "denoise": {"mask_id": self.resolved(model).mask_id, "fill": length if self.ends == "fill" else 0, **blocks}
        }

    def shapes(self, rows: int, length: int) -> Shapes:
        return batch_shapes(("tokens", "segments", "loss"), rows, length)

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        """Columns `tokens`, `segments` and `loss` (what may be hidden) `[N, T]`."""
        tokenizer = model.tokenizer
        if self.ends == "packed":
            packed = pack_tokens(data, length - 1, tokenizer)
            columns = dict(packed.columns)
            loss = columns.get("loss", columns["segments"] > 0)
            first = np.concatenate([np.ones((len(loss), 1), bool), np.diff(columns["segments"], axis=1) != 0], axis=1)
            return Packed({**columns, "loss": loss * (~first & (columns["segments"] > 0))})
        weights = [1.0 if w is None else float(w) for w in data.column("weight")] if data.has("weight") else None
        found = []
        for n, example in enumerate(examples_of(data, tokenizer)):
            if weights is not None:
                example = dataclasses.replace(example, loss=example.loss * np.float32(weights[n]))
            found += [filled(e, length, tokenizer.eos) for e in cut([example], length)]
        if not found:
            raise InputError("there is nothing to train on: the dataset has no tokens")
        columns = stack_groups([[e] for e in found], length - 1, tokenizer.pad).columns
        return Packed({name: column[:, 0] for name, column in columns.items()})

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        tokens_BT, segments_BT = batch["tokens"], batch["segments"]
        B, T = tokens_BT.shape
        draw, hide, short, ahead = jax.random.split(ctx.key, 4)
        noised_BT = (batch["loss"] > 0) & (segments_BT > 0)
        shifted = is_shifted(ctx.network)
        if shifted:
            noised_BT &= ~begins(segments_BT)
        if self.random_lengths:
            keys = jax.random.split(short)
            length_B = jax.random.randint(keys[0], (B,), 1, T + 1)
            whole_B = jax.random.uniform(keys[1], (B,)) >= self.random_lengths
            kept_BT = rows_like(whole_B[:, None] | (jnp.arange(T)[None] <= length_B[:, None]), B)
            noised_BT, segments_BT = noised_BT & kept_BT, jnp.where(kept_BT, segments_BT, 0)
        size = self.block_size or T
        N = -(-T // size)
        t_BN = levels(draw, B * N, eps=self.eps, steps=self.steps, antithetic=self.antithetic).reshape(N, B).T
        t_BT = rows_like(jnp.repeat(t_BN, size, axis=1)[:, :T], B)
        uniform_BT = rows_like(jax.random.uniform(hide, (B, T)), B)
        hidden_BT = noised_BT & (uniform_BT < hidden_share(self.schedule, t_BT))
        inputs_BT = jnp.where(hidden_BT, self.mask_id, tokens_BT)
        if self.block_size:
            logits_BTV = read_blocks(ctx.apply, params, inputs_BT, tokens_BT, segments_BT, self.block_size)
        else:
            seen = {"visible_BTS": self.in_sight(ahead, ctx.progress, B, T)} if self.anneal else {}
            logits_BTV = own_logits(ctx.apply, shifted, params, inputs_BT, segments_BT, **seen)
        cost_BT = jnp.where(hidden_BT, -behind(logits_BTV, tokens_BT, self.mask_id), 0.0)
        weight_BT = jnp.where(noised_BT, batch["loss"].astype(jnp.float32), 0.0)
        cost_BT = cost_BT * weight_BT * level_weight(self.schedule, t_BT, self.steps)
        length_B = jnp.sum(weight_BT, axis=1)
        if self.normalize == "answer":
            per_row_B = jnp.sum(cost_BT, axis=1) / jnp.maximum(length_B, 1e-9)
            term = Term(jnp.sum(per_row_B), jnp.sum((length_B > 0).astype(jnp.float32)))
        else:
            term = Term(jnp.sum(cost_BT), jnp.sum(length_B))
        right_BT = hidden_BT & (jnp.argmax(logits_BTV, axis=-1) == tokens_BT)
        hidden = jnp.sum(hidden_BT.astype(jnp.float32))
        return Loss({"nll": term}, {"masked_accuracy": (jnp.sum(right_BT.astype(jnp.float32)), hidden)})

    def in_sight(self, key: jax.Array, progress: Any, B: int, T: int) -> jax.Array:
        """Who sees whom: what lies behind, and of what lies ahead a share that grows to all (arXiv:2410.17891, sec.
        3.2)."""
        share = jnp.clip(progress / self.anneal, 0.0, 1.0)
        ahead_BTS = rows_like(jax.random.uniform(key, (B, T, T)), B) < share
        return ahead_BTS | (jnp.arange(T)[:, None] >= jnp.arange(T)[None])


def read_blocks(apply: Callable[..., Any], params: Any, inputs_BT, tokens_BT, segments_BT, size: int) -> jax.Array:
    """Logits `[B, T, V]` of noised rows, each block of `size` with itself and the clean blocks before it in sight: both
    rows go through the network side by side (arXiv:2503.09573, sec. 3.2 and app. B.6)."""
    B, T = inputs_BT.shape
    block_T = jnp.arange(T) // size
    same, before = block_T[:, None] == block_T[None], block_T[:, None] > block_T[None]
    noised = jnp.concatenate([same, before], axis=1)
    clean = jnp.concatenate([jnp.zeros((T, T), bool), same | before], axis=1)
    visible = jnp.broadcast_to(jnp.concatenate([noised, clean])[None], (B, 2 * T, 2 * T))
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    positions_BT = rows_like(jnp.broadcast_to(jnp.arange(T)[None], (B, T)), B)
    states_BTD = apply(
        params,
        jnp.concatenate([inputs_BT, tokens_BT], axis=1),
        twice(segments_BT),
        visible_BTS=rows_like(visible, B),
        positions_BT=twice(positions_BT),
        hidden=True,
    )
    return apply(params, None, states_BTD=states_BTD[:, :T])


def cut(examples: list[Example], length: int) -> list[Example]:
    """Rows with something to learn; those that are too long in pieces behind their start token each, but for prompts
    with answers, which stay whole."""
    found = []
    for e in examples:
        whole = len(e.tokens) <= length or not e.loss[1:2].any()
        step = len(e.tokens) if whole else length - 1
        for at in range(0, len(e.tokens) - 1, step):
            tokens, loss = e.tokens[1 + at : 1 + at + step], e.loss[1 + at : 1 + at + step]
            if loss.any():
                found.append(Example(np.append(e.tokens[:1], tokens), np.append(e.loss[:1], loss)))
    return found


def filled(example: Example, length: int, eos: int) -> Example:
    """With end tokens behind it, which are learnt."""
    short = max(0, length - len(example.tokens))
    tokens = np.concatenate([example.tokens, np.full(short, eos, np.int32)]).astype(np.int32)
    return Example(
        tokens, np.concatenate([example.loss, np.full(short, example.loss.max(initial=0), example.loss.dtype)])
    )
