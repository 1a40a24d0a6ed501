"""Analytic costs. XLA's own count takes the body of a scan once, so utilisation must not be read from it."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from recursive_jax.config import ModelConfig, TrainConfig, row_length

#: Dense peak in FLOP/s per device, from the vendors' data sheets: (bfloat16, float32).
PEAK = {
    "TPU v4": (275e12, 275e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5": (459e12, 459e12),
    "TPU v5p": (459e12, 459e12),
    "TPU v6 lite": (918e12, 918e12),
    "TPU v6e": (918e12, 918e12),
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA H100": (989e12, 495e12),
    "NVIDIA H200": (989e12, 495e12),
    "NVIDIA L4": (121e12, 60e12),
    "Tesla T4": (65e12, 8e12),
}


def matmul_parameters(c: ModelConfig, chosen: bool = False) -> int:
    """Parameters of products: blocks and output matrix. chosen: of the experts only those that a token is sent to,
    which is what it needs (on a CPU all of them run)."""
    experts = min(c.experts, c.experts_per_token) if chosen else c.experts
    attention = c.d_model * c.K * (2 * c.heads + 2 * c.G)
    mlp = (3 if c.gated else 2) * c.d_model * c.F * max(1, experts) + c.d_model * c.experts
    plain = c.E * c.V
    head = {"none": 0, "score": c.d_model, "plain": plain, "transform": plain + c.d_model * c.d_model}[c.head]
    squeeze = 0 if c.embedding_width is None else 2 * c.E * c.d_model
    return c.layers * (attention + mlp) + head + squeeze


def train_flops_per_token(c: ModelConfig, length: int) -> float:
    """Forward and backward: 6 per parameter, and attention (a causal query sees half of the row on average)."""
    seen = [min(length, 2 * c.sliding_window) if c.is_windowed(i) else length for i in range(c.layers)]
    return 6.0 * matmul_parameters(c, chosen=True) + 6.0 * sum(seen) * c.heads * c.K * (1 if c.causal else 2)


def decode_cost_per_token(
    c: ModelConfig, rows: int, prompt: int, new: int, bytes_per_value: int
) -> tuple[float, float]:
    """(FLOPs, bytes read from memory) for each new token when `rows` sequences decode together, each after a prompt of
    `prompt` tokens, which counts too: a step reads the weights once for all rows, and the cache of each."""
    weights, needed = matmul_parameters(c), matmul_parameters(c, chosen=True)
    cached = [min(prompt + new / 2, c.sliding_window if c.is_windowed(i) else prompt + new) for i in range(c.layers)]
    attended = new * 4.0 * sum(cached) * c.heads * c.K
    head = c.E * c.V  # of the prompt only the last position needs it
    flops = 2.0 * needed * (prompt + new) - 2.0 * head * (prompt - 1) + attended
    flops += 2.0 * prompt * prompt * c.layers * c.heads * c.K
    values = weights * (1 + new) / rows + new * 2.0 * sum(cached) * c.G * c.K
    return flops / new, values * bytes_per_value / new


def train_memory_bytes(c: ModelConfig, t: TrainConfig, parameters: int, devices: int, bytes_per_value: int) -> int:
    """Estimate per device: float32 params, gradients and two moments; activations kept for the backward pass;
    logits and their gradient."""
    length = row_length(t.length, c.max_length)
    rows = -(-t.batch // t.gradient_accumulation // devices)
    per_layer = {"none": 10 * c.d_model + 3 * c.F, "dots": 4 * c.d_model + 2 * c.F, "full": c.d_model}[c.remat]
    scores = c.heads * length if c.remat == "none" else 0
    activations = rows * length * c.layers * (per_layer + scores) * bytes_per_value
    return 16 * parameters // devices + activations + rows * length * c.V * 8


def peak_flops(dtype: str) -> float | None:
    """Peak of one device for the dtype, or None when the device is not in the table. On a CPU: measured once on a
    1024-cube product, so that a share of it means something; devices that are parts of one CPU share it."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_peak() / jax.local_device_count()
    for name, (half, single) in sorted(PEAK.items(), key=lambda item: -len(item[0])):
        if device.device_kind.startswith(name):
            return half if dtype == "bfloat16" else single
    return None


@functools.cache
def _measured_cpu_peak() -> float:
    a = jnp.ones((1024, 1024), jnp.float32, device=jax.local_devices()[0])
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)
