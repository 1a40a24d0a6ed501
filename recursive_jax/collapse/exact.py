"""Against the embedded language: exact KL to the truth, split into syntax, semantics, facts and distribution.

At a true prefix with true distribution p and model distribution q, and nested supports F in Sem in Syn,

    KL(p || q) = -ln q(Syn)  -ln q(Sem | Syn)  -ln q(F | Sem)  + KL(p || q restricted to F)

because p lives on F. Averaged over true prefixes this is exact up to the choice of prefixes: no sampling of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.collapse.likelihood import rows_per_batch, rows_to_batch
from recursive_jax.data.language import FACT_ERROR, SEMANTIC_ERROR, SYNTAX_ERROR, UNJUDGED, Language
from recursive_jax.models.model import Architecture, Model

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


@functools.cache
def _program(architecture: Architecture):
    def parts(params, tables, tokens, segments, states):
        meshes.TRACES["exact_kl"] += 1
        logits_BTV = architecture.apply(params, tokens[:, :-1], segments[:, :-1])
        logits_BTV = jax.reshard(logits_BTV, meshes.spec("batch", None, None))[..., : architecture.vocab]
        known = states >= 0
        row = lambda table: table.at[jnp.maximum(states, 0)].get(out_sharding=meshes.spec("batch", None, None))
        parts_BT4 = kl_parts(logits_BTV.astype(jnp.float32), row(tables["p"]), row(tables["syn"]), row(tables["sem"]))
        return jnp.where(known[..., None], parts_BT4, 0.0)

    return jax.jit(parts)


def exact_kl(model: Model, language: Language, rows: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean KL per token over the prefixes of true rows (nats): `kl_total` and its four parts, with the standard error
    of the total over rows. Rows are cut at the model's context."""
    tokens, segments = rows_to_batch(rows, model)
    states, _ = language.parse(tokens[:, 1:] * (segments[:, 1:] > 0))
    states = np.where(segments[:, 1:] > 0, states, -1).astype(np.int32)
    tables = {"p": language.P_AV.astype(np.float32), "syn": language.syn_AV, "sem": language.sem_AV}
    pad = architecture_pad(model, language)
    tables = {k: np.pad(v, ((0, 0), (0, pad))) for k, v in tables.items()}
    program, sums = _program(model.architecture), []
    B = rows_per_batch(model, len(rows), tokens.shape[1] - 1)
    with jax.set_mesh(model.mesh):
        tables = meshes.replicate(model.mesh, tables)
        for begin in range(0, len(rows), B):
            fill = max(0, begin + B - len(rows))
            chunk = [
                np.pad(x[begin : begin + B], ((0, fill), (0, 0)), constant_values=c)
                for x, c in ((tokens, 0), (segments, 0), (states, -1))
            ]
            parts_BT4 = meshes.fetch(program(model.params, tables, *meshes.put_batch(model.mesh, tuple(chunk))))
            sums.append(np.asarray(parts_BT4, np.float64).sum(1)[: len(rows) - begin])
    sums_N4 = np.concatenate(sums)
    counts_N = (states >= 0).sum(1)
    total = counts_N.sum()
    means = sums_N4.sum(0) / total
    residual = sums_N4.sum(1) - means.sum() * counts_N
    return {
        "kl_total": float(means.sum()),
        **dict(zip(PARTS, map(float, means), strict=True)),
        "kl_total_stderr": float(np.sqrt((residual**2).sum()) / total),
    }


def architecture_pad(model: Model, language: Language) -> int:
    if model.vocab < language.vocab:
        raise ValueError(f"the model has {model.vocab} ids, the language {language.vocab} words")
    return model.vocab - language.vocab


def validity(language: Language, rows: Sequence[np.ndarray], shape: tuple[int, int] = (0, 0)) -> dict[str, float]:
    """Sentence-level validity of generated rows that begin a document, with re-synchronisation at full stops.

    shape: (rows, tokens) to pad to at least, so that every round runs the same program.

    `valid_syn`: sentences with the right form. `valid_sem_given_syn`: of those, right in number, type and
    attribute. `true_given_sem`: of those, with no false fact. `valid`: all three. A sentence cut by the token limit
    is not judged.
    """
    if not rows:
        return {"valid_syn": 0.0, "valid_sem_given_syn": 0.0, "true_given_sem": 0.0, "valid": 0.0, "sentences": 0.0}
    tokens = np.zeros((max(len(rows), shape[0]), max(1, *map(len, rows), shape[1])), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = np.where(row < language.vocab, row, language.dot)
    _, levels = language.parse(tokens)
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
        "valid": share(true, np.ones_like(syn)),
        "sentences": float(len(judged)),
    }
