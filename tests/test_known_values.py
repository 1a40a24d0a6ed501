"""Values that are worked out here, by hand, in NumPy or by a bootstrap: each notices a fault of one line that the suite
once did not (`benchmarks/mutants.json`)."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import recursive_jax as rj
from recursive_jax import storage
from recursive_jax.collapse.embeddings import coverage
from recursive_jax.collapse.exact import Judged, _knowledge
from recursive_jax.collapse.likelihood import cross_entropy
from recursive_jax.config import LanguageConfig, SamplingConfig, TrainConfig
from recursive_jax.data.dataset import Dataset, real_rows
from recursive_jax.data.language import Language
from recursive_jax.data.packing import Packed, pack_tokens
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import unconditional
from recursive_jax.generate.sampling import NEVER, Rules, apply_rules
from recursive_jax.models.model import user_model
from recursive_jax.objectives.causal import targets
from recursive_jax.rounds.run import Run
from recursive_jax.train.optimizer import decayed

BYTES = rj.ByteTokenizer()

# Training.


def table(key):
    return {"table": 0.1 * jax.random.normal(key, (259, 259))}


def look_up(params, tokens_BT, segments_BT=None):
    return params["table"][tokens_BT]


@pytest.fixture(scope="module")
def bigram(mesh):
    """A table of logits: its gradient is known in closed form."""
    return user_model(table, look_up, tokenizer=BYTES, max_length=8, mesh=mesh)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_is_optax_on_the_mean_gradient_of_what_is_learnt(bigram, accumulate, tmp_path):
    """Of rows with few and many learnt tokens. The norm that is logged is that of the mean; the step is AdamW's on it,
    clipped: a sum, or a mean of means, is another."""
    model = bigram.initialized(3)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (4, 9)).astype(np.int32)
    loss = np.zeros((4, 9), bool)
    loss[0, 3:], loss[1, 8:], loss[2, 1:], loss[3, 5:7] = True, True, True, True
    packed = Packed({"tokens": tokens, "segments": np.ones_like(tokens), "loss": loss})

    def mean(params):
        nll = optax.softmax_cross_entropy_with_integer_labels(params["table"][tokens[:, :-1]], tokens[:, 1:])
        return (nll * loss[:, 1:]).sum() / loss[:, 1:].sum()

    value, grads = jax.value_and_grad(mean)(model.params)
    config = TrainConfig(
        steps=1, batch=4, length=8, gradient_accumulation=accumulate, learning_rate=0.01, warmup=0.0, log_every=1,
        schedule="constant", clip=0.5 * float(optax.tree.norm(grads)), weight_decay=0.3, tensorboard=False,
    )  # fmt: skip
    trained = rj.train(model, packed, config=config, directory=tmp_path, quiet=True)
    adamw = optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.3)
    tx = optax.chain(optax.clip_by_global_norm(config.clip), adamw)
    updates, _ = tx.update(grads, tx.init(model.params), model.params)
    wanted = optax.apply_updates(model.params, updates)["table"]
    np.testing.assert_allclose(trained.model.params["table"], wanted, rtol=2e-4, atol=1e-6)
    (line,) = (tmp_path / "train.jsonl").read_text().splitlines()
    logged = json.loads(line)
    assert logged["loss"] == pytest.approx(float(value), rel=1e-5)
    assert logged["gradient_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert logged["targets"] == loss[:, 1:].sum()


def test_a_mask_is_of_the_token_that_is_predicted():
    """`[0, 0, 1, 1]`: the second half is learnt, the first of it from the last that is not."""
    batch = {
        "tokens": jnp.array([[10, 11, 12, 13]]),
        "segments": jnp.ones((1, 4), jnp.int32),
        "loss": jnp.array([[0.0, 0.0, 1.0, 0.5]]),
    }
    inputs, _, labels, weight = targets(batch)
    seen = [(int(i), int(l), float(w)) for i, l, w in zip(inputs[0], labels[0], weight[0], strict=True) if w]
    assert seen == [(11, 12, 1.0), (12, 13, 0.5)]
    data = real_rows([[65, 66, 67, 68]], [""]).with_column("loss", [[0.0, 0.0, 1.0, 1.0]])
    columns = pack_tokens(data, 8, BYTES).columns
    assert columns["tokens"][0, :5].tolist() == [BYTES.bos, 65, 66, 67, 68]
    assert columns["loss"][0, :5].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "modernbert", "qwen3_moe"])
def test_weights_decay_and_biases_and_scales_do_not(family, mesh):
    """By name, in the trees of real families, where layers are stacked and a bias has two axes."""
    from recursive_jax.models.families import read_config
    from recursive_jax.models.model import abstract_params
    from recursive_jax.models.network import transformer_network
    from tests.test_families import FOLDER

    values = json.loads((FOLDER / family / "config.json").read_text())
    shapes = abstract_params(transformer_network(read_config(values, family)), mesh)
    found = {jax.tree_util.keystr(path): on for path, on in jax.tree_util.tree_leaves_with_path(decayed(shapes))}
    off = {name for name, on in found.items() if not on}
    assert off == {n for n in found if n.split("'")[-2].endswith(("bias", "scale"))} and off and len(off) < len(found)


def test_weights_of_rows_reach_the_loss():
    data = real_rows([[65, 66], [67]], ["", ""]).with_column("weight", [0.25, 2.0])
    columns = pack_tokens(data, 8, BYTES).columns
    learnt = {
        int(t): float(w) for t, w, s in zip(*(columns[n][0] for n in ("tokens", "loss", "segments")), strict=True) if s
    }
    assert {t: learnt[t] for t in (65, 66, 67)} == {65: 0.25, 66: 0.25, 67: 2.0}


# Sampling.


def kept_by_hand(logits, temperature, top_k, top_p, min_p):
    """Rules one after the other on what the one before left, in NumPy."""
    z = logits.astype(np.float64) / temperature
    alive = np.ones(len(z), bool)
    if top_k:
        alive &= z >= np.sort(z)[-top_k]
    if top_p < 1:
        q = np.where(alive, np.exp(z - z.max()), 0)
        order = np.argsort(-q)
        count = int(np.searchsorted(np.cumsum(q[order]) / q.sum(), top_p) + 1)
        alive &= np.isin(np.arange(len(z)), order[:count])
    if min_p:
        alive &= np.exp(z - z[alive].max()) >= min_p
    return alive


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7])
def test_rules_in_pairs_are_those_of_numpy(temperature):
    """Min-p was taken from the raw logits: alone, at temperature 1, nobody can tell."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (16, 40)).astype(np.float32)
    for top_k, top_p, min_p in ((0, 1.0, 0.2), (5, 1.0, 0.1), (0, 0.7, 0.1), (8, 0.8, 0.0), (6, 0.9, 0.3)):
        one = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        found = np.asarray(apply_rules(jnp.asarray(logits), Rules.of([one] * 16, [()] * 16))) > NEVER / 2
        for row, mine in zip(logits, found, strict=True):
            np.testing.assert_array_equal(mine, kept_by_hand(row, temperature, top_k, top_p, min_p))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_beams_rank_by_length_as_all_rows_do(bigram, penalty):
    """Every row of up to three tokens of a tiny language, scored one by one: log p / length ** penalty."""
    logits = np.random.default_rng(2).normal(0, 1.5, (259, 259)).astype(np.float32)
    alive = [0, 1, 2, BYTES.eos]
    logits[:, [i for i in range(259) if i not in alive]] = -60.0
    model = bigram.with_params({"table": jnp.asarray(logits)})
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    every, open_rows = [], [([], 0.0)]
    for n in (1, 2, 3):
        grown = [([*t, v], p + logp[t[-1] if t else BYTES.bos, v]) for t, p in open_rows for v in alive]
        every += [(p / n**penalty, t) for t, p in grown if t[-1] == BYTES.eos or n == 3]
        open_rows = [(t, p) for t, p in grown if t[-1] != BYTES.eos]
    best = [t for _, t in sorted(every, reverse=True)[:4]]
    sampling = SamplingConfig(beams=48, n_best=4, max_tokens=3, batch=48, length_penalty=penalty)
    rows = generate(model, unconditional(1), sampling)
    assert [t.tolist() for t in rows.tokens()] == best


