"""A variational autoencoder on images, trained on its own output (arXiv:2305.17493, sec. 4.2 and its published notebook)."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recursive_jax.collapse.embeddings import frechet_of_moments
from recursive_jax.collapse.lab.chain import Family, mask
from recursive_jax.errors import InputError

SEEN = 2048  # samples and real images that a measurement looks at


@dataclasses.dataclass(frozen=True)
class VAE(Family):
    """Two strided convolutions to a Gaussian code, two back to Bernoulli pixels; params: {"encoder", "decoder", "real"}, of which
    `real` is 1 for the truth, whose rows are the images themselves. A sample is the mean of the decoder at a code from
    N(0, I), as in the paper.

    images: `mnist` (from tensorflow-datasets, where it is prepared), `digits` (8x8, from scikit-learn), a file: .npz (an array
    `images` `[N, S, S]`) or .csv, .csv.gz (a row each, label last); `auto` takes the first of the two that is there.
    channels: of the outer convolution; the inner one has twice as many. Round 0 is the first VAE, trained on real images.
    With samples=inf every training step of a later round reads new rows of the last model: no sampling error at all, what
    is left is the network's own.
    """

    images: str = "auto"
    channels: int = 16
    latent: int = 20
    steps: int = 1000
    batch: int = 256
    learning_rate: float = 1e-3
    population: bool = False

    name = "vae"
    apart = True  # replicates one after another: batched products of small matrices run on one thread

    @property
    def real_NP(self) -> np.ndarray:
        return load_images(self.images)

    @property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        side = int(self.real_NP.shape[1] ** 0.5)
        return _Encoder(side, self.channels, self.latent), _Decoder(side, self.channels)

    def init(self, key: jax.Array) -> dict[str, Any]:
        encoder, decoder = self.networks
        first, second = jax.random.split(key)
        return {
            "encoder": encoder.init(first, jnp.zeros((1, self.real_NP.shape[1]))),
            "decoder": decoder.init(second, jnp.zeros((1, self.latent))),
            "real": jnp.zeros(()),
        }

    def truth(self):
        like = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like) | {"real": jnp.ones(())}

    def prepare(self, key):
        """The first VAE: every round's codes are those of its encoder."""
        draw = lambda key, count: self._real(key, count)
        return self._train(key, draw)

    def start(self, truth, context):
        return context

    def _real(self, key, count):
        index_N = jax.random.randint(key, (count,), 0, len(self.real_NP))
        return jnp.asarray(self.real_NP)[index_N].astype(jnp.float32) / 255

    def _written(self, params, key, count):
        z_NZ = jax.random.normal(key, (count, self.latent), jnp.float32)
        return jax.nn.sigmoid(self.networks[1].apply(params["decoder"], z_NZ))

    def sample(self, params, key, most: int, count, context):
        rows = jax.lax.cond(
            params["real"] > 0, lambda k: self._real(k, most), lambda k: self._written(params, k, most), key
        )
        return rows, mask(most, count)

    def fit(self, data, weight_N, previous, context, key):
        if self.population:
            return self._train(key, lambda key, count: self._written(previous, key, count))
        until_N = jnp.cumsum(weight_N)

        def draw(key, count):
            u_B = jax.random.uniform(key, (count,), until_N.dtype) * until_N[-1]
            return data[jnp.minimum(jnp.searchsorted(until_N, u_B, side="right"), len(data) - 1)]

        return self._train(key, draw)

    def _train(self, key, draw):
        """Adam with a weight decay of 1e-5 in its gradient, as the published notebook has it."""
        optimizer = optax.chain(optax.add_decayed_weights(1e-5), optax.adam(self.learning_rate))
        init_key, key = jax.random.split(key)
        params = self.init(init_key)

        def step(i, carry):
            params, state = carry
            data_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
            rows = draw(data_key, self.batch)
            loss = lambda params: -self._elbo(params, rows, noise_key).mean()
            change, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, change), state

        found = jax.lax.fori_loop(0, self.steps, step, (params, optimizer.init(params)))[0]
        return found | {"real": jnp.zeros(())}

    def _elbo(self, params, data_NP, key):
        """Nats per image `[N]`: expected log-likelihood of Bernoulli pixels less KL(code || N(0, I))."""
        encoder, decoder = self.networks
        mean_NZ, log_var_NZ = encoder.apply(params["encoder"], data_NP)
        z_NZ = mean_NZ + jnp.exp(log_var_NZ / 2) * jax.random.normal(key, mean_NZ.shape, jnp.float32)
        pixels_N = optax.sigmoid_binary_cross_entropy(decoder.apply(params["decoder"], z_NZ), data_NP).sum(-1)
        return -pixels_N + 0.5 * (1 + log_var_NZ - mean_NZ**2 - jnp.exp(log_var_NZ)).sum(-1)

    def log_prob(self, params, data):
        """A lower bound (one draw of the code)."""
        return self._elbo(params, data, jax.random.key(0))

    def measure(self, params, context):
        """code_std: of the first encoder's means of the model's samples, over samples and code dimensions; code_frechet: Frechet
        distance of those means to the means of real images; elbo: of real images, nats; variance: of pixels, mean over them.
        """
        codes = lambda rows: self.networks[0].apply(context["encoder"], rows)[0]
        written, real = self._written(params, jax.random.key(1), SEEN), self._real(jax.random.key(2), SEEN)
        moments = lambda code_NZ: (code_NZ.mean(0), jnp.cov(code_NZ, rowvar=False))
        code_NZ = codes(written)
        return {
            "code_std": code_NZ.std(),
            "code_frechet": frechet_of_moments(*moments(code_NZ), *moments(codes(real))),
            "elbo": self.log_prob(params, real).mean(),
            "variance": written.var(0).mean(),
        }


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
    """The 4x4 patches at stride 2, padded by 1: `[N, H/2, W/2, 16 C]`, of which a Dense makes the strided convolution. In a loop
    on CPU that is 27 times as fast as XLA's convolution (64 channels, 28 x 28)."""
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


