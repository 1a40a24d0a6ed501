"""Against the embedded language: exact KL to the truth, split into syntax, semantics, facts and distribution.

At a true prefix with true distribution p and model distribution q, and nested supports F in Sem in Syn,

    KL(p || q) = -ln q(Syn)  -ln q(Sem | Syn)  -ln q(F | Sem)  + KL(p || q restricted to F)

because p lives on F. Averaged over true prefixes this is exact up to the choice of prefixes: no sampling of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.collapse.intervals import proportion
from recursive_jax.collapse.likelihood import cross_entropy, rows_per_batch, rows_to_batch
from recursive_jax.collapse.tails import deciles
from recursive_jax.config import LanguageConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.language import FACT_ERROR, SEMANTIC_ERROR, SYNTAX_ERROR, UNJUDGED, Language
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network

PARTS = ("kl_syn", "kl_sem", "kl_fact", "kl_dist")


def kl_parts(logits: jax.Array, p: jax.Array, syn: jax.Array, sem: jax.Array) -> jax.Array:
    """The four parts (last axis: syntactic, semantic, epistemic, distributional) for logits `[..., V]`, the truth p and
    the supports syn and sem (boolean, same shape). Their sum is KL(p || softmax(logits)), nats."""
    true = p > 0

    def mass(support):
        return jax.nn.logsumexp(jnp.where(support, logits, -jnp.inf), axis=-1)

    every, in_syn, in_sem, in_true = jax.nn.logsumexp(logits, axis=-1), mass(syn), mass(sem), mass(true)
    log_p = jnp.log(jnp.where(true, p, 1.0))
    restricted = jnp.sum(jnp.where(true, p * (log_p - logits), 0.0), axis=-1) + in_true
    return jnp.stack([every - in_syn, in_syn - in_sem, in_sem - in_true, restricted], axis=-1)


SURE = 0.9


@functools.cache
def _program(network: Network):
    """-> `[B, T, 4 + 10 + 3]`: the parts, the last of them by decile of the truth, then the gap between the model's
    confidence and the truth's probability of what it would say, whether it is sure of what cannot come, and the model's
    entropy."""

    def parts(params, tables, tokens, segments, states):
        meshes.TRACES["exact_kl"] += 1
        logits_BTV = network.apply(params, tokens[:, :-1], segments[:, :-1])
        logits_BTV = jax.reshard(logits_BTV, meshes.spec("batch", "time", None))[..., : network.vocab]
        known_BT = states >= 0
        row = lambda table: table.at[jnp.maximum(states, 0)].get(out_sharding=meshes.spec("batch", "time", None))
        p_BTV, logits_BTV = row(tables["p"]), logits_BTV.astype(jnp.float32)
        parts_BT4 = kl_parts(logits_BTV, p_BTV, row(tables["syn"]), row(tables["sem"]))
        true_BTV = p_BTV > 0
        inside_BT1 = jax.nn.logsumexp(jnp.where(true_BTV, logits_BTV, -jnp.inf), axis=-1, keepdims=True)
        ratio_BTV = jnp.log(jnp.where(true_BTV, p_BTV, 1.0)) - (logits_BTV - inside_BT1)
        terms_BTV = jnp.where(true_BTV, p_BTV * ratio_BTV, 0.0)
        deciles_BTN = jnp.einsum("btv,vn->btn", terms_BTV, tables["decile"], precision=jax.lax.Precision.HIGHEST)
        logq_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
        says_BTV = jnp.arange(logits_BTV.shape[-1]) == jnp.argmax(logits_BTV, axis=-1)[..., None]
        sure_BT, true_BT = jnp.exp(jnp.max(logq_BTV, axis=-1)), jnp.sum(jnp.where(says_BTV, p_BTV, 0.0), axis=-1)
        entropy_BT = -jnp.sum(jnp.exp(logq_BTV) * logq_BTV, axis=-1)
        rest_BT3 = jnp.stack([jnp.abs(sure_BT - true_BT), (sure_BT > SURE) & (true_BT == 0), entropy_BT], axis=-1)
        return jnp.where(known_BT[..., None], jnp.concatenate([parts_BT4, deciles_BTN, rest_BT3], axis=-1), 0.0)

    return jax.jit(parts)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A model's answers at the prefixes of N true rows: `[N, T, 4 + 10 + 3]` as `_program` gives them (float64), 0
    where a row has ended; the rows' tokens (start token first) and the states of the grammar, -1 there."""

    found_NTX: np.ndarray
    tokens: np.ndarray
    states: np.ndarray

    @functools.cached_property
    def counts_N(self) -> np.ndarray:
        return (self.states >= 0).sum(1)

    @functools.cached_property
    def sums_NX(self) -> np.ndarray:
        return self.found_NTX.sum(1)

    def stderr(self, sums_N: np.ndarray) -> float:
        """Of a mean per token, rows independent (delta method)."""
        residual = sums_N - sums_N.sum() / self.counts_N.sum() * self.counts_N
        return float(np.sqrt((residual**2).sum()) / self.counts_N.sum())


