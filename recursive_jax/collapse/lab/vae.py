"""A variational autoencoder on images, trained on its own output (arXiv:2305.17493, sec. 4.2 and its published
notebook), by the package's own training loop."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.collapse.embeddings import frechet_of_moments
from recursive_jax.collapse.lab.chain import Family, mask
from recursive_jax.config import MeshConfig, TrainConfig
from recursive_jax.errors import InputError
from recursive_jax.identity import digest
from recursive_jax.models.model import Model
from recursive_jax.models.vae import VAENetwork
from recursive_jax.objectives.variational import NegativeElbo, elbo
from recursive_jax.train.loop import train

SEEN = 2048  # samples and real images that a measurement looks at


@dataclasses.dataclass(frozen=True)
class VAE(Family):
    """`models/vae.py` on images; params: its own, or None for the truth, whose rows are the images themselves. A sample
    is the mean of the decoder at a code from N(0, I), as in the paper.

    images: `mnist` (from tensorflow-datasets, where it is prepared), `digits` (8x8, from scikit-learn), a file: .npz
    (an array `images` `[N, S, S]`) or .csv, .csv.gz (a row each, label last); `auto` takes the first of the two that is
    there. channels: of the outer convolution; the inner one has twice as many. Round 0 is the first VAE, trained on
    real images. With samples=inf every training step of a later round reads new rows of the last model: no sampling
    error at all, what is left is the network's own."""

    images: str = "auto"
    channels: int = 16
    latent: int = 20
    steps: int = 1000
    batch: int = 256
    learning_rate: float = 1e-3
    population: bool = False

    name = "vae"
    traced = False

    @property
    def real_NP(self) -> np.ndarray:
        return load_images(self.images)

    @property
    def network(self) -> VAENetwork:
        return VAENetwork(int(self.real_NP.shape[1] ** 0.5), self.channels, self.latent)

    def truth(self) -> None:
        return None

    def prepare(self, key):
        """The first VAE: every round's codes are those of its encoder."""
        real_NP = self.real_NP.astype(np.float32) / 255
        return self._train(key, Drawn(real_NP, np.ones(len(real_NP))))

    def start(self, truth, context):
        return context

    def sample(self, params, key, most: int, count, context):
        if params is not None:
            return np.asarray(_written(self.network, most)(params, key)), mask(most, count)
        index_N = np.asarray(jax.random.randint(key, (most,), 0, len(self.real_NP)))
        return self.real_NP[index_N].astype(np.float32) / 255, mask(most, count)

    def fit(self, data, weight_N, previous, context, key):
        if self.population:
            return self._train(key, Fresh(self.network, previous))
        return self._train(key, Drawn(np.asarray(data, np.float32), np.asarray(weight_N, np.float64)))

    def _train(self, key, batches):
        """Adam with a weight decay of 1e-5 in its gradient, as the published notebook has it."""
        config = TrainConfig(
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            schedule="constant",
            warmup=0.0,
            weight_decay=0.0,
            clip=1e9,
            beta2=0.999,
            tensorboard=False,
        )
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        model = Model(self.network, None, mesh=meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
        trained = train(model, batches, NegativeElbo(weight_decay=1e-5), config, seed=seed, quiet=True)
        return jax.device_get(trained.model.params)

    def log_prob(self, params, data):
        """A lower bound (one draw of the code)."""
        return _bounds(self.network)(params, jnp.asarray(data), jax.random.key(0))

    def measure(self, params, context):
        """code_std: of the first encoder's means of the model's samples, over samples and code dimensions;
        code_frechet: Frechet distance of those means to the means of real images; elbo: of real images, nats; variance:
        of pixels, mean over them."""
        written, _ = self.sample(params, jax.random.key(1), SEEN, SEEN, context)
        real, _ = self.sample(None, jax.random.key(2), SEEN, SEEN, context)
        codes = _codes(self.network)
        moments = lambda code_NZ: (code_NZ.mean(0), jnp.cov(code_NZ, rowvar=False))
        code_NZ = codes(context, written)
        return {
            "code_std": code_NZ.std(),
            "code_frechet": frechet_of_moments(*moments(code_NZ), *moments(codes(context, real))),
            "elbo": self.log_prob(params, real).mean(),
            "variance": written.var(0).mean(),
        }


class Drawn:
    """Batches of images drawn with replacement, each as often as its weight says."""

    def __init__(self, images_NP: np.ndarray, weight_N: np.ndarray):
        self.images_NP, self.until_N = images_NP, np.cumsum(weight_N)
        self.fingerprint = digest(np.ascontiguousarray(images_NP).data, self.until_N.data)

    def begin(self, batch: int, seed: int) -> None:
        self._batch, self._seed = batch, seed

    def next(self, step: int, params: Any = None, state: Any = None) -> dict[str, np.ndarray]:
        u_B = np.random.default_rng([self._seed, step]).random(self._batch) * self.until_N[-1]
        index_B = np.minimum(np.searchsorted(self.until_N, u_B, side="right"), len(self.images_NP) - 1)
        return {"images": self.images_NP[index_B]}

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        return {"images": len(self.images_NP), "epochs": round(steps * batch / len(self.images_NP), 3)}


class Fresh(Drawn):
    """Batches that a model writes, new ones at every step."""

    def __init__(self, network: VAENetwork, params: Any):
        self.network, self.params = network, params
        leaves = [np.ascontiguousarray(x).data for x in jax.tree.leaves(params)]
        self.fingerprint = digest(network.fingerprint.encode(), *leaves)

    def next(self, step: int, params: Any = None, state: Any = None) -> dict[str, np.ndarray]:
        key = jax.random.fold_in(meshes.random_key(self._seed), step)
        return {"images": np.asarray(_written(self.network, self._batch)(self.params, key))}

    def summary(self, steps: int, batch: int) -> dict[str, Any]:
        return {"images": steps * batch}


@functools.cache
def _written(network: VAENetwork, count: int):
    """(params, key) -> `count` images: the decoder's means at codes from N(0, I)."""

    def write(params, key):
        z_NZ = jax.random.normal(key, (count, network.latent), jnp.float32)
        return jax.nn.sigmoid(network.decoder.apply(params["decoder"], z_NZ))

    return jax.jit(write)


@functools.cache
def _codes(network: VAENetwork):
    return jax.jit(lambda params, images_NP: network.encoder.apply(params["encoder"], images_NP)[0])


@functools.cache
def _bounds(network: VAENetwork):
    apply = network.bind()
    return jax.jit(lambda params, images_NP, key: elbo(*apply(params, images_NP, key), images_NP))


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