def resolve_images(name: str) -> str:
    """`auto` as the images that are there. Raises ValueError with the remedy for none and for what cannot be read."""
    wanted = ("mnist", "digits") if name == "auto" else (name,)
    for which in wanted:
        try:
            load_images(which)
            return which
        except (ImportError, OSError, KeyError, ValueError, AssertionError, InputError) as error:
            if name != "auto":
                raise ValueError(f"these images cannot be read: {error}") from None
    raise ValueError("there are no images: install scikit-learn, prepare tfds' mnist, or give a file: images=PATH")


@functools.lru_cache(4)
def load_images(name: str) -> np.ndarray:
    """uint8 `[N, S * S]`, S a multiple of 4."""
    if name == "mnist":
        import tensorflow_datasets as tfds

        rows = tfds.as_numpy(tfds.data_source("mnist", split="train", download=False))
        found = np.stack([x["image"] for x in rows]).reshape(-1, 28 * 28)
    elif name == "digits":
        from sklearn.datasets import load_digits

        found = np.minimum(load_digits().data * 16, 255)
    elif name.endswith(".npz"):
        found = np.load(name)["images"]
        found = found.reshape(len(found), -1)
    else:
        text = gzip.decompress(Path(name).read_bytes()) if name.endswith(".gz") else Path(name).read_bytes()
        found = np.array([row.split(b",")[:-1] for row in text.split()], np.float32)
    side = int(found.shape[1] ** 0.5)
    if side * side != found.shape[1] or side % 4:
        raise InputError(
            f"{name}: square images with sides of a multiple of 4 are wanted, there are {found.shape[1]} pixels"
        )
    return np.ascontiguousarray(found).astype(np.uint8)