# What decides a result names it.


def test_every_field_of_a_result_s_recipe_is_in_its_name(tmp_path, language, tokenizer, mesh):
    """Seed, data, weights of rows, settings, objective, model: each changed once."""
    model = rj.transformer(rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=32), tokenizer, mesh).initialized(0)
    rows = real_rows([[5, 6, 7], [8, 9]], ["a", "b"])
    config = {"steps": 1, "batch": 2, "tensorboard": False}
    weighted = lambda *w: rows.with_column("weight", list(w))
    made = {}

    def train(name, seed=0, data=rows, config=config, objective=rj.objectives.causal, base=model):
        with Run(tmp_path / name, seed=seed, quiet=True) as run:
            made[name] = run.round(1).train("student", base, data, config, objective).fingerprint

    train("plain")
    train("again")
    train("seed", seed=1)
    train("weights", data=weighted(1.0, 2.0))
    train("other-weights", data=weighted(2.0, 1.0))
    train("order", data=rows[::-1])
    train("steps", config={**config, "steps": 2})
    train("rate", config={**config, "learning_rate": 0.5})
    train("objective", objective=rj.objectives.Causal(truncate=0.9))
    train("model", base=model.initialized(1))
    assert made.pop("again") == made["plain"]
    assert len(set(made.values())) == len(made)


