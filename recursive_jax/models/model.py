"""`Model`: a Flax model as two pure functions, its params and its tokenizer. Any JAX model joins by giving the two.

    init(key) -> params                                  params: any pytree of arrays
    apply(params, tokens_BT, segments_BT=None) -> logits_BTV   float32 logits; segments keep packed rows apart

The built-in Transformer also decodes with a KV cache; a user's model that gives only the two functions is sampled
by running the whole prefix again for each token.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from recursive_jax import mesh as meshes
from recursive_jax.config import LoraConfig, MeshConfig, ModelConfig
from recursive_jax.errors import InputError
from recursive_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What jitted programs are compiled for: hashable, without params. `config` is None for a user's functions."""

    init: Callable[[jax.Array], Any]
    apply: Callable[..., jax.Array]
    vocab: int
    context: int
    config: ModelConfig | None = None
    name: str = "transformer"
    lora: LoraConfig | None = None
    frozen: tuple[str, ...] = ()  # keys of the params that training leaves as they are


@dataclasses.dataclass(frozen=True)
class Model:
    """params is None until the model is trained or loaded. `fingerprint` names the params (set by a run), `source` is
    the path they were loaded from."""

    architecture: Architecture
    tokenizer: Any
    params: Any = None
    mesh: Mesh | None = None
    fingerprint: str = ""
    source: str = ""
    base_fingerprint: str = ""  # of the frozen base, in an adapted model

    @property
    def vocab(self) -> int:
        return self.architecture.vocab

    @property
    def context(self) -> int:
        return self.architecture.context

    def with_params(self, params: Any, fingerprint: str = "") -> Model:
        return dataclasses.replace(self, params=params, fingerprint=fingerprint)

    def on(self, mesh: Mesh) -> Model:
        """The same model on another mesh (params move)."""
        if self.params is None or mesh == self.mesh:
            return dataclasses.replace(self, mesh=mesh)
        move = lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec))
        return dataclasses.replace(self, mesh=mesh, params=jax.tree.map(move, self.params))

    def merged_base(self) -> Model:
        """The plain model under an adapter, its four-bit weights as float32."""
        if self.architecture.lora is None:
            return self
        from recursive_jax.models.lora import plain_base

        architecture = transformer_architecture(self.architecture.config)
        return dataclasses.replace(self, architecture=architecture, params=plain_base(self.params["base"]))

    def merged(self) -> Model:
        """The plain model that an adapted one computes; a plain one is itself. The base is not touched."""
        if self.architecture.lora is None:
            return self
        from recursive_jax.models.lora import merge_params

        with jax.set_mesh(self.mesh):
            params = merge_params(self.params, self.architecture.lora)
        architecture = transformer_architecture(self.architecture.config)
        return dataclasses.replace(self, architecture=architecture, params=params)

    def initialized(self, seed: int = 0) -> Model:
        """Fresh params on the model's mesh."""
        with jax.set_mesh(self.mesh):
            return self.with_params(_init_program(self.architecture)(jax.random.key(seed)))

    def logits(self, tokens_BT: Any, mask_BT: Any = None, types_BT: Any = None) -> jax.Array:
        """The plain forward pass: int tokens `[B, T]` -> float32 logits `[B, T, vocab]`.

        mask_BT: 1 for tokens, 0 for padding on either side; positions count the tokens. types_BT: token types (BERT).
        Raises InputError without params, for T beyond the context, or for ids outside the vocabulary.
        """
        if self.architecture.config is not None and self.architecture.config.head == "none":
            raise InputError("this model has no output head (its file holds a bare encoder): use model.states(...)")
        return self._forward(_apply_program, tokens_BT, mask_BT, types_BT)[:, :, : self.vocab]

    def states(self, tokens_BT: Any, mask_BT: Any = None, types_BT: Any = None) -> jax.Array:
        """The last layer's states, after the final norm: float `[B, T, width]`. Arguments and errors as `logits`."""
        if self.architecture.config is None:
            raise InputError("a model of user functions gives logits only")
        return self._forward(_states_program, tokens_BT, mask_BT, types_BT)

    def _forward(self, program: Callable, tokens_BT: Any, mask_BT: Any, types_BT: Any) -> jax.Array:
        tokens_BT = np.asarray(tokens_BT, np.int32)
        if self.params is None:
            raise InputError("this model has no params: train it, load one, or call .initialized(seed)")
        if tokens_BT.ndim != 2 or tokens_BT.shape[1] > self.context:
            raise InputError(f"tokens have shape {tokens_BT.shape}; [B, T] with T <= context={self.context} is wanted")
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
            out = program(self.architecture)(self.params, *rows)
        return out if fill == 0 and self.mesh.size == 1 else jnp.asarray(meshes.fetch(out))[:B]


@functools.cache
def _init_program(architecture: Architecture):
    def init(key):
        meshes.TRACES["init"] += 1
        return architecture.init(key)

    return jax.jit(init)


