"""Devices."""

from __future__ import annotations

from recursive_jax.config.section import Section


class MeshConfig(Section):
    """Devices per axis; one axis may be -1: all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
