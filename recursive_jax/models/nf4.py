"""NF4: four bits per frozen weight (QLoRA, arXiv:2305.14314, sec. 3; codebook of its appendix E).

Weights are quantised in blocks of 64 along the rows of the `[out, in]` matrix, as in `bitsandbytes`: each block is
divided by its largest magnitude, which is kept in float32, and rounded to the nearest of 16 values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import P

BLOCK = 64
CODEBOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
EDGES = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2


@struct.dataclass
class NF4:
    """codes: uint8, two values each, the first in the high half `[L, n / 2]`. scale: float32 `[L, n / 64]`.

    shape: of one layer's weight, of which the first `inner` axes are multiplied away.
    """

    codes: jax.Array
    scale: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    inner: int = struct.field(pytree_node=False, default=1)


def quantize(values_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 `[n / 2]`, scale float32 `[n / 64]`) of a flat float32 array whose size is a multiple of 64."""
    blocks = np.asarray(values_n, np.float32).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1)
    unit = blocks / np.where(scale == 0, 1.0, scale)[:, None]
    index = np.searchsorted(EDGES, unit.reshape(-1), side="left").astype(np.uint8)
    return (index[0::2] << 4) | index[1::2], scale


def quantized(stacked: np.ndarray, inner: int) -> NF4:
    """A stacked weight `[L, *in, *out]` in four bits."""
    shape = stacked.shape[1:]
    rows = int(np.prod(shape[:inner]))
    pairs = [quantize(np.asarray(w, np.float32).reshape(rows, -1).T.reshape(-1)) for w in stacked]
    return NF4(np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs]), shape, inner)


def gathered(x: NF4) -> NF4:
    """The codes whole on every device: at four bits a value, a fraction of gathering the weight."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_auto:
        return x
    return jax.tree.map(lambda leaf: jax.reshard(leaf, P()), x)


def dequantize(x: NF4) -> jax.Array:
    """One layer's float32 weight, of `x.shape`."""
    x = gathered(x)
    codebook = jnp.asarray(CODEBOOK)
    index = jnp.stack([x.codes >> 4, x.codes & 15], axis=-1).reshape(-1)
    values = codebook[index].reshape(-1, BLOCK) * x.scale[:, None]
    rows = int(np.prod(x.shape[: x.inner]))
    return values.reshape(-1, rows).T.reshape(x.shape)
