"""Concept scrubbing: a Transformer whose layers cannot tell a concept, each fitted on what the layers before, already
scrubbed, let through (arXiv:2306.03819, sec. 5).

Erasers stand behind the norms, where attention and MLP read. What reads there is linear, so an eraser is folded into
the weights: the scrubbed model is an ordinary one (with biases where there were none), which trains, writes, is stored
and exported as any other. Fitting is three passes over the rows, layer by layer: `scrub_neox` of the paper's code runs
the whole model for every eraser.

Shapes: N rows, T positions, D width, K classes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from recursive_jax import mesh as meshes
from recursive_jax.collapse.erasure import LeaceEraser, LeaceFitter
from recursive_jax.errors import InputError
from recursive_jax.models.layers import Block, LayerKind
from recursive_jax.models.masks import Mask
from recursive_jax.models.model import Model, abstract_params
from recursive_jax.models.network import TransformerNetwork, transformer_network
from recursive_jax.models.transformer import Transformer, layer_kinds

SITES = ("attention", "mlp")
READERS = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}


@dataclasses.dataclass(frozen=True)
class Scrubbed:
    """model: with the erasers in its weights. erasers: by layer and site (`attention`, `mlp`)."""

    model: Model
    erasers: tuple[dict[str, LeaceEraser], ...]


def scrub(
    model: Model,
    rows: Sequence[np.ndarray],
    labels: Sequence[Any],
    *,
    method: str = "leace",
    independent: bool = False,
    batch: int = 16,
    seed: int = 0,
) -> Scrubbed:
    """The model without a concept. rows: token ids, as they are read (with a start token where the model wants one);
    labels: for each row a class of each token (-1: not looked at), or one for all of them. method: as of
    `LeaceEraser.fit`. independent: each eraser is fitted on the model as it was, to show what scrubbing is for.

    Raises InputError for a model whose layers do not read behind a norm (post-norm encoders), or with experts."""
    config = _checked(model)
    model = model.merged()
    tokens_NT, segments_NT, labels_NT, K = _rows(model, rows, labels)
    blocks = model.params["blocks"]
    layers = [jax.tree.map(lambda w, i=i: np.asarray(meshes.fetch(w[i])), blocks) for i in range(config.layers)]
    with jax.set_mesh(model.mesh):
        states = _embedded(model, tokens_NT, segments_NT, batch)
        # Biases everywhere, as a Llama may have them: what no other family's file can say.
        biased = config.model_copy(update={"qkv_bias": True, "out_bias": True, "mlp_bias": True, "family": ""})
        plain = [_with_biases(layer, config) for layer in layers]
        done, erasers = [], []
        for i, layer in enumerate(plain):
            found: dict[str, LeaceEraser] = {}
            seen = layer
            for site in SITES:
                inputs, _ = _run_block(model, biased, i, layer if independent else seen, states, segments_NT, batch)
                fitter = LeaceFitter(config.d_model, K)
                for x_BTD, z_BT in zip(inputs[site], _cut(labels_NT, batch), strict=True):
                    used = z_BT >= 0
                    fitter.update(np.asarray(x_BTD, np.float64)[used], z_BT[used])
                found[site] = fitter.fitted(method, seed + i)
                seen = folded(seen, site, found[site])
            _, states = _run_block(model, biased, i, layer if independent else seen, states, segments_NT, batch)
            done.append(seen)
            erasers.append(found)
    stacked = jax.tree.map(lambda *w: np.stack(w), *done)
    return Scrubbed(_placed(model, biased, stacked), tuple(erasers))


def inputs_of(model: Model, rows: Sequence[np.ndarray], *, batch: int = 16) -> list[dict[str, list[np.ndarray]]]:
    """What attention and MLP of each layer read, behind their norms: by layer and site, for each row float32 `[T,
    D]`."""
    config = _checked(model)
    model = model.merged()
    tokens_NT, segments_NT, _, _ = _rows(model, rows, [0] * len(rows))
    lengths = [min(len(r), tokens_NT.shape[1]) for r in rows]
    found = []
    with jax.set_mesh(model.mesh):
        states = _embedded(model, tokens_NT, segments_NT, batch)
        for i in range(config.layers):
            layer = jax.tree.map(lambda w, i=i: np.asarray(meshes.fetch(w[i])), model.params["blocks"])
            inputs, states = _run_block(model, config, i, layer, states, segments_NT, batch)
            whole = {site: np.concatenate([np.asarray(x) for x in parts]) for site, parts in inputs.items()}
            found.append({s: [x[:n] for x, n in zip(parts, lengths, strict=False)] for s, parts in whole.items()})
    return found


def probe(x_ND: np.ndarray, z_N: np.ndarray, x_MD: np.ndarray, z_M: np.ndarray, *, c: float = 1e6) -> float:
    """The accuracy, on the second rows, of a logistic probe fitted on the first ones (multinomial, penalty
    |w|^2 / 2c, features scaled to unit variance)."""
    mean, scale = x_ND.mean(0), x_ND.std(0)
    scale = np.where(scale > 1e-6 * max(scale.max(), 1e-12), scale, 1.0)
    x_ND, x_MD = (x_ND - mean) / scale, (x_MD - mean) / scale
    K, (N, D) = int(max(z_N.max(), z_M.max())) + 1, x_ND.shape
    target_NK = np.eye(K)[z_N]

    def cost(w):
        w_DK, b_K = w[:-K].reshape(D, K), w[-K:]
        logits = x_ND @ w_DK + b_K
        logits -= logits.max(1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        error = (np.exp(logp) - target_NK) / N
        grad = np.concatenate([(x_ND.T @ error + w_DK / (c * N)).ravel(), error.sum(0)])
        return -(logp * target_NK).sum() / N + (w_DK**2).sum() / (2 * c * N), grad

    w = optimize.minimize(cost, np.zeros(D * K + K), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return float(((x_MD @ w[:-K].reshape(D, K) + w[-K:]).argmax(1) == z_M).mean())


def folded(layer: dict[str, Any], site: str, eraser: LeaceEraser) -> dict[str, Any]:
    """A layer that reads its input through the eraser: y = (b + P (x - b)) W + c = x (P^T W) + (b - P b) W + c."""
    room = dict(layer[site])
    rest_D = eraser.bias - eraser.projection @ eraser.bias
    for name in READERS[site]:
        if name not in room:
            continue
        w = np.asarray(room[name], np.float64)
        room[f"{name}_bias"] = (room[f"{name}_bias"] + np.tensordot(rest_D, w, axes=1)).astype(room[name].dtype)
        room[name] = np.tensordot(eraser.projection.T, w, axes=1).astype(room[name].dtype)
    return {**layer, site: room}


def _checked(model: Model) -> Any:
    if not isinstance(model.network, TransformerNetwork) or model.params is None:
        raise InputError("scrubbing is for a Transformer that has params")
    config = model.network.config
    if config.block not in ("pre", "sandwich") or config.experts or not config.first_norm:
        raise InputError(
            f"model.block={config.block}, experts={config.experts}: erasers stand behind norms that attention and MLP "
            "read alone (pre, sandwich), without experts"
        )
    return config


def _rows(
    model: Model, rows: Sequence[np.ndarray], labels: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Rows as one array, their segments, their labels (-1 on padding), and the number of classes."""
    if not len(rows) or len(rows) != len(labels):
        raise InputError(f"{len(rows)} rows and {len(labels)} labels: one label, or one for each token, of every row")
    T = min(model.max_length, max(map(len, rows)))
    tokens, segments = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), np.int32)
    found = np.full((len(rows), T), -1)
    for n, (row, label) in enumerate(zip(rows, labels, strict=True)):
        row = np.asarray(row, np.int32)[:T]
        tokens[n, : len(row)], segments[n, : len(row)] = row, 1
        found[n, : len(row)] = label if np.ndim(label) == 0 else np.asarray(label)[: len(row)]
    return tokens, segments, found, int(found.max()) + 1


