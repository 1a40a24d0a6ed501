"""Symbol tuning's builder, linked pairs, retrieval-augmented rows and API calls: audits of what is built, and small
trainings; every definition against counts, `transformers` or rows written by hand."""

from __future__ import annotations

import collections

import jax
import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.config import MeshConfig, ModelConfig
from recursive_jax.curate.api_calls import calls_in, check_call
from recursive_jax.data.links import RELATIONS, Linked, LinkGraph, PairSource, linked_document, read_linked
from recursive_jax.data.retrieval import Bm25, Mixture, Question, raft_rows, with_documents
from recursive_jax.data.symbols import FORMATS, Labelled, letters, symbol, symbol_rows
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from recursive_jax.errors import InputError
from recursive_jax.mesh import make_mesh
from recursive_jax.models.model import transformer
from recursive_jax.objectives.linked import LinkedPairs, relation_logits
from recursive_jax.recipes import load_config
from recursive_jax.recipes.symbol_tuning import tasks as symbol_tasks
from recursive_jax.rounds.linkbert import save_linkbert

# Symbol tuning (arXiv:2305.08298).


@pytest.fixture(scope="module")
def moods():
    rows = [(f"{w} day number {n}", mood) for mood, w in (("glad", "sunny"), ("sad", "rainy"), ("mad", "stormy"))
            for n in range(12)]  # fmt: skip
    return Labelled("moods", tuple(rows), "How does it feel?")


def test_symbols_of_tuning_and_evaluation_have_none_in_common():
    assert [letters(n) for n in (0, 25, 26, 701, 702)] == ["a", "z", "aa", "zz", "aaa"]
    words = [f"w{n}" for n in range(300)] + ["cat", "17"]  # a string of letters and a number: of the other kinds
    assert not {"cat", "17"} & {symbol(np.random.default_rng([3, n]), "evaluation", words) for n in range(3000)}
    with pytest.raises(InputError, match="without a label"):
        Labelled("t", (("a", "x"), ("b", "")))
    drawn = {split: {symbol(np.random.default_rng([1, n]), split, words) for n in range(4000)}
             for split in ("tuning", "evaluation")}  # fmt: skip
    assert not drawn["tuning"] & drawn["evaluation"]
    kind = lambda s: "number" if s.isdigit() else "word" if s[0] == "w" and s[1:].isdigit() else "letters"
    kinds = collections.Counter(kind(symbol(np.random.default_rng([2, n]), "tuning", words)) for n in range(3000))
    assert all(abs(count - 1000) < 4 * 26 for count in kinds.values())  # a standard error of 26
    assert max(int(s) for s in drawn["tuning"] if s.isdigit()) < 10_000
    assert min(int(s) for s in drawn["evaluation"] if s.isdigit()) >= 10_000


def test_a_prompt_shows_every_class_and_no_label(moods):
    """Bijective symbols, every class as often, the query never among the exemplars, no natural label anywhere."""
    for row in symbol_rows([moods], 60, seed=3, per_class=(2, 4)):
        assert len(set(row["symbols"])) == 3
        assert not [label for label in moods.classes if label in row["prompt"]], row["prompt"]
        shown = row["prompt"].split("\n\n")[:-1]
        counts = collections.Counter(part.rsplit("\n", 1)[1].rsplit(" ", 1)[1] for part in shown)
        assert set(counts) == set(row["symbols"]) and len(set(counts.values())) == 1
        query = row["prompt"].split("\n\n")[-1]
        asked = next(text for text, _ in moods.rows if f"{text}\n" in query)
        assert not any(f"{asked}\n" in part for part in shown)
        label = dict(moods.rows)[asked]
        assert row["completion"] == f" {row['symbols'][moods.classes.index(label)]}"
        assert row["choices"][row["answer"]] == row["completion"].strip()
    assert len({r["prompt"].split(" ")[0] for r in symbol_rows([moods], 60)}) >= 6  # of the formats' beginnings
    assert len(FORMATS) == 10


def test_flipped_labels_and_instructions(moods):
    natural, flipped = (
        symbol_rows([moods], 5, seed=1, labels=kind, instruction=True) for kind in ("natural", "flipped")
    )
    assert all(r["prompt"].startswith("How does it feel?") for r in (*natural, *flipped))
    after = {"glad": "mad", "mad": "sad", "sad": "glad"}
    assert [after[r["completion"].strip()] for r in natural] == [r["completion"].strip() for r in flipped]
    with pytest.raises(InputError, match="one row of the class"):
        symbol_rows([Labelled("few", (("a", "x"), ("b", "y")))], 1)


