"""Floating-point operations of a program, counted in what JAX traced: products only, each pass of a loop, over all
devices together. What is computed again to save memory counts again."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

#: Products of queries with keys' shape in the kernels of splash attention.
SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}


def flops(jaxpr: Any, causal: bool = True, loop: int = 1) -> float:
    """Of one call. causal: attention kernels skip what a causal query cannot see. loop: how often a loop without a
    fixed length runs."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of(eqn, causal, loop) for eqn in jaxpr.eqns)


def _of(eqn: Any, causal: bool, loop: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * depth
    if name == "ragged_dot_general":
        rows, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        # [R, K] with [N, K, M]; or, of a gradient, the rows contracted group by group, [R, K] with [R, M] to [N, K, M],
        # which every backend writes as a dense product over all N.
        return 2.0 * rows[0] * math.prod(out) if len(out) == 3 else 2.0 * math.prod(out) * rows[-1]
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out = params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]
    if name == "pallas_call":
        return _kernel(eqn, causal)
    times = 1.0
    if name == "scan":
        times = float(params["length"])
    elif name == "while":
        times = float(loop)
    elif name == "shard_map":  # shapes inside are one device's
        times = float(math.prod(params["mesh"].shape.values()))
    inner = [flops(part, causal, loop) for part in _inner(params)]
    return times * (max(inner, default=0.0) if name == "cond" else sum(inner))


def _inner(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                found.append(part)
    return found


def _kernel(eqn: Any, causal: bool) -> float:
    """Of a Pallas kernel: what it says of itself, or, of splash attention, its products."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return float(estimate.flops)
    name = str(eqn.params.get("name") or eqn.params.get("name_and_src_info", ""))
    products = next((n for part, n in SPLASH.items() if part in name), 0)
    heads = [v.aval.shape for v in eqn.invars if v.aval.ndim >= 3 and v.aval.dtype.kind not in "iub"]
    if not products or len(heads) < 2:
        return 0.0
    query, key = heads[0], heads[1]
    return products * 2.0 * math.prod(query) * key[-2] * (0.5 if causal else 1.0)
