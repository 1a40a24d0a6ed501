"""Concept erasure: the smallest affine change after which no linear probe finds a concept (LEACE, arXiv:2306.03819).

    eraser = LeaceEraser.fit(x_ND, z_N)            # or: fitter = LeaceFitter(D, K); fitter.update(x, z); fitter.eraser
    eraser.erase(x_ND)                             # mean + P (x - mean)

A probe that is no better than a constant is the same as equal class means, and as no covariance between x and z: with
W = Sxx^(-1/2) and Q the orthogonal projector onto the columns of W Sxz, P = I - W^+ Q W. Everything is kept in float64.

Shapes: N rows, D features, K classes (or features of the concept)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.errors import InputError

METHODS = ("leace", "orthogonal", "random")
TOLERANCE = 0.01  # singular values of the whitened covariance below this are noise, as in `concept-erasure`


@dataclasses.dataclass(frozen=True)
class LeaceEraser:
    """projection: float64 `[D, D]`; bias: the mean of what it was fitted on, float64 `[D]`."""

    projection: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(cls, x_ND: Any, z: Any, *, method: str = "leace", seed: int = 0) -> LeaceEraser:
        """x_ND: floats; z: classes `[N]` (whole numbers, or bools) or features `[N, K]`. method: `leace`; `orthogonal`,
        the projection off the columns of Sxz; `random`, off as many random directions, to compare with. Raises
        InputError for shapes that do not fit, and values that are not finite."""
        x_ND = np.asarray(x_ND, np.float64)
        z_NK = features(z, x_ND.shape[:-1])
        return (
            LeaceFitter(x_ND.shape[-1], z_NK.shape[-1])
            .update(x_ND.reshape(-1, x_ND.shape[-1]), z_NK)
            .fitted(method, seed)
        )

    @property
    def rank(self) -> int:
        """How many directions are taken out."""
        return round(float(len(self.bias) - np.trace(self.projection)))

    def erase(self, x: Any) -> Any:
        """`[..., D]` without the concept: NumPy in float64, JAX arrays in their own dtype."""
        if isinstance(x, jax.Array):
            bias, P = jnp.asarray(self.bias, x.dtype), jnp.asarray(self.projection, x.dtype)
            return bias + (x - bias) @ P.T
        return self.bias + (np.asarray(x, np.float64) - self.bias) @ self.projection.T


class LeaceFitter:
    """The statistics of rows that come in pieces: counts, means and centred products, merged exactly (Chan, Golub and
    LeVeque, 1979), in any order and from any number of hosts."""

    def __init__(self, x_dim: int, z_dim: int):
        self.n = 0
        self.mean_x, self.mean_z = np.zeros(x_dim), np.zeros(z_dim)
        self.xx, self.xz = np.zeros((x_dim, x_dim)), np.zeros((x_dim, z_dim))

    def update(self, x: Any, z: Any) -> LeaceFitter:
        """Takes rows `[..., D]` with their concept (classes `[...]`, or features `[..., K]`) into account; returns
        itself. JAX arrays may lie on many devices: their sums are made there, in float32 around the rows' own mean."""
        D, K = len(self.mean_x), len(self.mean_z)
        z_NK = features(z, tuple(np.shape(x)[:-1]), K)
        if np.shape(x)[-1:] != (D,) or z_NK.shape[1] != K:
            raise InputError(f"x has {np.shape(x)[-1:]} features and z {z_NK.shape[1]}; {D} and {K} are wanted")
        if isinstance(x, jax.Array) and x.size:
            n, mean_x, mean_z, xx, xz = _device_sums(x.reshape(-1, D), z_NK)
        else:
            x_ND = np.asarray(x, np.float64).reshape(-1, D)
            n = len(x_ND)
            if not n:
                return self
            mean_x, mean_z = x_ND.mean(0), z_NK.mean(0)
            x_ND, z_NK = x_ND - mean_x, z_NK - mean_z
            xx, xz = x_ND.T @ x_ND, x_ND.T @ z_NK
        if not (np.isfinite(xx).all() and np.isfinite(xz).all()):
            raise InputError("there are values in x or z that are not finite: leave those rows out")
        return self.merge(n, mean_x, mean_z, xx, xz)

    def merge(self, n: int, mean_x: np.ndarray, mean_z: np.ndarray, xx: np.ndarray, xz: np.ndarray) -> LeaceFitter:
        """Takes the statistics of other rows into account (of another host's fitter, say); returns itself."""
        if not n:
            return self
        total = self.n + n
        gap_x, gap_z = mean_x - self.mean_x, mean_z - self.mean_z
        share = self.n * n / total
        self.xx = self.xx + xx + share * np.outer(gap_x, gap_x)
        self.xz = self.xz + xz + share * np.outer(gap_x, gap_z)
        self.mean_x, self.mean_z = self.mean_x + gap_x * n / total, self.mean_z + gap_z * n / total
        self.n = total
        return self

    @property
    def eraser(self) -> LeaceEraser:
        return self.fitted()

    def fitted(self, method: str = "leace", seed: int = 0) -> LeaceEraser:
        """The eraser of all rows so far. Raises InputError for fewer than two, and another method."""
        if method not in METHODS:
            raise InputError(f"method={method!r}: {', '.join(METHODS)} is wanted")
        if self.n < 2:
            raise InputError(f"an eraser is fitted on two rows at least, there are {self.n}")
        xx, xz, D = self.xx / self.n, self.xz / self.n, len(self.mean_x)
        values, vectors = np.linalg.eigh(xx)
        kept = values > values[-1] * D * np.finfo(np.float64).eps
        root = np.sqrt(np.where(kept, values, 1.0))
        W = (vectors * np.where(kept, 1.0 / root, 0.0)) @ vectors.T
        W_back = (vectors * np.where(kept, root, 0.0)) @ vectors.T
        left, sizes, _ = np.linalg.svd(W @ xz, full_matrices=False)
        left = left[:, sizes > TOLERANCE]
        if method == "leace":
            return LeaceEraser(np.eye(D) - W_back @ left @ left.T @ W, self.mean_x)
        if method == "orthogonal":
            left = np.linalg.svd(xz, full_matrices=False)[0][:, : left.shape[1]]
        else:
            left = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, left.shape[1])))[0]
        return LeaceEraser(np.eye(D) - left @ left.T, self.mean_x)


