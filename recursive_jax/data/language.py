"""The embedded language: a grammar whose next-token probabilities are known exactly.

An s-grammar (Greibach form, one production per nonterminal and token): every production emits one token and
pushes a few nonterminals, so the stack, and with it the true distribution of the next token, is a function of
the prefix. Nonterminals carry features (number, noun type, attribute, entity), which gives agreement, selection
and a table of facts about entities with a long tail. Sentences:

    Det[number] Noun[type, number] (that Verb ...)* Verb[type, number, valency] (Det Noun[selected type]) .
    the ATTRIBUTE of FIRST LAST is VALUE .

Three nested supports split every error of a model: F (true) inside Sem (number, type and attribute right) inside
Syn (the automaton with the features erased). Letters in shapes: A nonterminals, V tokens, B rows, T positions.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.config import LanguageConfig
from recursive_jax.mesh import TRACES, random_key

PAD, BOS, EOS = 0, 1, 2
NUMBERS = ("sg", "pl")
RHS = 3  # the longest right-hand side
TRUE, FACT_ERROR, SEMANTIC_ERROR, SYNTAX_ERROR, UNJUDGED = range(5)
_ATTRIBUTE_WORDS = ("home", "trade", "colour", "song", "rival", "river", "crop", "metal")


def _zipf(n: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


class _Words:
    """Pronounceable words, each used once."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.used = rng, set()

    def __call__(self, count: int, suffix: str = "") -> list[str]:
        words: list[str] = []
        while len(words) < count:
            n = 2 if len(self.used) < 2000 else 3
            word = (
                "".join(self.rng.choice(list("bdfgklmnprstvz")) + self.rng.choice(list("aeiou")) for _ in range(n))
                + suffix
            )
            if word not in self.used:
                self.used.add(word)
                words.append(word)
        return words


@dataclasses.dataclass(frozen=True)
class _Production:
    state: tuple
    word: str
    weight: float
    push: tuple[tuple, ...]


def _productions(c: LanguageConfig) -> Iterator[_Production]:
    """The whole grammar. States are tuples whose first entry is the name with the features erased."""
    rng = np.random.default_rng([c.seed, 0xA11CE])
    words = _Words(rng)
    stems = [words(c.nouns) for _ in range(c.types)]
    nouns = {(t, n): [w + ("s" if n == "pl" else "") for w in stems[t]] for t in range(c.types) for n in NUMBERS}
    lemmas = {(t, v): words(c.verbs, "r") for t in range(c.types) for v in ("intransitive", "transitive")}
    selected = {t: rng.integers(0, c.types, c.verbs) for t in range(c.types)}
    firsts, lasts = words(c.first_names, "n"), words(c.last_names, "x")
    attributes = [*_ATTRIBUTE_WORDS, *words(max(0, c.attributes - len(_ATTRIBUTE_WORDS)))][: c.attributes]
    values = [words(c.values, "l") for _ in attributes]
    exists = rng.random((c.first_names, c.last_names)) < 0.5  # half of the names belong to somebody
    exists[np.arange(c.first_names), rng.integers(0, c.last_names, c.first_names)] = True
    value_of = rng.integers(0, c.values, (c.attributes, c.first_names, c.last_names))
    p_noun, p_verb = _zipf(c.nouns, c.word_exponent), _zipf(c.verbs, c.word_exponent)
    p_first, p_last = _zipf(c.first_names, c.entity_exponent), _zipf(c.last_names, c.entity_exponent)

    the = c.fact_share + (1 - c.fact_share) / 2
    opening = [
        ("the", the, (("THE",),)),
        ("a", (1 - the) / 2, (("NOUN", "sg"),)),
        ("some", (1 - the) / 2, (("NOUN", "pl"),)),
    ]
    for word, weight, push in opening:
        yield _Production(("START",), word, weight, push)
        yield _Production(("NEXT",), word, weight * (1 - c.stop), push)
    yield _Production(("NEXT",), "<eos>", c.stop, ())
    yield _Production(("DOT",), ".", 1.0, (("NEXT",),))

    for (t, n), forms in nouns.items():
        for word, p in zip(forms, p_noun, strict=True):
            after = (("AFTER0", t, n), ("DOT",))
            yield _Production(("NOUN", n), word, p / c.types, after)
            yield _Production(("THE",), word, (1 - c.fact_share / the) * p / c.types / 2, after)
            yield _Production(("OBJECT", t, n), word, p, ())
            yield _Production(("OBJECT_THE", t), word, p / 2, ())
    for t in range(c.types):
        yield _Production(("DET", t), "the", 0.5, (("OBJECT_THE", t),))
        yield _Production(("DET", t), "a", 0.25, (("OBJECT", t, "sg"),))
        yield _Production(("DET", t), "some", 0.25, (("OBJECT", t, "pl"),))
        for n in NUMBERS:
            for d in range(c.depth + 1):
                more = 0.25 if d < c.depth else 0.0
                if more:
                    push = (("RELATIVE", t, n), (f"AFTER{d + 1}", t, n))
                    yield _Production((f"AFTER{d}", t, n), "that", more, push)
                yield from _verbs((f"AFTER{d}", t, n), 1 - more, lemmas, selected, p_verb)
            yield from _verbs(("RELATIVE", t, n), 1.0, lemmas, selected, p_verb)

    yield _Production(("OF",), "of", 1.0, ())
    yield _Production(("IS",), "is", 1.0, ())
    for a, attribute in enumerate(attributes):
        yield _Production(("THE",), attribute, c.fact_share / the / c.attributes, (("OF",), ("FIRST", a), ("DOT",)))
        for v, value in enumerate(values[a]):
            yield _Production(("VALUE", a, v), value, 1.0, ())
        for f, first in enumerate(firsts):
            yield _Production(("FIRST", a), first, p_first[f], (("LAST", a, f),))
            for l, last in enumerate(lasts):
                if exists[f, l]:
                    fact = ("VALUE", a, int(value_of[a, f, l]))
                    yield _Production(("LAST", a, f), last, p_last[l], (("IS",), fact))


