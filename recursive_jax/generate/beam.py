"""Beam search inside one jitted program, and the requests that go through it.

At every step the W best continuations of each row go on; those that end are set aside, ranked by log-probability /
length ** length_penalty (arXiv:1609.08144, sec. 7, with the exponent alone). A row is done when no open continuation,
scored at its present length, beats the worst of the W that were set aside. This is what `transformers` does by default
(early_stopping=False), penalties on log-probabilities included, so that published settings mean the same here.

Shapes: U rows, W beams, N new tokens at most, V vocabulary, C candidates of a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from recursive_jax import mesh as meshes
from recursive_jax.generate import programs
from recursive_jax.generate.decoder import decoder
from recursive_jax.generate.prefill import Prefill, Row
from recursive_jax.generate.request import Request
from recursive_jax.generate.sampling import allowed
from recursive_jax.mesh import TRACES, local, spec
from recursive_jax.models.network import Network

FAR = -1e9  # score of a beam that is none


@struct.dataclass
class Beams:
    """tokens_UWN, logprobs_UWN: new tokens and the model's log-probabilities; score_UW: sum of the (penalised)
    log-probabilities, over length ** length_penalty where they are finished; length_UW; filled_UW: whether there is
    one."""

    tokens_UWN: jax.Array
    logprobs_UWN: jax.Array
    score_UW: jax.Array
    length_UW: jax.Array
    filled_UW: jax.Array

    @classmethod
    def none(cls, U: int, W: int, N: int) -> Beams:
        return cls(
            jnp.zeros((U, W, N), jnp.int32),
            jnp.zeros((U, W, N), jnp.float32),
            jnp.full((U, W), FAR, jnp.float32),
            jnp.zeros((U, W), jnp.int32),
            jnp.zeros((U, W), bool),
        )

    def take(self, index_UW: jax.Array) -> Beams:
        return jax.tree.map(lambda x: _take(x, index_UW), self)


def _take(x: jax.Array, index_UW: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, jnp.expand_dims(index_UW, range(2, x.ndim)), axis=1)


@functools.cache
def beam_program(network: Network, dtype: str, W: int, N: int, ends: int) -> Callable:
    """(params, memory, logits_UV, terms, penalty, banned) -> finished `Beams`, best first. N: new tokens at most; ends:
    ids that may end a row. terms: of the U rows; penalty: the length penalty."""
    step = decoder(network, dtype)
    C = max(2, 1 + ends) * W  # so many candidates that W stay open, whichever end

    def search(params, memory, logits_UV, terms: programs.Terms, penalty, banned):
        TRACES["beam"] += 1
        rows = spec("batch")

        def start(logits_UV, terms):
            U = logits_UV.shape[0]
            open_beams = Beams.none(U, W, N)
            first = open_beams.score_UW.at[:, 0].set(0.0)  # the beams are alike until the first token
            history = jax.tree.map(lambda x: jnp.repeat(x, W, axis=0), terms.history)
            logits_UWV = jnp.repeat(logits_UV[:, None], W, axis=1)
            return logits_UWV, open_beams.replace(score_UW=first), Beams.none(U, W, N), history, jnp.ones((U,), bool)

        def choose(n, logits_UWV, open_beams, finished, history, improving_U, terms, penalty, banned):
            U, _, V = logits_UWV.shape
            logp_UWV = jax.nn.log_softmax(logits_UWV, axis=-1)
            per_beam = lambda x: jnp.repeat(x, W, axis=0)
            z_RV = allowed(
                logp_UWV.reshape(U * W, V),
                jax.tree.map(per_beam, terms.rules),
                history,
                jnp.full((U * W,), n),
                per_beam(terms.stops_BK),
                banned,
            )
            total_UX = (z_RV.reshape(U, W, V) + open_beams.score_UW[:, :, None]).reshape(U, W * V)
            score_UC, at_UC = best(total_UX, C)
            parent_UC, token_UC = at_UC // V, at_UC % V
            own_UC = jnp.take_along_axis(logp_UWV.reshape(U, W * V), at_UC, axis=1)
            grown = open_beams.take(parent_UC)
            put = lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new[:, :, None], n, axis=2)
            grown = Beams(
                put(grown.tokens_UWN, token_UC),
                put(grown.logprobs_UWN, own_UC),
                score_UC,
                grown.length_UW + 1,
                score_UC > FAR,
            )
            stops_UC = jnp.any(token_UC[:, :, None] == terms.stops_BK[:, None], axis=-1)
            ends_UC = stops_UC | (n + 1 >= terms.limit_B)[:, None]
            length = jnp.asarray(n + 1, jnp.float32) ** penalty
            # Set aside: of the W best candidates those that end, while the row can still improve.
            counts_UC = ends_UC & (jnp.arange(C) < W)[None] & improving_U[:, None] & grown.filled_UW
            done = grown.replace(score_UW=jnp.where(counts_UC, score_UC / length, FAR), filled_UW=counts_UC)
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), finished, done)
            finished = both.take(best(both.score_UW, W)[1])
            # Go on: the W best that do not end.
            score_UW, on_UW = best(jnp.where(ends_UC, score_UC + FAR, score_UC), W)
            open_beams = grown.take(on_UW).replace(score_UW=score_UW)
            token_UW = _take(token_UC, on_UW)
            parent_UW = _take(parent_UC, on_UW)
            worst_U = jnp.where(jnp.all(finished.filled_UW, axis=1), jnp.min(finished.score_UW, axis=1), FAR)
            improving_U = improving_U & (score_UW[:, 0] / length > worst_U) & (n + 1 < terms.limit_B)
            reorder = lambda x: _take(x.reshape(U, W, *x.shape[1:]), parent_UW).reshape(x.shape)
            history = jax.tree.map(reorder, history).after(token_UW.reshape(-1), jnp.ones((U * W,), bool))
            return open_beams, finished, history, improving_U, token_UW, parent_UW

        kinds = lambda tree: jax.tree.map(lambda _: rows, tree)
        logits_UWV, open_beams, finished, history, improving_U = local(start, (rows, kinds(terms)), rows)(
            logits_UV, terms
        )
        local_choose = local(
            choose, (spec(), rows, rows, rows, kinds(history), rows, kinds(terms), spec(), spec()), rows
        )

        def body(carry):
            n, branched, logits_UWV, open_beams, finished, history, improving_U = carry
            open_beams, finished, history, improving_U, token_UW, parent_UW = local_choose(
                n, logits_UWV, open_beams, finished, history, improving_U, terms, penalty, banned
            )
            logits_UWV, branched = step.grow(params, branched, token_UW, parent_UW, n)
            return n + 1, branched, _whole(logits_UWV), open_beams, finished, history, improving_U

        carry = (jnp.int32(0), step.branch(memory, W, N), logits_UWV, open_beams, finished, history, improving_U)
        return jax.lax.while_loop(lambda c: (c[0] < N) & jnp.any(c[6]), body, carry)[4]

    return jax.jit(search)


def _whole(logits_UWV: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return logits_UWV if mesh.empty or mesh.are_all_axes_auto else jax.reshard(logits_UWV, spec("batch", "time", None))


def best(values_UX: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row, in order, and where they stand; of equal ones the first.

    On CPU, where XLA sorts the whole row for this, in two stages: the k blocks with the largest maxima hold them all.
    """
    U, X = values_UX.shape
    if meshes.platform() != "cpu" or k * 8 > X:
        return jax.lax.top_k(values_UX, k)
    block = 64 if X >= 64 * 64 else 8
    blocks_UNB = jnp.pad(values_UX, ((0, 0), (0, -X % block)), constant_values=-jnp.inf).reshape(U, -1, block)
    if blocks_UNB.shape[1] <= k:
        return _pick(values_UX, k)
    _, chosen_Uk = _pick(jnp.max(blocks_UNB, axis=-1), k)
    chosen_Uk = jax.lax.sort(chosen_Uk, dimension=1)  # in their order, so that the first of equals stays the first
    near_UX = jnp.take_along_axis(blocks_UNB, chosen_Uk[:, :, None], axis=1).reshape(U, -1)
    found_Uk, at_Uk = _pick(near_UX, k)
    return found_Uk, jnp.take_along_axis(chosen_Uk, at_Uk // block, axis=1) * block + at_Uk % block


def _pick(values_UX: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest by k passes."""

    def one(values_UX, _):
        at_U = jnp.argmax(values_UX, axis=-1)
        found_U = jnp.max(values_UX, axis=-1)
        gone_UX = jnp.arange(values_UX.shape[1])[None] == at_U[:, None]
        return jnp.where(gone_UX, -jnp.inf, values_UX), (found_U, at_U)

    _, (found_kU, at_kU) = jax.lax.scan(one, values_UX, None, length=k)
    return found_kU.T, at_kU.T.astype(jnp.int32)


def beam_search(prefill: Prefill, requests: Iterable[Request | None]) -> Iterator[Row]:
    """The `n_best` best rows of each request, best first; a batch of requests at a time, of like prompt lengths. Rows
    of one batch come in request order; the memory is that of one window of requests, whatever their number."""
    sampling = prefill.sampling
    U = max(1, sampling.batch // sampling.beams)
    U += -U % prefill.divisor
    source = iter(requests)
    with jax.set_mesh(prefill.mesh):
        while True:
            window: list[Row] = []
            for request in source:
                if request is None:
                    break
                row = prefill.open(request)
                if row.status:
                    yield row
                else:
                    window.append(row)
                if len(window) == 4 * U:
                    break
            if not window:
                return
            plans: dict[tuple, list[Row]] = {}
            for row in window:
                plans.setdefault(prefill.plan(row.prompt, row.request.both_ways), []).append(row)
            for plan, members in sorted(plans.items()):
                for begin in range(0, len(members), U):
                    yield from _search(prefill, plan, members[begin : begin + U], U)


def _search(prefill: Prefill, plan: Any, rows: list[Row], U: int) -> Iterator[Row]:
    sampling, W = prefill.sampling, prefill.sampling.beams
    logits_UV, memory = prefill.read(0, plan, [r.prompt for r in rows], U)
    N = _round(max(row.limit for row in rows))
    program = beam_program(prefill.networks[0], prefill.dtype, W, N, prefill.most_stops)
    terms = meshes.put_batch(prefill.mesh, prefill.terms([*rows, *[None] * (U - len(rows))]))
    found = program(prefill.params[0], memory, logits_UV, terms, np.float32(sampling.length_penalty), prefill.banned)
    found = meshes.fetch(found)
    for u, row in enumerate(rows):
        for rank in range(sampling.n_best):
            if not found.filled_UW[u, rank]:
                break
            n = int(found.length_UW[u, rank])
            tokens = found.tokens_UWN[u, rank, :n].tolist()
            made = dataclasses.replace(row, tokens=tokens)
            made.logprobs = found.logprobs_UWN[u, rank, :n].tolist()
            made.status = "ok" if tokens[-1] in row.stops else "length"
            made.text, made.rank = row.text_of(tokens), rank
            made.score = float(found.score_UW[u, rank])
            made.last = rank + 1 == sampling.n_best or not found.filled_UW[u, rank + 1]
            yield made


def _round(n: int) -> int:
    """Lengths that are compiled: multiples of 16."""
    return -(-n // 16) * 16
