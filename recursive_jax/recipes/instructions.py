"""What recipes on instructions share: rows of any form as instruction, input and output; a teacher that is asked; a
student that is tuned on what is kept; and both measured on held-out instructions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from recursive_jax import mesh as meshes
from recursive_jax import rewards
from recursive_jax.collapse.likelihood import cross_entropy, example_losses
from recursive_jax.collapse.tasks import Task, answered, task_numbers
from recursive_jax.config import LoraConfig, TaskConfig
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.forms import SECTIONS, as_conversations
from recursive_jax.data.parser import Parser
from recursive_jax.data.template import Template, examples_dataset, task_rows
from recursive_jax.errors import InputError
from recursive_jax.generate.remote.model import Remote
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model
from recursive_jax.recipes.recipe import RecipeConfig
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.preflight import batch_problems, training_cost
from recursive_jax.rounds.round import Round

COLUMNS = ("instruction", "input", "output", "asked")
COMPARE = (
    "Which answer is better?\nQuestion: {asked}\n\nA: {first}\n\nB: {second}\n\nAnswer A, B or tie.\nThe better one is "
)


class InstructionTask(TaskConfig):
    """Rows with `instruction`, `input` and `output`, Self-Instruct's `instances`, or any form of conversation."""

    prompt: str = Field("{asked}", description="what the model reads; {asked}: the instruction, and its input")
    completion: str = "{output}"


class InstructionsConfig(RecipeConfig):
    """A teacher writes, a student is tuned on what is kept."""

    base: str = Field("", description="the student before: a run, a Hugging Face folder, a GGUF, smollm2")
    teacher: str | None = Field(None, description="who writes: a model, or openai:MODEL@URL; default: the base itself")
    teacher_chat: bool | None = Field(
        None, description="ask the teacher in its chat form, not as a text that goes on; default: a remote one"
    )
    task: InstructionTask
    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")
    epochs: float = Field(2.0, gt=0.0, description="over the rows learnt from; decides train.steps")
    problems: PositiveInt | None = Field(None, description="held-out rows, the first ones; default: all")
    judge: str | None = Field(None, description="a model that compares answers before and after, in both orders")

    @model_validator(mode="before")
    @classmethod
    def _must(cls, raw: Any) -> Any:
        missing = [key for key in ("base", "task") if isinstance(raw, dict) and not raw.get(key)]
        if missing:
            raise ValueError("\n".join(f"recipe={raw.get('recipe')} needs {key}" for key in missing))
        return raw


def as_instructions(rows: Sequence[dict], prefix: str) -> list[dict[str, Any]]:
    """The rows with `instruction`, `input`, `output` and `asked`, all texts, and an id. Raises InputError naming the
    columns of rows of no known form."""
    found = []
    for n, row in enumerate(rows):
        own = {k: v for k, v in row.items() if k not in ("id", "instances", "messages", "conversations")}
        if row.get("instances"):
            own |= {key: str(row["instances"][0].get(key) or "") for key in ("input", "output")}
        elif "instruction" not in row:
            ((made,), _) = as_conversations([row])
            said = {m["role"]: m["content"] for m in made["messages"]}
            own |= {"instruction": said.get("user", ""), "output": said.get("assistant", "")}
        own |= {key: str(own.get(key) or "").strip() for key in ("instruction", "input", "output")}
        found.append({**own, "asked": asked_of(own), "id": f"{prefix}/{n}"})
    return found


