"""`Model`: a Flax model as two pure functions, its params and its tokenizer. Any JAX model joins by giving the two.

    init(key) -> params                                  params: any pytree of arrays
    apply(params, tokens_BT, segments_BT=None) -> logits_BTV   float32 logits; segments keep packed rows apart

The built-in Transformer also decodes with a KV cache; a user's model that gives only the two functions is sampled
by running the whole prefix again for each token.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from recursive_jax import mesh as meshes
from recursive_jax.config import MeshConfig, ModelConfig
from recursive_jax.errors import InputError
from recursive_jax.identity import array_bytes, digest
from recursive_jax.models.merging import merge_params, plain_base
from recursive_jax.models.network import FunctionNetwork, Network, check_mesh, transformer_network


@dataclasses.dataclass(frozen=True)
class Model:
    """params is None until the model is trained or loaded. mark: names the params where a run or a file gave them a
    name; source: the path they were loaded from. sampling: how it samples where nobody says, as keys of a
    SamplingConfig (of a foreign model: by its generation_config.json)."""

    network: Network
    tokenizer: Any
    params: Any = None
    mesh: Mesh | None = None
    mark: str = ""
    source: str = ""
    base_fingerprint: str = ""  # of the frozen base, in an adapted model, and where it lies
    base_source: str = ""
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        where = f", from {self.source}" if self.source else ""
        return f"Model({self.network.summary()}{where}{', no params yet' if self.params is None else ''})"

    @property
    def vocab(self) -> int:
        return self.network.vocab

    @property
    def max_length(self) -> int:
        """The longest sequence it reads, in tokens."""
        return self.network.max_length

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the model by value: the fingerprint of what made its params, where a run or a file says; else of
        network, tokenizer and the params' content. Raises InputError for user functions without an identity."""
        if self.mark:
            return self.mark
        what = f"{self.network.fingerprint} {_tokenizer_name(self.tokenizer)}"
        if self.params is None:
            return f"init:{digest(what.encode())}"
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        named = [(jax.tree_util.keystr(path), np.asarray(meshes.fetch(leaf))) for path, leaf in leaves]
        return digest(
            what.encode(), *(x for name, a in named for x in (f"{name} {a.dtype} {a.shape}".encode(), array_bytes(a)))
        )

    def with_params(self, params: Any, mark: str = "") -> Model:
        return dataclasses.replace(self, params=params, mark=mark)

    def on(self, mesh: Mesh) -> Model:
        """The same model on another mesh (params move)."""
        if mesh == self.mesh:
            return self
        if self.params is None:
            return dataclasses.replace(self, mesh=mesh)
        move = lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec))
        return dataclasses.replace(self, mesh=mesh, params=jax.tree.map(move, self.params))

    def merged_base(self) -> Model:
        """The plain model under an adapter, its four-bit weights as float32."""
        if not self.network.frozen:
            return self
        return dataclasses.replace(self, network=self.network.plain, params=plain_base(self.params["base"]), mark="")

    def merged(self) -> Model:
        """The plain model that an adapted one computes; a plain one is itself. The base is not touched."""
        if not self.network.frozen:
            return self
        with jax.set_mesh(self.mesh):
            params = merge_params(self.params, self.network.lora)
        return dataclasses.replace(self, network=self.network.plain, params=params)

    def initialized(self, seed: int = 0) -> Model:
        """Fresh params on the model's mesh."""
        with jax.set_mesh(self.mesh):
            return self.with_params(_init_program(self.network)(meshes.random_key(seed)))

    def logits(self, tokens_BT: Any, mask_BT: Any = None, types_BT: Any = None) -> jax.Array:
        """The plain forward pass: int tokens `[B, T]` -> float32 logits `[B, T, vocab]`.

        mask_BT: 1 for tokens, 0 for padding on either side; positions count the tokens. types_BT: token types (BERT).
        Raises InputError without params, for T longer than the model reads, or for ids outside the vocabulary.
        """
        if not self.network.has_head:
            raise InputError(
                "this model has no output head (its file holds a bare encoder, or one score): use model.states(...) or "
                "rj.rewards.reward_model(model)"
            )
        return self._forward(_apply_program, tokens_BT, mask_BT, types_BT)[:, :, : self.vocab]

    def states(self, tokens_BT: Any, mask_BT: Any = None, types_BT: Any = None) -> jax.Array:
        """The last layer's states, after the final norm: float `[B, T, d_model]`. Arguments and errors as `logits`."""
        if self.network.states_size is None:
            raise InputError("a model of user functions gives logits only")
        return self._forward(_states_program, tokens_BT, mask_BT, types_BT)

    def _forward(self, program: Callable, tokens_BT: Any, mask_BT: Any, types_BT: Any) -> jax.Array:
        tokens_BT = np.asarray(tokens_BT, np.int32)
        if self.params is None:
            raise InputError("this model has no params: train it, load one, or call .initialized(seed)")
        if tokens_BT.ndim != 2 or tokens_BT.shape[1] > self.max_length:
            raise InputError(
                f"tokens have shape {tokens_BT.shape}; [B, T] with T <= max_length={self.max_length} is wanted"
            )
        if tokens_BT.size and (tokens_BT.min() < 0 or tokens_BT.max() >= self.vocab):
            raise InputError(
                f"token ids must be in 0..{self.vocab - 1}, they span {tokens_BT.min()}..{tokens_BT.max()}"
            )
        segments = None if mask_BT is None else np.asarray(mask_BT, np.int32)
        types = () if types_BT is None else (np.asarray(types_BT, np.int32),)
        B = len(tokens_BT)
        fill = -B % meshes.batch_divisor(self.mesh)
        pad = lambda x: None if x is None else np.pad(x, ((0, fill), (0, 0)))
        with jax.set_mesh(self.mesh):
            rows = meshes.put_batch(self.mesh, (pad(tokens_BT), pad(segments), *map(pad, types)))
            out = program(self.network)(self.params, *rows)
        return out if fill == 0 and self.mesh.size == 1 else jnp.asarray(meshes.fetch(out))[:B]


