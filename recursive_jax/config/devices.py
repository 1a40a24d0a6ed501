"""Devices."""

from __future__ import annotations

from pydantic import Field

from recursive_jax.config.section import Section


class MeshConfig(Section):
    """Devices per axis; one axis may be -1: all that are left."""

    data: int = Field(-1, le=65_536)
    fsdp: int = Field(1, le=65_536)
    tensor: int = Field(1, le=65_536)