def asked_of(row: dict[str, Any]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


class Studio:
    """What such a recipe works with: `base`, `teacher`, `seeds` (rows), `template` of the student, held-out `task`."""

    def __init__(self, config: InstructionsConfig):
        mesh = meshes.make_mesh(config.mesh)
        self.config, self.base = config, load_model(config.base, mesh)
        self.teacher = load_model(config.teacher, mesh) if config.teacher else self.base
        rows, held_out, _ = task_rows(config.task, config.seed)
        self.seeds = as_instructions(rows, "seed")
        self.template = template_of(config.task, self.base)
        held = as_instructions(held_out, "held-out")[: config.problems]
        settings = {"temperature": 0.0, "max_tokens": config.sampling.max_tokens or 256}
        self.task = Task("held-out", tuple(held), self.template, rewards.rouge_l("output"), settings)
        self.chat = isinstance(self.teacher, Remote) if config.teacher_chat is None else config.teacher_chat
        self.start = self.adapted(self.base)

    def adapted(self, model: Model) -> Model:
        """What a training begins from: `model`, or a fresh adapter over it (merged, where it has one)."""
        lora = self.config.lora
        return model if lora is None else adapted_model(model.merged(), lora, seed=self.config.seed)

    def ask(self, prompt: str, parser: Parser | None = None, completion: str = "", **more: Any) -> Template:
        """A template for the teacher."""
        return Template(prompt, completion, chat=self.chat, parser=parser, **more)

    def settings(self, **defaults: Any) -> dict[str, Any]:
        """How a teacher writes: the recipe's own settings, under what the config says."""
        return {"max_tokens": 256, **defaults, **self.config.sampling.model_dump(exclude_defaults=True)}

    def tuned(self, round: Round, rows: Stored | Dataset, start: Model | None = None) -> Model:
        """A student of rows with `asked` and `output`, from the base."""
        return self.train(
            round, "student", round.dataset("examples", learnt, rows, self.template, self.tokenizer), start
        )

    def train(self, round: Round, name: str, examples: Stored, start: Model | None = None) -> Model:
        """A model of the examples, `epochs` over them."""
        steps = max(1, math.ceil(self.config.epochs * len(examples) / self.config.train.batch))
        train = self.config.train.model_copy(update={"steps": steps})
        return round.train(name, start or self.start, examples, train)

    @property
    def tokenizer(self) -> Any:
        """The student's."""
        return self.base.tokenizer

    def measure(self, round: Round, model: Model, before: Stored | None = None, data_rows: int = 0) -> Stored:
        """Answers to the held-out instructions, stored and measured: ROUGE-L with the given ones, the loss of these,
        and where there is a judge how often the answer is the better one."""
        held = round.dataset("held-out", answered, model, self.task, {})
        if before is not None and self.config.judge:
            judge = rewards.judge(load_model(self.config.judge, model.mesh), Template(COMPARE), against="before")
            both = round.dataset("both", with_before, held, before)
            held = round.score("judged", both, judge, column="won")
        arguments = (model, self.task, held, data_rows)
        round.evaluate("evaluation", model, measured, *arguments, inputs={"answers": held})
        return held


def template_of(task: TaskConfig, model: Model) -> Template:
    """In a chat where the model has one; else, unless the config asks otherwise, in Alpaca's sections."""
    found = Template.of(task, model.tokenizer)
    if not found.chat and task.prompt == "{asked}":
        return Template(SECTIONS.format("{asked}"), found.completion, found.system)
    return found


def measured(model: Model, task: Task, answers: Dataset, data_rows: int) -> dict[str, Any]:
    """`score`: ROUGE-L F1 with the given answer (arXiv:2212.10560, sec. 4); `ce_task`: nats per token of the given
    ones; `win_rate`: over the answers before, a tie half."""
    losses = example_losses(model, [task.template.example(row, model.tokenizer) for row in task.rows if row["output"]])
    found = {**task_numbers(task, answers), "data_rows": data_rows}
    if losses:
        found["ce_task"], found["ce_task_stderr"] = cross_entropy(losses)
    if answers.has("won"):
        known = [x for x in answers.column("won") if x is not None]
        found |= {"win_rate": sum(known) / len(known) if known else None, "judged": len(known)}
    return found


def with_before(held: Dataset, before: Dataset) -> Dataset:
    return held.with_column("before", before.column("text"))


def learnt(data: Dataset, template: Template, tokenizer: Any) -> Dataset:
    """Rows to train on; those without an output, or that could not be read, are no examples."""
    keep = [bool(out) and status in ("ok", "length") for out, status in
            zip(data.column("output"), data.column("status"), strict=True)]  # fmt: skip
    kept = data.take([n for n, good in enumerate(keep) if good])
    if not len(kept):
        raise InputError(f"none of {len(data)} rows can be learnt from: no reply of the teacher was kept")
    return examples_dataset(kept, template, tokenizer)


def plain(data: Dataset, names: Sequence[str] = COLUMNS) -> list[dict[str, Any]]:
    """Rows with some columns, who wrote them and where they come from."""
    core = ("id", "parents", "synthetic", "model", "round", "status")
    return [{name: row[name] for name in (*core, *names) if name in row} for row in python_rows(data.table)]


def joined(*parts: Dataset) -> Dataset:
    """The rows of all parts that can be learnt from."""
    rows = [row for part in parts for row in plain(part) if row["output"] and row["status"] in ("ok", "length")]
    return Dataset.from_rows([{**row, "input": row.get("input") or "", "asked": asked_of(row)} for row in rows])


def given(rows: list[dict]) -> Dataset:
    return Dataset.from_rows(rows)


def with_asked(data: Dataset) -> Dataset:
    """The rows that could be read, with `asked`."""
    rows = [n for n, status in enumerate(data.column("status")) if status in ("ok", "length")]
    kept = data.take(rows)
    inputs = kept.column("input") if kept.has("input") else [""] * len(kept)
    asked = [asked_of({"instruction": i, "input": x}) for i, x in zip(kept.column("instruction"), inputs, strict=True)]
    return kept.with_column("asked", asked)


def cost(config: InstructionsConfig) -> list[str]:
    """Of a student of as many rows as the seed has: at least that."""
    rows = len(task_rows(config.task, config.seed)[0])
    steps = max(1, math.ceil(config.epochs * rows / config.train.batch))
    train = config.train.model_copy(update={"steps": steps})
    return training_cost(load_model(config.base).network, train, meshes.make_mesh(config.mesh))


def check(config: InstructionsConfig) -> list[str]:
    """What can be said before a model is loaded: the files are there, and their rows are instructions."""
    try:
        train, test, _ = task_rows(config.task, config.seed)
        as_instructions(train, "seed")
        as_instructions(test, "held-out")
    except InputError as error:
        return [str(error)]
    return batch_problems(config.mesh, train=config.train)
