"""What recipes on instructions share: rows of any form as instruction, input and output; a teacher that is asked; a
student that is tuned on what is kept; and both measured on held-out instructions."""

from __future__ import annotations

import math
from typing import Any

from recursive_jax import mesh as meshes
from recursive_jax import rewards
from recursive_jax.collapse.tasks import Task, answered
from recursive_jax.config import TaskConfig, row_length
from recursive_jax.curate import rules
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.forms import SECTIONS
from recursive_jax.data.parser import Parser
from recursive_jax.data.template import Template, task_rows
from recursive_jax.generate.remote.model import Remote
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model
from recursive_jax.recipes import instruction_rows as rows_
from recursive_jax.recipes.answers import judge_of
from recursive_jax.recipes.instruction_config import InstructionsConfig
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.place import replicate
from recursive_jax.rounds.round import Round

COMPARE = (
    "Which answer is better?\nQuestion: {asked}\n\nA: {first}\n\nB: {second}\n\nAnswer A, B or tie.\nThe better one is "
)


class Studio:
    """What such a recipe works with: `base`, `teacher`, `seeds` (rows), `template` of the student, held-out `task`."""

    def __init__(self, config: InstructionsConfig):
        mesh = meshes.make_mesh(config.mesh)
        self.config, self.base = config, load_model(config.base, mesh)
        self.teacher = load_model(config.teacher, mesh) if config.teacher else self.base
        learnt, held_out, _ = task_rows(config.task, config.seed)
        self.seeds = rows_.as_instructions(learnt, "seed")
        self.template = template_of(config.task, self.base)
        held = rows_.as_instructions(held_out, "held-out")[: config.problems]
        settings = {"temperature": 0.0, "max_tokens": config.sampling.max_tokens or 256}
        self.task = Task("held-out", tuple(held), self.template, rewards.rouge_l("output"), settings)
        self.remote = isinstance(self.teacher, Remote)
        self.chat = self.remote if config.teacher_chat is None else config.teacher_chat
        self.start = self.adapted(self.base)

    def adapted(self, model: Model) -> Model:
        """What a training begins from: `model`, or a fresh adapter over it (merged, where it has one)."""
        lora = self.config.lora
        return model if lora is None else adapted_model(model.merged(), lora, seed=self.config.seed + replicate())

    def ask(self, prompt: str, parser: Parser | None = None, completion: str = "", **more: Any) -> Template:
        """A template for the teacher."""
        return Template(prompt, completion, chat=self.chat, parser=parser, **more)

    def settings(self, **defaults: Any) -> dict[str, Any]:
        """How a teacher writes: the recipe's own settings, under what the config says."""
        return {"max_tokens": 256, **defaults, **self.config.sampling.model_dump(exclude_unset=True)}

    def tuned(self, round: Round, data: Stored | Dataset, start: Model | None = None) -> Model:
        """A student of rows with `asked` and `output`, from the base; those that a training row does not hold are left
        out, and counted."""
        kept = self.fitting(round, data)
        examples = round.dataset("examples", rows_.learnt, kept, self.template, self.tokenizer)
        return self.train(round, "student", examples, start)

    def train(self, round: Round, name: str, examples: Stored, start: Model | None = None) -> Model:
        """A model of the examples, `epochs` over them."""
        steps = max(1, math.ceil(self.config.epochs * len(examples) / self.config.train.batch))
        train = self.config.train.model_copy(update={"steps": steps})
        return round.train(name, start or self.start, examples, train)

    def seed(self, round: Round, rows: list[dict]) -> Stored:
        """The seed rows, stored. For a profile also as they would be learnt: what generated rows are held against where
        no real row is learnt from."""
        seed = round.dataset("seed", rows_.given, rows)
        if self.config.profile:
            round.dataset("seed-examples", rows_.learnt, seed, self.template, self.tokenizer)
        return seed

    def fitting(self, round: Round, data: Stored, template: Template | None = None, name: str = "fitting") -> Stored:
        """The rows that can be learnt: read, with an output, no longer than a training row."""
        length = row_length(self.config.train.length, self.base.max_length)
        chosen = [rows_.readable, rules.fits(template or self.template, self.tokenizer, length)]
        return round.select(name, data, chosen)

    def stops(self, *texts: str) -> tuple[str, ...]:
        """Texts that end a reply of a teacher that goes on; one that is asked in a chat ends by itself."""
        return () if self.chat else texts

    @property
    def tokenizer(self) -> Any:
        """The student's."""
        return self.base.tokenizer

    def measure(self, round: Round, model: Model, before: Stored | None = None, data_rows: int = 0) -> Stored:
        """Answers to the held-out instructions, stored and measured: ROUGE-L with the given ones, the loss of these,
        and where there is a judge how often the answer is the better one."""
        held = round.dataset("held-out", answered, model, self.task, {})
        if before is not None and self.config.judge:
            judge = judge_of(load_model(self.config.judge, model.mesh), Template(COMPARE), against="before")
            both = round.dataset("both", rows_.with_before, held, before)
            held = round.score("judged", both, judge, column="won")
        arguments = (model, self.task, held, data_rows)
        round.evaluate("evaluation", model, rows_.measured, *arguments, inputs={"answers": held})
        return held


def template_of(task: TaskConfig, model: Model) -> Template:
    """In a chat where the model has one; else, unless the config asks otherwise, in Alpaca's sections."""
    found = Template.of(task, model.tokenizer)
    if not found.chat and task.prompt == "{asked}":
        return Template(SECTIONS.format("{asked}"), found.completion, found.system)
    return found
