"""Learning from a teacher's distributions: the student's next-token probabilities are drawn to the teacher's on the
same texts. What the texts are decides the rest: real ones, the teacher's, or the student's own (on-policy: rows that
the round's student wrote)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from recursive_jax.data.tokenizers import fingerprint as tokenizer_fingerprint
from recursive_jax.errors import InputError
from recursive_jax.mesh import spec
from recursive_jax.models.model import Model
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Term
from recursive_jax.objectives.causal import targets, token_nll
from recursive_jax.objectives.policy_losses import jsd_tokens


@dataclasses.dataclass(frozen=True)
class Distill(Objective):
    """Generalised Jensen-Shannon divergence from a frozen teacher (arXiv:2306.13649). Data as for `Causal`: what counts
    there counts here.

    beta: 0 is KL(teacher || student), which covers all that the teacher does; 1 is KL(student || teacher), which keeps
    to what it does most; between them their mixture. temperature: of both. hard: weight of the text's own
    cross-entropy beside it. Teacher and student have one vocabulary: tokenizers are compared by content, and others are
    refused (train on the teacher's texts instead). Logged: the divergence and the teacher's entropy, nats."""

    version: ClassVar[int] = 1

    teacher: Model | None = None
    beta: float = 0.0
    temperature: float = 1.0
    hard: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.beta <= 1.0:
            raise InputError(f"beta={self.beta}: between 0 (the teacher's KL) and 1 (the student's) is wanted")
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature}: more than 0 is wanted")

    def models(self, model: Model) -> dict[str, Model]:
        teacher = self.teacher
        if not isinstance(teacher, Model) or teacher.params is None:
            raise InputError("Distill learns from a teacher that has params: Distill(teacher=rj.load_model(...))")
        if teacher.vocab != model.vocab or not _one_tokenizer(teacher.tokenizer, model.tokenizer):
            raise InputError(
                "teacher and student have tokenizers of their own: their distributions are over other tokens. Let the "
                "teacher write (generate) and train the student on its texts"
            )
        return {"teacher": teacher}

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        inputs, segments, labels, weight_BT = targets(batch)
        student_BTV = ctx.apply(params, inputs, segments)
        teacher_BTV = jax.lax.stop_gradient(ctx.others["teacher"](None, inputs, segments))
        V = self.teacher.vocab if self.teacher is not None else min(student_BTV.shape[2], teacher_BTV.shape[2])
        each_BT = jsd_tokens(_cut(student_BTV, V), _cut(teacher_BTV, V), beta=self.beta, temperature=self.temperature)
        of = lambda x_BT: jnp.sum(jnp.where(weight_BT > 0, weight_BT * x_BT, 0.0))
        count = jnp.sum(weight_BT)
        terms = {"divergence": Term(of(each_BT), count)}
        if self.hard:
            terms["hard"] = Term(of(token_nll(student_BTV, labels)), count, self.hard)
        logp_BTV = jax.nn.log_softmax(_cut(teacher_BTV, V), axis=-1)
        entropy_BT = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
        logged = {"divergence": jax.lax.stop_gradient(each_BT), "entropy": entropy_BT}
        return Loss(terms, {name: (of(x_BT), count) for name, x_BT in logged.items()})


def _cut(logits_BTV: jax.Array, vocab: int) -> jax.Array:
    """The columns of the vocabulary, without those that pad it for a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.are_all_axes_auto):
        logits_BTV = jax.reshard(logits_BTV, spec("batch", "time", None))
    return logits_BTV[..., :vocab].astype(jnp.float32)


def _one_tokenizer(one: Any, other: Any) -> bool:
    return one is other or tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
