"""The keys that commands on one stored model take."""

from __future__ import annotations

from pydantic import Field

from recursive_jax.config import DataConfig, EvaluateConfig, MeshConfig, RemoteConfig, SamplingConfig, Section


class GenerateOptions(Section):
    """Of `generate`."""

    sampling: SamplingConfig = SamplingConfig()
    remote: RemoteConfig = RemoteConfig()
    mesh: MeshConfig = MeshConfig()


class ServeOptions(Section):
    """Of `serve`."""

    mesh: MeshConfig = MeshConfig()


class EvaluateOptions(Section):
    """Of `evaluate`."""

    seed: int = Field(0, ge=0, lt=2**63)
    evaluate: EvaluateConfig = EvaluateConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