def features(z: Any, rows: tuple[int, ...], classes: int | None = None) -> np.ndarray:
    """A concept as features, float64 `[N, K]`. z: one entry for each of the `rows` (whole numbers or bools are
    classes, a column for each; else one number), or features `[*rows, K]`. Raises InputError for another shape, and
    for a class beyond those there are."""
    z = np.asarray(z)
    if z.shape[: len(rows)] != rows or z.ndim > len(rows) + 1:
        raise InputError(f"z has shape {z.shape}; one concept for each row of x is wanted: {rows}, or {(*rows, 'K')}")
    if z.ndim == len(rows) + 1:
        return z.astype(np.float64).reshape(-1, z.shape[-1])
    z = z.reshape(-1)
    if not (z.dtype == bool or np.issubdtype(z.dtype, np.integer)):
        return z.astype(np.float64)[:, None]
    z = z.astype(int)
    count = classes or (int(z.max()) + 1 if z.size else 1)
    if z.size and (z.min() < 0 or z.max() >= count):
        raise InputError(f"classes are 0 .. {count - 1}, there is {int(z.min() if z.min() < 0 else z.max())}")
    return np.eye(count)[z]


@jax.jit
def _sums(x_ND, z_NK):
    mean_x, mean_z = jnp.mean(x_ND, axis=0), jnp.mean(z_NK, axis=0)
    x_ND, z_NK = x_ND - mean_x, z_NK - mean_z
    product = lambda a, b: jnp.einsum("nd,nk->dk", a, b, precision=jax.lax.Precision.HIGHEST, **_whole(x_ND))
    return mean_x, mean_z, product(x_ND, x_ND), product(x_ND, z_NK)


def _whole(x: jax.Array) -> dict[str, Any]:
    """The products are whole on every device: their sums over rows go over all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty or mesh.are_all_axes_auto else {"out_sharding": jax.P(None, None)}


def _device_sums(x_ND: jax.Array, z_NK: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    mesh = getattr(x_ND.sharding, "mesh", None)
    if mesh is None or mesh.size == 1:
        out = _sums(jnp.asarray(jax.device_get(x_ND), jnp.float32), jnp.asarray(z_NK, jnp.float32))
    else:
        with jax.set_mesh(mesh):
            z_NK = jax.device_put(np.asarray(z_NK, np.float32), x_ND.sharding)
            out = _sums(x_ND.astype(jnp.float32), z_NK)
    return (len(x_ND), *(np.asarray(meshes.fetch(v), np.float64) for v in out))
