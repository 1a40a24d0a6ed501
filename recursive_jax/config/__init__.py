"""The sections that configs are put together from, and how they are read. What a whole config holds, its recipe
says."""

from recursive_jax.config.data import DataConfig, LanguageConfig, TaskConfig
from recursive_jax.config.devices import MeshConfig
from recursive_jax.config.loader import difference, grown, without_keys
from recursive_jax.config.model import LoraConfig, ModelConfig, RopeScaling
from recursive_jax.config.remote import RemoteConfig
from recursive_jax.config.rounds import ArmConfig, EvaluateConfig, FilterConfig, RoundsConfig
from recursive_jax.config.sampling import DenoiseConfig, SamplingConfig
from recursive_jax.config.section import Section
from recursive_jax.config.train import TrainConfig, row_length

__all__ = [
    "ArmConfig",
    "DataConfig",
    "DenoiseConfig",
    "EvaluateConfig",
    "FilterConfig",
    "LanguageConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "RemoteConfig",
    "RopeScaling",
    "RoundsConfig",
    "SamplingConfig",
    "Section",
    "TaskConfig",
    "TrainConfig",
    "difference",
    "grown",
    "row_length",
    "without_keys",
]
