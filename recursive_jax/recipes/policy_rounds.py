"""What GRPO, RLAIF and the reinforcement of WizardMath share: a student answers problems, a reward grades the answers,
and the policy gradient follows; round after round from the last student."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from recursive_jax.curate.rollouts import Rollouts
from recursive_jax.models.model import Model
from recursive_jax.objectives import PolicyGradient
from recursive_jax.recipes.answers import Course
from recursive_jax.recipes.self_training import SelfTrainingConfig
from recursive_jax.rounds.round import Round


class PolicyConfig(SelfTrainingConfig):
    """Rounds of policy gradient; `train` is of the given solutions."""

    samples: PositiveInt = Field(8, description="answers to a problem; train.batch is a multiple of it")
    policy_steps: PositiveInt = Field(100, description="of a round")
    policy_rate: float = Field(1e-6, gt=0.0, description="learning rate of the rounds")
    policy_batch: PositiveInt = Field(64, description="answers in a step, a multiple of `samples`")
    signal: Literal["grpo", "rloo", "reinforce", "gae"] = Field("grpo", description="how rewards become advantages")
    loss_type: str = Field("grpo", description="grpo, dapo, dr_grpo, ppo and the others of PolicyGradient")
    beta: float = Field(0.0, ge=0.0, description="of the divergence from the student that a round begins with")
    max_answer: PositiveInt | None = Field(None, description="tokens of an answer; default: sampling.max_tokens")

    @property
    def objective(self) -> PolicyGradient:
        return PolicyGradient(signal=self.signal, loss_type=self.loss_type, beta=self.beta)


def reinforced(course: Course, round: Round, student: Model, reward: Any, problems: Any = None) -> tuple[Model, int]:
    """(the student after a round of policy gradient, the answers that it learnt from)."""
    config: Any = course.config
    tokens = config.max_answer or config.sampling.max_tokens or 256
    asked = course.problems if problems is None else problems
    rollouts = Rollouts(student, asked, course.template, reward, config.objective, num_generations=config.samples,
                        max_tokens=tokens)  # fmt: skip
    changed = {"steps": config.policy_steps, "learning_rate": config.policy_rate, "batch": config.policy_batch}
    train = config.train.model_copy(update={**changed, "length": None})
    return round.train("student", student, rollouts, train, config.objective), config.policy_steps * config.policy_batch