def _cut(x: np.ndarray, batch: int) -> list[np.ndarray]:
    return [x[i : i + batch] for i in range(0, len(x), batch)]


def _embedded(model: Model, tokens_NT: np.ndarray, segments_NT: np.ndarray, batch: int) -> list[np.ndarray]:
    """The states before the first layer, a batch of rows at a time."""
    config = model.network.config.model_copy(update={"layers": 1})
    first = {k: v for k, v in model.params.items() if k != "blocks"}
    first["blocks"] = jax.tree.map(lambda w: w[:1], model.params["blocks"])
    program = _embed_program(config)
    return [
        np.asarray(meshes.fetch(program(first, *_padded(model, t, s, batch))))[: len(t)]
        for t, s in zip(_cut(tokens_NT, batch), _cut(segments_NT, batch), strict=True)
    ]


def _padded(model: Model, a: np.ndarray, b: np.ndarray, batch: int) -> Any:
    """Two arrays of a batch of rows, filled up to its size, on the mesh."""
    batch += -batch % meshes.batch_divisor(model.mesh)
    fill = lambda x: np.pad(x, ((0, batch - len(x)), *((0, 0),) * (x.ndim - 1)))
    return meshes.put_batch(model.mesh, (fill(a), fill(b)))


@functools.cache
def _embed_program(config):
    module = Transformer(config)

    def embed(params, tokens, segments):
        return module.apply({"params": params}, tokens, segments, embedded=True)

    return jax.jit(embed)


