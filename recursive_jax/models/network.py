"""`Network`: what jitted programs are compiled for. Hashable, without params; equal networks share compiled programs.

A kind of network is a frozen dataclass here or in a file beside this one, and a line in `models/registry.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from recursive_jax import mesh as meshes
from recursive_jax.config import LoraConfig, ModelConfig
from recursive_jax.errors import InputError, problems
from recursive_jax.identity import describe, fingerprint
from recursive_jax.models.flops import train_flops_per_token
from recursive_jax.models.transformer import Transformer


class Network:
    """init(key) -> params; apply(params, *inputs, **kw) -> outputs, float32. Subclasses are frozen dataclasses.

    kind: its line in the registry. frozen: keys of the params that training leaves as they are. causal: writes from
    left to right. states_size: width of the states that `apply(..., hidden=True)` gives, None where there are none."""

    kind: ClassVar[str]
    vocab: int = 0
    max_length: int = 0
    frozen: tuple[str, ...] = ()
    causal: bool = True
    has_head: bool = True
    has_dropout: bool = False
    layers: int = 1
    states_size: int | None = None

    def init(self, key: jax.Array) -> Any:
        raise NotImplementedError

    def bind(self, dtype: str = "float32") -> Callable[..., Any]:
        """`apply` in a compute dtype over float32 master params, where the network has one."""
        raise NotImplementedError

    def apply(self, params: Any, *inputs: Any, **keywords: Any) -> Any:
        return self.bind()(params, *inputs, **keywords)

    @property
    def padded_vocab(self) -> int:
        """Columns of the logits."""
        return self.vocab

    @property
    def fingerprint(self) -> str:
        return fingerprint({"network": self.kind, **self.describe()})

    def describe(self) -> dict[str, Any]:
        """What names it by value. Raises InputError for a closure without a name."""
        raise NotImplementedError

    def store(self) -> dict[str, Any]:
        """What `model.json` keeps of it, as JSON."""
        raise NotImplementedError

    @classmethod
    def load(cls, stored: dict[str, Any], folder: Any) -> Network:
        """The inverse of `store`. Raises InputError where it cannot be opened from a file."""
        raise NotImplementedError

    def mesh_problems(self, mesh: Mesh) -> list[str]:
        """Every dimension that the mesh does not divide, as messages."""
        return []

    def train_flops_per_token(self, length: int) -> float | None:
        """Forward and backward, for each position of a row of `length`; None: not known."""
        return None

    def summary(self) -> str:
        return self.kind


@dataclasses.dataclass(frozen=True)
class TransformerNetwork(Network):
    """The built-in Transformer; with `lora` over params {"base", "lora"}, of which only the adapter trains."""

    config: ModelConfig
    lora: LoraConfig | None = None
    kind = "transformer"

    @property
    def vocab(self) -> int:
        return self.config.vocab

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def padded_vocab(self) -> int:
        return self.config.V

    @property
    def frozen(self) -> tuple[str, ...]:
        return () if self.lora is None else ("base",)

    @property
    def causal(self) -> bool:
        return self.config.causal

    @property
    def has_head(self) -> bool:
        return self.config.head in ("plain", "transform")

    @property
    def has_dropout(self) -> bool:
        return self.lora is not None and self.lora.dropout > 0

    @property
    def layers(self) -> int:
        return self.config.layers

    @property
    def states_size(self) -> int:
        return self.config.d_model

    @property
    def plain(self) -> TransformerNetwork:
        return transformer_network(self.config)

    def init(self, key: jax.Array) -> Any:
        tokens = jnp.zeros((1, 1), jnp.int32)
        # A batch of one row cannot be split over a mesh; shapes of params do not depend on it.
        tokens = jnp.broadcast_to(tokens, (_batch_size_of_context_mesh(), 1), out_sharding=meshes.spec("batch", None))
        return Transformer(self.config).init(key, tokens)["params"]

    def bind(self, dtype: str = "float32") -> Callable[..., Any]:
        """Takes the Transformer's keywords too (`hidden=True`, `key=...`)."""
        module = Transformer(self.config, jnp.dtype(dtype), self.lora)
        if self.lora is None:
            return lambda params, *rows, **kw: module.apply({"params": params}, *rows, **kw)
        return lambda params, *rows, **kw: module.apply({"params": params["base"], "lora": params["lora"]}, *rows, **kw)

    def describe(self) -> dict[str, Any]:
        return {"config": describe(self.config), **({} if self.lora is None else {"lora": describe(self.lora)})}

    def store(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "lora": None if self.lora is None else self.lora.model_dump(mode="json"),
        }

    @classmethod
    def load(cls, stored: dict[str, Any], folder: Any) -> Network:
        return transformer_network(ModelConfig(**stored["config"]))

    def mesh_problems(self, mesh: Mesh) -> list[str]:
        c, tensor, fsdp = self.config, mesh.shape["tensor"], mesh.shape["fsdp"]
        checks = [
            ("model.heads", c.heads, tensor, "mesh.tensor"),
            ("model.kv_heads", c.G, tensor, "mesh.tensor"),
            ("model.d_ff", c.F, tensor, "mesh.tensor"),
            ("model.d_model", c.d_model, fsdp, "mesh.fsdp"),
            ("model.vocab, padded,", c.V, tensor * fsdp, "mesh.fsdp * mesh.tensor"),
        ]
        return [f"{name}={size} is not divisible by {axis}={n}" for name, size, n, axis in checks if size % n]

    def train_flops_per_token(self, length: int) -> float:
        share = 1.0 if self.lora is None else 2 / 3  # frozen weights get no gradient of their own
        return train_flops_per_token(self.config, length) * share

    def summary(self) -> str:
        c = self.config
        kind = c.family or "transformer"
        return f"{kind}: {c.layers} layers of width {c.d_model}, vocabulary {c.vocab:,}, context {c.max_length:,}"


