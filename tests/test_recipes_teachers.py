"""Recipes in which a teacher writes: a scripted one behind a server, whose every line is known, and small students."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
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
    rows = [{"prompt": f"### Instruction:\nExplain {w}\n\n### Response:\n", "completion": f"It is {w}."} for w in WORDS]
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
        records[0]["round"] == 0
        and last["metrics"]["data_rows"] > (0 if recipe == "baize" else 3)
        and {"score", "ce_task"} <= last["metrics"].keys()
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
            rows = zip(*map(rated.column, ("parents", "score", "status")), strict=True)
            assert score == max(s for p, s, status in rows if p == parent and s is not None and status == "ok")


# ---- from broad to narrow


INTENTS = {"weather": ("rain", "sun", "snow", "wind"), "music": ("song", "album", "band", "tune")}
CITIES = ("rome", "oslo", "lima", "bern", "cairo")


def utterance(rng, intent):
    word, where = rng.choice(INTENTS[intent]), rng.choice(("in", "of", "for", "near"))
    return f"{word} {where} {rng.choice(CITIES)} {rng.randint(1, 99)}"


def broad(question, body):
    """Goes on with a list of the class that it is shown; of whole rows with whole rows; labels by a word."""
    rng = draw(question, body)
    if "Different examples of" in question:
        intent = re.findall(r"intent: (\w+)\n", question)[-1]
        lines = [utterance(rng, intent) for _ in range(4)]
        return " " + "\n".join(f"{n}. {line}" if n else line for n, line in enumerate([*lines, "x", lines[0]]))
    if question.rstrip().endswith("text:"):
        rows = [(utterance(rng, intent), intent) for intent in ("music", "weather")]
        return " " + "\n\n".join(f"{'text: ' * (n > 0)}{t}\nintent: {i}" for n, (t, i) in enumerate(rows))
    last = question.rstrip().split("\n")[-1]
    return next((i for i, words in INTENTS.items() if any(w in last for w in words)), "none")


def narrow_config(folder, url, **more):
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for name, count in (("train", 6), ("test", 6)):
        rows = [{"text": utterance(rng, i), "intent": i} for _ in range(count) for i in INTENTS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "recipe": "broad_to_narrow", "teacher": f"openai:test-model@{url}", "rows": 48, "per_request": 4, "shots": 3,
        "task": {"path": str(folder / "train.jsonl"), "validation": str(folder / "test.jsonl"),
                 "prompt": "{text}\n", "completion": "{intent}"},
        "model": {"layers": 1, "d_model": 48, "heads": 2, "max_length": 64},
        "train": {"steps": 8, "batch": 16, "length": 48, "learning_rate": 3e-3, "tensorboard": False},
        "sampling": {"max_tokens": 10}, **more,
    }  # fmt: skip
    (folder / "narrow.yaml").write_text(json.dumps(raw))
    return load_config(folder / "narrow.yaml")


@pytest.mark.slow
def test_a_broad_teacher_and_a_narrow_student(tmp_path):
    """All classes are asked for alike; kept rows are new, none of the held-out ones, of the class that was asked for;
    teacher, seed's student and student are measured on the same rows; the student is exported."""
    with running(Server(write=broad)) as server:
        config = narrow_config(tmp_path / "task", server.url, verify="teacher")
        records = run(config, tmp_path / "run", quiet=True)
        page = again(config, tmp_path / "run", records)
    named = {(r["name"], r["round"]): r["metrics"] for r in records}
    assert named["teacher", 0]["accuracy"] == 1.0 and named["speed", 1]["rows_per_second"] > 0
    first, last = named["evaluation", 0], named["evaluation", 1]
    assert first["rows"] == last["rows"] == 12 and last["data_rows"] > first["data_rows"] == 12
    assert last["gain"] == pytest.approx(last["accuracy"] - first["accuracy"]) and set(last["by_class"]) == set(INTENTS)
    asked, kept = (stored(tmp_path / "run", f"rounds/0001/{name}") for name in ("asked", "verified"))
    assert [asked.column("intent").count(i) for i in INTENTS] == [6, 6]
    held = {json.loads(line)["text"] for line in (tmp_path / "task/test.jsonl").open()}
    for row in kept.table.to_pylist():
        assert row["text"] not in held and row["text"].split()[0] in INTENTS[row["intent"]]
    assert len(set(kept.column("text"))) == len(kept) == last["data_rows"] - 12
    for text in ("student of the seed", "teacher, shown seed rows", "By class", "What the generated rows lack"):
        assert text in page, text
    exported = rj.load_model(str(tmp_path / "run/exported"))
    student = rj.load_model(str(tmp_path / "run"))
    ids = np.arange(10)[None] + 65
    np.testing.assert_allclose(exported.logits(ids), student.logits(ids), atol=1e-5)