def test_the_recipe_holds_out_pairs_of_classes():
    config = load_config("configs/symbol_tuning.yaml")
    tuned, held_out = symbol_tasks(config)
    assert (len(tuned), len(held_out)) == (6, 3)
    assert not {c for t in tuned for c in t.classes} & {c for t in held_out for c in t.classes}
    assert held_out[0].instruction == "Which intent has the utterance, GetWeather or PlayMusic?"
    with pytest.raises(InputError, match="Weather is no class"):
        symbol_tasks(load_config("configs/symbol_tuning.yaml", ["held_out=[Weather, PlayMusic]"]))


# Links (arXiv:2203.15827).


@pytest.fixture(scope="module")
def web():
    """Twelve documents; the first is linked to from all others, each of which links to its neighbour, too."""
    rng = np.random.default_rng(0)
    docs = [Linked(f"d{n}", "", () if n == 0 else ("d0", f"D{(n % 11) + 1}", "nowhere", f"d{n}")) for n in range(12)]
    segments = [[rng.integers(5, 50, 6) for _ in range(3)] for _ in docs]
    return segments, LinkGraph.of(docs)


def test_pairs_are_as_often_and_neighbours_by_one_over_in_degree(web):
    segments, graph = web
    assert graph.in_degree.tolist() == [11] + [1] * 11
    source, rng = PairSource(segments, graph), np.random.default_rng(1)
    where = {s.tobytes(): (n, i) for n, doc in enumerate(segments) for i, s in enumerate(doc)}
    kinds, to_hub = collections.Counter(), collections.Counter()
    for _ in range(30_000):
        a, b, relation = source.draw(rng)
        (n, i), (m, j) = where[a.tobytes()], where[b.tobytes()]
        kinds[relation] += 1
        if RELATIONS[relation] == "contiguous":
            assert (m, j) == (n, i + 1)
        elif RELATIONS[relation] == "linked":
            assert m in graph.neighbours[n]
            to_hub[m == 0] += 1
        else:
            assert m != n and m not in graph.neighbours[n] and n not in graph.neighbours[m]
    assert all(abs(count / 30_000 - 1 / 3) < 0.01 for count in kinds.values())
    # 1/11 against 1/1: a twelfth of the links; 10,000 draws have a standard error of 0.0028.
    assert to_hub[True] / sum(to_hub.values()) == pytest.approx(1 / 12, abs=0.011)
    with pytest.raises(InputError, match="no pair of segments is linked"):
        PairSource(segments, LinkGraph(tuple(() for _ in segments)))


def test_links_are_read_from_markdown_and_wiki_text(tmp_path):
    one = linked_document("a", "See [[Other page|that]] and [[B#part]], [c](sub/c.md#x), [web](https://x.y).")
    assert one.text == "See that and B, c, web."
    assert one.links == ("Other page", "B", "c")
    (tmp_path / "sub").mkdir()
    for name, text in (
        ("a.md", "to [c](sub/c.md)"),
        ("sub/c.md", "to [[a]]"),
        ("b.wiki", "alone"),
        (".x.md", "hidden"),
    ):
        (tmp_path / name).write_text(text)
    found = read_linked(tmp_path)
    assert [d.name for d in found] == ["a", "b", "c"]
    assert LinkGraph.of(found).neighbours == ((2,), (), (0,))
    (tmp_path / "c.md").write_text("again")
    with pytest.raises(InputError, match="two documents called c"):
        read_linked(tmp_path)


@pytest.fixture(scope="module")
def bert(mesh):
    tokenizer = ByteTokenizer()
    config = ModelConfig(
        layers=1, d_model=32, heads=4, d_ff=64, max_length=32, vocab=260, causal=False, block="post", norm="layer",
        final_norm=False, embedding_norm=True, position="learned", head="transform", head_bias=True, bias=True,
        gated=False, activation="gelu", token_types=2, norm_eps=1e-12,
    )  # fmt: skip
    return transformer(config, tokenizer, mesh)


DOCUMENTS = [{"name": f"d{n}", "text": f"document {n} says {chr(97 + n) * 40}", "links": [f"d{(n + 1) % 8}"]}
             for n in range(8)]  # fmt: skip


@pytest.mark.slow
def test_linked_pairs_train_alike_on_eight_devices(bert):
    settings = {"steps": 3, "batch": 8, "length": 32, "learning_rate": 1e-2, "quiet": True}
    one = rj.train(bert, DOCUMENTS, LinkedPairs(), **settings)
    wide = rj.train(bert.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))), DOCUMENTS, LinkedPairs(), **settings)
    assert one.summary["loss"] == pytest.approx(wide.summary["loss"], rel=1e-3)
    with pytest.raises(InputError, match="token_types=2"):
        LinkedPairs().resolved(transformer(ModelConfig(layers=1, d_model=32, heads=2), ByteTokenizer(), make_mesh()))