def judge(model: Model, language: Language, rows: Sequence[np.ndarray]) -> Judged:
    """One pass of the model over true rows, cut at its context."""
    tokens, segments = rows_to_batch(rows, model)
    states, _ = language.parse(tokens[:, 1:] * (segments[:, 1:] > 0))
    states = np.where(segments[:, 1:] > 0, states, -1).astype(np.int32)
    groups = deciles(language.marginals_V)
    decile_VN = np.zeros((language.vocab, len(groups)), np.float32)
    for n, ids in enumerate(groups):
        decile_VN[ids, n] = 1.0
    tables = {"p": language.P_AV.astype(np.float32), "syn": language.syn_AV, "sem": language.sem_AV}
    pad = padding_id(model, language)
    tables = {k: np.pad(v, ((0, 0), (0, pad))) for k, v in tables.items()}
    tables["decile"] = np.pad(decile_VN, ((0, pad), (0, 0)))
    program, found = _program(model.network), []
    B = rows_per_batch(model, len(rows), tokens.shape[1] - 1)
    with jax.set_mesh(model.mesh):
        tables = meshes.put_replicated(model.mesh, tables)
        for begin in range(0, len(rows), B):
            fill = max(0, begin + B - len(rows))
            chunk = [
                np.pad(x[begin : begin + B], ((0, fill), (0, 0)), constant_values=c)
                for x, c in ((tokens, 0), (segments, 0), (states, -1))
            ]
            out = meshes.fetch(program(model.params, tables, *meshes.put_batch(model.mesh, tuple(chunk))))
            found.append(np.asarray(out, np.float64)[: len(rows) - begin])
    return Judged(np.concatenate(found), tokens, states)


def exact_kl(
    model: Model, language: Language, rows: Sequence[np.ndarray], base: Judged | None = None
) -> dict[str, Any]:
    """Means per token over the prefixes of true rows (nats): `kl_total` and its four parts, each with its standard
    error over rows (`*_stderr`). base: another model's answers to the same rows; then `*_change_stderr` is the error of
    the difference to it, row by row, which is much smaller.

    `kl_dist_deciles`: the distributional part by frequency decile of the truth's tokens (their sum is `kl_dist`; one
    may be negative). `calibration_error`: mean gap between the model's largest probability and the truth's probability
    of the same token: no binning. `confident_wrong`: share of prefixes where the model gives more than 0.9 to a token
    that cannot come. `knowledge`: mean probability of the right value of a fact, and `knowledge_deciles` by how often
    its entity is spoken of (None where no row has one). `anchor_entropy`: of the model's next token."""
    judged = judge(model, language, rows)
    means_X = judged.sums_NX.sum(0) / judged.counts_N.sum()
    columns = {"kl_total": slice(0, 4), **{part: slice(i, i + 1) for i, part in enumerate(PARTS)}}
    columns["anchor_entropy"] = slice(-1, None)
    found: dict[str, Any] = {}
    for name, column in columns.items():
        sums_N = judged.sums_NX[:, column].sum(1)
        found[name] = float(means_X[column].sum())
        found[f"{name}_stderr"] = judged.stderr(sums_N)
        if base is not None:
            found[f"{name}_change_stderr"] = judged.stderr(sums_N - base.sums_NX[:, column].sum(1))
    return {
        **found,
        "kl_dist_deciles": means_X[4:-3].round(9).tolist(),
        "calibration_error": float(means_X[-3]),
        "confident_wrong": float(means_X[-2]),
        **_knowledge(language, judged.tokens, judged.states, judged.found_NTX[..., :4].sum(-1)),
    }