@dataclasses.dataclass(frozen=True)
class FunctionNetwork(Network):
    """A user's two functions. They need not know about meshes: params are replicated, the batch is split, and inside
    `apply` the compiler decides the layout."""

    init_function: Callable[[jax.Array], Any]
    apply_function: Callable[..., jax.Array]
    vocab: int
    max_length: int
    name: str = "user"
    version: int | str | None = None
    kind = "functions"

    def init(self, key: jax.Array) -> Any:
        return self.init_function(key)

    def bind(self, dtype: str = "float32") -> Callable[..., Any]:
        """The functions choose their dtypes themselves."""

        def apply(params, tokens_BT, segments_BT=None):
            run = jax.sharding.auto_axes(self.apply_function, out_sharding=meshes.spec("batch", "time", None))
            return run(params, tokens_BT, segments_BT)

        return apply

    def describe(self) -> dict[str, Any]:
        own = {"name": self.name, "vocab": self.vocab, "max_length": self.max_length}
        if self.version is not None:
            return {**own, "version": self.version}
        return {**own, "init": describe(self.init_function), "apply": describe(self.apply_function)}

    def store(self) -> dict[str, Any]:
        return {"name": self.name, "vocab": self.vocab, "max_length": self.max_length}

    @classmethod
    def load(cls, stored: dict[str, Any], folder: Any) -> Network:
        raise InputError(f"{folder} holds a model of user functions ({stored['name']}); load it through its own run")

    def summary(self) -> str:
        return f"{self.name}: two functions of the user's, vocabulary {self.vocab:,}, context {self.max_length:,}"


@functools.cache
def transformer_network(config: ModelConfig, lora: LoraConfig | None = None) -> TransformerNetwork:
    """The built-in Transformer of a config."""
    if config.vocab is None:
        raise InputError("model.vocab is not set and there is no tokenizer to take it from")
    return TransformerNetwork(config, lora)


def adapted_network(base: TransformerNetwork, lora: LoraConfig) -> TransformerNetwork:
    """The same model over params {"base", "lora"}; only "lora" trains."""
    return transformer_network(base.config, lora)


def check_mesh(network: Network, mesh: Mesh) -> None:
    """Raises InputError with every dimension that the mesh does not divide."""
    lines = network.mesh_problems(mesh)
    if lines:
        raise problems("the model does not fit the mesh:", lines)


def _batch_size_of_context_mesh() -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return shape.get("data", 1) * shape.get("fsdp", 1)
