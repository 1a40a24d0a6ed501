"""Recipes in which a teacher writes: a scripted one behind a server, whose every line is known, and small students."""

from __future__ import annotations

import json
import random
import re

import pytest

import recursive_jax as rj
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.recipes import load_config, run
from tests.openai_server import Server, running


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


WORDS = (
    "amber birch copper dune ember frost grove harbor iris jade kelp lotus mango north olive pearl quartz reef".split()
)


def draw(question, body):
    return random.Random(f"{question}{body.get('seed')}")


def teacher(question, body):
    """Writes what every recipe asks for, and now and then rubbish."""
    rng = draw(question, body)
    some = lambda n: " ".join(rng.sample(WORDS, n))
    if rng.random() < 0.1:
        return "###"
    if "series of tasks" in question or "more problems" in question:
        return "\n".join(f"{n}. Explain how {some(5)} differ" for n in range(9, 12)) + "\n12. Draw a graph of it"
    if question.startswith("Write") and "diverse tasks" in question:
        row = lambda: f"Name what {some(4)} share\nInput: <none>\nOutput: {some(3)}"
        return " " + "\n###\nInstruction: ".join(row() for _ in range(3))
    if "classification task" in question:
        return " Yes" if rng.random() < 0.5 else " No"
    if question.startswith("Write an example of the task"):
        return f"Label: {some(1)}\nInput: {some(3)}" if "Label:" in question else f"Input: {some(2)}\nOutput: {some(4)}"
    if "Rewrite the prompt" in question or "new prompt of the same field" in question:
        return f"Say at length how {some(6)} are alike"
    if "Equal or Not Equal" in question:
        return "Equal" if rng.random() < 0.2 else "Not Equal"
    if "Answer:\n" in question:
        return "I am sorry." if rng.random() < 0.2 else f"They are {some(4)}."
    if "from 1 to 100" in question:
        return f"Well.\nScore: {rng.randint(1, 100)}"
    if question.rstrip().endswith("[AI]"):
        return f" It is {some(3)}.\n[Human] And {some(2)}?\n[AI] That is {some(2)}."
    if question.rstrip().endswith("[Human]"):
        return f" Why {some(2)}?"
    raise AssertionError(f"nobody asks this: {question[-300:]}")


@pytest.fixture(scope="module")
def base(mesh, tmp_path_factory):
    """A student before: it has read a few instructions."""
    model = rj.transformer(rj.ModelConfig(layers=1, d_model=32, heads=2, max_length=512), ByteTokenizer(), mesh)
    folder = tmp_path_factory.mktemp("base") / "run"
    rows = [{"instruction": f"Explain {w}", "output": f"It is {w}."} for w in WORDS]
    with rj.Run(folder, {"name": "base"}, quiet=True) as made:
        made.round(0).train("base", model, rows, {"steps": 10, "batch": 8, "length": 128, "learning_rate": 3e-3})
        made.name_model("base", made.round(0), "base", default=True)
    return folder


SEEDS = [
    {"instruction": f"Tell me about {a} and {b}", "is_classification": n % 3 == 0,
     "instances": [{"input": a if n % 2 else "", "output": f"It is {b} with {a}."}]}
    for n, (a, b) in enumerate(zip(WORDS, WORDS[1:], strict=False))
]  # fmt: skip


def config_of(recipe, base, folder, **more):
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", SEEDS[:12]), ("test", SEEDS[12:16])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "recipe": recipe, "base": str(base), "epochs": 1,
        "task": {"path": str(folder / "train.jsonl"), "validation": str(folder / "test.jsonl")},
        "train": {"batch": 8, "length": 400, "learning_rate": 1e-3, "tensorboard": False},
        "sampling": {"max_tokens": 24}, **more,
    }  # fmt: skip
    (folder / f"{recipe}.yaml").write_text(json.dumps(raw))
    return load_config(folder / f"{recipe}.yaml")


def stored(run_folder, path):
    return Dataset.read([str(run_folder / path / "rows-00000.parquet")])


def again(config, folder, records):
    """A second start makes nothing anew."""
    before = (folder / "commits.jsonl").read_bytes()
    assert run(config, folder, quiet=True) == records and (folder / "commits.jsonl").read_bytes() == before
    return (folder / "report.html").read_text()


MORE = {
    "self_instruct": {"batches": 2, "requests": 4},
    "alpaca": {"batches": 2, "requests": 4},
    "evol_instruct": {"rounds": 2},
    "baize": {"lora": {"rank": 2}, "samples": 2},
}


@pytest.mark.parametrize(
    "recipe", ["alpaca", *(pytest.param(r, marks=pytest.mark.slow) for r in MORE if r != "alpaca")]
)
def test_a_student_learns_what_a_teacher_writes(recipe, base, tmp_path):
    with running(Server(write=teacher)) as server:
        config = config_of(recipe, base, tmp_path / "task", teacher=f"openai:test-model@{server.url}", **MORE[recipe])
        records = run(config, tmp_path / "run", quiet=True)
        count = len(server.asked)
        page = again(config, tmp_path / "run", records)
        assert len(server.asked) == count
    last = max(records, key=lambda r: r["round"])
    assert (
        records[0]["round"] == 0 and last["metrics"]["data_rows"] > (0 if recipe == "baize" else 3) and {"score", "ce_task"} <= last["metrics"].keys()
    )
    for text in ("What was written, and what was kept of it", "What is learnt from", "Answers to held-out rows"):
        assert text in page, text
    folder = tmp_path / "run/rounds" / f"{last['round']:04d}"
    examples = Dataset.read([str(folder / "examples/rows-00000.parquet")])
    assert all(examples.column("output")) and any(examples.column("synthetic"))
    if recipe in ("self_instruct", "alpaca"):
        for row in examples.where(synthetic=True).table.to_pylist():
            words = row["instruction"].split()
            assert 4 <= len(words) <= 150 and not re.search(r"(?i)\b(graph|draw)\b", row["instruction"])
            assert row["output"] != row["input"]
    if recipe == "self_instruct":
        kinds = stored(tmp_path / "run", "rounds/0001/kinds")
        labelled = stored(tmp_path / "run", "rounds/0001/labelled-instructions")
        assert len(labelled) == sum(k == "Yes" for k in kinds.column("kind"))
        asked = [stored(tmp_path / "run", f"rounds/0001/ask-{k}").column("shown") for k in (1, 2)]
        assert all(text.count("\n") == 5 for text in asked[0]) and all(text.count("\n") == 7 for text in asked[1])
    if recipe == "evol_instruct":
        kept, pool = (stored(tmp_path / "run", f"rounds/0001/{name}") for name in ("kept", "pool"))
        became = dict(zip(kept.column("source"), kept.column("asked"), strict=True))
        seed = stored(tmp_path / "run", "rounds/0000/seed")
        for row, old in zip(pool.table.to_pylist(), seed.column("asked"), strict=True):
            assert row["asked"] == became.get(row["id"], old)
        assert not any("sorry" in text for text in kept.column("output")) and 0 < len(kept) < len(pool)
    if recipe == "baize":
        rated, best = (stored(tmp_path / "run", f"rounds/0002/{name}") for name in ("rated", "best"))
        for parent, score in zip(best.column("parents"), best.column("score"), strict=True):
            own = [s for p, s in zip(rated.column("parents"), rated.column("score"), strict=True) if p == parent]
            assert score == max(s for s in own if s is not None)