@pytest.mark.parity
def test_an_exported_linkbert_is_transformers(bert, tmp_path):
    """`BertForPreTraining` with three relations: no missing keys, equal logits of both heads."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    trained = rj.train(bert, DOCUMENTS, LinkedPairs(), steps=2, batch=8, length=32, quiet=True)
    folder = save_linkbert(trained.model, trained.extra.params, tmp_path / "linkbert")
    config = transformers.BertConfig.from_pretrained(folder)
    theirs = transformers.BertForPreTraining(config)
    theirs.cls.seq_relationship = torch.nn.Linear(config.hidden_size, 3)
    from safetensors.torch import load_file

    missing, unexpected = theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    theirs.tie_weights()
    batches = LinkedPairs().resolved(bert).pack(LinkedPairs().rows(DOCUMENTS, bert.tokenizer), bert, 32)
    batches.begin(4, 0)
    batch = batches.next(0)
    with torch.no_grad():
        out = theirs.eval()(
            input_ids=torch.tensor(batch["tokens"]).long(),
            attention_mask=torch.tensor(batch["segments"]).long(),
            token_type_ids=torch.tensor(batch["types"]).long(),
        )
    ours = np.asarray(trained.model.logits(batch["tokens"], batch["segments"], batch["types"]))
    real = batch["segments"] > 0
    np.testing.assert_allclose(ours[real], out.prediction_logits.numpy()[real], atol=2e-4)
    states = trained.model.states(batch["tokens"], batch["segments"], batch["types"])
    with jax.set_mesh(bert.mesh):
        relations = np.asarray(relation_logits(trained.extra.params, states))
    np.testing.assert_allclose(relations, out.seq_relationship_logits.numpy(), atol=2e-4)


# Retrieval (arXiv:2305.15334, 2403.10131).

CARDS = [f"{name}({arg}: str). {what}" for name, arg, what in (
    ("load_picture", "path", "Opens a picture file"), ("send_mail", "address", "Sends a letter by mail"),
    ("play_song", "title", "Plays a song aloud"), ("book_table", "place", "Reserves a table to dine"),
    ("find_route", "city", "Shows the way to a city"),
)]  # fmt: skip


def test_bm25_finds_by_words_and_stands_in_any_template():
    found = Bm25(CARDS)
    assert [hits[0] for hits in found.search(["play me a song", "a table to dine please"], 2)] == [2, 3]
    rows = with_documents([{"question": "the way to the city"}], found, k=1)
    assert rows[0]["documents"] == CARDS[4]
    with pytest.raises(InputError, match="no texts"):
        Bm25([])


@pytest.mark.parity
def test_bm25_is_its_formula():
    """Lucene's: idf = ln(1 + (N - n + 0.5) / (n + 0.5)), tf / (tf + k1 (1 - b + b |d| / avg))."""
    bm25s = pytest.importorskip("bm25s")
    texts = ["a b b c", "a c", "b b b d e f", "g"]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords=None, show_progress=False, token_pattern=r"\w+"), show_progress=False)
    words = [t.split() for t in texts]
    mean = np.mean([len(w) for w in words])
    score = lambda d, w: (
        np.log(1 + (4 - (n := sum(w in x for x in words)) + 0.5) / (n + 0.5))
        * d.count(w) / (d.count(w) + 1.5 * (1 - 0.75 + 0.75 * len(d) / mean))
    )  # fmt: skip
    found = index.get_scores(["b", "c"])
    np.testing.assert_allclose(found, [score(d, "b") + score(d, "c") for d in words], rtol=1e-4)


