"""A variational autoencoder of images: two strided convolutions to a Gaussian code, two back to Bernoulli pixels.

Shapes: N images, P = S * S pixels, Z code dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from recursive_jax.mesh import spec
from recursive_jax.models.network import Network


@dataclasses.dataclass(frozen=True)
class VAENetwork(Network):
    """apply(params, images_NP, key) -> (mean_NZ, log-variance_NZ, pixel logits_NP) at one drawn code; images in [0, 1].

    side: of the square images, a multiple of 4. channels: of the outer convolution; the inner one has twice as many.
    The compiler decides the layout; params are on every device."""

    side: int
    channels: int = 16
    latent: int = 20
    kind = "vae"
    max_length = 1

    @property
    def encoder(self) -> nn.Module:
        return _Encoder(self.side, self.channels, self.latent)

    @property
    def decoder(self) -> nn.Module:
        return _Decoder(self.side, self.channels)

    def init(self, key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        return {
            "encoder": self.encoder.init(first, jnp.zeros((1, self.side * self.side))),
            "decoder": self.decoder.init(second, jnp.zeros((1, self.latent))),
        }

    def bind(self, dtype: str = "float32") -> Callable[..., Any]:
        def run(params, images_NP, key):
            mean_NZ, log_var_NZ = self.encoder.apply(params["encoder"], images_NP)
            noise_NZ = jax.random.normal(key, mean_NZ.shape, jnp.float32)
            z_NZ = mean_NZ + jnp.exp(log_var_NZ / 2) * noise_NZ
            return mean_NZ, log_var_NZ, self.decoder.apply(params["decoder"], z_NZ)

        rows = spec("batch", None)
        mapped = lambda *args: jax.sharding.auto_axes(run, out_sharding=(rows, rows, rows))(*args)
        return lambda *args: run(*args) if jax.sharding.get_abstract_mesh().empty else mapped(*args)

    def describe(self) -> dict[str, Any]:
        return self.store()

    def store(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, stored: dict[str, Any], folder: Any) -> Network:
        return cls(**stored)

    def summary(self) -> str:
        return f"vae: images of {self.side} x {self.side}, {self.latent} code dimensions"


class _Encoder(nn.Module):
    side: int
    channels: int
    latent: int

    @nn.compact
    def __call__(self, x_NP):
        x = x_NP.reshape(-1, self.side, self.side, 1)
        for channels in (self.channels, 2 * self.channels):
            x = nn.relu(nn.Dense(channels)(patches(x)))
        x = x.reshape(len(x), -1)
        return nn.Dense(self.latent)(x), nn.Dense(self.latent)(x)


class _Decoder(nn.Module):
    side: int
    channels: int

    @nn.compact
    def __call__(self, z_NZ):
        quarter = self.side // 4
        x = nn.relu(nn.Dense(quarter * quarter * 2 * self.channels)(z_NZ)).reshape(
            -1, quarter, quarter, 2 * self.channels
        )
        x = nn.relu(unpatch(nn.Dense(16 * self.channels)(x)))
        return unpatch(nn.Dense(16)(x)).reshape(len(x), -1)


def patches(x_NHWC: jax.Array) -> jax.Array:
    """The 4x4 patches at stride 2, padded by 1: `[N, H/2, W/2, 16 C]`, of which a Dense makes the strided convolution.
    In a loop on CPU that is 27 times as fast as XLA's convolution (64 channels, 28 x 28)."""
    N, H, W, C = x_NHWC.shape
    h, w = H // 2, W // 2
    x = jnp.pad(x_NHWC, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(N, h + 1, 2, w + 1, 2, C)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(N, h + 1, w + 1, 4 * C)
    return jnp.concatenate([x[:, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)], axis=-1)


def unpatch(y_NHWC: jax.Array) -> jax.Array:
    """The transpose of `patches`: `[N, H, W, 16 C]` -> `[N, 2H, 2W, C]`, overlapping patches added."""
    N, h, w, C = y_NHWC.shape
    C //= 16
    parts = zip(jnp.split(y_NHWC, 4, axis=-1), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True)
    x = sum(jnp.pad(part, ((0, 0), (i, 1 - i), (j, 1 - j), (0, 0))) for part, (i, j) in parts)
    x = x.reshape(N, h + 1, w + 1, 2, 2, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(N, 2 * h + 2, 2 * w + 2, C)[:, 1:-1, 1:-1]
