"""The engine against a plain second sampler (one row, one whole forward pass per token, NumPy rules), and its promises:
what a row is depends on its request alone; settings, guides, drafts and constraints in one batch."""

from __future__ import annotations

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.config import MeshConfig, ModelConfig, SamplingConfig
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.engine import Engine, slots_for
from recursive_jax.generate.generate import generate, stream
from recursive_jax.generate.programs import contrastive
from recursive_jax.generate.request import Draft, Guide, Request, shared_prefix, unconditional
from recursive_jax.generate.score import embed, rewards, token_logprobs
from recursive_jax.mesh import make_mesh
from recursive_jax.models.model import transformer, user_model
from tests.helpers import plain_functions
from tests.test_model import randomised

CONFIG = ModelConfig(layers=2, d_model=32, heads=4, kv_heads=2, d_ff=64, max_length=96)
COMMON = {"batch": 4, "chunk": 4}


@pytest.fixture(scope="module")
def model(mesh):
    return randomised(transformer(CONFIG, ByteTokenizer(), mesh))


@pytest.fixture(scope="module")
def small(mesh):
    config = ModelConfig(layers=1, d_model=16, heads=2, kv_heads=1, d_ff=32, max_length=96)
    return randomised(transformer(config, ByteTokenizer(), mesh), seed=5)


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    return [Request(10 * i + 3, rng.integers(32, 127, n).astype(np.int32)) for i, n in enumerate((0, 3, 7, 2, 12, 5))]


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def plain(model, request, s: SamplingConfig, seed=0, other=None):
    """One row, a token at a time. other: (its model, its prompt, combine)."""
    V, tokenizer = model.vocab, model.tokenizer
    key = jax.random.fold_in(jax.random.key(seed), request.id)
    sequence, new, logprobs = request.tokens(tokenizer.bos).tolist(), [], []
    start = len(sequence)
    limit = min(s.max_tokens, model.max_length + 1 - start)
    guide = list(other[1]) if other else None

    def last_logits(m, tokens):  # one shape, so that one program serves every length
        padded = np.zeros((1, m.max_length), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(m.logits(padded), np.float64)[0, len(tokens) - 1]

    while len(new) < limit:
        raw = last_logits(model, sequence)
        z = raw.copy()
        if other:
            z = np.asarray(other[2](z[None], last_logits(other[0], guide)[None], np.array([s.guidance])))[0].astype(
                float
            )
        for v in range(V):
            count = new.count(v)
            if v in sequence:
                z[v] = z[v] / s.repetition_penalty if z[v] > 0 else z[v] * s.repetition_penalty
            z[v] -= s.presence_penalty * (count > 0) + s.frequency_penalty * count
        for word in s.bad_words:
            for form in (word, " " + word):
                ids = tokenizer.encode(form)
                if sequence[len(sequence) - len(ids) + 1 :] == ids[:-1]:
                    z[ids[-1]] = -np.inf
        stops = {tokenizer.eos, *s.stop_tokens}
        if len(new) < s.min_tokens:
            z[list(stops)] = -np.inf
        z[[tokenizer.bos, tokenizer.pad]] = -np.inf
        if s.temperature == 0:
            token = int(z.argmax())
        else:
            p = softmax(z / s.temperature)
            if s.top_k:
                p[np.argsort(-p, kind="stable")[s.top_k :]] = 0
            if s.top_p < 1:
                order = np.argsort(-p)
                p[order[np.searchsorted(np.cumsum(p[order] / p.sum()), s.top_p) + 1 :]] = 0
            p[p < s.min_p * p.max()] = 0
            p /= p.sum()
            if s.typical_p < 1:
                with np.errstate(divide="ignore"):
                    surprise = -np.log(p)
                entropy = (p[p > 0] * surprise[p > 0]).sum()
                order = np.argsort(np.where(p > 0, np.abs(surprise - entropy), np.inf))
                p[order[np.searchsorted(np.cumsum(p[order]), s.typical_p) + 1 :]] = 0
                p /= p.sum()
            u = float(jax.random.uniform(jax.random.fold_in(key, len(sequence))))
            token = int(np.flatnonzero((np.cumsum(p) > u * p.sum()) & (p > 0))[0])
        logprobs.append(np.log(softmax(raw)[token]))
        new.append(token)
        sequence.append(token)
        if other:
            guide.append(token)
        if token in stops:
            break
    return new, logprobs


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "truncated": {"temperature": 1.3, "top_k": 20, "top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "typical": {"typical_p": 0.6},
    "repetition": {"repetition_penalty": 1.7, "temperature": 0.7},
    "counted": {"presence_penalty": 0.8, "frequency_penalty": 0.6, "temperature": 0.5},
    "bad-words": {"temperature": 0.0, "bad_words": ("e", "th", "\x01")},
    "min-tokens": {"min_tokens": 6, "stop_tokens": tuple(range(32, 200))},
}


@pytest.mark.parametrize("batch", [4, 3])
def test_every_rule_in_one_batch_is_the_plain_sampler(model, requests, batch):
    """Each request with settings of its own, all in the same slots. Equal tokens: the plain sampler computes in
    float64, so a random number within 1e-6 of a boundary could differ; with 250 draws that happens once in a thousand
    seeds."""
    own = [SamplingConfig(max_tokens=8, **COMMON, **x) for x in SETTINGS.values()]
    asked = [Request(r.id, r.prompt, sampling=s) for r, s in zip(itertools.cycle(requests[1:5]), own, strict=False)]
    asked = [Request(100 * i + r.id, r.prompt, sampling=r.sampling) for i, r in enumerate(asked)]
    rows = generate(model, asked, SamplingConfig(max_tokens=8, **{**COMMON, "batch": batch}), seed=7)
    for request, tokens, logprobs in zip(asked, rows.tokens(), rows.column("logprobs"), strict=True):
        wanted, wanted_logprobs = plain(model, request, request.sampling, seed=7)
        assert tokens.tolist() == wanted, request.sampling
        np.testing.assert_allclose(logprobs, wanted_logprobs, atol=1e-4)


def test_rows_are_equal_for_any_order_company_slots_chunk_and_mesh(model, requests):
    sampling = SamplingConfig(max_tokens=8, top_p=0.95, **COMMON)
    first = generate(model, requests, sampling, seed=3)
    wanted = dict(zip([r.id for r in requests], [t.tolist() for t in first.tokens()], strict=True))
    elsewhere = model.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    for who, asked, change in (
        (model, requests[::-1], {}),
        (model, requests[2:4], {}),
        (model, requests, {"batch": 3, "chunk": 5}),
        (model, requests, {"batch": 16, "chunk": 1}),
        (elsewhere, requests, {}),
    ):
        rows = generate(who, asked, sampling.model_copy(update=change), seed=3)
        assert [t.tolist() for t in rows.tokens()] == [wanted[r.id] for r in asked], change
    streamed = {row.request.id: row.tokens for row in stream(model, iter(requests), sampling, seed=3)}
    assert streamed == wanted
    assert [t.tolist() for t in generate(model, requests, sampling, seed=4).tokens()] != list(wanted.values())


def test_log_probabilities_are_those_of_a_scoring_pass(model, requests):
    rows = generate(model, requests, SamplingConfig(max_tokens=12, temperature=1.4, top_k=30, **COMMON), seed=1)
    whole = [np.concatenate([r.prompt, t]) for r, t in zip(requests, rows.tokens(), strict=True)]
    for request, found, scored in zip(requests, rows.column("logprobs"), token_logprobs(model, whole), strict=True):
        np.testing.assert_allclose(found, scored[len(request.prompt) :], atol=1e-4)


def test_stop_texts_end_a_row_before_them(model):
    free = generate(model, unconditional(12), SamplingConfig(max_tokens=24, **COMMON), seed=2)
    text = free.column("text")[0]
    stop = text[3:5]
    cut = generate(model, unconditional(12), SamplingConfig(max_tokens=24, stop=(stop, "\0\0\0"), **COMMON), seed=2)
    for whole, tokens, row, kept, status in zip(
        free.column("text"), free.tokens(), cut.column("text"), cut.tokens(), cut.column("status"), strict=True
    ):
        assert row == whole.split(stop)[0] and tokens[: len(kept)].tolist() == kept.tolist()
        assert (stop in whole) <= (status == "ok")
    assert stop not in "".join(cut.column("text")) and cut.column("status")[0] == "ok"


def test_best_of_keeps_the_most_probable_samples(model, requests):
    sampling = SamplingConfig(max_tokens=6, best_of=4, n_best=2, length_penalty=0.5, **COMMON)
    rows = generate(model, requests[1:3], sampling, seed=8)
    assert rows.column("id") == [f"rows/{r.id}{rank}" for r in requests[1:3] for rank in ("", ".1")]
    singly = sampling.model_copy(update={"best_of": 1, "n_best": 1})
    for i, request in enumerate(requests[1:3]):
        samples = [
            next(stream(model, [Request(request.id, request.prompt, sample=k)], singly, seed=8)) for k in range(4)
        ]
        assert len({tuple(s.tokens) for s in samples}) == 4
        samples.sort(key=lambda s: -sum(s.logprobs) / len(s.tokens) ** 0.5)
        assert [t.tolist() for t in rows.tokens()[2 * i : 2 * i + 2]] == [s.tokens for s in samples[:2]]


def test_guidance_is_two_forward_passes(model, small, requests):
    rng = np.random.default_rng(4)
    asked = [Request(r.id, r.prompt, negative=rng.integers(32, 99, i)) for i, r in enumerate(requests[1:4])]
    for guide, sampling in (
        (None, SamplingConfig(max_tokens=6, guidance=2.5, **COMMON)),
        (Guide(small, contrastive(0.2), same_prompt=True), SamplingConfig(max_tokens=6, guidance=0.7, **COMMON)),
    ):
        rows = generate(model, asked, sampling, seed=1, guide=guide)
        used = guide or Guide(model)
        for request, tokens in zip(asked, rows.tokens(), strict=True):
            other = (used.model, used.prompt(request, model.tokenizer.bos), used.combine)
            assert tokens.tolist() == plain(model, request, sampling, seed=1, other=other)[0]


def test_a_draft_changes_nothing(model, small, requests):
    """Every rule and several settings in one batch; drafts that are always right, and nearly never."""
    own = [
        None,
        *(SamplingConfig(max_tokens=9, **COMMON, **SETTINGS[n]) for n in ("truncated", "counted", "bad-words")),
    ]
    asked = [Request(r.id, r.prompt, sampling=s) for r, s in zip(requests, itertools.cycle(own), strict=False)]
    sampling = SamplingConfig(max_tokens=9, **COMMON)
    alone = generate(model, asked, sampling, seed=6)
    for draft in (Draft(small, 3), Draft(model, 2)):
        rows = generate(model, asked, sampling, seed=6, draft=draft)
        assert [t.tolist() for t in rows.tokens()] == [t.tolist() for t in alone.tokens()]
        for a, b in zip(rows.column("logprobs"), alone.column("logprobs"), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match="not both"):
        Engine(model, sampling, draft=Draft(small), guide=Guide(small))


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SUM = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/\n'


def test_constrained_rows_parse(model):
    requests = unconditional(8)
    for key, text, check in (
        ("regex", "(red|green) [0-9]{2,4}", lambda t: re.fullmatch("(red|green) [0-9]{2,4}", t)),
        (
            "json_schema",
            json.dumps(PERSON),
            lambda t: set(json.loads(t)) == {"name", "age"} and json.loads(t)["age"] <= 120,
        ),
        ("grammar", SUM, lambda t: eval(t) >= 0 if not re.search(r"\b0\d", t) else re.fullmatch(r"[0-9+()]+", t)),
    ):
        rows = generate(model, requests, SamplingConfig(**COMMON, **{key: text}), seed=11)
        ended = [t for t, s in zip(rows.column("text"), rows.column("status"), strict=True) if s == "ok"]
        assert len(ended) >= 2 and all(check(t) for t in ended), (key, ended)
        assert len(set(ended)) > 1  # sampled, not one forced text
    whole = generate(model, requests, SamplingConfig(regex="[ab]{3}", **COMMON), seed=11)
    narrow = generate(model, requests[::-1], SamplingConfig(regex="[ab]{3}", batch=3), seed=11)
    assert whole.column("text") == narrow.column("text")[::-1] and set(whole.column("status")) == {"ok"}


def test_bad_constraints_are_refused(model, tiny, tokenizer, mesh):
    for key, text in (("regex", "(a"), ("json_schema", "{"), ("grammar", "start: nothing")):
        with pytest.raises(InputError, match=f"sampling.{key} is not valid"):
            generate(model, unconditional(1), SamplingConfig(**{key: text}))
    with pytest.raises(InputError, match="pieces of text"):
        generate(transformer(tiny, tokenizer, mesh).initialized(), unconditional(1), SamplingConfig(regex="a"))


def test_a_common_header_is_read_once_and_changes_nothing(model):
    header = np.frombuffer(b"A header that all of the prompts share, longer than 32", np.uint8).astype(np.int32)
    rng = np.random.default_rng(2)
    requests = [
        Request(i, np.concatenate([header, rng.integers(32, 99, n).astype(np.int32)]))
        for i, n in enumerate((1, 9, 4, 4))
    ]
    requests.append(Request(4, requests[3].prompt))  # the same prompt again
    sampling = SamplingConfig(max_tokens=6, **COMMON)
    bos = model.tokenizer.bos
    assert shared_prefix(requests, bos).tolist() == [bos, *header]
    together = generate(model, requests, sampling, seed=1)
    alone = [generate(model, [r], sampling, seed=1) for r in requests]
    assert [t.tolist() for t in together.tokens()] == [d.tokens()[0].tolist() for d in alone]
    for found, single in zip(together.column("logprobs"), alone, strict=True):
        np.testing.assert_allclose(found, single.column("logprobs")[0], atol=1e-4)


def test_long_prompts_are_read_in_pieces(mesh, monkeypatch):
    from recursive_jax.generate import prefill

    model = randomised(transformer(CONFIG.model_copy(update={"max_length": 160}), ByteTokenizer(), mesh))
    rng = np.random.default_rng(3)
    requests = [Request(i, rng.integers(32, 127, n).astype(np.int32)) for i, n in enumerate((100, 150, 17))]
    sampling = SamplingConfig(max_tokens=5, **COMMON)
    whole = generate(model, requests, sampling)
    monkeypatch.setattr(prefill, "PIECE", 32)
    assert [t.tolist() for t in generate(model, requests, sampling).tokens()] == [t.tolist() for t in whole.tokens()]


def test_defined_ends(model):
    """Start token and prompt together may fill the context: then one token follows. Nothing asked, nothing written."""
    context = model.max_length
    requests = [Request(i, np.full(n, 65, np.int32)) for i, n in enumerate((context - 1, context, context + 1, 0))]
    rows = generate(model, requests, SamplingConfig(max_tokens=3, **COMMON))
    assert [len(t) for t in rows.tokens()][:3] == [1, 0, 0]
    assert rows.column("status")[1:3] == ["length", "prompt_too_long"]
    nothing = generate(model, requests[3:], SamplingConfig(max_tokens=0, **COMMON))
    assert nothing.column("status") == ["length"] and nothing.column("text") == [""]
    with pytest.raises(ValueError, match="same id"):
        generate(model, unconditional(2) + unconditional(1), SamplingConfig(**COMMON))
    with pytest.raises(InputError, match="ids outside"):
        generate(model, [Request(0, np.array([9999]))], SamplingConfig(**COMMON))
    with pytest.raises(InputError, match="name them beforehand"):
        list(
            stream(
                model, iter([Request(0, np.array([65]), sampling=SamplingConfig(top_k=3))]), SamplingConfig(**COMMON)
            )
        )


def test_requests_are_taken_as_there_is_room(model):
    """An endless iterator: never more requests taken than finished rows and twice the slots."""
    taken, finished = itertools.count(), 0
    seen = 0

    def endless():
        nonlocal seen
        for i in taken:
            seen = i + 1
            yield Request(i, np.array([65 + i % 20], np.int32)) if i % 7 else None

    for row in stream(model, endless(), SamplingConfig(max_tokens=4, **COMMON)):
        finished += 1
        assert seen <= finished * 8 // 6 + 16
        assert 0 < len(row.tokens) <= 4
        if finished == 60:
            break


def test_scoring_and_embedding_are_the_unpacked_forward(model):
    """Rows of unequal length share packed rows; each must come out as if it were alone."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, n).astype(np.int32) for n in (0, 5, 40, 1, 17, 96, 120)]
    found = list(token_logprobs(model, rows))
    states = embed(model, rows[1:], normalize=False)
    last = embed(model, rows[1:], pool="last", normalize=False)
    head = rng.normal(size=CONFIG.d_model).astype(np.float32)
    np.testing.assert_allclose(rewards(model, rows[1:], head, 0.5), last @ head + 0.5, rtol=1e-5)
    for row, logprobs in zip(rows, found, strict=True):
        cut = np.concatenate([[model.tokenizer.bos], row]).astype(np.int32)[: model.max_length + 1]
        assert len(logprobs) == len(cut) - 1
        if len(logprobs):
            z = np.asarray(model.logits(cut[None, :-1]), np.float64)[0]
            wanted = [np.log(softmax(z[t])[cut[t + 1]]) for t in range(len(cut) - 1)]
            np.testing.assert_allclose(logprobs, wanted, atol=1e-4)
    for row, mean, final in zip(rows[1:], states, last, strict=True):
        alone = embed(model, [row], normalize=False)[0]
        np.testing.assert_allclose(mean, alone, atol=1e-4)
        np.testing.assert_allclose(final, embed(model, [row], pool="last", normalize=False)[0], atol=1e-4)
    unit = embed(model, ["some text", "other"])
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-5)
    with pytest.raises(InputError, match="mean or last"):
        embed(model, ["a"], pool="first")
    with pytest.raises(InputError, match="shape"):
        rewards(model, ["a"], np.zeros(3))


@pytest.mark.slow
def test_beams_of_user_functions_are_those_of_the_cache(model, requests):
    """Without its config the model is functions like a user's: every step is a whole forward pass."""
    plain = plain_functions(model)
    functions = plain.with_params(model.params)
    sampling = SamplingConfig(beams=3, n_best=2, max_tokens=5, batch=12, length_penalty=0.7)
    cached = generate(model, requests[:3], sampling)
    for other in (functions, model.on(make_mesh(MeshConfig(data=2, tensor=2)))):
        rows = generate(other, requests[:3], sampling)
        assert [t.tolist() for t in rows.tokens()] == [t.tolist() for t in cached.tokens()]


def test_a_beam_as_wide_as_the_tree_is_the_best_of_all_rows(mesh):
    """Every row of two tokens of a small vocabulary, scored one by one."""
    table = np.random.default_rng(0).normal(0, 2, (259, 259)).astype(np.float32)
    table[:, 6:] = -40.0  # five letters and nothing else
    bigram = user_model(
        lambda key: {"table": jnp.zeros((259, 259))},
        lambda p, t, s=None: p["table"][t],
        tokenizer=ByteTokenizer(),
        max_length=8,
        mesh=mesh,
    ).with_params({"table": jnp.asarray(table)})
    rows = generate(bigram, unconditional(1), SamplingConfig(beams=6, n_best=6, max_tokens=2, batch=6))
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    every = sorted(((logp[256, a] + logp[a, b], [a, b]) for a in range(6) for b in range(6)), reverse=True)
    assert [t.tolist() for t in rows.tokens()] == [pair for _, pair in every[:6]]


def test_a_row_that_cannot_follow_its_grammar_is_a_row_with_a_status(model, monkeypatch):
    """It ended the call, and a run at every restart again. The parser of one slot gives up, as llguidance does on
    limits and on tokens that it did not foresee; the other rows are those of an undisturbed call."""
    from recursive_jax.generate.constrain import Constraint

    sampling = SamplingConfig(regex="[ab]{6}", batch=4)
    whole = generate(model, unconditional(8), sampling, seed=3)
    start = Constraint.start

    class Gives:
        """Up after two tokens."""

        def __init__(self, parser, in_masks):
            self.parser, self.left, self.in_masks = parser, 2, in_masks

        def consume_token(self, token):
            self.left -= 1
            return self.parser.consume_token(token) and (self.in_masks or self.left >= 0)

        def is_error(self):
            return self.in_masks and self.left <= 0

        def get_error(self):
            return "gave up"

    for in_masks, kept in ((False, 3), (True, 2)):

        def stubborn(self, slot, opens=False, in_masks=in_masks):
            start(self, slot, opens)
            if slot == 1:
                self.parsers[slot] = Gives(self.parsers[slot], in_masks)

        fill = Constraint._fill

        def unwrapped(self, fill=fill):
            real, self.parsers = self.parsers, {s: getattr(p, "parser", p) for s, p in self.parsers.items()}
            fill(self)
            self.parsers = real
            self.failed |= {s: "gave up" for s, p in real.items() if isinstance(p, Gives) and p.is_error()}

        with monkeypatch.context() as patch:
            patch.setattr(Constraint, "start", stubborn)
            patch.setattr(Constraint, "_fill", unwrapped)
            rows = generate(model, unconditional(8), sampling, seed=3)
        failed = [i for i, s in enumerate(rows.column("status")) if s != "ok"]
        assert failed and {rows.column("status")[i] for i in failed} == {"constraint"}
        for i, (text, wanted) in enumerate(zip(rows.column("text"), whole.column("text"), strict=True)):
            assert (text == wanted[:kept]) if i in failed else (text == wanted), (i, text, wanted)


def test_what_is_one_for_all_rows_is_refused_of_one(model):
    """A request's own regular expression was ignored."""
    for own in ({"regex": "[0-9]+"}, {"best_of": 2}, {"dtype": "bfloat16"}):
        request = Request(0, np.array([65]), sampling=SamplingConfig(max_tokens=3, **own))
        with pytest.raises(InputError, match="one for all rows"):
            generate(model, [request], SamplingConfig(max_tokens=3, batch=1))


def test_few_rows_take_few_slots(small, monkeypatch):
    """Each slot costs its share of every step: 256 of them for three rows took six times the time."""
    assert [slots_for(SamplingConfig(), n).batch for n in (1, 2, 4, 5, 17, 65, 300)] == [1, 4, 4, 16, 64, 256, 256]
    assert slots_for(SamplingConfig(best_of=3), 2).batch == 16 and slots_for(SamplingConfig(batch=6), 5).batch == 6
    used = []
    start = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a, **k: (start(self, *a, **k), used.append(self.B))[0])
    assert len(generate(small, unconditional(3), max_tokens=2)) == 3 and used == [4]
