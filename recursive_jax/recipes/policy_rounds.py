"""What GRPO, RLAIF and the reinforcement of WizardMath share: a student answers problems, a reward grades the answers,
and the policy gradient follows; round after round from the last student."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from recursive_jax.curate.rollouts import Rollouts
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network
from recursive_jax.objectives import PolicyGradient
from recursive_jax.recipes.answers import Course
from recursive_jax.recipes.self_training import SelfTrainingConfig
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.work import Training, Work, Writing


class PolicyConfig(SelfTrainingConfig):
    """Rounds of policy gradient; `train` is of the given solutions."""

    samples: PositiveInt = Field(8, description="answers to a problem")
    policy_steps: PositiveInt = Field(100, description="of a round")
    policy_rate: float = Field(1e-6, gt=0.0, description="learning rate of the rounds")
    policy_batch: PositiveInt = Field(64, description="answers in a step, a multiple of `samples`")
    signal: Literal["grpo", "rloo", "reinforce", "gae"] = Field("grpo", description="how rewards become advantages")
    loss_type: str = Field("grpo", description="grpo, dapo, dr_grpo, ppo and the others of PolicyGradient")
    beta: float = Field(0.0, ge=0.0, description="of the divergence from the student that a round begins with")
    truncated: Literal["keep", "zero", "soft", "mask"] = Field("keep", description="what becomes of a cut answer")
    max_answer: PositiveInt | None = Field(None, description="tokens of an answer; default: sampling.max_tokens")

    def work(self, network: Network, rows: int, prompt: int, answer: int) -> list[Work]:
        """`policy_batch` answers a step, and the step on them."""
        length = min(network.max_length, prompt + self.answer_tokens)
        changed = {"steps": self.policy_steps, "batch": self.policy_batch, "length": length}
        train, written = self.train.model_copy(update=changed), self.policy_steps * self.policy_batch * self.rounds
        sampling = self.sampling.model_copy(update={"batch": min(self.sampling.batch, self.policy_batch)})
        return [
            Writing("rollouts", network, sampling, written, prompt, self.answer_tokens),
            Training("the policy", network, train, float(self.rounds), self.objective),
        ]

    @property
    def answer_tokens(self) -> int:
        return self.max_answer or self.sampling.max_tokens or 256

    @property
    def objective(self) -> PolicyGradient:
        settings = {"signal": self.signal, "loss_type": self.loss_type, "beta": self.beta, "truncated": self.truncated}
        longest = {"max_length": self.answer_tokens} if self.loss_type == "dr_grpo" else {}
        return PolicyGradient(**settings, **longest)

    @model_validator(mode="after")
    def _policy(self) -> PolicyConfig:
        try:
            self.objective  # noqa: B018 (its settings are checked as it is made)
        except InputError as error:
            raise ValueError(str(error)) from None
        if self.policy_batch % self.samples:
            raise ValueError(f"policy_batch={self.policy_batch} is not a multiple of samples={self.samples}")
        if self.samples < 2 and self.signal in ("grpo", "rloo"):
            raise ValueError(f"samples={self.samples}: answers to a problem are compared, at least 2 are wanted")
        return self


def reinforced(course: Course, round: Round, student: Model, reward: Any, problems: Any = None) -> tuple[Model, int]:
    """(the student after a round of policy gradient, the answers that it learnt from)."""
    config: Any = course.config
    asked = course.problems if problems is None else problems
    plain = dataclasses.replace(course.template, completion="")  # whatever is written has a reward
    rollouts = Rollouts(student, asked, plain, reward, config.objective, num_generations=config.samples,
                        max_tokens=config.answer_tokens)  # fmt: skip
    changed = {"steps": config.policy_steps, "learning_rate": config.policy_rate, "batch": config.policy_batch}
    train = config.train.model_copy(update={**changed, "length": None})
    return round.train("student", student, rollouts, train, config.objective), config.policy_steps * config.policy_batch
