"""recursive_jax: train models on the output of models, in JAX, and know exactly what each round gained and lost.

Names are imported when they are first used, so that `import recursive_jax` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "config": (
        "ArmConfig",
        "Config",
        "DataConfig",
        "EvaluateConfig",
        "LanguageConfig",
        "LoraConfig",
        "MeshConfig",
        "ModelConfig",
        "RoundsConfig",
        "SamplingConfig",
        "TaskConfig",
        "TrainConfig",
        "load_config",
    ),
    "errors": ("InputError", "Preempted", "TrainingDiverged"),
    "mesh": ("make_mesh",),
    "models.lora": ("adapted_model",),
    "models.model": ("Model", "transformer", "user_model"),
    "models.peft": ("load_adapter", "save_adapter"),
    "data.dataset": ("Dataset",),
    "data.language": ("Language",),
    "data.sources": ("World", "open_world"),
    "data.template": ("ParseError", "Template", "examples_dataset"),
    "data.tokenizers": ("ByteTokenizer", "FileTokenizer", "LanguageTokenizer"),
    "train.loop": ("train",),
    "generate.generate": ("generate", "stream"),
    "generate.files": ("Prompts", "generate_file"),
    "generate.score": ("embed", "rewards", "token_logprobs"),
    "generate.request": ("Draft", "Guide", "Request", "from_rows", "unconditional"),
    "curate.select": ("Rule", "select"),
    "collapse.measure": ("Yardstick", "measure"),
    "collapse.lab.lab": ("lab",),
    "collapse.profile": ("collapse_profile",),
    "rounds.run": ("Run",),
    "rounds.iterate": ("Pool", "generate_and_mix", "iterate"),
    "rounds.exchange": ("save_huggingface",),
    "rounds.stored": ("load_model",),
    "rounds.report": ("write_report",),
    "recipes.collapse": ("collapse",),
    "recipes.finetune": ("finetune",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"recursive_jax has no {name!r}; there are: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"recursive_jax.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """The rooms `train`, `generate` and `collapse` share their names with functions: `recursive_jax.train` is the
    function, and importing a file of the room does not put the room in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if TYPE_CHECKING:
    from recursive_jax.collapse.lab.lab import lab
    from recursive_jax.collapse.measure import Yardstick, measure
    from recursive_jax.collapse.profile import collapse_profile
    from recursive_jax.config import (
        ArmConfig,
        Config,
        DataConfig,
        EvaluateConfig,
        LanguageConfig,
        LoraConfig,
        MeshConfig,
        ModelConfig,
        RoundsConfig,
        SamplingConfig,
        TaskConfig,
        TrainConfig,
        load_config,
    )
    from recursive_jax.curate.select import Rule, select
    from recursive_jax.data.dataset import Dataset
    from recursive_jax.data.language import Language
    from recursive_jax.data.sources import World, open_world
    from recursive_jax.data.template import ParseError, Template, examples_dataset
    from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer, LanguageTokenizer
    from recursive_jax.errors import InputError, Preempted, TrainingDiverged
    from recursive_jax.generate.files import Prompts, generate_file
    from recursive_jax.generate.generate import generate, stream
    from recursive_jax.generate.request import Draft, Guide, Request, from_rows, unconditional
    from recursive_jax.generate.score import embed, rewards, token_logprobs
    from recursive_jax.mesh import make_mesh
    from recursive_jax.models.lora import adapted_model
    from recursive_jax.models.model import Model, transformer, user_model
    from recursive_jax.models.peft import load_adapter, save_adapter
    from recursive_jax.recipes.collapse import collapse
    from recursive_jax.recipes.finetune import finetune
    from recursive_jax.rounds.exchange import save_huggingface
    from recursive_jax.rounds.iterate import Pool, generate_and_mix, iterate
    from recursive_jax.rounds.report import write_report
    from recursive_jax.rounds.run import Run
    from recursive_jax.rounds.stored import load_model
    from recursive_jax.train.loop import train
