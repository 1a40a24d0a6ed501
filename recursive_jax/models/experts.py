"""A mixture of gated MLPs: softmax router in float32, the best `experts_per_token` of each token (arXiv:2401.04088).
No token is dropped, no expert has a capacity. Two ways to the same sum:

    dense      every expert runs on every token, and the router's weights, zero for those not chosen, mix them
    grouped    tokens are sorted by their experts, and each expert multiplies its own (`jax.lax.ragged_dot`)

Grouped is k / N of the arithmetic forward where the backend has such a product: TPU. Its weights' gradient is a dense
product over all experts there, and on CPU and GPU XLA (of jax 0.10 and 0.12) writes all of it so: dense is the default.

Shapes: B rows, T positions, D width, F expert width, N experts, k of them a token, S = B T tokens of a device."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from recursive_jax.mesh import local, spec

Activation = Callable[[jax.Array], jax.Array]


def dense(
    x_BTD: jax.Array,
    p_BTk: jax.Array,
    chosen_BTk: jax.Array,
    gate_NDF: jax.Array,
    up_NDF: jax.Array,
    down_NFD: jax.Array,
    act: Activation,
) -> jax.Array:
    """`[B, T, D]`. p: weights of the chosen experts, chosen: which they are."""
    hidden, N = spec("batch", "time", "experts", "mlp"), gate_NDF.shape[0]
    p_BTN = jnp.sum(jax.nn.one_hot(chosen_BTk, N, dtype=jnp.float32) * p_BTk[..., None], axis=-2)
    into = lambda w: jnp.einsum("btd,ndf->btnf", x_BTD, w, out_sharding=hidden)
    h_BTNF = act(into(gate_NDF)) * into(up_NDF) * p_BTN[..., None].astype(x_BTD.dtype)
    return jnp.einsum("btnf,nfd->btd", h_BTNF, down_NFD, out_sharding=spec("batch", "time", None))


def grouped(
    x_BTD: jax.Array,
    p_BTk: jax.Array,
    chosen_BTk: jax.Array,
    gate_NDF: jax.Array,
    up_NDF: jax.Array,
    down_NFD: jax.Array,
    act: Activation,
) -> jax.Array:
    """As `dense`. Each device sorts its own tokens; of split experts each has its part of the width, and the parts are
    added up."""
    mesh = jax.sharding.get_abstract_mesh()
    several = not (mesh.empty or mesh.are_all_axes_auto)

    def own(x_BTD, p_BTk, chosen_BTk, gate_NDF, up_NDF, down_NFD):
        (B, T, D), k = x_BTD.shape, chosen_BTk.shape[-1]
        expert_R = chosen_BTk.reshape(-1)  # R = S k pairs of a token and an expert
        order_R = jnp.argsort(expert_R, stable=True)
        sizes_N = jnp.bincount(expert_R, length=gate_NDF.shape[0]).astype(jnp.int32)
        rows_RD = x_BTD.reshape(-1, D)[order_R // k]
        h_RF = act(jax.lax.ragged_dot(rows_RD, gate_NDF, sizes_N)) * jax.lax.ragged_dot(rows_RD, up_NDF, sizes_N)
        out_RD = jax.lax.ragged_dot(h_RF, down_NFD, sizes_N) * p_BTk.reshape(-1)[order_R][:, None].astype(h_RF.dtype)
        back_R = jnp.argsort(order_R)  # a gather, not a scatter: its sums have one order on every hardware
        out_BTD = out_RD[back_R].reshape(B, T, k, D).sum(2)
        return jax.lax.psum(out_BTD, "tensor") if several else out_BTD

    rows = spec("batch", "time", None)
    into, out = spec("experts", None, "mlp"), spec("experts", "mlp", None)
    return local(own, (rows, rows, rows, into, into, out), rows)(x_BTD, p_BTk, chosen_BTk, gate_NDF, up_NDF, down_NFD)
