"""Distillation of a teacher's answers: of its texts (sequence-level, arXiv:1606.07947), or of its distributions, on
given texts and on the student's own (GKD, arXiv:2306.13649, alg. 1).

    student_0 = train(base, solutions)                             `solved: 0`: the base itself
    how=texts:          answers   = teacher(problems), greedy
                        student_1 = train(base, answers)
    how=distributions:  for each of `distill_steps`: with probability `lmbda` texts of the student, else the solutions
                        student   = a step on JSD_beta(teacher || student) of every token

Departures: `right_only` leaves out teachers' answers that are wrong. Expect: with distributions more than with texts,
from the student's own texts most (the paper's fig. 1)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from recursive_jax.curate import rules
from recursive_jax.curate.select import with_status
from recursive_jax.curate.student_texts import StudentTexts
from recursive_jax.data import fields
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.generate.remote.model import SCHEME
from recursive_jax.generate.request import FromTemplate
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.objectives import Distill
from recursive_jax.recipes.answers import Course, check
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import SelfTrainingConfig, bare, cost, rounds_of
from recursive_jax.rounds.opening import open_network
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.work import Training, Work, Writing


class DistillConfig(SelfTrainingConfig):
    """A student follows a teacher."""

    NEEDS = ("base", "task", "teacher")

    recipe: str = "distill"

    teacher: str = Field("", description="a model; for distributions one with the student's tokenizer")
    how: Literal["texts", "distributions"] = Field("texts", description="what of the teacher is learnt")
    lmbda: float = Field(0.5, ge=0.0, le=1.0, description="share of the student's own texts, of distributions")
    beta: float = Field(
        0.5, ge=0.0, le=1.0, description="0: KL(teacher || student), 1: KL(student || teacher), between: JSD"
    )
    temperature: float = Field(1.0, gt=0.0, description="of both distributions, and of the student's texts")
    distill_steps: PositiveInt = Field(100, description="of a round")
    distill_rate: float = Field(1e-5, gt=0.0, description="learning rate of the rounds, of distributions")
    right_only: bool = Field(False, description="learn only from teacher's texts that are right")

    def work(self, network: Network, rows: int, prompt: int, answer: int) -> list[Work]:
        teacher = None if self.teacher.startswith(SCHEME) else open_network(self.teacher)
        if self.how == "texts" or teacher is None:
            own = [item for item in super().work(network, rows, prompt, answer) if isinstance(item, Training)]
            return own if teacher is None else [Writing("texts", teacher, self.sampling, rows, prompt, answer), *own]
        length = min(network.max_length, prompt + answer)
        train = self.train.model_copy(update={"steps": self.distill_steps, "length": length})
        objective = Distill(beta=self.beta, temperature=self.temperature)
        written = self.lmbda * self.distill_steps * self.train.batch * self.rounds
        own = [Writing("its own texts", network, self.sampling, written, prompt, answer)] if written else []
        return [*own, Training("the rounds", network, train, float(self.rounds), objective, (("teacher", teacher),))]


def advance(course: Course, round: Round, student: Model) -> tuple[Model, int]:
    config: Any = course.config
    teacher = course.model(config.teacher)
    if config.how == "texts":
        answers = course.answers(round, "answers", teacher, course.problems, temperature=0.0)
        kept = round.select("kept", answers, [with_status("ok"), *([rules.correct()] if config.right_only else [])])
        data = round.dataset("data", taught, kept, course.problems, course.template, course.start.tokenizer)
        train = config.train.model_copy(update={"steps": config.steps(len(data), round.number)})
        return round.train("student", course.start, data, train), len(data)
    objective = Distill(teacher, beta=config.beta, temperature=config.temperature)
    given = fields.names(course.template.completion)
    if config.lmbda < 1.0 and given != [course.template.completion.strip("{}")]:
        raise InputError(
            f"task.completion={course.template.completion!r}: with lmbda below 1 it is one {{field}} alone"
        )
    problems = course.solved if config.lmbda < 1.0 and len(course.solved) else course.problems
    texts = StudentTexts(student, problems, course.template, objective, lmbda=config.lmbda, completion=given[0],
                         max_tokens=config.sampling.max_tokens or 256, temperature=config.temperature)  # fmt: skip
    changed = {"steps": config.distill_steps, "learning_rate": config.distill_rate, "length": None}
    student = round.train("student", student, texts, config.train.model_copy(update=changed), objective)
    return student, config.distill_steps * config.train.batch


def taught(answers: Dataset, problems: Dataset, template: Template, tokenizer: Any) -> Dataset:
    """The teacher's texts as the student's rows: asked and encoded as the student reads them."""
    asked = FromTemplate(problems, template, tokenizer)
    prompts = {request.parents[0]: request.prompt for request in asked(0, len(asked))}
    texts = answers.column("text")
    data = bare(answers).with_column("prompt", [prompts[p[0]].tolist() for p in answers.column("parents")])
    data = data.with_column("tokens", [[*tokenizer.encode(text), tokenizer.eos] for text in texts])
    return data.with_column("logprobs", [[]] * len(data))


def distill(config: DistillConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records."""
    return rounds_of(config, workdir, advance, fork=fork, quiet=quiet)


recipe = Recipe(
    "distill",
    "a student learns a teacher's answers, or follows its distributions on given texts and on its own",
    DistillConfig,
    distill,
    check,
    cost,
    paper="arXiv:1606.07947, arXiv:2306.13649",
    example="recursive-jax run configs/distill.yaml --workdir runs/distill",
)
