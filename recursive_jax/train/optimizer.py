"""AdamW with everything a round may change as data: a new learning rate or horizon never compiles again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from recursive_jax.config import TrainConfig
from recursive_jax.mesh import seed_words

SCHEDULES = ("cosine", "wsd", "constant")


@struct.dataclass
class Hyper:
    """Scalars (float32, `schedule` int32) that live in the train state."""

    learning_rate: jax.Array
    warmup: jax.Array  # steps
    horizon: jax.Array  # steps
    final: jax.Array  # share of the peak
    decay: jax.Array  # share of the horizon, wsd
    schedule: jax.Array
    weight_decay: jax.Array
    clip: jax.Array
    beta1: jax.Array
    beta2: jax.Array
    seed: jax.Array  # uint32 [2]: of dropout and of objectives that draw

    @classmethod
    def of(cls, c: TrainConfig, seed: int = 0) -> Hyper:
        f = np.float32
        return cls(
            f(c.learning_rate),
            f(round(c.warmup * c.steps)),
            f(c.steps),
            f(c.final),
            f(c.decay),
            np.int32(SCHEDULES.index(c.schedule)),
            f(c.weight_decay),
            f(c.clip),
            f(c.beta1),
            f(c.beta2),
            seed_words(seed),
        )


def learning_rate(h: Hyper, step: jax.Array) -> jax.Array:
    """Linear warm-up, then cosine to `final` (arXiv:1608.03983), or constant with a linear decay over the last
    `decay` share (warm-up, stable, decay: arXiv:2404.06395), or constant. `step` counts from 0."""
    t = step.astype(jnp.float32)
    ramp = jnp.minimum(1.0, (t + 1) / jnp.maximum(h.warmup, 1.0))
    done = jnp.clip((t - h.warmup) / jnp.maximum(h.horizon - h.warmup, 1.0), 0.0, 1.0)
    cosine = h.final + (1 - h.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    left = jnp.clip((h.horizon - t) / jnp.maximum(h.decay * h.horizon, 1.0), 0.0, 1.0)
    wsd = h.final + (1 - h.final) * left
    shape = jnp.stack([cosine, wsd, jnp.ones_like(t)])[h.schedule]
    return h.learning_rate * ramp * shape


def transformation(h: Hyper, step: jax.Array) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay (not on vectors), scaled by the learning rate. Built inside the jitted
    step from traced scalars; its state has the same structure every round."""
    return optax.chain(
        optax.clip_by_global_norm(h.clip),
        optax.scale_by_adam(h.beta1, h.beta2, eps=1e-8),
        optax.add_decayed_weights(h.weight_decay, mask=decayed),
        optax.scale(-learning_rate(h, step)),
    )


def decayed(params):
    """Weight decay touches matrices only. Stacked layers add one axis to scales and biases, so the name decides."""

    def is_matrix(path, x) -> bool:
        name = str(getattr(path[-1], "key", path[-1]))
        return x.ndim >= 2 and not (name in ("scale", "magnitude") or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)
