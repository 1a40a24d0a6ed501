"""Replies as rows: every parser on replies whose rows are known, on any text, cut anywhere, and in the time of its
length; templates that show examples; what is asked again."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recursive_jax as rj
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.parsers import (
    PARSERS,
    Answer,
    Completion,
    Json,
    Label,
    Numbered,
    ParseError,
    Score,
    Sections,
    Turns,
    parser_of,
)
from recursive_jax.data.template import Examples, Template
from recursive_jax.data.template_file import load_template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.dialogue import Dialogue, Step, hold
from recursive_jax.generate.generate import generate
from recursive_jax.generate.reading import read_record, read_replies
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.status import status_text

SCHEMA = {"properties": {"q": {"type": "string"}, "n": {"type": "integer"}}, "required": ["q"]}
TRIPLE = {"instruction": "Instruction:", "input": "Input:", "output": "Output:"}
KNOWN = [
    (Json(SCHEMA), '{"q": "a", "n": 3}', [{"q": "a", "n": 3}]),
    (Json(SCHEMA), 'Sure [see below], {here}:\n```json\n[{"q": "a"}, {"q": "b", "n": 1}]\n```\nDone {"q": "c"}.',
     [{"q": "a", "n": None}, {"q": "b", "n": 1}]),
    (Json(SCHEMA), '{"q": 3}', "schema"),
    (Json(SCHEMA), '{"q": "a", "n": 1e3}', [{"q": "a", "n": 1000.0}]),  # 1000.0 is an integer of JSON Schema's
    (Json(SCHEMA), '{"q": "a", "n": 9223372036854775808}', "no json"),
    (Json(), '{"q": NaN}', "no json"),
    (Json(), '{"q": "\\ud800"}', "no unicode"),
    (Json(), '{"a": {"b": 1}, oops', "no json"),  # not the inner object
    (Json(), "[]", "empty"),
    (Json(), "[" * 100_000, "no json"),
    (Json(), '[{"a": ' * 30_000, "no json"),
    (Json(key="items"), '{"items": [{"a": 1}]}', [{"a": 1}]),
    (Json(key="items"), '{"a": 1}', "no object"),
    (Sections(TRIPLE, "###", empty=("input",)),
     "1. Instruction: Add.\nInput: 1 2\nOutput: 3\n###\n2. Instruction: Sing.\nInput:\nOutput: la\n###\nInstruction: x",
     [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Sing.", "input": "", "output": "la"}]),
    (Sections(TRIPLE), "Instruction: a\nOutput: b", "missing input"),
    (Sections(TRIPLE), "Instruction: a\nInput:\nOutput: b", "empty input"),
    (Sections({"q": "Question:", "a": "Answer:"}, opened=True), " what?\nAnswer: that", [{"q": "what?", "a": "that"}]),
    (Sections({"q": "Question:", "a": "Answer:"}, opened=True), "Question: b\nAnswer: c", [{"q": "b", "a": "c"}]),
    (Numbered("task"), "Here:\n1. One\n2) Two\n   goes on\n- three", [{"task": "One"}, {"task": "Two\n   goes on"},
                                                                    {"task": "three"}]),
    (Numbered("task", opened=True), " One\n10. Two", [{"task": "One"}, {"task": "Two"}]),
    (Numbered("task", opened=True), "Here are more:\n\n9. One\n10. Two", [{"task": "One"}, {"task": "Two"}]),
    (Numbered("task", opened=True), "Say why:", [{"task": "Say why:"}]),
    (Numbered(), "In 1999. there was", "no items"),
    (Turns(), "[AI] hi [Human] a [AI] b [Human] c [AI] d [Human] e", [{"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}]),
    (Turns(), "[Human] a [AI] b [AI] c [Human] d [AI] e", [{"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
    (Turns(least=2), "[Human] a [AI] b", "few turns"),
    (Turns(opened=True), " a [AI] b", [{"messages": [{"role": "user", "content": "a"},
                                                     {"role": "assistant", "content": "b"}]}]),
    (Score(), "Good, but short.\nScore: 4", [{"score": 4.0, "score_text": "Good, but short."}]),
    (Score(), "Score: 4/5\n", [{"score": 4.0, "score_text": ""}]),
    (Score(), "Score: 4/10", "lenient score"),
    (Score(), "I give it 4 out of 5", "lenient score"),
    (Score(), "Score: 7", "score out of range"),
    (Score(), "none", "no score"),
    (Score(lenient=True), "**Score: 4** of 5, not 2", [{"score": 4.0, "score_text": ""}]),
    (Score(lenient=True), "about 3\nI say 2.5", [{"score": 2.5, "score_text": "about 3"}]),
    (Answer(), r"so \boxed{\frac{1}{2}} is 7", [{"answer": r"\frac{1}{2}"}]),
    (Answer(), "2 + 2 = 5\n#### 1,234\n", [{"answer": "1,234"}]),
    (Answer("number"), "it is $1,234.50, I think", [{"answer": "1234.50"}]),
    (Answer("number"), "from 3 to -7.", [{"answer": "-7"}]),
    (Answer("####"), "it is 7", "no answer"),
    (Answer("boxed"), r"\boxed{" * 50_000, "no answer"),
    (Label(("yes", "no")), " Yes.\n", [{"label": "yes"}]),
    (Label(("yes", "no")), "I say yes", "lenient label"),
    (Label(("yes", "no"), lenient=True), "I say yes, of course", [{"label": "yes"}]),
    (Label(("yes", "no"), lenient=True), "yes and no", "several labels"),
    (Label(("yes", "no"), lenient=True), "yesterday", "no label"),
    (Completion("{a} and {b}"), "x and y", [{"a": "x", "b": "y"}]),
    (Completion("{a} and {b}"), "x", "form"),
]  # fmt: skip


@pytest.mark.parametrize(("parser", "text", "wanted"), KNOWN)
def test_replies_whose_rows_are_known(parser, text, wanted):
    assert parser.read(text) == (ParseError(text, wanted) if isinstance(wanted, str) else wanted)
    if not isinstance(wanted, str):
        assert all(set(row) >= set(parser.columns) for row in wanted)


@pytest.mark.parametrize(("parser", "text", "wanted"), [
    (Json(SCHEMA), '[{"q": "a"}, {"q": "b"}, {"q": "c', [{"q": "a", "n": None}, {"q": "b", "n": None}]),
    (Json(SCHEMA), '{"q": "a', "cut"),
    (Sections(TRIPLE, "###"), "Instruction: a\nInput: b\nOutput: c\n###\nInstruction: d\nInput: e\nOutput: f",
     [{"instruction": "a", "input": "b", "output": "c"}]),
    (Sections(TRIPLE), "Instruction: a\nInput: b\nOutput: c", "cut"),
    (Numbered(), "1. one\n2. two\n3. thr", [{"item": "one"}, {"item": "two"}]),
    (Numbered(), "1. on", "cut"),
    (Turns(), "[Human] a [AI] b [Human] c [AI] d", [{"messages": [{"role": "user", "content": "a"},
                                                                 {"role": "assistant", "content": "b"}]}]),
    (Score(), "well\nScore: 1", "cut"),  # it may have become 10
    (Answer(), "let me think", "cut"),
    (Completion("{a}"), "half a", [{"a": "half a"}]),
    (Completion("{a}", whole=True), "half a", "cut"),
])  # fmt: skip
def test_what_stands_last_in_a_cut_reply_is_left_out(parser, text, wanted):
    assert parser.read(text, cut=True) == (ParseError(text, wanted) if isinstance(wanted, str) else wanted)


ANY = [Json(), Json(SCHEMA, key="k"), Sections(TRIPLE, "#"), Numbered(), Turns("H", "A"), Score("S"), Answer(),
       Label(("a", "b")), Completion("{a}: {b}")]  # fmt: skip
PARTS = ["{", "[", '[{"', "[{", '{"a":', "1. ", "\n1", "- ", "H", "A", "HA", "S", "S 1", "\\boxed{", "{a", "1,",
         "#", "####", " ", "\n", "Instruction:", "Input:Instruction:", "a"]  # fmt: skip
PIECES = st.sampled_from([*PARTS, "}", "]", '"q"', ":", ",", "1", "S 3", "Output:", "\\", "\ud800", "é"])


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(), st.lists(PIECES).map("".join)), cut=st.booleans())
def test_any_text_gives_rows_or_a_reason(text, cut):
    for parser in ANY:
        found = parser.read(text, cut)
        if isinstance(found, ParseError):
            assert found.text == text and found.reason
        else:
            assert found and all(set(row) >= set(parser.columns) for row in found)


@pytest.mark.parametrize("piece", PARTS)
def test_the_time_is_that_of_the_length(piece):
    """100 kB of anything in far less than a second; a search from every place would take minutes."""
    text = (piece * 100_000)[:100_000]
    begin = time.process_time()
    for parser in ANY:
        parser.read(text)
        parser.read(text, cut=True)
    assert time.process_time() - begin < 10


def test_bad_parsers_are_refused():
    for make, says in (
        (lambda: Json({"type": "nothing"}), "JSON Schema"),
        (lambda: Sections({}), "field: marker"),
        (lambda: Sections(TRIPLE, empty=("x",)), "is no section"),
        (lambda: Answer("last"), "form='last'"),
        (lambda: Label(("Yes", "yes.")), "differ in more"),
        (lambda: parser_of({"kind": "xml"}), "one of completion, json"),
        (lambda: parser_of({"kind": "label", "names": []}), "parser.names: label has labels"),
        (lambda: parser_of({"kind": "label"}), "labels"),
    ):
        with pytest.raises(InputError, match=says):
            make()
    assert set(PARSERS) == {"completion", "json", "sections", "numbered", "turns", "score", "answer", "label"}


@pytest.fixture(scope="module")
def writer(mesh):
    return rj.transformer(
        rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=128), ByteTokenizer(), mesh
    ).initialized(0)


@pytest.mark.parametrize("parser", [
    Json({"properties": {"n": {"type": "integer"}}, "required": ["n"]}, many=True), Json(SCHEMA, key="rows"),
    Label(("yes", "no (or so)")), Score(high=10, reasons=5), Score("[Rating] =", low=-2, high=2),
])  # fmt: skip
def test_a_constraint_of_the_parser_s_gives_replies_it_reads(parser, writer):
    """A model of random weights writes them."""
    asked = [{"task": "one"}, {"task": "two"}]
    found = generate(writer, asked, template=Template("{task}", parser=parser), each=4, constrained=True, max_tokens=90)
    ended = [r for r in found if r["status"] != "parse_error:cut"]
    assert len(ended) >= 2 and all(r["status"] in ("ok", "length") for r in ended)
    assert set(found.column("task")) == {"one", "two"}
    with pytest.raises(InputError, match="no constraint"):
        generate(writer, asked, template=Template("{task}", parser=Numbered()), constrained=True)


def replies(*rows):
    return Dataset.from_rows([{"id": f"r/{n}", "synthetic": True, **row} for n, row in enumerate(rows)])


def test_replies_become_rows_and_none_is_lost():
    template = Template("{q}", parser=Json({"properties": {"answer": {"type": "string"}, "n": {"type": "integer"}}}))
    data = replies(
        {"text": '[{"answer": "a", "n": 1}, {"answer": "b"}]', "tokens": [1, 2], "answer": "gold", "k": 7},
        {"text": "no", "answer": "gold", "k": 8},
        {"text": "", "status": "prompt_too_long", "answer": "gold", "k": 9},
    )
    found = read_replies(data, template)
    assert found.column("id") == ["r/0", "r/0#1", "r/1", "r/2"]
    assert found.column("status") == ["ok", "ok", "parse_error:no json", "prompt_too_long"]
    assert found.column("answer") == ["a", "b", None, None] and found.column("source_answer") == ["gold"] * 4
    assert found.column("n") == [1, None, None, None] and found.column("k") == [7, 7, 8, 9]
    assert [len(t) for t in found.tokens()] == [2, 0, 0, 0] and found.column("text")[2] == "no"
    records = [r for row in data for r in read_record(row, template)]
    for name in ("id", "status", "answer", "source_answer", "n", "k", "text"):
        assert [r[name] for r in records] == found.column(name)
    mixed = read_replies(
        replies({"text": '{"a": 1, "text": "x"}'}, {"text": '{"a": "x"}'}), Template("{q}", parser=Json())
    )
    assert mixed.column("a") == ["1", "x"] and mixed.column("reply_text") == ["x", None]  # of no one type: JSON texts
    assert mixed.column("text")[1] == '{"a": "x"}'
    thought = Template("{q}", parser=Label(("yes", "no")), after="</think>")
    found = read_replies(
        replies({"text": "<think>no?</think> yes"}, {"text": "<think>no", "status": "length"}), thought
    )
    assert found.column("label") == ["yes", None] and found.column("status")[1] == "parse_error:cut"


def test_what_failed_is_asked_again_and_nothing_else(writer, tmp_path):
    """Random letters begin with a vowel now and then: each row is asked until it does, at most nine times."""
    template = Template("{q}", parser=Completion("e{rest}"))
    rows = Dataset.from_rows([{"q": f"row {n}"} for n in range(12)])
    settings = {"max_tokens": 2, "temperature": 1.0, "regex": "[aei][a-z]"}
    once = generate(writer, rows, template=template, seed=3, **settings)
    again = generate(writer, rows, template=template, attempts=9, seed=3, **settings)
    fine = lambda data: [not s.startswith("parse_error") for s in data.column("status")]
    assert 0 < sum(fine(once)) < 12 and sum(fine(again)) > sum(fine(once)) and again.column("q") == rows.column("q")
    for n, ok in enumerate(fine(once)):
        assert not ok or again[n] == once[n]
    assert len(set(again.column("id"))) == 12

    run = Run(tmp_path / "run", {}, seed=0, quiet=True)
    first = run.round(1)
    made = first.generate("asked", writer, rows, settings, template=template, attempts=3)
    assert [p.name for p in first.path.glob("asked-replies*")] and made.value.column("q") == rows.column("q")
    assert sum(made.manifest["counts"]["status"].values()) == 12 and made.manifest["verb"] == "read"
    unread = made.value.column("status").count("parse_error:form")
    assert f"{unread} parse_error:form" in status_text(tmp_path / "run") and unread
    write_report(tmp_path / "run")
    assert f"parse_error:form: {unread}" in (tmp_path / "run" / "report.html").read_text()
    stored = lambda: {p: Path(p).stat().st_mtime_ns for p in first.path.glob("asked-replies*/manifest.json")}
    before = stored()
    run.close()
    with Run(tmp_path / "run2", {}, seed=0, fork=tmp_path / "run", quiet=True) as run:
        other = Template("{q}", parser=Completion("{letter}"))
        read = run.round(1).generate("asked", writer, rows, settings, template=other)
        assert read.value.column("letter") and set(read.value.column("status")) <= {"ok", "length"}
        copied = run.round(1).path / "asked-replies" / "manifest.json"
        assert copied.read_text() == (first.path / "asked-replies" / "manifest.json").read_text()  # nothing is asked
    assert stored() == before


def test_examples_are_drawn_for_each_row_and_never_the_row_itself():
    pool = [{"q": f"q{n}", "a": f"a{n}"} for n in range(6)]
    template = Template("Q: {q}\n", "A: {a}", examples=Examples(((pool, 3),), seed=1))
    asked = [template.asks(row) for row in pool]
    for n, text in enumerate(asked):
        assert text.endswith(f"Q: q{n}\n") and text.count(f"q{n}\n") == 1 and text.count("A: a") == 3
    assert len({tuple(sorted(t.split("\n\n")[:-1])) for t in asked}) > 1 and asked[0] == template.asks(pool[0])
    two = Examples(((pool, 2), ([{"q": "new", "a": "x"}], 1)), prompt="{number}. {q}", completion="", shuffle=False)
    fixed = Template("Q: {q}\n", "A: {a}", examples=Examples(((pool, 3),), seed=1, fixed=True))
    begins = [fixed.asks({"q": f"new {n}"}).rpartition("Q: ")[0] for n in range(4)]
    assert len(set(begins)) == 1 and fixed.asks(pool[0]).count("q0\n") == 1  # it is no example of itself
    of_texts = [{"text": f"t{n}", "intent": "x"} for n in range(3)]  # one class, and other texts
    assert Template("{text}", "{intent}", examples=Examples(((of_texts, 2),))).asks(of_texts[0]).count("t0") == 1
    lines = Template("{q}", examples=dataclasses.replace(two, between="\n")).asks({"q": "?"}).split("\n")
    assert lines[2] == "3. new" and lines[0].startswith("1. q") and lines[-1] == "?"
    chatted = Template("{q}", "{a}", "be brief", True, examples=Examples(((pool, 2),))).messages({"q": "?", "a": "!"})
    assert [m["role"] for m in chatted] == ["system", *["user", "assistant"] * 3]
    with pytest.raises(InputError, match="4 examples are wanted of a pool of 1"):
        Examples((([{"q": "x"}], 4),))
    with pytest.raises(InputError, match="beside the row"):
        Template("{q}", examples=Examples((([{"q": "x"}], 1),))).asks({"q": "x"})


def test_templates_are_written_as_yaml(tmp_path):
    (tmp_path / "seeds.jsonl").write_text('{"q": "a"}\n{"q": "b"}\n')
    path = tmp_path / "t.yaml"
    path.write_text(
        f'prompt: "Like {{q}}:\\n1."\nparser: {{kind: numbered, field: q, opened: true}}\n'
        f"examples: {{path: {json.dumps(str(tmp_path / 'seeds.jsonl'))}, count: 1, prompt: '- {{q}}'}}\n"
    )
    template = load_template(str(path), ByteTokenizer())
    assert template.parser == Numbered("q", opened=True) and not template.chat
    assert template.asks({"q": "a"}) == "- b\n\nLike a:\n1."
    for text, says in (
        ("prompts: x", "prompts is no key"),
        ("prompt: [1]", "no a text"),
        ("completion: x", "has no prompt"),
        ("prompt: x\nchat: true", "no chat template"),
        ("prompt: x\nparser: numbered", "settings are wanted"),
        ("prompt: x\nparser: {kind: numbred}", "numbred"),
        ("prompt: x\nexamples: {count: 2}", "needs a path"),
        ("prompt: '{a.b}'", "plain name"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=says):
            load_template(str(path), ByteTokenizer())


class Says:
    """Stands for a model: what is read of each row, turn by turn."""

    def __init__(self, *answers):
        self.answers, self.asked = answers, []

    def __call__(self, turn, rows, template):
        self.asked.append([template.asks(row) for row in rows])
        texts = [self.answers[turn](row) for row in rows]
        made = [
            {**row, "id": f"t{turn}/{n}", "text": text} for n, (row, text) in enumerate(zip(rows, texts, strict=True))
        ]
        return read_replies(Dataset.from_rows(made), template)


def test_a_dialogue_goes_on_until_it_is_done():
    """Answer, critique, refine: the row that is good ends, the one that cannot be read ends with its reason."""
    answer = Step(Template("Q: {q} {feedback}", "{answer}"))
    critique = Step(Template("{q} -> {answer}?", parser=Label(("good", "bad"), "verdict")), {"feedback": "({verdict})"})
    talk = Dialogue((answer, critique), most=6, until=("verdict", "good"), start={"feedback": ""})
    data = Dataset.from_rows([{"q": q} for q in "abc"])
    model = Says(
        lambda row: f"first {row['q']}",
        lambda row: {"a": "good", "b": "bad", "c": "hm"}[row["q"]],
        lambda row: f"second {row['q']}",
        lambda row: "good",
    )
    found = hold(talk, data, model)
    assert model.asked == [["Q: a ", "Q: b ", "Q: c "], ["a -> first a?", "b -> first b?", "c -> first c?"],
                           ["Q: b (bad)"], ["b -> second b?"]]  # fmt: skip
    assert found.column("answer") == ["first a", "second b", "first c"]
    assert found.column("status") == ["ok", "ok", "parse_error:no label"] and found.column("turns") == [2, 4, 2]
    assert found.column("replies")[1] == ["first b", "bad", "second b", "good"]
    assert found.column("parents") == [["row/0"], ["row/1"], ["row/2"]] and found.column("verdict") == [
        "good",
        "good",
        None,
    ]
    with pytest.raises(InputError, match="at least one step"):
        Dialogue((), 3)


def test_self_chat_makes_a_transcript_and_is_kept_turn_by_turn(writer, tmp_path):
    line = lambda who: Step(Template("{talk}\n" + who, "{line}"), {"talk": "{talk}\n" + who + " {line}"})
    talk = Dialogue((line("[Human]"), line("[AI]")), most=4, start={"talk": "About {topic}."})
    rows = [{"topic": "cats", "talk": "About cats."}, {"topic": "dogs", "talk": "About dogs."}]
    settings = {"max_tokens": 4, "regex": "[a-z]{4}"}
    found = generate(writer, rows, template=talk, **settings)
    for row, topic in zip(found, ("cats", "dogs"), strict=True):
        first, *lines = row["talk"].split("\n")
        assert first == f"About {topic}." and [x.split()[0] for x in lines] == ["[Human]", "[AI]"] * 2
        assert [x.split()[1] for x in lines] == row["replies"] and row["turns"] == 4
    assert len(generate(writer, rows, template=talk, each=2, **settings)) == 4
    with Run(tmp_path / "run", {}, seed=0, quiet=True) as run:
        stored = run.round(1).generate("talk", writer, rows, settings, template=talk)
        assert stored.value.column("turns") == [4, 4]
        assert {f"talk-{n}" for n in range(1, 5)} <= {p.name for p in run.round(1).path.iterdir()}
        again = run.round(1).generate("talk", writer, rows, settings, template=talk)
        assert again.value.table.equals(stored.value.table)
