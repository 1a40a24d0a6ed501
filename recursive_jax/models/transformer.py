"""One configurable Transformer in Flax Linen, decoder or encoder, used as pure functions.

`Transformer(config).init(key, tokens)` makes the params (a plain dict, layers stacked on the first axis);
`.apply(...)` reads them, whether the layers are scanned (training large models: compiles once) or unrolled
(decoding: a scan would copy every layer's weights and cache out of the stacks at each token).
The KV cache is an argument and a result. The parts of a layer are in `layers.py`.

Shapes: B rows, T positions, D width, G key heads, K head width, L layers, V vocabulary, S cache slots.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from recursive_jax.config import LoraConfig, ModelConfig
from recursive_jax.mesh import rows_like, spec
from recursive_jax.models.layers import ACTIVATIONS, Block, LayerKind, Norm, weight
from recursive_jax.models.masks import Mask, begins
from recursive_jax.models.nf4 import NF4

FAR = 1 << 30  # a window that hides nothing


@struct.dataclass
class Cache:
    """Keys and values per layer, `[B, G, S, K]`. Row b holds length_B[b] tokens, in slots 0 .. length_B[b]; what lies
    beyond is never seen, and is overwritten by the tokens to come."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array

    @classmethod
    def empty(cls, c: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
        zeros = lambda: tuple(
            jnp.zeros((rows, c.G, slots, c.K), dtype, out_sharding=spec("batch", "kv_heads", "time", None))
            for _ in range(c.layers)
        )
        return cls(zeros(), zeros(), jnp.zeros((rows,), jnp.int32, out_sharding=spec("batch")))

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    def resized(self, slots: int) -> Cache:
        """Room for `slots` tokens; what does not fit is lost."""

        def fit(x):
            if slots <= x.shape[2]:
                return x[:, :, :slots]
            times, rest = divmod(slots, x.shape[2])  # what new slots hold does not matter; copying is faster than `pad`
            return jnp.concatenate([x] * times + [x[:, :, :rest]], axis=2)

        return self.replace(keys=tuple(map(fit, self.keys)), values=tuple(map(fit, self.values)))


def frequencies(c: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(radians per position of each rotated pair `[L, F]` float32, factor on the rotated vectors `[L]`).

    Scaling: linear; llama3 (the piecewise rule of Llama 3.1's release); yarn (arXiv:2309.00071, eq. 17-20 and 22).
    """
    size = int(c.K * c.rope_fraction)
    # In float32 as the reference implementations compute it: at position 4,000 one float32 step is 2e-4 radians.
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain = lambda theta: (np.float32(1.0) / np.float32(theta) ** exponent).astype(np.float32)
    wide, turn = plain(c.rope_theta), 1.0
    s = c.rope_scaling
    if s is not None and s.kind == "linear":
        wide = wide / np.float32(s.factor)
    elif s is not None and s.kind == "llama3":
        turns = s.original * wide / (2 * math.pi)
        share = np.clip((turns - s.low) / (s.high - s.low), 0.0, 1.0)
        wide = ((1 - share) * wide / s.factor + share * wide).astype(np.float32)
    elif s is not None:
        pair = lambda rotations: size * math.log(s.original / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))
        low, high = max(math.floor(pair(s.high)), 0), min(math.ceil(pair(s.low)), size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        wide = (wide / s.factor * ramp + wide * (1 - ramp)).astype(np.float32)
        turn = s.attention or (0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0)
    local = wide if c.rope_local_theta is None else plain(c.rope_local_theta)
    rows, turns = [], []
    for layer in range(c.layers):
        skipped = layer in c.nope_layers
        rows.append(np.zeros_like(wide) if skipped else local if c.is_windowed(layer) else wide)
        turns.append(1.0 if skipped else turn)
    return np.stack(rows), np.asarray(turns, np.float32)


def layer_kinds(c: ModelConfig) -> list[LayerKind]:
    """Each layer's own settings, as constants."""
    rows, turns = frequencies(c) if c.position == "rope" else ([None] * c.layers, [1.0] * c.layers)
    return [
        LayerKind(
            frequency_F=rows[i],
            turn=float(turns[i]),
            window=c.sliding_window if c.is_windowed(i) else None,
            normalized=c.first_norm or i > 0,
        )
        for i in range(c.layers)
    ]


def uniform(c: ModelConfig) -> bool:
    """Whether all layers are alike, so that a scan needs no settings per layer."""
    return (
        c.first_norm and len({c.is_windowed(i) for i in range(c.layers)}) == 1 and (not c.nope_layers)
    ) or c.layers == 1


@struct.dataclass
class Taps:
    """What a layer made: its states, and the queries and keys of its attention, as they meet."""

    states_BTD: jax.Array
    query_BTHK: jax.Array
    key_BTGK: jax.Array


class Transformer(nn.Module):
    """tokens_BT int32 -> logits_BTV float32. `hidden=True` stops before the head: states_BTD, after the final norm;
    `embedded=True` before the first layer; `states_BTD=` goes on from there (tokens_BT is None).

    segments_BT: packed documents, 0 is padding; positions restart with each segment. types_BT: token types.
    causal: overrides the config's (a decoder read in both directions). prefix_B: the first keys of each row that every
    position sees (prefix LM). visible_BTS: who sees whom, one by one, in place of all that (segments still part).
    positions_BT: in place of those that are counted. cache: the tokens are T more of each row; returns (logits, the
    cache with them). fresh: the cache is empty. branches: the T tokens are of T continuations, not in line. read_B:
    logits `[B, 1, V]` of this position of each row only (a prompt's others are not needed). taps: returns (out, the
    Taps of every layer). key: randomness of the adapter's dropout.

    The params may also have their layers apart, `blocks` a tuple (`unstacked`): a decode loop then copies none of them.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        tokens_BT,
        segments_BT=None,
        types_BT=None,
        *,
        causal=None,
        prefix_B=None,
        visible_BTS=None,
        positions_BT=None,
        cache=None,
        fresh=False,
        branches=None,
        read_B=None,
        hidden=False,
        states_BTD=None,
        embedded=False,
        taps=False,
        key=None,
    ):
        c = self.config
        if states_BTD is not None:
            return self._outputs(states_BTD, weight(self, "embedding", (c.V, c.E), ("vocab_rows", None), 0.02))
        table_VD = weight(self, "embedding", (c.V, c.E), ("vocab_rows", None), 0.02)
        x_BTD = self._gather(table_VD, tokens_BT)
        if c.embedding_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(c.embedding_scale, self.dtype)
        if c.embedding_width is not None:
            w = weight(self, "project_in", (c.E, c.d_model), (None, "embed"), c.E**-0.5)
            x_BTD = jnp.einsum("bte,ed->btd", x_BTD, w, out_sharding=spec("batch", "time", None))
        if positions_BT is None:
            positions_BT = _positions(tokens_BT, segments_BT, cache, branches)
        if c.position == "learned":
            where_PD = weight(self, "positions", (c.max_length + c.position_offset, c.d_model), (None, "embed"), 0.02)
            x_BTD = x_BTD + self._gather(where_PD, positions_BT + c.position_offset)
        if c.token_types:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            table = weight(self, "token_types", (c.token_types, c.d_model), (None, "embed"), 0.02)
            x_BTD = x_BTD + self._gather(table, types_BT)
        if c.embedding_norm:
            x_BTD = Norm(c, self.dtype, name="embedding_norm")(x_BTD)
        if embedded:
            return x_BTD
        mask = Mask(
            causal=c.causal if causal is None else causal,
            fresh=fresh,
            segments_BT=segments_BT,
            branches=branches,
            prefix_B=prefix_B,
            visible_BTS=visible_BTS,
        )
        seen = [] if taps else None
        x_BTD, written = self._blocks(x_BTD, positions_BT, mask, cache, key, seen)
        if read_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, read_B[:, None, None], axis=1)
        x_BTD = Norm(c, self.dtype, name="final_norm")(x_BTD) if c.final_norm else x_BTD
        out = x_BTD if hidden else self._outputs(x_BTD, table_VD)
        if cache is not None:
            keys, values = zip(*written, strict=True)
            return out, Cache(keys, values, cache.length_B + tokens_BT.shape[1])
        return (out, tuple(seen)) if taps else out

    def _outputs(self, x_BTD, table_VD):
        """What the head makes of the states."""
        c = self.config
        if c.head == "none":
            return x_BTD
        if c.head == "score":
            rows = spec("batch", "time", None)
            score_1D = weight(self, "score", (1, c.d_model), (None, None), c.d_model**-0.5)
            return jnp.einsum("btd,ud->btu", x_BTD, score_1D, out_sharding=rows, preferred_element_type=jnp.float32)
        x_BTD, head_VD = self._head(x_BTD, table_VD)
        bias_V = weight(self, "head_bias", (c.V,), ("vocab_rows",), 0.0) if c.head_bias else None
        return unembed(x_BTD, head_VD, c.vocab, bias_V, c.logit_cap)

    def _gather(self, table, index_BT):
        return table.at[index_BT].get(out_sharding=spec("batch", "time", None))

    def _head(self, x_BTD, table_VD):
        """(what meets the output matrix, the output matrix)."""
        c, rows = self.config, spec("batch", "time", None)
        if c.head == "transform":
            w = weight(self, "head_dense", (c.d_model, c.d_model), ("embed", None), c.d_model**-0.5)
            x_BTD = jnp.einsum("btd,de->bte", x_BTD, w, out_sharding=rows)
            x_BTD = x_BTD + weight(self, "head_dense_bias", (c.d_model,), (None,), 0.0) if c.bias else x_BTD
            x_BTD = Norm(c, self.dtype, name="head_norm")(ACTIVATIONS[c.activation](x_BTD))
        if c.embedding_width is not None:
            w = weight(self, "project_out", (c.d_model, c.E), ("embed", None), c.d_model**-0.5)
            x_BTD = jnp.einsum("btd,de->bte", x_BTD, w, out_sharding=rows)
        if c.tied:
            return x_BTD, table_VD
        return x_BTD, weight(self, "head", (c.V, c.E), ("vocab_rows", None), c.E**-0.5)

    def _blocks(self, x_BTD, positions_BT, mask, cache, key, seen=None):
        """Runs all layers over one stored layout: params stacked on the layer axis. seen: a list that gets Taps."""
        c = self.config
        kinds = layer_kinds(c)
        if self.is_initializing():
            scanned = nn.scan(
                lambda block, x, _: (block(x, positions_BT, mask, kinds[-1])[0], None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=c.layers,
            )
            return scanned(Block(c, self.dtype, name="blocks"), x_BTD, None)[0], []
        block = Block(c, self.dtype, self.lora, parent=None)
        stacked = {room: tree["blocks"] for room, tree in self.variables.items() if "blocks" in tree}
        blocks = stacked["params"]

        def run(x, variables, kind, layer_cache, key):
            return block.apply(variables, x, positions_BT, mask, kind, layer_cache, key)

        if c.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            run = jax.checkpoint(run, policy=policy, prevent_cse=False)
        # Four-bit weights are opened layer by layer only where layers are a loop: unrolled, XLA opens them all at once.
        loops = c.scan or any(isinstance(w, NF4) for w in jax.tree.leaves(blocks, is_leaf=lambda x: isinstance(x, NF4)))
        if loops and cache is None and seen is None and not isinstance(blocks, tuple):
            settings = None if uniform(c) else _traced(kinds)

            def body(x, layer):
                variables, i, kind = layer
                layer_key = None if key is None else jax.random.fold_in(key, i)
                return run(x, variables, kinds[0] if kind is None else kind, None, layer_key)[0], None

            x_BTD, _ = jax.lax.scan(body, x_BTD, (stacked, jnp.arange(c.layers), settings))
            return x_BTD, []
        written = []
        for i, kind in enumerate(kinds):
            layer = lambda tree, i=i: tree[i] if isinstance(tree, tuple) else jax.tree.map(lambda w: w[i], tree)
            variables = {room: layer(tree) for room, tree in stacked.items()}
            layer_cache = None if cache is None else (cache.keys[i], cache.values[i], cache.length_B)
            layer_key = None if key is None else jax.random.fold_in(key, i)
            if seen is None:
                x_BTD, pair = run(x_BTD, variables, kind, layer_cache, layer_key)
            else:
                (x_BTD, pair), found = block.apply(
                    variables, x_BTD, positions_BT, mask, kind, layer_cache, layer_key, mutable=["taps"]
                )
                inside = found["taps"]["attention"]
                seen.append(Taps(x_BTD, inside["query"][0], inside["key"][0]))
            written.append(pair)
        return x_BTD, written


def _traced(kinds: list[LayerKind]) -> LayerKind:
    """The layers' settings side by side, for a scan."""
    rows = None if kinds[0].frequency_F is None else jnp.stack([k.frequency_F for k in kinds])
    windows = [FAR if k.window is None else k.window for k in kinds]
    return LayerKind(
        frequency_F=rows,
        turn=jnp.asarray([k.turn for k in kinds], jnp.float32),
        traced_window=jnp.asarray(windows, jnp.int32),
        normalized=jnp.asarray([k.normalized for k in kinds]),
    )


def unstacked(params: dict[str, Any], config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The params in the compute dtype with their layers apart: `blocks` becomes a tuple of one tree per layer."""
    params = jax.tree.map(lambda w: w.astype(dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w, params)
    layers = tuple(jax.tree.map(lambda w, i=i: w[i], params["blocks"]) for i in range(config.layers))
    return {**params, "blocks": layers}


def _positions(tokens_BT, segments_BT, cache, branches):
    """Position of each token in its own document."""
    if branches is not None:
        return rows_like(jnp.broadcast_to(branches.position_B[:, None], tokens_BT.shape), tokens_BT.shape[0])
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    index_BT = rows_like(index_BT, tokens_BT.shape[0])
    if cache is not None:
        return index_BT + cache.length_B[:, None]
    if segments_BT is None:
        return index_BT
    return index_BT - jax.lax.cummax(jnp.where(begins(segments_BT), index_BT, 0), axis=1)


def unembed(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    vocab: int | None,
    bias_V: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Float32 logits; rows of the table beyond the vocabulary are padding and get no probability."""
    layout = spec("batch", "time", "vocab")
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, head_VD, out_sharding=layout, preferred_element_type=jnp.float32)
    if bias_V is not None:
        mesh = jax.sharding.get_abstract_mesh()
        bias_V = bias_V if mesh.empty or mesh.are_all_axes_auto else jax.reshard(bias_V, spec("vocab"))
        logits_BTV = logits_BTV + bias_V.astype(jnp.float32)
    if cap is not None:
        logits_BTV = cap * jnp.tanh(logits_BTV / cap)
    V = head_VD.shape[0]
    if vocab is None or vocab == V:
        return logits_BTV
    column = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    return jnp.where(column < vocab, logits_BTV, -1e30)
