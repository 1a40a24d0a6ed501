"""Rules at work: on rows whose fate is known, against brute force, and in parts as in one."""

from __future__ import annotations

import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import recursive_jax as rj
from recursive_jax.curate.near import NearDuplicates, bands_for
from recursive_jax.curate.novel import Pool, needed
from recursive_jax.curate.rules import equations
from recursive_jax.curate.select import select, select_files
from recursive_jax.curate.verifiers import rouge_l
from recursive_jax.curate.words import hashed_words, ngrams
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError

r = rj.rules


def texts(*given, **columns):
    return Dataset.from_rows([{"text": t, **{k: v[n] for k, v in columns.items()}} for n, t in enumerate(given)])


def kept(rule, data):
    return select(data, rule)[0].column("text")


def scored(*scores, parents=None):
    rows = [{"text": f"t{n}", "score": s} for n, s in enumerate(scores)]
    parents = parents or ["q"] * len(rows)
    return Dataset.from_rows([{**row, "parents": [p]} for row, p in zip(rows, parents, strict=True)])


def test_scores_decide():
    data = scored(1.0, 0.0, None, 0.5, parents=["a", "a", "b", "b"])
    assert kept(r.correct(), data) == ["t0"] and kept(r.wrong(), data) == ["t1", "t3"]
    assert kept(r.top(2), data) == ["t0", "t3"] and kept(r.top(9), data) == ["t0", "t1", "t3"]
    assert kept(r.best_of(), data) == ["t0", "t3"] and kept(r.cap(1), data) == ["t0", "t2"]
    assert kept(r.best_of(), scored(2.0, 2.0, 1.0)) == ["t0"]  # of equal ones the first
    rate = scored(1, 0, 1, 1, 0, 0, None, parents=["half", "half", "known", "known", "hard", "hard", "none"])
    assert kept(r.difficulty(0.2, 0.8), rate) == ["t0", "t1"] and kept(r.difficulty(0, 1), rate) == [
        f"t{n}" for n in range(6)
    ]
    with pytest.raises(InputError, match="holds texts"):
        kept(r.correct("text"), data)


def test_pairs_are_the_best_and_the_worst_of_a_question():
    data = scored(1.0, 0.2, 0.0, 0.5, 0.5, None, 0.4, 0.3, parents=list("aaabbbcc"))
    found, dropped = select(data, r.pairs())
    assert list(zip(found.column("chosen"), found.column("rejected"), strict=True)) == [("t0", "t2"), ("t6", "t7")]
    assert found.column("score") == [1.0, 0.4] and found.column("rejected_score") == [0.0, 0.3]
    assert found.column("rejected_id") == ["row/2", "row/7"] and sum(dropped.values()) == 6
    assert len(select(data, r.pairs(gap=0.5))[0]) == 1 and len(select(data.take([]), r.pairs())[0]) == 0


def test_texts_decide():
    data = texts("Draw a cat", "Write two words.", "- list", "Über", "", "withdraw it now", "Привет мир", "漢字 and x")
    assert kept(r.words(2, 3), data) == [
        "Draw a cat",
        "Write two words.",
        "- list",
        "withdraw it now",
        "Привет мир",
        "漢字 and x",
    ]
    assert kept(r.characters(high=4), data) == ["Über", ""]
    assert "Draw a cat" not in kept(r.without_keywords(["draw", "go to"]), data)
    assert "withdraw it now" in kept(r.without_keywords(["draw"]), data)  # whole words
    assert kept(r.without_keywords(["go to", "c++"]), texts("Go to it", "c++ it", "goto c+")) == ["c++ it", "goto c+"]
    assert kept(r.first_character(), data) == ["Draw a cat", "Write two words.", "withdraw it now"]
    assert kept(r.script("Cyrillic"), data) == ["Привет мир"] and kept(r.script("Han", 0.3), data) == ["漢字 and x"]
    assert kept(r.distinct("k"), texts("a", "b", "c", k=[1, 1, 2])) == ["a", "c"]
    for wrong, says in (
        (lambda: kept(r.script("Klingon"), data), "script of Unicode"),
        (lambda: r.without_keywords("a"), "list of words"),
        (lambda: kept(r.first_character("["), data), "not valid"),
    ):
        with pytest.raises(InputError, match=says):
            wrong()


def test_solutions_with_the_same_equations_are_one():
    assert equations("He has 2 + 3=5 <<2+3=5>> and then 5*2 = 10, in 1999 = x") == ("2+3", "2+3", "5*2")
    data = texts("so 2 + 3 = 5", "well, 2+3=5!", "3 + 2 = 5", "2 + 3 = 5", q=[1, 1, 1, 2])
    assert kept(r.distinct_equations(by="q"), data) == ["so 2 + 3 = 5", "3 + 2 = 5", "2 + 3 = 5"]