@pytest.mark.slow
def test_whole_rows_are_asked_for_where_there_are_no_classes(tmp_path):
    with running(Server(write=broad)) as server:
        config = narrow_config(tmp_path / "task", server.url, rounds=2)
        task = config.task.model_copy(update={"completion": "{intent}: {text}"})
        records = run(config.model_copy(update={"task": task}), tmp_path / "run", quiet=True)
    sizes = [r["metrics"]["data_rows"] for r in records if r["name"] == "evaluation"]
    assert sizes == sorted(sizes) and sizes[0] == 12 < sizes[2]


def test_a_student_that_is_not_narrow_is_refused(base, tmp_path):
    config = narrow_config(tmp_path / "task", "http://127.0.0.1:9/v1").model_copy(update={"teacher": str(base)})
    with pytest.raises(InputError, match=r"of the teacher's [\d,]+: at most 0.1 is narrow"):
        run(config, tmp_path / "run", quiet=True)


# ---- backtranslation


@pytest.mark.slow
def test_texts_become_answers_and_the_curator_is_measured(base, tmp_path):
    """Candidates are the paragraphs of the wanted length and the planted pairs, of which every other is wrong; none of
    these is learnt; precision and recall are those of the ratings."""
    paragraphs = [f"All about {w}: it is small, it is {w}, and it is old." for w in WORDS]
    (tmp_path / "texts.txt").write_text("\n\n".join([*paragraphs, "short", paragraphs[0]]))
    config = config_of("backtranslation", base, tmp_path / "task", segments={"path": str(tmp_path / "texts.txt")},
                       shortest=30, longest=100, planted=0.34, keep=1, iterations=1)  # fmt: skip
    records = run(config, tmp_path / "run", quiet=True)
    again(config, tmp_path / "run", records)
    rated, kept = (stored(tmp_path / "run", f"rounds/0001/{name}") for name in ("rated", "curated"))
    planted = rated.where(lambda row: row["planted"] is not None)
    seeds = {f"Tell me about {a} and {b}": f"It is {b} with {a}." for a, b in zip(WORDS, WORDS[1:], strict=False)}
    for row in planted.table.to_pylist():
        assert (seeds[row["asked"].split("\n")[0]] == row["output"]) is row["planted"]
    assert len(planted) == 4 and sum(planted.column("planted")) == 2
    assert set(rated.where(planted=None).column("output")) <= set(paragraphs)
    assert all(flag is None for flag in kept.column("planted"))
    numbers = next(r["metrics"] for r in records if r["name"] == "curator")
    scores, good = np.array(planted.column("score"), float), np.array(planted.column("planted"))
    assert numbers["recall"] == pytest.approx((good & (scores >= 1)).sum() / 2) and numbers["planted"] == 4
    assert records[-1]["metrics"]["data_rows"] == 8 + len(kept)


# ---- rewards by a model, and errors that are known