@functools.cache
def _block_program(config, kind: int):
    block, own = Block(config, jnp.float32), layer_kinds(config)[kind]

    def run(layer, x_BTD, segments_BT):
        index_BT = meshes.rows_like(jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), segments_BT.shape), len(x_BTD))
        mask = Mask(causal=config.causal, segments_BT=segments_BT)
        (out, _), found = block.apply({"params": layer}, x_BTD, index_BT, mask, own, mutable=["taps"])
        return {site: found["taps"][f"{site}_input"][0] for site in SITES}, out

    return jax.jit(run)


def _run_block(
    model: Model, config: Any, i: int, layer: Any, states: list[np.ndarray], segments_NT: np.ndarray, batch: int
):
    """(what each site of a layer reads, by batch; the states behind it)."""
    alike = [j for j, kind in enumerate(layer_kinds(config)) if _same(kind, layer_kinds(config)[i])]
    program = _block_program(config, alike[0])
    inputs: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
    after = []
    placed = meshes.put_replicated(model.mesh, layer)
    for x_BTD, s_BT in zip(states, _cut(segments_NT, batch), strict=True):
        found, out = meshes.fetch(program(placed, *_padded(model, x_BTD, s_BT, batch)))
        for site in SITES:
            inputs[site].append(np.asarray(found[site])[: len(x_BTD)])
        after.append(np.asarray(out)[: len(x_BTD)])
    return inputs, after


def _same(a: LayerKind, b: LayerKind) -> bool:
    equal = a.frequency_F is None or np.array_equal(a.frequency_F, b.frequency_F)
    return equal and (a.turn, a.window, a.normalized) == (b.turn, b.window, b.normalized)


def _with_biases(layer: dict[str, Any], config: Any) -> dict[str, Any]:
    """The layer with zero biases where the folded one has some."""
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    for name in READERS["attention"]:
        attention.setdefault(f"{name}_bias", np.zeros(attention[name].shape[1:], attention[name].dtype))
    attention.setdefault("out_bias", np.zeros(config.d_model, attention["out"].dtype))
    for name in ("gate", "up", "down"):
        if name in mlp:
            mlp.setdefault(f"{name}_bias", np.zeros(mlp[name].shape[1:], mlp[name].dtype))
    return {**layer, "attention": attention, "mlp": mlp}


def _placed(model: Model, config: Any, blocks: Any) -> Model:
    """The model of a config with biases, its params laid out as they would be from the start."""
    network = transformer_network(config)
    like = abstract_params(network, model.mesh)
    params = {**meshes.fetch({k: v for k, v in model.params.items() if k != "blocks"}), "blocks": blocks}
    place = lambda x, shape: jax.device_put(np.asarray(x, shape.dtype), shape.sharding)
    return dataclasses.replace(model, network=network, params=jax.tree.map(place, params, like), mark="", source="")