def test_valid_rows_of_the_language_are_those_that_it_wrote(language, tokenizer):
    rows = language.sample(0, 0, 30)
    broken = [np.r_[row[:2], row[1], row[2:]] if n % 2 else row for n, row in enumerate(rows)]
    data = Dataset.from_rows([{"text": str(n), "tokens": row.tolist()} for n, row in enumerate(broken)])
    whole = {str(n) for n in range(0, 30, 2)}
    assert set(kept(r.valid(language, "syntax"), data)) >= whole and set(kept(r.valid(language), data)) >= whole
    assert len(kept(r.valid(language, "syntax"), data)) < 30
    with pytest.raises(InputError, match="one of syntax"):
        r.valid(language, "truth")


word_lists = st.lists(st.lists(st.sampled_from([f"w{n}" for n in range(8)]), max_size=9), max_size=25)


@settings(max_examples=120, deadline=None)
@given(rows=word_lists, t=st.sampled_from([0.05, 0.3, 0.5, 0.7, 2 / 3, 0.95]))
def test_novel_decides_as_a_comparison_with_every_row(rows, t):
    pool, kept = Pool(t), []
    for row in rows:
        new = all(rouge_l(row, other) <= t for other in kept)
        assert (pool.closest(row) is None) == new
        if new:
            pool.add(row)
            kept.append(row)


def test_novel_has_bounds_that_hold():
    for t in (0.3, 0.7, 2 / 3):
        for m in range(1, 12):
            for n in range(1, 12):
                least = needed(t, m, n)
                assert 2 * least / (m + n) > t >= 2 * (least - 1) / (m + n)
    data = texts("the cat sat on the mat", "The cat sat on a mat!", "dogs bark", "")
    assert kept(r.novel(0.7), data) == ["the cat sat on the mat", "dogs bark", ""]
    assert kept(r.novel(0.7, known=["dogs bark"]), data) == ["the cat sat on the mat", ""]
    with pytest.raises(InputError, match="between 0 and 1"):
        r.novel(1.0)


def made_up(rng, count, words=60, vocabulary=3000):
    return [" ".join(f"w{n}" for n in rng.integers(0, vocabulary, words)) for _ in range(count)]


def edited(rng, text, edits):
    words = text.split()
    for at in rng.choice(len(words), edits, replace=False):
        words[at] = f"x{at}"
    return " ".join(words)


def jaccard(one, other, n=3):
    grams = lambda t: {tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)}
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b)


