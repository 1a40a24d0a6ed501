"""Learning from a teacher's distributions: the student's next-token probabilities are drawn to the teacher's on the
same texts. What the texts are decides the rest: real ones, the teacher's, or the student's own (on-policy: rows that
the round's student wrote, or `curate/student_texts.py` while it learns)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.packing import Columns, Packed, examples_of, stack_groups
from recursive_jax.data.tokenizers import fingerprint as tokenizer_fingerprint
from recursive_jax.errors import InputError
from recursive_jax.identity import fingerprint
from recursive_jax.mesh import local, rows_like, spec
from recursive_jax.models.model import Model
from recursive_jax.models.network import TransformerNetwork
from recursive_jax.models.read import attention_logprobs
from recursive_jax.models.transformer import Taps
from recursive_jax.objectives.base import Context, Extra, Loss, Objective, Params, Shapes, Term, batch_shapes
from recursive_jax.objectives.causal import targets, token_nll
from recursive_jax.objectives.policy_losses import jsd_tokens


@dataclasses.dataclass(frozen=True)
class Distill(Objective):
    """Generalised Jensen-Shannon divergence from a frozen teacher (arXiv:2306.13649). Data as for `Causal`: what counts
    there counts here.

    beta: 0 is KL(teacher || student), which covers all that the teacher does; 1 is KL(student || teacher), which keeps
    to what it does most; between them their mixture. temperature: of both. hard: weight of the text's own
    cross-entropy beside it. Teacher and student have one vocabulary: tokenizers are compared by content, and others are
    refused (train on the teacher's texts instead).

    hidden: weight of the squared distance of the student's states, through a learned projection where their widths
    differ, from the teacher's (arXiv:1909.10351, eq. 8). attention: weight of the divergence of what its heads attend
    to from what the teacher's do (arXiv:2002.10957, eq. 1); both have as many heads. layers: pairs (student's,
    teacher's) that these two compare, counted as in a list; by default the last ones. Logged: the divergence and the
    teacher's entropy, nats."""

    version: ClassVar[int] = 2

    teacher: Model | None = None
    beta: float = 0.0
    temperature: float = 1.0
    hard: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    layers: tuple[tuple[int, int], ...] = ((-1, -1),)

    def __post_init__(self):
        _check(self.beta, self.temperature)
        for name in ("hard", "hidden", "attention"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: 0 or more is wanted")
        pairs = tuple(tuple(pair) if isinstance(pair, (list, tuple)) else () for pair in self.layers)
        if not pairs or not all(len(pair) == 2 for pair in pairs):
            raise InputError(f"layers={self.layers}: pairs (the student's, the teacher's) are wanted, ((-1, -1),)")
        object.__setattr__(self, "layers", pairs)

    def models(self, model: Model) -> dict[str, Model]:
        teacher = the_teacher(self, self.teacher, model)
        if self.hidden or self.attention:
            pair = (model.network, teacher.network)
            if not all(isinstance(network, TransformerNetwork) for network in pair):
                raise InputError("hidden and attention compare layers of two Transformers; user functions show none")
            for name, network, places in zip(("student", "teacher"), pair, zip(*self.layers, strict=True), strict=True):
                odd = [i for i in places if not -network.layers <= i < network.layers]
                if odd:
                    raise InputError(f"layers={self.layers}: the {name} has {network.layers} layers, no layer {odd[0]}")
            heads = [network.config.heads for network in pair]
            if self.attention and heads[0] != heads[1]:
                raise InputError(
                    f"attention={self.attention}: the student has {heads[0]} heads, the teacher {heads[1]}; they are "
                    "compared one by one"
                )
        return {"teacher": teacher}

    def init(self, key: jax.Array, model: Model) -> Extra:
        """A projection for each pair of layers, where the widths differ."""
        if not self.hidden:
            return Extra()
        D, E = model.network.states_size, self.teacher.network.states_size
        if D == E:
            return Extra()
        keys = jax.random.split(key, len(self.layers))
        return Extra({f"project_{n}": jax.random.normal(k, (D, E)) * D**-0.5 for n, k in enumerate(keys)})

    def unpacked(self, data: Dataset, model: Model, length: int) -> Columns:
        packed = stack_groups([[e] for e in examples_of(data, model.tokenizer)], length, model.tokenizer.pad)
        return {name: column[:, 0] for name, column in packed.columns.items()}

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        inputs, segments, labels, weight_BT = targets(batch)
        more = {"taps": True} if self.hidden or self.attention else {}
        student = ctx.apply(params, inputs, segments, **more)
        teacher = jax.lax.stop_gradient(ctx.others["teacher"](None, inputs, segments, **more))
        student_BTV, teacher_BTV = (student[0], teacher[0]) if more else (student, teacher)
        each_BT, entropy_BT = _divergence(student_BTV, teacher_BTV, self, ctx.networks.get("teacher"))
        of = lambda x_BT: jnp.sum(jnp.where(weight_BT > 0, weight_BT * x_BT, 0.0))
        count = jnp.sum(weight_BT)
        terms = {"divergence": Term(of(each_BT), count)}
        if self.hard:
            terms["hard"] = Term(of(token_nll(student_BTV, labels)), count, self.hard)
        if more:
            found = self._matched(ctx, params, student[1], teacher[1], segments)
            terms |= {name: Term(of(x_BT), count, getattr(self, name)) for name, x_BT in found.items()}
        logged = {"divergence": jax.lax.stop_gradient(each_BT), "entropy": entropy_BT}
        return Loss(terms, {name: (of(x_BT), count) for name, x_BT in logged.items()})

    def _matched(
        self, ctx: Context, params: Params, student: tuple[Taps, ...], teacher: tuple[Taps, ...], segments: jax.Array
    ) -> dict[str, jax.Array]:
        """What `hidden` and `attention` weigh, token by token `[B, T]`, the mean over the pairs of layers."""
        found: dict[str, list[jax.Array]] = {name: [] for name in ("hidden", "attention") if getattr(self, name)}
        for n, (i, j) in enumerate(self.layers):
            if self.hidden:
                own, other = (taps.states_BTD.astype(jnp.float32) for taps in (student[i], teacher[j]))
                if f"project_{n}" in params.extra:
                    own = jnp.einsum("btd,de->bte", own, params.extra[f"project_{n}"])
                found["hidden"].append(jnp.mean((rows_like(own, len(own)) - rows_like(other, len(own))) ** 2, axis=-1))
            if self.attention:
                own, other = (
                    attention_logprobs(network.config, at % network.layers, taps[at], segments)
                    for network, at, taps in ((ctx.network, i, student), (ctx.networks["teacher"], j, teacher))
                )
                apart_BHT = jnp.sum(jnp.exp(other) * (other - own), axis=-1)
                found["attention"].append(jnp.mean(apart_BHT, axis=1))
        return {name: sum(parts) / len(parts) for name, parts in found.items()}


@dataclasses.dataclass(frozen=True)
class DistillTopK(Objective):
    """`Distill` from what a teacher said once: the columns `teacher_ids` and `teacher_logprobs` of
    `curate.teachers.with_teacher`, its most probable tokens in the place of every one. The teacher need not be there.
    All other tokens count as one: the divergence is a lower bound of the whole one, and equals it where all are stored.
    """

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "loss", "teacher_ids", "teacher_logprobs")

    beta: float = 0.0
    hard: float = 0.0

    def __post_init__(self):
        _check(self.beta, 1.0)

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        for name in ("teacher_ids", "teacher_logprobs"):
            if not data.has(name):
                raise InputError(f"the rows have no column {name!r}: curate.teachers.with_teacher gives it")
        examples = examples_of(data, model.tokenizer)
        stacked = stack_groups([[e] for e in examples], length, model.tokenizer.pad)
        columns = {name: column[:, 0] for name, column in stacked.columns.items()}
        N, width = columns["tokens"].shape
        ids, logprobs = data.column("teacher_ids"), data.column("teacher_logprobs")
        K = max((len(place) for row in ids for place in row), default=1)
        columns["teacher_ids"] = np.zeros((N, width, K), np.int32)
        columns["teacher_logprobs"] = np.full((N, width, K), -np.inf, np.float32)
        for n, (example, row, own) in enumerate(zip(examples, data.tokens(), ids, strict=True)):
            stop, size = len(example.tokens), len(row)
            if len(own) != size or len(logprobs[n]) != size:
                raise InputError(f"row {n}: the column `teacher_ids` does not belong to its {size} tokens")
            for at, (best, logp) in enumerate(zip(own, logprobs[n], strict=True), stop - size):
                columns["teacher_ids"][n, at, : len(best)] = best
                columns["teacher_logprobs"][n, at, : len(logp)] = logp
        return Packed(columns, fingerprint(columns))

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        inputs, segments, labels, weight_BT = targets(batch)
        logits_BTV = ctx.apply(params, inputs, segments)

        def lumped(logits_BTV, ids_BTK, teacher_BTK):
            logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
            known_BTK = jnp.isfinite(teacher_BTK)
            own_BTK = jnp.take_along_axis(logp_BTV, ids_BTK, axis=-1)
            own, other = (with_rest(jnp.where(known_BTK, x, MISSING)) for x in (own_BTK, teacher_BTK))
            return jsd_tokens(own, other, beta=self.beta)

        rows = spec("batch")
        given = (batch["teacher_ids"][:, 1:], batch["teacher_logprobs"][:, 1:])
        each_BT = local(lumped, (rows, rows, rows), rows)(logits_BTV, *given)
        of = lambda x_BT: jnp.sum(jnp.where(weight_BT > 0, weight_BT * x_BT, 0.0))
        terms = {"divergence": Term(of(each_BT), jnp.sum(weight_BT))}
        if self.hard:
            terms["hard"] = Term(of(token_nll(logits_BTV, labels)), jnp.sum(weight_BT), self.hard)
        return Loss(terms, {"divergence": (jax.lax.stop_gradient(of(each_BT)), jnp.sum(weight_BT))})


MISSING = -1e4  # a log-probability of nothing whose products with 0 are 0


def with_rest(logp_BTK: jax.Array) -> jax.Array:
    """With one more entry `[B, T, K + 1]`, all that the K leave over (at least 1e-7: sums are no more exact)."""
    rest_BT = jnp.log1p(-jnp.minimum(jnp.sum(jnp.exp(logp_BTK), axis=-1), 1.0 - 1e-7))
    return jnp.concatenate([logp_BTK, rest_BT[..., None]], axis=-1)


@dataclasses.dataclass(frozen=True)
class SelfDistill(Objective):
    """Self-distillation from a demonstration in context (SDFT, arXiv:2601.19897): the student's distributions after
    `prompt` are drawn to those of the model itself after `teacher_prompt`, which shows it more (a demonstration, a
    right answer, feedback), on `tokens`, which the student wrote (`curate.student_texts.StudentTexts`).

    beta, temperature: as in `Distill`; 1: KL(student || teacher). ema: the teacher is the mean of the student's own
    params over about 1 / (1 - ema) steps; 1: it stays as the model is before this training, 0: it is the student of the
    step before."""

    fields: ClassVar[tuple[str, ...]] = ("tokens", "segments", "loss")

    def shapes(self, rows: int, length: int) -> Shapes:
        return batch_shapes(self.fields, rows, 2, length + 1)

    beta: float = 1.0
    temperature: float = 1.0
    ema: float = 0.99

    def __post_init__(self):
        _check(self.beta, self.temperature)
        if not 0.0 <= self.ema <= 1.0:
            raise InputError(f"ema={self.ema}: between 0 (the student of the step before) and 1 (it stays) is wanted")

    def init(self, key: jax.Array, model: Model) -> Extra:
        if model.params is None:
            raise InputError("SelfDistill starts from a trained model: it is its own teacher, and has no params")
        held = {k: v for k, v in model.params.items() if k not in model.network.frozen}
        return Extra(state={"params": held, "step": jnp.int32(-1)})

    def pack(self, data: Dataset, model: Model, length: int) -> Packed:
        return Packed(self.unpacked(data, model, length))

    def unpacked(self, data: Dataset, model: Model, length: int) -> Columns:
        if not data.has("teacher_prompt"):
            raise InputError("there is no column `teacher_prompt`, the ids that the model reads as its own teacher")
        shown = data.with_column("prompt", data.column("teacher_prompt"))
        both = zip(examples_of(data, model.tokenizer), examples_of(shown, model.tokenizer), strict=True)
        return stack_groups([list(pair) for pair in both], length, model.tokenizer.pad).columns

    def loss(self, ctx: Context, params: Params, batch: dict[str, jax.Array]) -> Loss:
        own, other = ({name: batch[name][:, g] for name in self.fields} for g in (0, 1))
        held = Params(ctx.state["params"], params.extra)
        student_BTV, weight_BT = _of_answer(ctx, params, own)
        sure = {"key": None} if ctx.network is not None and ctx.network.has_dropout else {}
        teacher_BTV, _ = _of_answer(ctx, held, other, **sure)
        each_BT, entropy_BT = _divergence(student_BTV, jax.lax.stop_gradient(teacher_BTV), self, ctx.network)
        of = lambda x_BT: jnp.sum(jnp.where(weight_BT > 0, x_BT, 0.0))
        count = jnp.sum(weight_BT)
        logged = {"divergence": jax.lax.stop_gradient(each_BT), "entropy": entropy_BT}
        metrics = {name: (of(x_BT), count) for name, x_BT in logged.items()}
        first = ctx.step > ctx.state["step"]  # of the micro-batches of a step
        keep = jnp.where(first, self.ema, 1.0)
        moved = jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, ctx.state["params"], params.model)
        state = {"params": jax.lax.stop_gradient(moved), "step": ctx.step}
        return Loss({"divergence": Term(of(each_BT), count)}, metrics, state)


