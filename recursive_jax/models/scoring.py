"""A language model's trunk under a fresh head of scores: where reward models begin (arXiv:2009.01325, sec. 3.4)."""

from __future__ import annotations

import dataclasses

import jax

from recursive_jax.errors import InputError
from recursive_jax.identity import digest
from recursive_jax.models.model import Model
from recursive_jax.models.network import TransformerNetwork, transformer_network
from recursive_jax.models.weights import from_paths, leaf_paths


def scoring_model(model: Model, seed: int = 0) -> Model:
    """`model` with the head `score`: the same states, a new output of one number for each token. An adapter is merged
    first. Raises InputError for a model without params, or one of user functions."""
    if not isinstance(model.network, TransformerNetwork) or model.params is None:
        raise InputError("a reward model begins from a built-in Transformer with params: load one, or train it first")
    trunk = model.merged()
    config = trunk.network.config.model_copy(update={"head": "score", "head_bias": False})
    fresh = dataclasses.replace(trunk, network=transformer_network(config), params=None, mark="", sampling={})
    fresh = fresh.initialized(seed)
    known = leaf_paths(trunk.params)
    leaves = {
        path: jax.device_put(known[path], leaf.sharding) if path in known else leaf
        for path, leaf in leaf_paths(fresh.params).items()
    }
    return fresh.with_params(from_paths(leaves), digest(b"score", str(seed).encode(), model.fingerprint.encode()))