def test_near_duplicates_are_found_by_their_similarity():
    """One word in sixty changed leaves a Jaccard similarity of 0.9, eight leave half: by the exact one."""
    rng = np.random.default_rng(0)
    base = made_up(rng, 60)
    near, far = [edited(rng, t, 1) for t in base], [edited(rng, t, 8) for t in base]
    assert min(map(jaccard, base, near)) > 0.88 and max(map(jaccard, base, far)) < 0.7
    data = texts(*base, *near, *far)
    mask = np.asarray(NearDuplicates(0.8)(data))
    assert mask[:60].all() and (~mask[60:120]).sum() >= 58 and mask[120:].all()
    assert kept(r.unique(near=0.8), texts("a b", "a b", "a c", "", "")) == ["a b", "a c", "", ""]  # short; no words
    assert [bands_for(t, 128) for t in (0.5, 0.8, 0.95)] == [2, 4, 16]
    for t, rows in ((0.5, 2), (0.8, 4), (0.95, 16)):
        assert 1 - (1 - t**rows) ** (128 // rows) >= 0.99
    with pytest.raises(InputError, match="above 0 and up to 1"):
        r.unique(near=0.0)


def test_rows_of_one_meaning_are_found_by_their_embeddings(monkeypatch):
    states = {"a": [1, 0], "b": [0.99, 0.14], "c": [0, 1]}
    monkeypatch.setattr("recursive_jax.curate.near.embed", lambda model, texts: np.array([states[t] for t in texts]))
    assert kept(r.unique(similar=0.95, model="m"), texts("a", "b", "c", "a")) == ["a", "c"]
    with pytest.raises(InputError, match="give it a model"):
        r.unique(similar=0.9)


def test_words_and_their_runs_are_hashed_by_value():
    hashes, offsets = hashed_words(["The cat, the CAT!", "", None, "ça-va 3.5", "--", "cat the"])
    assert np.diff(offsets).tolist() == [4, 0, 0, 4, 0, 2] and hashes[0] == hashes[2] == hashes[9]
    grams, ends = ngrams(hashes, offsets, 2)
    assert np.diff(ends).tolist() == [3, 0, 0, 3, 0, 1] and grams[0] == grams[2] and grams[1] == grams[6] != grams[0]
    assert len(ngrams(hashes, offsets, 5)[0]) == 0
    assert hashes[0] == hashed_words(["the"])[0][0] == xxhash.xxh3_64_intdigest(b"the")


def test_planted_items_are_found_and_boilerplate_is_none():
    """Recall on planted items, whole and in part; and a template that all items share."""
    rng = np.random.default_rng(1)
    frame = "Read the following question with care and answer it in one sentence please"
    items = [f"{frame}: {t}" for t in made_up(rng, 80, 20)]
    clean = made_up(rng, 200, 80)
    planted = [f"{a} {i} {b}" for a, i, b in zip(clean[:80], items, clean[80:160], strict=True)]
    half = [f"{a} {' '.join(i.split()[:-6])} {b}" for a, i, b in zip(clean[:80], items, clean[80:160], strict=True)]
    framed = [f"{frame}: {t}" for t in clean[:50]]
    found = select(texts(*clean, *planted, *half, *framed), r.decontaminate(items))[0]
    by = found.column("contaminated_by")
    assert by[:200] == [None] * 200 and by[200:280] == list(range(80)) and by[280:360] == list(range(80))
    assert by[360:] == [None] * 50
    span = found.column("contaminated_span")[200]
    assert set(items[0].split(": ")[1].split()) <= set(span.split()) and span in planted[0]
    assert kept(r.decontaminate(items, drop=True), texts(*planted[:3], clean[0])) == [clean[0]]
    assert kept(r.decontaminate(items, drop=True), texts(*clean)) == list(
        clean
    )  # none of them has any n-gram of an item
    short, _ = select(texts("The answer is forty two, he said", "two forty"), r.decontaminate(["forty two", "seven"]))
    assert short.column("contaminated_by") == [0, None] and short.column("contaminated_span") == ["forty two", None]
    with pytest.raises(InputError, match="at least one"):
        r.decontaminate([])


def test_what_is_dropped_is_counted_and_shown(tmp_path):
    data = texts(*[f"row {n} " + "x " * (n % 7) for n in range(40)])
    found, dropped = select(data, [r.words(0, 6), lambda row: "3" not in row["text"]])
    assert dropped == {"0..6 words": 10, "<lambda>": 10}
    assert dropped.examples["0..6 words"] == [f"row/{n}: row {n} " + " ".join("x" * (n % 7)) for n in (5, 6, 12)]
    assert len(found) + sum(dropped.values()) == 40
    with rj.Run(tmp_path / "run", {}, seed=0, quiet=True) as run:
        stored = run.round(1).select("kept", data, [r.words(0, 6)])
        assert stored.manifest["counts"]["dropped_examples"] == {"0..6 words": dropped.examples["0..6 words"]}


def test_files_larger_than_memory_pass_in_parts(tmp_path, monkeypatch):
    """In parts of seven rows the rules decide as on all of them."""
    random.seed(0)
    rows = [{"text": " ".join(random.choices("abcdefgh", k=random.randint(1, 9))), "k": n % 5} for n in range(120)]
    data = Dataset.from_rows(rows)
    paths = [str(tmp_path / f"{n}.parquet") for n in range(3)]
    for n, path in enumerate(paths):
        pq.write_table(data.table.slice(n * 40, 40), path)
    rules = [r.unique(), r.unique(near=0.9), r.words(2, 9), r.novel(0.8), r.cap(9, by="k"), lambda row: row["k"] != 3]
    wanted, counts = select(data, rules)
    assert 5 < len(wanted) < 60
    monkeypatch.setattr("recursive_jax.curate.select.PART", 7)
    dropped = select_files(paths, str(tmp_path / "out.parquet"), rules)
    assert Dataset.read([str(tmp_path / "out.parquet")]).table.equals(wanted.table) and dropped == counts
    assert dropped.examples == counts.examples
    for wrong, says in (
        (lambda: select_files(paths, str(tmp_path / "out.parquet"), rules), "is there already"),
        (lambda: select_files(paths, str(tmp_path / "x.parquet"), r.top(2)), "must see all rows"),
        (lambda: select_files(paths, str(tmp_path / "x.parquet"), r.pairs()), "must see all rows"),
        (lambda: select_files([str(tmp_path / "no.parquet")], str(tmp_path / "x.parquet"), rules), "cannot be read"),
    ):
        with pytest.raises(InputError, match=says):
            wrong()
    assert not (tmp_path / "x.parquet").exists()
    pq.write_table(data.table.select(["text", "k"]), tmp_path / "plain.parquet")
    select_files([str(tmp_path / "plain.parquet")], str(tmp_path / "y.parquet"), r.words(2))
    assert Dataset.read([str(tmp_path / "y.parquet")])[0]["id"].startswith("row/")


def test_rows_that_fit_a_training():
    """Prompt, answer and end token, by one: a training row of n tokens predicts n and holds n + 1."""
    from recursive_jax.data.template import Template
    from recursive_jax.data.tokenizers import ByteTokenizer

    rows = [{"q": "a" * n, "out": "b"} for n in (1, 2, 3)]  # start, question, answer, end
    data, template = Dataset.from_rows(rows), Template("{q}", "{out}")
    sizes = [len(template.example(row, ByteTokenizer()).tokens) for row in rows]
    assert sizes == [4, 5, 6]
    assert list(r.fits(template, ByteTokenizer(), 4).keep(data)) == [True, True, False]