def bound_kl(
    language: Language, rows: Sequence[np.ndarray], losses: Sequence[np.ndarray], base: Sequence[np.ndarray]
) -> dict[str, float]:
    """Of a model that bounds the likelihood of whole rows and says nothing of a next token: `kl_total`, an upper bound
    of the KL per token from the truth, nats, with its standard errors as of `exact_kl`. It has no parts. losses: of the
    model, base: of the one that its change is measured from, row by row (nats, cut at the context)."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = row
    states, _ = language.parse(tokens)
    truth = [language.P_AV[states[n, : len(x)], tokens[n, : len(x)]] for n, x in enumerate(losses)]
    excess = [np.asarray(x, np.float64) + np.log(p) for x, p in zip(losses, truth, strict=True)]
    kl, stderr = cross_entropy(excess)
    change = cross_entropy([np.asarray(a, np.float64) - b for a, b in zip(losses, base, strict=True)])[1]
    return {"kl_total": kl, "kl_total_stderr": stderr, "kl_total_change_stderr": change}


def _knowledge(language: Language, tokens: np.ndarray, states: np.ndarray, kl_NT: np.ndarray) -> dict[str, Any]:
    """Before a fact's value the truth is certain, so KL there is -log q(value). The entity are the two tokens before
    `is`."""
    values = [a for a, state in enumerate(language.states) if state[0] == "VALUE"]
    n, t = np.nonzero(np.isin(states, values))
    n, t = n[t >= 2], t[t >= 2]
    if not len(n):
        return {}
    ranked = sorted(language.entities, key=lambda e: -language.entities[e])
    rank = {entity: i for i, entity in enumerate(ranked)}
    place = np.array([rank[e] for e in zip(tokens[n, t - 2].tolist(), tokens[n, t - 1].tolist(), strict=True)])
    group = place * 10 // len(ranked)
    q = np.exp(-kl_NT[n, t])
    by_decile = [q[group == d] for d in range(10)]
    return {
        "knowledge": float(q.mean()),
        "knowledge_stderr": float(q.std() / np.sqrt(len(q))),
        "knowledge_deciles": [round(float(x.mean()), 6) if len(x) else None for x in by_decile],
    }


def oracle_kl(language: Language, rows: Sequence[np.ndarray]) -> dict[str, float]:
    """What sampling alone loses: `kl_oracle`, the KL per token from the truth to the exact fit of the grammar to the
    rows, half a count added to every token the truth allows (else one lost word would make it infinite);
    `kl_oracle_null`, the first order of what rows of the truth itself give, d / 2N for d free parameters (each state's,
    at its own count)."""
    fit = language.fitted(rows, smoothing=0.5)
    tokens = sum(map(len, rows))
    null = language.free_parameters / (2 * tokens)
    return {"kl_oracle": language.kl_to(fit) / language.expected_length, "kl_oracle_null": null}


def padding_id(model: Model, language: Language) -> int:
    if model.vocab < language.vocab:
        raise ValueError(f"the model has {model.vocab} ids, the language {language.vocab} words")
    return model.vocab - language.vocab


def right_rows(language: Language, rows: Sequence[np.ndarray], level: str = "facts") -> np.ndarray:
    """Whether no token of a row that begins a document is wrong: bool `[N]`. level: `syntax` asks for the form alone,
    `semantics` for agreement and selection too, `facts` for everything. A row cut in a sentence is judged as far as it
    goes."""
    if not rows:
        return np.zeros(0, bool)
    wrong = {"syntax": SYNTAX_ERROR, "semantics": SEMANTIC_ERROR, "facts": FACT_ERROR}[level]
    levels = _levels(language, rows, tuple(1 << (n - 1).bit_length() for n in (len(rows), max(map(len, rows)))))
    return np.array(
        [not np.any((x[: len(r)] >= wrong) & (x[: len(r)] != UNJUDGED)) for x, r in zip(levels, rows, strict=False)]
    )


@dataclasses.dataclass(frozen=True)
class GrammarVerifier:
    """For `Rule`: whether the grammar of the embedded language of a config calls a row right, at a level (see
    `right_rows`)."""

    language: LanguageConfig
    level: str = "facts"

    def __call__(self, data: Dataset) -> np.ndarray:
        return right_rows(Language(self.language), data.tokens(), self.level)


def _levels(language: Language, rows: Sequence[np.ndarray], shape: tuple[int, int] = (0, 0)) -> np.ndarray:
    """The level of every token, `[N, T]`; ids beyond the language stand for a full stop."""
    tokens = np.zeros((max(len(rows), shape[0]), max(1, *map(len, rows), shape[1])), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = np.where(row < language.vocab, row, language.dot)
    return language.parse(tokens)[1]


def validity(language: Language, rows: Sequence[np.ndarray], shape: tuple[int, int] = (0, 0)) -> dict[str, float]:
    """Sentence-level validity of generated rows that begin a document, with re-synchronisation at full stops.

    shape: (rows, tokens) to pad to at least, so that every round runs the same program.

    `valid_syn`: sentences with the right form. `valid_sem_given_syn`: of those, right in number, type and
    attribute. `true_given_sem`: of those, with no false fact. `valid`: all three. A sentence cut by the token limit
    is not judged.
    """
    if not rows:
        return {"valid_syn": 0.0, "valid_sem_given_syn": 0.0, "true_given_sem": 0.0, "valid": 0.0, "sentences": 0.0}
    levels = _levels(language, rows, shape)
    worst: list[int] = []
    for n, row in enumerate(rows):
        current, length = 0, 0
        for token, level in zip(row, levels[n], strict=False):
            current = max(current, int(level) if level != UNJUDGED else 0)
            length += 1
            if token == language.dot or (current == SYNTAX_ERROR and token == 2):
                worst.append(current)
                current = length = 0
    judged = np.array(worst)
    syn = judged < SYNTAX_ERROR
    sem = judged < SEMANTIC_ERROR
    true = judged < FACT_ERROR
    share = lambda a, b: float(a.sum() / b.sum()) if b.sum() else 0.0
    return {
        "valid_syn": share(syn, np.ones_like(syn)),
        "valid_sem_given_syn": share(sem, syn),
        "true_given_sem": share(true, sem),
        **(proportion("valid", int(true.sum()), len(true)) if len(true) else {"valid": 0.0}),
        "sentences": float(len(judged)),
    }
