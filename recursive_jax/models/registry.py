"""The kinds of networks, by the name that `model.json` keeps: each builds, runs, stores and loads itself."""

from __future__ import annotations

from recursive_jax.models.network import FunctionNetwork, Network, TransformerNetwork
from recursive_jax.models.vae import VAENetwork

NETWORKS: dict[str, type[Network]] = {
    "transformer": TransformerNetwork,
    "functions": FunctionNetwork,
    "vae": VAENetwork,
}