@functools.cache
def _apply_program(architecture: Architecture):
    apply = bound(architecture)

    def forward(params, *rows):
        meshes.TRACES["forward"] += 1
        return apply(params, *rows)

    return jax.jit(forward)


@functools.cache
def _states_program(architecture: Architecture):
    apply = bound(architecture)
    return jax.jit(lambda params, *rows: apply(params, *rows, hidden=True)[0])


def bound(architecture: Architecture, dtype: str = "float32") -> Callable[..., jax.Array]:
    """`apply` in the given compute dtype over float32 master params; an adapted model's with its adapter.

    The built-in Transformer's takes its keywords too (`hidden=True`, `key=...`).
    """
    if architecture.config is None:
        return architecture.apply
    module = Transformer(architecture.config, jnp.dtype(dtype), architecture.lora)
    if architecture.lora is None:
        return lambda params, *rows, **kw: module.apply({"params": params}, *rows, **kw)
    return lambda params, *rows, **kw: module.apply({"params": params["base"], "lora": params["lora"]}, *rows, **kw)


def abstract_params(architecture: Architecture, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the params on `mesh`; nothing is allocated."""
    return meshes.abstract(mesh, lambda: architecture.init(jax.random.key(0)))


def parameter_count(architecture: Architecture) -> int:
    shapes = abstract_params(architecture, meshes.make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))


@functools.cache
def transformer_architecture(config: ModelConfig) -> Architecture:
    """The built-in Transformer as the two functions. Cached, so equal configs share their compiled programs."""
    if config.vocab is None:
        raise InputError("model.vocab is not set and there is no tokenizer to take it from")
    module = Transformer(config)

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        # A batch of one row cannot be split over a mesh; shapes of params do not depend on it.
        tokens = jnp.broadcast_to(tokens, (_batch_size_of_context_mesh(), 1), out_sharding=meshes.spec("batch", None))
        return module.init(key, tokens)["params"]

    def apply(params, tokens_BT, segments_BT=None):
        return module.apply({"params": params}, tokens_BT, segments_BT)

    return Architecture(init, apply, config.vocab, config.context, config)


def _batch_size_of_context_mesh() -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return shape.get("data", 1) * shape.get("fsdp", 1)


def user_model(
    init: Callable,
    apply: Callable,
    *,
    tokenizer: Any,
    context: int,
    vocab: int | None = None,
    mesh: Mesh | None = None,
    name: str = "user",
) -> Model:
    """A model from two plain JAX functions (see the module docstring).

    The functions need not know about meshes: params are replicated, the batch is split, and inside `apply` the
    compiler decides the layout. Give the same two function objects every time: programs are compiled per function.
    """

    def split(params, tokens_BT, segments_BT=None):
        run = jax.sharding.auto_axes(apply, out_sharding=meshes.spec("batch", None, None))
        return run(params, tokens_BT, segments_BT)

    architecture = Architecture(
        init, split, vocab or tokenizer.vocab, context, None, f"{name}-{source_mark(init, apply)}"
    )
    return Model(architecture, tokenizer, mesh=mesh or meshes.make_mesh())


def source_mark(*functions: Callable) -> str:
    """A short hash of the functions' source: a run must notice that the model changed. Where there is no source (made
    at a prompt, or compiled), only the name tells."""
    try:
        text = "".join(inspect.getsource(f) for f in functions)
    except (OSError, TypeError):
        text = "".join(getattr(f, "__qualname__", repr(type(f))) for f in functions)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def transformer(config: ModelConfig, tokenizer: Any, mesh: Mesh | None = None) -> Model:
    """The built-in Transformer for a tokenizer. Raises InputError when the two disagree on the vocabulary."""
    if config.vocab is None:
        config = config.model_copy(update={"vocab": tokenizer.vocab})
    elif config.vocab < tokenizer.vocab:
        raise InputError(
            f"model.vocab={config.vocab} is smaller than the tokenizer's {tokenizer.vocab} ids; leave model.vocab out"
        )
    mesh = mesh or meshes.make_mesh()
    check_mesh(config, mesh)
    return Model(transformer_architecture(config), tokenizer, mesh=mesh)


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    lines = mesh_problems(config, mesh)
    if lines:
        from recursive_jax.errors import problems

        raise problems("the model does not fit the mesh:", lines)


def mesh_problems(config: ModelConfig, mesh: Mesh) -> list[str]:
    """Every dimension that the mesh does not divide, as messages."""
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    checks = [
        ("model.heads", config.heads, tensor, "mesh.tensor"),
        ("model.kv_heads", config.G, tensor, "mesh.tensor"),
        ("model.hidden", config.F, tensor, "mesh.tensor"),
        ("model.width", config.width, fsdp, "mesh.fsdp"),
        ("model.vocab, padded,", config.V, tensor * fsdp, "mesh.fsdp * mesh.tensor"),
    ]
    return [f"{name}={size} is not divisible by {axis}={n}" for name, size, n, axis in checks if size % n]
