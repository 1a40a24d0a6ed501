"""recursive_jax: train models on the output of models, in JAX, and know exactly what each round gained and lost.

    rj.load_model  rj.Dataset  rj.Run                                the nouns
    rj.train  rj.generate  rj.score  rj.select  rj.evaluate          the verbs
    rj.objectives  rj.parsers  rj.rewards  rj.rules  rj.recipes  rj.collapse   what there is to choose from

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
    ),
    "errors": ("InputError", "Preempted", "TrainingDiverged"),
    "identity": ("fingerprint", "named"),
    "mesh": ("make_mesh",),
    "models.lora": ("adapted_model",),
    "models.model": ("Model", "transformer", "user_model"),
    "models.peft": ("load_adapter", "save_adapter"),
    "data.dataset": ("Dataset",),
    "data.language": ("Language",),
    "data.sources": ("World", "open_world"),
    "data.parsers": ("ParseError",),
    "data.template": ("Examples", "Template", "examples_dataset"),
    "data.template_file": ("load_template",),
    "data.tokenizers": ("ByteTokenizer", "FileTokenizer", "LanguageTokenizer"),
    "generate.dialogue": ("Dialogue",),
    "generate.denoise": ("fill_masks",),
    "generate.hidden_score": ("pseudo_logprobs",),
    "generate.generate": ("stream",),
    "generate.files": ("Prompts", "generate_file"),
    "generate.score": ("embed", "token_logprobs"),
    "generate.request": (
        "Draft",
        "FromRows",
        "FromTemplate",
        "Guide",
        "Request",
        "Unconditional",
        "from_rows",
        "unconditional",
    ),
    "curate.rewards": ("score",),
    "curate.select": ("Rule", "select", "select_files"),
    "collapse.evaluate": ("Evaluated", "evaluate"),
    "collapse.measure": ("Yardstick", "measure"),
    "collapse.lab.lab": ("lab",),
    "collapse.profile": ("collapse_profile",),
    "rounds.run": ("Run",),
    "rounds.iterate": ("Pool", "generate_and_mix", "iterate"),
    "rounds.writing": ("save_huggingface",),
    "rounds.opening": ("load_model",),
    "rounds.report": ("write_report",),
    "recipes": ("load_config",),
    "recipes.recipe": ("Recipe", "RecipeConfig"),
    "recipes.finetune": ("finetune",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
#: Rooms that are also verbs: `recursive_jax.train(...)` trains, and `recursive_jax.train.step` is a module as any
#: other.
_VERBS = {
    "train": "train.loop:train",
    "generate": "generate.generate:generate",
    "collapse": "recipes.collapse:collapse",
}
_NAMESPACES = {
    "erasure": "collapse.erasure",
    "objectives": "objectives",
    "parsers": "data.parsers",
    "rewards": "curate.rewards",
    "rules": "curate.rules",
    "recipes": "recipes",
    "tasks": "collapse.tasks",
}
__all__ = sorted([*_HOME_OF, *_VERBS, *_NAMESPACES])


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"recursive_jax.{_HOME_OF[name]}"), name)
    elif name in _VERBS:
        return importlib.import_module(f"recursive_jax.{name}")
    elif name in _NAMESPACES:
        value = importlib.import_module(f"recursive_jax.{_NAMESPACES[name]}")
    else:
        raise AttributeError(f"recursive_jax has no {name!r}; there are: {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Verb(types.ModuleType):
    """A room that can be called: it does what its verb does."""

    @property
    def _function(self) -> Any:
        module, _, function = _VERBS[self.__name__.rpartition(".")[2]].partition(":")
        return getattr(importlib.import_module(f"recursive_jax.{module}"), function)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._function(*arguments, **keywords)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(self._function)


class _Package(types.ModuleType):
    """Makes the rooms of `_VERBS` callable as they are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, types.ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if TYPE_CHECKING:
    from recursive_jax import collapse, generate, objectives, recipes, train
    from recursive_jax.collapse import erasure, tasks
    from recursive_jax.collapse.evaluate import Evaluated, evaluate
    from recursive_jax.collapse.lab.lab import lab
    from recursive_jax.collapse.measure import Yardstick, measure
    from recursive_jax.collapse.profile import collapse_profile
    from recursive_jax.config import (
        ArmConfig,
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
    )
    from recursive_jax.curate import rewards, rules
    from recursive_jax.curate.rewards import score
    from recursive_jax.curate.select import Rule, select, select_files
    from recursive_jax.data import parsers
    from recursive_jax.data.dataset import Dataset
    from recursive_jax.data.language import Language
    from recursive_jax.data.parsers import ParseError
    from recursive_jax.data.sources import World, open_world
    from recursive_jax.data.template import Examples, Template, examples_dataset
    from recursive_jax.data.template_file import load_template
    from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer, LanguageTokenizer
    from recursive_jax.errors import InputError, Preempted, TrainingDiverged
    from recursive_jax.generate.denoise import fill_masks
    from recursive_jax.generate.dialogue import Dialogue
    from recursive_jax.generate.files import Prompts, generate_file
    from recursive_jax.generate.generate import stream
    from recursive_jax.generate.hidden_score import pseudo_logprobs
    from recursive_jax.generate.request import (
        Draft,
        FromRows,
        FromTemplate,
        Guide,
        Request,
        Unconditional,
        from_rows,
        unconditional,
    )
    from recursive_jax.generate.score import embed, token_logprobs
    from recursive_jax.identity import fingerprint, named
    from recursive_jax.mesh import make_mesh
    from recursive_jax.models.lora import adapted_model
    from recursive_jax.models.model import Model, transformer, user_model
    from recursive_jax.models.peft import load_adapter, save_adapter
    from recursive_jax.recipes import load_config
    from recursive_jax.recipes.finetune import finetune
    from recursive_jax.recipes.recipe import Recipe, RecipeConfig
    from recursive_jax.rounds.iterate import Pool, generate_and_mix, iterate
    from recursive_jax.rounds.opening import load_model
    from recursive_jax.rounds.report import write_report
    from recursive_jax.rounds.run import Run
    from recursive_jax.rounds.writing import save_huggingface
