"""The embedded language against its closed forms and against brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.collapse.exact import PARTS, exact_kl, kl_parts, oracle_kl, right_rows, validity
from recursive_jax.collapse.lab import laws
from recursive_jax.config import LanguageConfig
from recursive_jax.data.language import EOS, FACT_ERROR, PAD, SEMANTIC_ERROR, SYNTAX_ERROR, TRUE, Language
from recursive_jax.models.model import Model, user_model


@pytest.fixture(scope="module")
def documents(language):
    return language.sample(7, 0, 8192)


def padded(rows):
    out = np.full((len(rows), max(map(len, rows))), PAD, np.int32)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return out


def test_tables_are_distributions_on_nested_supports(language):
    np.testing.assert_allclose(language.P_AV.sum(1), 1.0, atol=1e-12)
    true = language.P_AV > 0
    assert (language.sem_AV | ~true).all() and (language.syn_AV | ~language.sem_AV).all()
    assert (language.sem_AV & ~true).any() and (language.syn_AV & ~language.sem_AV).any()


def test_same_config_same_language_other_seed_other_facts(language):
    again = Language(language.config)
    assert again.words == language.words and np.array_equal(again.P_AV, language.P_AV)
    other = Language(language.config.model_copy(update={"seed": 1}))
    assert other.words != language.words


def test_closed_forms_match_monte_carlo(language, documents):
    """Means over 8,192 independent documents, within 4 of their own standard errors."""
    lengths = np.array([len(d) for d in documents], float)
    assert abs(lengths.mean() - language.expected_length) < 4 * lengths.std() / np.sqrt(len(lengths))
    tokens = padded(documents)
    states, levels = language.parse(tokens)
    assert (levels[tokens != PAD] == TRUE).all()
    logp = np.where(tokens != PAD, np.log(np.where(states >= 0, language.P_AV[states, tokens], 1.0)), 0.0).sum(1)
    assert abs(-logp.mean() - language.entropy) < 4 * logp.std() / np.sqrt(len(logp))
    counts = np.array([np.bincount(d, minlength=language.vocab) for d in documents], float)
    expected = language.marginals_V * language.expected_length
    z = (counts.mean(0) - expected)[expected > 0] / (counts.std(0)[expected > 0] / np.sqrt(len(counts)) + 1e-12)
    assert np.abs(z).max() < 5  # the largest of about seventy


def test_kl_between_grammars_matches_monte_carlo(language, documents):
    other = Language(language.config)
    rng = np.random.default_rng(0)
    other.P_AV = np.where(language.P_AV > 0, language.P_AV * rng.uniform(0.5, 2.0, language.P_AV.shape), 0.0)
    other.P_AV /= other.P_AV.sum(1, keepdims=True)
    tokens = padded(documents)
    states, _ = language.parse(tokens)
    live = tokens != PAD
    ratio = np.log(np.where(live, language.P_AV[states, tokens], 1.0)) - np.log(
        np.where(live, other.P_AV[states, tokens], 1.0)
    )
    per_document = ratio.sum(1)
    assert abs(per_document.mean() - language.kl_to(other)) < 4 * per_document.std() / np.sqrt(len(documents))
    assert language.kl_to(language) == 0.0


def test_documents_depend_on_seed_and_index_only(language):
    whole = language.sample(3, 0, 50)
    tail = language.sample(3, 40, 10)
    assert all(np.array_equal(a, b) for a, b in zip(whole[40:], tail, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(whole, language.sample(4, 0, 50), strict=True))


def test_every_document_ends_and_is_valid(language, documents):
    assert all(d[-1] == EOS and (d[:-1] != EOS).all() for d in documents)
    scores = validity(language, documents[:500])
    assert scores["valid"] == 1.0 and scores["sentences"] == sum((d == language.dot).sum() for d in documents[:500])


def corrupted(language, level):
    """A document whose first wrong token has the given level, the index of that token, and the document before."""
    for document in language.sample(11, 0, 400):
        states, _ = language.parse(document[None])
        for t in range(len(document) - 1):
            wrong = np.flatnonzero(language.level_AV[states[0, t]] == level)
            wrong = wrong[wrong > EOS]
            if len(wrong):
                changed = document.copy()
                changed[t] = wrong[0]
                return changed, t
    raise AssertionError("no place found")


@pytest.mark.parametrize("level", [FACT_ERROR, SEMANTIC_ERROR, SYNTAX_ERROR])
def test_levels_and_recovery(language, level):
    document, t = corrupted(language, level)
    _, levels = language.parse(document[None])
    assert levels[0, t] == level and (levels[0, :t] == TRUE).all()
    scores = validity(language, [document])
    assert scores["valid"] < 1.0
    if level == FACT_ERROR:
        assert scores["valid_syn"] == 1.0 and scores["valid_sem_given_syn"] == 1.0 and scores["true_given_sem"] < 1.0
    if level == SYNTAX_ERROR:
        assert scores["valid_syn"] < 1.0


def test_kl_parts_sum_to_the_kl_in_double_precision(language):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for a in rng.integers(0, len(language.states), 20):
            logits = jnp.asarray(rng.normal(0, 3, language.vocab))
            p = language.P_AV[a]
            parts = kl_parts(logits, jnp.asarray(p), jnp.asarray(language.syn_AV[a]), jnp.asarray(language.sem_AV[a]))
            log_q = np.asarray(jax.nn.log_softmax(logits))
            direct = sum(p[v] * (np.log(p[v]) - log_q[v]) for v in np.flatnonzero(p))
            assert abs(float(parts.sum()) - direct) < 1e-10
            assert (np.asarray(parts) > -1e-12).all()


def oracle_model(language, tokenizer, mesh, spread: float) -> Model:
    """A `model` that knows the grammar: its logits are the true log-probabilities, mixed with the uniform
    distribution."""
    tables = language.tables | {"p": language.P_AV.astype(np.float32)}

    def apply(params, tokens_BT, segments_BT=None):
        from recursive_jax.data.language import _parse

        body = tokens_BT[:, 1:]
        states, _ = _parse(
            tables,
            jnp.pad(body, ((0, 0), (0, 1)), constant_values=EOS),
            language.start,
            language.next_state,
            language.dot,
            language.depth,
        )
        p = jnp.asarray(tables["p"])[jnp.maximum(states, 0)]
        return jnp.log((1 - spread) * p + spread / language.vocab + 1e-30)

    return user_model(lambda key: {}, apply, tokenizer=tokenizer, max_length=64, mesh=mesh).initialized()


def test_exact_kl_of_known_models(language, tokenizer, mesh, documents):
    """The truth itself has KL 0. Mixed with a share e of uniform noise, each part has its closed form: a prefix in
    state A keeps (1 - e) + e |Syn_A| / V of its mass in Syn, and so on down."""
    rows = [d for d in documents[:200] if len(d) <= 64]
    zero = exact_kl(oracle_model(language, tokenizer, mesh, 0.0), language, rows)
    assert abs(zero["kl_total"]) < 1e-5
    e, V = 0.1, language.vocab
    found = exact_kl(oracle_model(language, tokenizer, mesh, e), language, rows)
    tokens = padded(rows)
    states, _ = language.parse(tokens)
    states = states[tokens != PAD]
    p = language.P_AV[states]
    mass = lambda support: (1 - e) + e * support[states].sum(1) / V
    syn, sem, true = mass(language.syn_AV), mass(language.sem_AV), mass(language.P_AV > 0)
    q = (1 - e) * p + e / V
    total = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0).sum(1)
    expected = [-np.log(syn), -np.log(sem / syn), -np.log(true / sem)]
    for name, value in zip(PARTS, expected, strict=False):
        assert abs(found[name] - value.mean()) < 2e-5, name
    assert abs(found["kl_total"] - total.mean()) < 2e-5
    assert found["kl_total"] == pytest.approx(sum(found[k] for k in PARTS))
    assert sum(found["kl_dist_deciles"]) == pytest.approx(found["kl_dist"], abs=1e-6)
    assert found["knowledge"] == pytest.approx((1 - e) + e / V, abs=1e-5)
    assert all(x is None or abs(x - found["knowledge"]) < 1e-5 for x in found["knowledge_deciles"])
    top = p.max(1)
    assert found["calibration_error"] == pytest.approx(np.abs((1 - e) * top + e / V - top).mean(), abs=1e-5)
    assert found["confident_wrong"] == 0
    assert found["anchor_entropy"] == pytest.approx(-(q * np.log(q)).sum(1).mean(), abs=1e-5)


@pytest.mark.parametrize("changes", [{"depth": 0}, {"types": 1}, {"attributes": 9}, {"fact_share": 0.9}])
def test_other_sizes_build_and_sample(changes):
    language = Language(LanguageConfig(**changes))
    documents = language.sample(0, 0, 300)
    lengths = np.array([len(d) for d in documents], float)
    assert abs(lengths.mean() - language.expected_length) < 5 * lengths.std() / np.sqrt(300)


@pytest.mark.slow
def test_the_exact_fit_drifts_as_theory_says():
    """L7: after k refits to N of its own documents, E KL(P_k || P_0) per document is k d / 2N, d free parameters."""
    config = LanguageConfig(types=2, nouns=4, verbs=2, first_names=4, last_names=4, attributes=2, values=4, depth=1)
    language, N, chains = Language(config), 4096, 12
    found = np.zeros(3)
    for chain in range(chains):
        student = language
        for k in range(3):
            student = student.fitted(student.sample(seed=10 * chain + k, first=0, count=N))
            found[k] += student.kl_to(language) / chains
    np.testing.assert_allclose(found, laws.oracle_kl(language.free_parameters, N, 3)[1:], rtol=0.08)


def test_the_fit_to_the_truth_is_near_the_truth():
    language = Language()
    rows = language.sample(seed=3, first=0, count=4000)
    found = oracle_kl(language, rows)
    assert 0 < found["kl_oracle"] < 2 * found["kl_oracle_null"]  # half a count more everywhere pulls it towards uniform
    fewer = oracle_kl(language, rows[:400])
    assert fewer["kl_oracle"] > 3 * found["kl_oracle"]
    assert sum(language.entities.values()) == pytest.approx(1.0)


def test_right_rows_are_those_without_an_error_of_the_level(language):
    rows = [r for r in language.sample(7, 0, 200) if "is" in language.text(r).split()][:20]
    assert right_rows(language, rows, "facts").all()
    states, _ = language.parse(padded(rows))
    values = [a for a, state in enumerate(language.states) if state[0] == "VALUE"]
    for level, broken in (("facts", 0), ("semantics", 1), ("syntax", 2)):
        changed = []
        for n, row in enumerate(rows):
            t = int(np.flatnonzero(np.isin(states[n, : len(row)], values))[0])
            a = states[n, t]
            value = language.P_AV[a] > 0
            wrong = [language.sem_AV[a] & ~value, language.syn_AV[a] & ~language.sem_AV[a], ~language.syn_AV[a]][broken]
            new = row.copy()
            new[t] = np.flatnonzero(wrong)[-1]
            changed.append(new)
        assert not right_rows(language, changed, level).any()
        for weaker in ("facts", "semantics", "syntax")[broken + 1 :]:
            assert right_rows(language, changed, weaker).all()