def _of_answer(
    ctx: Context, params: Params, rows: dict[str, jax.Array], **keywords: Any
) -> tuple[jax.Array, jax.Array]:
    """The logits before each token of the answer, moved to the front of their row, and 1 where there is one."""
    inputs, segments, _, weight_BT = targets(rows)
    logits_BTV = whole_vocabulary(ctx.apply(params, inputs, segments, **keywords))

    def moved(logits_BTV, weight_BT):
        T = weight_BT.shape[1]
        place_BT = jnp.argmax(weight_BT > 0, axis=1)[:, None] + jnp.arange(T)
        count_B1 = jnp.sum(weight_BT > 0, axis=1, keepdims=True)
        shown = jnp.take_along_axis(logits_BTV, jnp.minimum(place_BT, T - 1)[..., None], axis=1)
        return shown, (jnp.arange(T) < count_B1).astype(jnp.float32)

    rows = spec("batch")
    return local(moved, (rows, rows), (rows, rows))(logits_BTV, weight_BT)


def the_teacher(objective: Objective, teacher: Any, model: Model) -> Model:
    """Raises InputError where it is none, or has another vocabulary."""
    if not isinstance(teacher, Model) or teacher.params is None:
        name = type(objective).__name__
        raise InputError(f"{name} learns from a teacher that has params: {name}(teacher=rj.load_model(...))")
    if teacher.vocab != model.vocab or not _one_tokenizer(teacher.tokenizer, model.tokenizer):
        raise InputError(
            "teacher and student have tokenizers of their own: their distributions are over other tokens. Let the "
            "teacher write (generate) and train the student on its texts"
        )
    return teacher


def whole_vocabulary(logits_BTV: jax.Array) -> jax.Array:
    """With every device's columns on each."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_auto:
        return logits_BTV
    return jax.reshard(logits_BTV, spec("batch", "time", None))


def _divergence(student_BTV: jax.Array, teacher_BTV: jax.Array, objective: Any, network: Any) -> tuple:
    """(the divergence, the teacher's entropy), token by token, over the columns of the vocabulary alone."""
    V = network.vocab if network is not None else min(student_BTV.shape[2], teacher_BTV.shape[2])
    student_BTV, teacher_BTV = (whole_vocabulary(x)[..., :V].astype(jnp.float32) for x in (student_BTV, teacher_BTV))
    each_BT = jsd_tokens(student_BTV, teacher_BTV, beta=objective.beta, temperature=objective.temperature)
    logp_BTV = jax.nn.log_softmax(teacher_BTV, axis=-1)
    return each_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)


def _check(beta: float, temperature: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise InputError(f"beta={beta}: between 0 (the teacher's KL) and 1 (the student's) is wanted")
    if not temperature > 0:
        raise InputError(f"temperature={temperature}: more than 0 is wanted")


def _one_tokenizer(one: Any, other: Any) -> bool:
    return one is other or tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