def sums_config(recipe, base, folder, **more):
    folder.mkdir(exist_ok=True)
    rows = [{"question": f"{a}+{b}", "solution": f"{a}+{b}={a + b}\nso\n#### {a + b}", "answer": f"{a + b}"}
            for a in range(1, 5) for b in range(1, 4)]  # fmt: skip
    for name, part in (("train", rows), ("test", rows[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    raw = {
        "recipe": recipe, "base": str(base), "solved": 12, "epochs": 2, "right": "numeric_match",
        "task": {"path": str(folder / "train.jsonl"), "validation": str(folder / "test.jsonl"),
                 "prompt": "{question}\n", "completion": "{solution}"},
        "train": {"batch": 8, "length": 200, "learning_rate": 3e-3, "tensorboard": False},
        "sampling": {"max_tokens": 24}, **more,
    }  # fmt: skip
    (folder / f"{recipe}.yaml").write_text(json.dumps(raw))
    return load_config(folder / f"{recipe}.yaml")


def judge(question, body):
    """Prefers the longer answer, rates problems by their length, makes problems longer."""
    if "Which answer is better" in question:
        a, b = re.search(r"\n\nA: (.*?)\n\nB: (.*?)\n\nThe better", question, re.DOTALL).groups()
        return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
    if "Rate the problem" in question:
        problem = re.search(r"Problem: (.*)", question)[1]
        return f"Score: {max(1, min(10, len(problem)))}"
    if "problem:\n" in question:
        problem = re.search(r"The problem:\n(.*)\n", question)[1]
        return f"{problem}+{draw(question, body).randint(1, 9)}"
    raise AssertionError(f"nobody asks this: {question[-300:]}")


POLICY = {"samples": 4, "policy_steps": 2, "policy_batch": 16, "policy_rate": 1e-4, "rounds": 1,
          "reward": {"steps": 3, "batch": 8, "tensorboard": False}}  # fmt: skip


@pytest.mark.slow
def test_preferences_of_a_judge_become_a_reward(base, tmp_path):
    """Chosen is what the judge preferred in both orders; the reward model learns it, the policy its score."""
    with running(Server(write=judge)) as server:
        config = sums_config("rlaif", base, tmp_path / "task", epochs=60, judge=f"openai:test-model@{server.url}",
                             **POLICY)  # fmt: skip
        records = run(config, tmp_path / "run", quiet=True)
        again(config, tmp_path / "run", records)
    facing, pairs = (stored(tmp_path / "run", f"rounds/0001/{name}") for name in ("facing", "pairs"))
    both = zip(*map(facing.column, ("parents", "text", "other")), strict=True)
    longer = {parents[0]: max(a, b, key=len) for parents, a, b in both if len(a) != len(b)}
    assert len(pairs) == len(longer) > 0
    for parents, chosen, rejected in zip(*map(pairs.column, ("parents", "chosen", "rejected")), strict=True):
        assert chosen == longer[parents[0]] and len(rejected) < len(chosen)
    log = (tmp_path / "run/rounds/0001/student/train.jsonl").read_text().splitlines()
    assert "reward" in log[-1] and [r["round"] for r in records] == [0, 1]


@pytest.mark.slow
def test_problems_evolve_and_two_reward_models_are_one_reward(base, tmp_path):
    """Versions are ranked by the teacher's ratings; a step is right where its equation holds; the policy's reward is a
    product of two probabilities."""
    more = {**POLICY, "epochs": 60, "evolutions": 1, "versions": 2, "solutions": 2, "marks": "equation"}
    with running(Server(write=judge)) as server:
        config = sums_config("wizardmath", base, tmp_path / "task", teacher=f"openai:test-model@{server.url}", **more)
        records = run(config, tmp_path / "run", quiet=True)
        again(config, tmp_path / "run", records)
    read = lambda name: stored(tmp_path / "run", f"rounds/0001/{name}")
    for best, worst in read("ranked").column("ranked"):
        assert len(best) > len(worst) and best.startswith(worst)
    assert len(read("problems")) == 24 and records[1]["metrics"]["data_rows"] == 32
    for step, mark in zip(*map(read("marked").column, ("step", "mark")), strict=True):
        found = re.search(r"(\d+)\+(\d+)=(\d+)", step)
        if found and mark:
            assert mark == ("Right" if int(found[1]) + int(found[2]) == int(found[3]) else "Wrong")


def test_errors_of_a_known_kind_are_planted():
    from recursive_jax.recipes.planted_errors import ERRORS, planted
    from recursive_jax.recipes.shepherd_rows import detection

    problem = {"id": "p", "question": "Ann has 12 nuts and buys 5 bags of 3 .",
               "solution": "5*3=15\n12+15=27\nShe has 27 nuts.\n#### 27"}  # fmt: skip
    rows = planted(
        Dataset.from_rows([problem] * 40), "question", "solution", "\n", list(ERRORS), 4, 0
    ).table.to_pylist()
    kinds = {kind: [row for row in rows if row["error"] == kind] for kind in ("none", *ERRORS)}
    assert all(len(found) == 40 for found in kinds.values())
    right = problem["solution"].split("\n")
    assert all(row["answer"] == problem["solution"] for row in kinds["none"])
    for row in kinds["arithmetic"]:
        found = [re.fullmatch(r"(\d+)([*+])(\d+)=(-?\d+)", step) for step in row["answer"].split("\n")[:2]]
        value = lambda m: int(m[1]) * int(m[3]) if m[2] == "*" else int(m[1]) + int(m[3])
        assert any(value(m) != int(m[4]) for m in found)
    for row in kinds["context"]:
        said = set(re.findall(r"\d+", row["critique"]))
        assert said & {"12", "5", "3"} and row["answer"] != problem["solution"]
    for row in kinds["coherence"]:
        assert len(row["answer"].split("\n")) == 3 and set(row["answer"].split("\n")) < set(right)
    for row in kinds["redundancy"]:
        assert len(row["answer"].split("\n")) == 5 and set(row["answer"].split("\n")) == set(right)
    said = ["none", "arithmetic", None, "arithmetic", "none"]
    real = ["none", "arithmetic", "context", "none", "coherence"]
    found = detection(Dataset.from_rows([{"error": a, "source_error": b} for a, b in zip(said, real, strict=True)]))
    assert (found["precision"], found["recall"], found["score"], found["read"]) == (0.5, 1 / 3, 0.4, 0.8)
    assert found["by_kind"]["arithmetic"] == {"precision": 0.5, "recall": 1.0, "rows": 1}


@pytest.mark.slow
def test_a_critic_is_taught_and_measured(base, tmp_path):
    config = sums_config("shepherd", base, tmp_path / "task", critic_epochs=80)
    records = run(config, tmp_path / "run", quiet=True)
    page = again(config, tmp_path / "run", records)
    named = {(r["name"], r["round"]): r["metrics"] for r in records}
    before, after = named["detection", 0], named["detection", 1]
    assert after["read"] > before["read"] and before["rows"] == after["rows"] == 8
    m = named["evaluation", 1]
    assert m["accuracy"] - m["accuracy_before"] == pytest.approx((m["became_right"] - m["became_wrong"]) / 4)
    assert "Planted errors" in page and "As a reward" in page
    from recursive_jax.recipes.shepherd_rows import Critic

    critic = Critic(rj.load_model(str(tmp_path / "run")))
    assert len(critic([{"question": "1+1", "text": "1+1=2"}])) == 1
