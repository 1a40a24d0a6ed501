"""SDFT, self-distillation fine-tuning (arXiv:2601.19897): a model that is shown a demonstration is its own teacher.

    for each of `distill_steps`:
        texts   = student(problem)
        teacher = the mean of the student's own params (`ema`), shown the row's solution before the problem
        student = a step on KL(student || teacher) of every token of its texts

Departures: none known; from the base, without a student of the solutions (`solved: 0`), as in the paper. Expect: what
the demonstrations show is learnt with less forgotten than by fine-tuning on them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from recursive_jax.curate.student_texts import StudentTexts
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.objectives import SelfDistill
from recursive_jax.recipes.answers import Course, check
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import SelfTrainingConfig, cost, rounds_of
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.work import Training, Work, Writing


class SdftConfig(SelfTrainingConfig):
    """A model learns from itself, shown demonstrations."""

    recipe: str = "sdft"

    solved: NonNegativeInt | None = Field(0, description="rows whose solution is learnt from before, the first")
    shown: str = Field(
        "", description="what the teacher reads; default: the question, the solution as an example, it again"
    )
    ema: float = Field(0.99, ge=0.0, le=1.0, description="of the teacher's params; 1: it stays")
    beta: float = Field(1.0, ge=0.0, le=1.0, description="1: KL(student || teacher), 0: KL(teacher || student)")
    distill_steps: PositiveInt = Field(100, description="of a round")
    distill_rate: float = Field(1e-5, gt=0.0, description="learning rate of the rounds")

    def work(self, network: Network, rows: int, prompt: int, answer: int) -> list[Work]:
        length = min(network.max_length, 2 * prompt + 2 * answer)  # the teacher reads a demonstration, too
        train = self.train.model_copy(update={"steps": self.distill_steps, "length": length})
        written = self.distill_steps * self.train.batch * self.rounds
        objective = SelfDistill(beta=self.beta, ema=self.ema)
        return [
            Writing("its own texts", network, self.sampling, written, prompt, answer),
            Training("the rounds", network, train, float(self.rounds), objective),
        ]


def advance(course: Course, round: Round, student: Model) -> tuple[Model, int]:
    config, template = course.config, course.template
    example = f"An example of an answer:\n{template.completion}\n\nNow your own answer.\n"
    prompt = config.shown or f"{template.prompt}\n{example}{template.prompt}"
    shown = type(template)(prompt, template.completion, template.system, template.chat)
    objective = SelfDistill(beta=config.beta, ema=config.ema)
    texts = StudentTexts(student, course.problems, template, objective, shown=shown,
                         max_tokens=config.sampling.max_tokens or 256)  # fmt: skip
    changed = {"steps": config.distill_steps, "learning_rate": config.distill_rate, "length": None}
    student = round.train("student", student, texts, config.train.model_copy(update=changed), objective)
    return student, config.distill_steps * config.train.batch


def sdft(config: SdftConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records."""
    return rounds_of(config, workdir, advance, fork=fork, quiet=quiet)


recipe = Recipe(
    "sdft",
    "a model that is shown a demonstration is its own teacher, on its own texts",
    SdftConfig,
    sdft,
    check,
    cost,
    paper="arXiv:2601.19897",
    example="recursive-jax run configs/sdft.yaml --workdir runs/sdft",
)