@functools.cache
def _init_program(network: Network):
    def init(key):
        meshes.TRACES["init"] += 1
        return network.init(key)

    return jax.jit(init)


@functools.cache
def _apply_program(network: Network):
    apply = network.bind()

    def forward(params, *rows):
        meshes.TRACES["forward"] += 1
        return apply(params, *rows)

    return jax.jit(forward)


@functools.cache
def _states_program(network: Network):
    apply = network.bind()
    return jax.jit(lambda params, *rows: apply(params, *rows, hidden=True))


def abstract_params(network: Network, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the params on `mesh`; nothing is allocated."""
    return meshes.abstract(mesh, lambda: network.init(jax.random.key(0)))


def parameter_count(network: Network) -> int:
    shapes = abstract_params(network, meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))


def user_model(
    init: Callable,
    apply: Callable,
    *,
    tokenizer: Any,
    max_length: int,
    vocab: int | None = None,
    mesh: Mesh | None = None,
    name: str = "user",
    version: int | str | None = None,
) -> Model:
    """A model from two plain JAX functions (see the module docstring). Equal functions share compiled programs.

    A run names the model by the two functions. Functions of a module, and methods of frozen dataclasses (Flax modules),
    have an identity of their own; for closures and lambdas give a `version`, and raise it when they change.
    """
    network = FunctionNetwork(init, apply, vocab or tokenizer.vocab, max_length, name, version)
    return Model(network, tokenizer, mesh=mesh or meshes.make_mesh())


def transformer(config: ModelConfig, tokenizer: Any, mesh: Mesh | None = None, extra_ids: int = 0) -> Model:
    """The built-in Transformer for a tokenizer. extra_ids: ids beyond the tokenizer's, where the config leaves the
    vocabulary open (`Objective.extra_ids`). Raises InputError when the two disagree on the vocabulary."""
    if config.vocab is None:
        config = config.model_copy(update={"vocab": tokenizer.vocab + extra_ids})
    elif config.vocab < tokenizer.vocab:
        raise InputError(
            f"model.vocab={config.vocab} is smaller than the tokenizer's {tokenizer.vocab} ids; leave model.vocab out"
        )
    network, mesh = transformer_network(config), mesh or meshes.make_mesh()
    check_mesh(network, mesh)
    return Model(network, tokenizer, mesh=mesh)


def _tokenizer_name(tokenizer: Any) -> str:
    """A tokenizer by value: its fingerprint, what it would store, or at the least its type."""
    own = getattr(tokenizer, "fingerprint", None)
    if isinstance(own, str):
        return own
    return (
        json.dumps(tokenizer.to_json(), sort_keys=True) if hasattr(tokenizer, "to_json") else type(tokenizer).__name__
    )
