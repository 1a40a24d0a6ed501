"""What a recipe is: a config of its own, and a function that runs it over the durable verbs.

    my_recipe = Recipe("mine", "one line that says what it does", Config, run)

A user's recipe joins by `recipe: package.module:name` in its config file, and is run, priced, reported, listed and
resumed as ours are (docs/examples/own_recipe.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, PositiveInt, model_validator

from recursive_jax import mesh as meshes
from recursive_jax.config import LoraConfig, MeshConfig, SamplingConfig, Section, TaskConfig, TrainConfig
from recursive_jax.data.template import Template, task_rows
from recursive_jax.errors import InputError, problems
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network, adapted_network
from recursive_jax.objectives import objective_of
from recursive_jax.rounds.opening import open_network
from recursive_jax.rounds.report import Layout, plain_layout, write_report
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Work


class RecipeConfig(Section):
    """What the config of every recipe has; a recipe's own derives from it and adds its sections."""

    HOW = frozenset(("name", "mesh"))
    NEEDS: ClassVar[tuple[str, ...]] = ()  # keys that have no default

    name: str = "run"
    recipe: str = Field(
        "collapse", description="what is run: a name of `recursive-jax recipes`, or package.module:name"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()
    arms: dict[str, dict[str, Any]] = Field(
        {}, description="the recipe several times in one run: NAME: {keys that differ}; the first is compared with"
    )
    replicates: PositiveInt = Field(1, description="every arm so many times, with other random numbers")
    profile: bool = Field(False, description="the collapse profile of the rows that students learn from: RUN/profiles")

    @model_validator(mode="before")
    @classmethod
    def _needs(cls, raw: Any) -> Any:
        missing = [key for key in cls.NEEDS if isinstance(raw, Mapping) and not raw.get(key)]
        if missing:
            name = raw.get("recipe") or cls.model_fields["recipe"].default
            raise ValueError("\n".join(f"recipe={name} needs {key}" for key in missing))
        return raw


def objective_problems(train: TrainConfig) -> list[str]:
    try:
        objective_of(train.objective)
        return []
    except InputError as error:
        return [f"train.{error}"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """summary: one line. Config: a section class. run(config, workdir, fork=, quiet=) -> metrics records.
    check(config): what can be said before anything is loaded, as lines. cost(config): what it does on its devices
    (`rounds/work.py`), which --dry-run prices and `plan` compiles; lines are shown as they are. layout: of its report.
    preview(config, rows): some rows asked, answered and read, for --preview; None: the recipe asks nothing through a
    template. paper: where it is from. example: a command that runs it. own_arms: it
    runs its arms and replicates itself. version: goes up when it computes something else."""

    name: str
    summary: str
    Config: type[RecipeConfig]
    run: Callable[..., list[dict]]
    check: Callable[[Any], list[str]] = lambda config: []
    cost: Callable[[Any], Sequence[Work | str]] = lambda config: []
    layout: Layout = plain_layout
    preview: Callable[[Any, int], str] | None = None
    paper: str = ""
    example: str = ""
    own_arms: bool = False
    version: int = 1

    def preflight(self, config: Any) -> None:
        """Raises one InputError with all that is wrong with a config."""
        lines = [*meshes.mesh_config_problems(config.mesh), *objective_problems(config.train), *self.check(config)]
        if lines:
            raise problems(f"this run cannot start, {len(lines)} problem(s):", lines)


def with_adapter(round: Round, base: Model, lora: LoraConfig | None) -> Model:
    """What a training of the round begins from: the base, or a fresh adapter on it."""
    return base if lora is None else adapted_model(base, lora, seed=round.seed("adapter"))


def concluded(run: Run, round: Round, layout: Layout = plain_layout, result: str = "student") -> list[dict]:
    """The end of a recipe: its last model is named as the run's, the report is written; the metrics records."""
    run.name_model(result, round, result, default=True)
    records = run.refresh_metrics()
    meshes.on_main(lambda: write_report(run.path, layout))
    return records


def task_problems(task: TaskConfig, seed: int, columns: Sequence[str] = ()) -> list[str]:
    """What can be said of a task before a model is loaded: its files are there, the first rows fill the template and
    have the columns."""
    try:
        train, test, _ = task_rows(task, seed)
        template = Template(task.prompt, task.completion, task.system)
        for row in (train[0], test[0]):
            template.messages(row)
            for column in columns:
                if column not in row:
                    raise InputError(f"column={column}: the rows have no such column: {', '.join(row)}")
    except InputError as error:
        return [str(error)]
    return []


def student_network(base: str, lora: LoraConfig | None = None) -> Network:
    """The network that is trained: of the model at `base`, or of an adapter on it."""
    network = open_network(base)
    return network if lora is None else adapted_network(network, lora)


def prompt_tokens(task: TaskConfig, rows: Sequence[Any]) -> int:
    """About how many tokens the task's prompts have: four characters each (no tokenizer is opened)."""
    template = Template(task.prompt, task.completion, task.system)
    texts = ["".join(str(m["content"]) for m in template.messages(row)) for row in rows[:20]]
    return max(1, sum(map(len, texts)) // (4 * max(1, len(texts))))