def test_a_fork_s_source_is_verified(tmp_path):
    """A damaged result of the other run is named, and nothing is taken over."""
    make = lambda folder, **kw: Run(tmp_path / folder, quiet=True, **kw)
    with make("old") as run:
        run.round(1).dataset("rows", Dataset.from_rows, [{"text": "a"}])
    file = next((tmp_path / "old").rglob("rows-*.parquet"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with make("new", fork=tmp_path / "old") as run, pytest.raises(InputError, match="rows-00000.parquet"):
        run.round(1).dataset("rows", Dataset.from_rows, [{"text": "a"}])
    assert not list((tmp_path / "new").rglob("manifest.json"))


# Errors and metrics.


def bootstrap_error(statistic, count, resamples=4000):
    rng = np.random.default_rng(0)
    return np.std([statistic(rng.integers(0, count, count)) for _ in range(resamples)])


def test_standard_errors_are_those_of_a_bootstrap_over_rows():
    """Of a mean per token where rows have unlike lengths and unlike means: the residual is centred, and longer rows
    count for more. 4,000 resamples: their own error is 1.1%, and 200 rows leave a bias below 1%."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 30, 200)
    losses = [rng.normal(3.0 + rng.normal(), 0.3, n) for n in lengths]
    sums = np.array([x.sum() for x in losses])
    wanted = bootstrap_error(lambda i: sums[i].sum() / lengths[i].sum(), 200)
    mean, error = cross_entropy(losses)
    assert mean == pytest.approx(sums.sum() / lengths.sum()) and error == pytest.approx(wanted, rel=0.05)
    judged = Judged(np.zeros((200, 30, 1)), None, np.where(np.arange(30) < lengths[:, None], 0, -1))
    assert judged.stderr(sums) == pytest.approx(wanted, rel=0.05)


def test_knowledge_is_by_how_often_an_entity_is_spoken_of():
    """Entities in ten groups, the most frequent first: here the value of the n-th is known with probability 1 / n."""
    entities = {(10 + n, 50 + n): 1.0 / (n + 1) for n in range(20)}
    states = [("OTHER",), ("VALUE", 0, 0)]
    language = SimpleNamespace(entities=entities, states=states)
    tokens = np.array([[1, first, last, 7] for first, last in entities])
    shown = np.tile([0, 0, 0, 1], (20, 1))
    found = _knowledge(language, tokens, shown, np.tile(np.log(np.arange(1, 21))[:, None], (1, 4)))
    pairs = (1 / np.arange(1, 21)).reshape(10, 2).mean(1)
    assert found["knowledge_deciles"] == pytest.approx(pairs, abs=1e-6)
    assert found["knowledge"] == pytest.approx(pairs.mean())


def test_balls_counted_one_by_one():
    """Without scikit-learn: distances, k-th neighbours and balls as loops."""
    rng = np.random.default_rng(3)
    real, made, k = rng.normal(size=(30, 2)), rng.normal(0.8, 0.7, size=(25, 2)), 3
    radius = lambda x: [sorted(np.linalg.norm(x - p, axis=1))[k] for p in x]
    R, G = radius(real), radius(made)
    inside = np.array([[np.linalg.norm(g - r) <= R[i] for i, r in enumerate(real)] for g in made])
    reached = np.array([[np.linalg.norm(g - r) <= G[j] for i, r in enumerate(real)] for j, g in enumerate(made)])
    found = coverage(made, real, k)
    assert found["precision"] == pytest.approx(inside.any(1).mean()) and 0 < found["precision"] < 1
    assert (inside.sum(1) == 1).any(), "one ball is enough"
    assert found["recall"] == pytest.approx(reached.any(0).mean()) and 0 < found["recall"] < 1
    assert found["density"] == pytest.approx(inside.sum() / k / len(made))
    nearest = np.array([min(np.linalg.norm(g - r) for g in made) <= R[i] for i, r in enumerate(real)])
    assert found["coverage"] == pytest.approx(nearest.mean())


def test_rules_keep_the_rows_whose_fate_is_known():
    rows = [
        {"text": "One  two", "status": "ok", "tokens": [1, 2], "score": 0.5},
        {"text": " one two ", "status": "ok", "tokens": [1, 2, 3], "score": 0.4},
        {"text": "three", "status": "length", "tokens": [4], "score": None},
        {"text": "four", "status": "constraint", "tokens": [], "score": 0.9},
    ]
    data = Dataset.from_rows(rows)
    kept = lambda rule: [t.strip() for t in rj.select(data, [rule])[0].column("text")]
    assert kept(rj.rules.with_status("ok")) == ["One  two", "one two"]
    assert kept(rj.rules.with_status("ok", "length")) == ["One  two", "one two", "three"]
    assert kept(rj.rules.unique()) == ["One  two", "three", "four"]
    assert kept(rj.rules.at_least(0.5)) == ["One  two", "four"]
    assert kept(rj.rules.tokens_between(1, 2)) == ["One  two", "three"]
    assert rj.select(data, [rj.rules.with_status("ok"), rj.rules.unique()])[1] == {"status in ok": 2, "unique texts": 1}


# Durability, as an order of calls.


@pytest.fixture
def calls(monkeypatch):
    """What is written and synced, in order: (what, name of the file or folder)."""
    made = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    named = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
    monkeypatch.setattr(os, "fsync", lambda handle: (made.append(("sync", named(handle))), real["fsync"](handle))[1])

    def replace(a, b):
        made.append(("rename", os.path.basename(b)))
        return real["replace"](a, b)

    monkeypatch.setattr(os, "replace", replace)
    return made


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are Linux's")
def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_it_is_said(calls, tmp_path):
    storage.write_atomic(tmp_path / "a.json", b"1")
    assert calls == [("sync", "a.json.tmp"), ("rename", "a.json"), ("sync", tmp_path.name)]
    calls.clear()
    storage.append_line(tmp_path / "log", "x")
    assert calls == [("sync", "log")]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are Linux's")
def test_a_commit_comes_after_all_that_it_names(calls, tmp_path):
    with Run(tmp_path / "run", quiet=True) as run:
        calls.clear()
        run.round(1).dataset("rows", Dataset.from_rows, [{"text": "a"}])
    at = lambda what, name: calls.index((what, name))
    before = calls[: at("rename", "manifest.json")]
    assert ("sync", "rows") in before[before.index(("sync", "rows-00000.parquet")) :]
    assert ("sync", "rows") in calls[at("rename", "manifest.json") :], "and its name is on the disk too"


# The grammar, against sentences and not against its own tables.


def test_words_agree_in_every_sentence_that_is_written():
    """Nouns in the plural end with s, verbs in the singular with es: `a` and a singular noun, `some` and a plural one,
    the verb like its subject."""
    language = Language(LanguageConfig(types=2, nouns=4, verbs=3, depth=0, fact_share=0.01))
    checked = {"a": 0, "some": 0, "verb": 0}
    for row in language.sample(0, 0, 300):
        words = [language.words[t] for t in row]
        start = 0
        for end in [i for i, w in enumerate(words) if w == "."]:
            sentence, start = words[start:end], end + 1
            if "is" in sentence:
                continue
            determiner, noun, verb, *rest = sentence
            plural = noun.endswith("s")
            if determiner in checked:
                assert plural == (determiner == "some"), words
                checked[determiner] += 1
            assert verb.endswith("es") != plural and verb.endswith(("es", "e")), words
            checked["verb"] += 1
            if rest and rest[0] in checked:
                assert rest[1].endswith("s") == (rest[0] == "some"), words
    assert min(checked.values()) > 50


# Small faults that a mutation round found unnoticed.


def test_a_cache_has_the_documented_sizes():
    """64, 128, 192, 256, 384, 512 ...; of deep models powers of two from 128 on; never more than the model reads."""
    from recursive_jax.generate.prefill import Prefill

    size = lambda need, layers=2, most=10**6: Prefill.size(SimpleNamespace(layers=layers, max_length=most), need)
    assert [size(n) for n in (1, 64, 65, 129, 192, 193, 257, 384, 385)] == [64, 64, 128, 192, 192, 256, 384, 384, 512]
    assert [size(n, layers=9) for n in (1, 129, 193, 300)] == [128, 256, 256, 512]
    assert size(500, most=400) == 400


def test_a_field_that_some_rows_lack_stratifies():
    from recursive_jax.data.task import hold_out

    rows = [{"text": str(i), **({"kind": "a"} if i % 2 else {})} for i in range(20)]
    _, held, how = hold_out(rows, 0.2, 0, "kind")
    assert len(held) == 4 and sum("kind" in row for row in held) == 2 and "2 values" in how
    with pytest.raises(InputError, match="no row has this field"):
        hold_out(rows, 0.2, 0, "colour")


def test_a_rule_on_no_rows_decides_on_none():
    empty = Dataset.from_rows([{"text": "a"}]).take([])
    assert len(rj.select(empty, [rj.rules.unique(), rj.rules.with_status("ok")])[0]) == 0


def test_a_band_needs_an_error():
    from recursive_jax.rounds.report.series import Arm

    alone = Arm("a", 0, {0: [{"x": 1.0}]}).series("x")
    assert alone.low is None and alone.high is None
    known = Arm("a", 0, {0: [{"x": 1.0, "x_stderr": 0.5}]}).series("x")
    assert (known.low, known.high) == ([0.5], [1.5])


def test_a_mask_token_is_the_tokenizer_s_where_none_is_given(tiny, mesh):
    from recursive_jax.objectives.masked import Masked

    class WithMask(rj.ByteTokenizer):
        mask = 255

    model = rj.transformer(tiny, WithMask(), mesh)
    found = Masked().resolved(model)
    assert found.mask_id == 255 and {255, BYTES.bos, BYTES.eos} <= set(found.special)
    assert Masked(mask_id=7).resolved(model).mask_id == 7
    with pytest.raises(InputError, match="no mask token"):
        Masked().resolved(rj.transformer(tiny, BYTES, mesh))