def _verbs(state, weight, lemmas, selected, p_verb) -> Iterator[_Production]:
    _, t, n = state
    ending = "es" if n == "sg" else "e"
    for word, p in zip(lemmas[t, "intransitive"], p_verb, strict=True):
        yield _Production(state, word + ending, weight * p / 2, ())
    for word, p, chosen in zip(lemmas[t, "transitive"], p_verb, selected[t], strict=True):
        yield _Production(state, word + ending, weight * p / 2, (("DET", int(chosen)),))


class Language:
    """The grammar as tables. Equal configs give equal languages; building takes well under a second.

    words: token id -> word. P_AV: float64 true next-token probabilities. push_AVR: int32 nonterminals pushed
    (-1: none), filled for every token some state with the same erased name accepts. level_AV: TRUE, FACT_ERROR,
    SEMANTIC_ERROR or SYNTAX_ERROR.
    """

    def __init__(self, config: LanguageConfig | None = None):
        self.config = config or LanguageConfig()
        productions = list(_productions(self.config))
        self.words = ["<pad>", "<bos>", "<eos>"]
        self.words += list(dict.fromkeys(p.word for p in productions if p.word != "<eos>"))
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.states = list(dict.fromkeys(p.state for p in productions))
        index = {state: a for a, state in enumerate(self.states)}
        A, V = len(self.states), len(self.words)
        self.P_AV = np.zeros((A, V))
        self.push_AVR = np.full((A, V, RHS), -1, np.int32)
        for p in productions:
            a, v = index[p.state], self.ids[p.word]
            self.P_AV[a, v] += p.weight
            self.push_AVR[a, v, : len(p.push)] = [index[s] for s in p.push]
        self.P_AV /= self.P_AV.sum(1, keepdims=True)
        self.start, self.next_state = index["START",], index["NEXT",]
        self.dot = self.ids["."]
        self._fill_supports()

    def _fill_supports(self) -> None:
        """Sem and Syn of each state, and how the automaton goes on after a token that is wrong but in Syn."""
        true_AV = self.P_AV > 0
        names = [state[0] for state in self.states]
        last_names = true_AV[[name == "LAST" for name in names]].any(0)
        self.sem_AV, self.syn_AV = true_AV.copy(), np.zeros_like(true_AV)
        for a, state in enumerate(self.states):
            peers = [b for b, name in enumerate(names) if name == state[0]]
            self.syn_AV[a] = true_AV[peers].any(0)
            if state[0] == "VALUE":
                self.sem_AV[a] = true_AV[[b for b in peers if self.states[b][1] == state[1]]].any(0)
            if state[0] == "LAST":
                self.sem_AV[a] = last_names
            best_V = np.asarray(peers)[self.P_AV[peers].argmax(0)]
            for v in np.flatnonzero(self.syn_AV[a] & ~true_AV[a]):
                self.push_AVR[a, v] = self.push_AVR[best_V[v], v]
        self.level_AV = np.where(
            true_AV, TRUE, np.where(self.sem_AV, FACT_ERROR, np.where(self.syn_AV, SEMANTIC_ERROR, SYNTAX_ERROR))
        ).astype(np.int32)
        self.depth = 8 + self.config.depth  # stack slots; the deepest derivation uses five plus the nesting

    @property
    def vocab(self) -> int:
        return len(self.words)

    # Closed forms (float64, nats).

    @functools.cached_property
    def visits_A(self) -> np.ndarray:
        """Expected visits of each nonterminal in one document: (I - M^T)^-1 e_start."""
        A = len(self.states)
        children = np.zeros((A, A))
        for a in range(A):
            for v in np.flatnonzero(self.P_AV[a]):
                for b in self.push_AVR[a, v]:
                    if b >= 0:
                        children[a, b] += self.P_AV[a, v]
        unit = np.zeros(A)
        unit[self.start] = 1.0
        return np.linalg.solve(np.eye(A) - children.T, unit)

    @property
    def expected_length(self) -> float:
        """Tokens per document, the end token included, the start token not."""
        return float(self.visits_A.sum())

    @property
    def entropy(self) -> float:
        """Entropy of a document."""
        logs = np.log(np.where(self.P_AV > 0, self.P_AV, 1.0))
        return float(self.visits_A @ -(self.P_AV * logs).sum(1))

    @property
    def entropy_rate(self) -> float:
        """Entropy per token: the cross-entropy no model can beat."""
        return self.entropy / self.expected_length

    @property
    def marginals_V(self) -> np.ndarray:
        """Expected share of each token."""
        return self.visits_A @ self.P_AV / self.expected_length

    @functools.cached_property
    def entities(self) -> dict[tuple[int, int], float]:
        """(first name, last name) as ids -> how often a fact is about them; sums to 1."""
        index = {state: a for a, state in enumerate(self.states)}
        first = index["FIRST", 0]
        found = {}
        for f in np.flatnonzero(self.P_AV[first]):
            last = self.push_AVR[first, f, 0]
            for l in np.flatnonzero(self.P_AV[last]):
                found[int(f), int(l)] = float(self.P_AV[first, f] * self.P_AV[last, l])
        return found

    def fitted(self, rows: Sequence[np.ndarray], smoothing: float = 0.0) -> Language:
        """The exact fit of the grammar to rows of tokens (each from the start of a document): the same states and
        tokens, the probabilities as the rows have them. It is the student that only sampling can hurt.

        smoothing: added to the count of every token the truth allows. A state that no row visits keeps the truth's
        probabilities; tokens that the grammar does not allow are not counted.
        """
        counts_AV, B = np.zeros_like(self.P_AV), 1024  # one shape for all but the last rows
        for begin in range(0, len(rows), B):
            some = rows[begin : begin + B]
            tokens = np.zeros((B, max(64, 1 << (max(map(len, some)) - 1).bit_length())), np.int32)
            for n, row in enumerate(some):
                tokens[n, : len(row)] = np.where(np.asarray(row) < self.vocab, row, self.dot)
            states, levels = self.parse(tokens)
            true = levels == TRUE
            np.add.at(counts_AV, (states[true], tokens[true]), 1)
        counts_AV += smoothing * (self.P_AV > 0)
        total_A1 = counts_AV.sum(1, keepdims=True)
        other = copy.copy(self)
        for cached in ("visits_A", "entities", "tables"):
            other.__dict__.pop(cached, None)
        other.P_AV = np.where(total_A1 > 0, counts_AV / np.maximum(total_A1, 1e-300), self.P_AV)
        return other

    @property
    def free_parameters(self) -> int:
        """Of the grammar's probabilities: entries less one for each state."""
        return int(((self.P_AV > 0).sum(1) - 1).sum())

    def kl_to(self, other: Language) -> float:
        """KL per document to a grammar over the same states (an exact fit, or other weights)."""
        if self.states != other.states or self.words != other.words:
            raise ValueError("the two languages have different states or words")
        p, q = self.P_AV, other.P_AV
        with np.errstate(divide="ignore", invalid="ignore"):
            rows_A = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(1)
        return float(self.visits_A @ rows_A)

    # Jitted programs.

    @functools.cached_property
    def tables(self) -> dict[str, np.ndarray]:
        """What the device programs read."""
        cdf_AV = np.cumsum(self.P_AV, axis=1)
        last_A = cdf_AV.shape[1] - 1 - (self.P_AV[:, ::-1] > 0).argmax(1)
        for a, last in enumerate(last_A):
            cdf_AV[a, last:] = 2.0  # float32 rounding must never select past the support
        return {"cdf": cdf_AV.astype(np.float32), "push": self.push_AVR, "level": self.level_AV}

    def sample(self, seed: int, first: int, count: int, longest: int = 512) -> list[np.ndarray]:
        """Documents `first .. first + count` of the stream `seed`: int32 tokens, end token included.

        A document depends on (language, seed, its index) only. One longer than `longest` would be cut; at the
        default sizes the probability is below 1e-15.
        """
        documents: list[np.ndarray] = []
        batch = 2048  # one shape, so the sampler compiles once
        for begin in range(0, count, batch):
            tokens_BT, lengths_B = jax.device_get(
                _sample(self.tables, random_key(seed), np.int32(first + begin), self.start, batch, longest, self.depth)
            )
            for i in range(min(batch, count - begin)):
                documents.append(tokens_BT[i, : lengths_B[i]])
        return documents

    def parse(self, tokens_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs the automaton over rows of tokens (no start token; anything after the end is ignored).

        Returns int32 `state_BT` (the nonterminal on top before each token; -1 when there is none) and
        `level_BT`. After a wrong token that keeps the form, the automaton goes on as if it had been right; after
        one that breaks it, it skips to the next full stop (those tokens are UNJUDGED).
        """
        state_BT, level_BT = _parse(
            self.tables, jnp.asarray(tokens_BT), self.start, self.next_state, self.dot, self.depth
        )
        return np.asarray(state_BT), np.asarray(level_BT)

    def text(self, tokens: np.ndarray) -> str:
        return " ".join(self.words[int(t)] for t in tokens)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _sample(tables, key, first, start, B, T, depth):
    TRACES["language_sample"] += 1
    V = tables["cdf"].shape[1]
    cdf = tables["cdf"].reshape(-1)
    keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(B))
    stack = jnp.zeros((B, depth), jnp.int32).at[:, 0].set(start)

    def body(carry):
        t, stack, height, out = carry
        alive = height > 0
        top = jnp.take_along_axis(stack, jnp.maximum(height - 1, 0)[:, None], axis=1)[:, 0]
        u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t)))(keys_B)
        low, high = jnp.zeros(B, jnp.int32), jnp.full(B, V - 1, jnp.int32)
        for _ in range(int(np.ceil(np.log2(V)))):
            middle = (low + high) // 2
            right = cdf[top * V + middle] <= u
            low, high = jnp.where(right, middle + 1, low), jnp.where(right, high, middle)
        token = jnp.where(alive, low, PAD)
        stack, height = _push(
            stack, jnp.where(alive, height - 1, 0), jnp.where(alive[:, None], tables["push"][top, low], -1)
        )
        return t + 1, stack, height, out.at[:, t].set(token)

    init = (jnp.int32(0), stack, jnp.ones(B, jnp.int32), jnp.zeros((B, T), jnp.int32))
    _, _, _, out = jax.lax.while_loop(lambda c: (c[0] < T) & jnp.any(c[2] > 0), body, init)
    return out, jnp.sum(out != PAD, axis=1)


def _push(stack_BD, height_B, push_BR):
    """Pushes right-hand sides so that their first entry ends on top."""
    for r in reversed(range(RHS)):
        new_B = push_BR[:, r]
        here_BD = (jnp.arange(stack_BD.shape[1])[None] == height_B[:, None]) & (new_B >= 0)[:, None]
        stack_BD = jnp.where(here_BD, new_B[:, None], stack_BD)
        height_B = height_B + (new_B >= 0)
    return stack_BD, height_B


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _parse(tables, tokens_BT, start, next_state, dot, depth):
    TRACES["language_parse"] += 1
    B = tokens_BT.shape[0]
    stack = jnp.zeros((B, depth), jnp.int32).at[:, 0].set(start)

    def step(carry, token_B):
        stack, height, lost = carry  # lost: skipping to the next full stop
        running = (height > 0) & (token_B != PAD)
        top = jnp.take_along_axis(stack, jnp.maximum(height - 1, 0)[:, None], axis=1)[:, 0]
        judged = running & ~lost
        level = jnp.where(judged, tables["level"][top, token_B], UNJUDGED)
        broken = judged & (level == SYNTAX_ERROR)
        going = judged & ~broken
        push = jnp.where(going[:, None], tables["push"][top, token_B], -1)
        stack, new_height = _push(stack, jnp.where(going, height - 1, height), push)
        lost = (lost | broken) & running
        found = lost & (token_B == dot)
        stack = jnp.where(found[:, None], jnp.zeros_like(stack).at[:, 0].set(next_state), stack)
        height = jnp.where(found, 1, jnp.where(running & (token_B == EOS), 0, new_height))
        return (stack, height, lost & ~found), (jnp.where(judged, top, -1), level)

    init = (stack, jnp.ones(B, jnp.int32), jnp.zeros(B, bool))
    _, (state_TB, level_TB) = jax.lax.scan(step, init, tokens_BT.T)
    return state_TB.T, level_TB.T