def test_rows_hold_golden_edited_and_missing_documents_at_their_rates():
    questions = [Question(f"q{n}", f"call{n % 5}()", n % 5) for n in range(2000)]
    edit = lambda document, answer, rng: (document.replace("(", "_new("), answer.replace("(", "_new("))
    rows = raft_rows(questions, CARDS, Mixture(golden=0.8, edited=0.25, distractors=3), edit=edit, missing="unknown")
    kinds = collections.Counter(r["kind"] for r in rows)
    for kind, share in (("missing", 0.2), ("edited", 0.2), ("golden", 0.6)):
        assert kinds[kind] / 2000 == pytest.approx(share, abs=0.045)  # four standard errors
    for q, row in zip(questions, rows, strict=True):
        shown = [part.split(": ", 1)[1] for part in row["prompt"].split("\n\n")[:-1]]
        assert len(shown) == 4 and len(set(shown)) == 4
        if row["kind"] == "missing":
            assert CARDS[q.document] not in shown and row["completion"] == " unknown" and row["place"] == -1
        else:
            golden = edit(CARDS[q.document], "", None)[0] if row["kind"] == "edited" else CARDS[q.document]
            assert shown[row["place"]] == golden
            assert row["completion"].endswith("_new()") == (row["kind"] == "edited")
    assert len({r["place"] for r in rows}) == 5
    quoted = raft_rows(questions[:1], CARDS, Mixture(golden=1.0), quotes=True)[0]
    assert f"##begin_quote##{CARDS[0]}##end_quote## <ANSWER>: call0()" in quoted["completion"]
    hard = raft_rows(questions[:5], CARDS, Mixture(golden=1.0, distractors=2), near=Bm25(CARDS))
    assert all(r["kind"] == "golden" for r in hard)
    with pytest.raises(InputError, match="there are 4 documents"):
        raft_rows(questions[:4], CARDS[:4], Mixture(0.5, 0.0, 3))  # without the golden one it takes one more
    with pytest.raises(InputError, match="edit="):
        raft_rows(questions, CARDS, Mixture(edited=0.5))


def test_a_task_looks_its_documents_up(tmp_path):
    (tmp_path / "cards.txt").write_text("\n".join(CARDS))
    (tmp_path / "rows.jsonl").write_text('{"question": "play a song", "answer": "x"}\n' * 10)
    config = rj.TaskConfig(
        path=str(tmp_path / "rows.jsonl"),
        prompt="{documents}\n{question}",
        completion="{answer}",
        retrieve={"path": str(tmp_path / "cards.txt"), "k": 1},
    )
    from recursive_jax.data.template import task_rows

    train, held_out, _ = task_rows(config, 0)
    assert {r["documents"] for r in (*train, *held_out)} == {CARDS[2]}


CALLS = {
    "right": ["torch.hub.load(repo='a/b', model=\"m\", n=3)",
              "```python\ntorch.hub.load(model='m', n=3.0, repo='a/b')\n```",
              "Use it so: torch.hub.load(n=3, repo='a/b', model='m'). It works."],
    "wrong": ["torch.hub.load(repo='a/b', model='m', n=4)", "torch.hub.load(repo='a/b', model='m')",
              "torch.hub.load(repo='a/b', model='m', n=3, more=1)", "torch.hub.list('a/b')",
              "torch.hub.load(repo='a/b', model='m', n=True)"],
    "hallucination": ["torch.hub.fetch(repo='a/b', model='m', n=3)", "download('m')"],
    "no call": ["I do not know.", "", "torch.hub.load"],
}  # fmt: skip


@pytest.mark.parametrize(("verdict", "text"), [(v, t) for v, texts in CALLS.items() for t in texts])
def test_a_call_is_judged_by_its_syntax_tree(verdict, text):
    wanted, apis = "torch.hub.load(repo='a/b', model='m', n=3)", ("torch.hub.load", "torch.hub.list")
    assert check_call(text, wanted, apis) == verdict
    graded = rj.rewards.api_call("answer", apis=apis)([{"text": text, "answer": wanted}])
    assert graded == [float(verdict == "right")]


def test_alternatives_and_odd_calls():
    assert check_call("f(x=[1, 2.0], y={'a': None})", "f(x=(1, 2), y={'a': None})") == "right"
    for value, fits in (("'cat'", True), ("'dog'", True), ("'cow'", False)):
        assert (check_call(f"f(x={value})", "f(x=one_of('cat', 'dog'))") == "right") is fits
    assert [c.name for c in calls_in("f(g(1))")] == ["f", "g"]
    assert check_call("f(a=red)", "f(a='red')") == "wrong" and check_call("f(a=1, **b)", "f(a=1)") == "wrong"
    with pytest.raises(InputError, match="no call"):
        check_call("f()", "not a call")
    assert calls_in("(" * 500) == []


def test_bpe_words_for_links_have_segments(mesh):
    """A tokenizer of words cuts documents into segments that hold whole tokens, and short documents have one."""
    tokenizer = FileTokenizer.train_bpe([d["text"] for d in DOCUMENTS], 300)
    config = ModelConfig(layers=1, d_model=32, heads=2, max_length=16, causal=False, token_types=2)
    model = transformer(config, tokenizer, mesh, LinkedPairs().extra_ids(tokenizer))
    batches = LinkedPairs(segment=5).resolved(model).pack(LinkedPairs().rows(DOCUMENTS, tokenizer), model, 16)
    batches.begin(16, 0)
    batch = batches.next(0)
    assert (batch["types"].sum(1) <= 6).all() and set(batch["relation"].tolist()) <= {0, 1, 2}
