"""docs/recipes/your-own.md does what it says; arms, replicates and the profile of generated rows for any recipe."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.recipes import find_recipe, load_config, run
from recursive_jax.rounds.synthetic import synthetic_profiles, without_common
from tests.conftest import ROOT

PAGE = (ROOT / "docs/recipes/your-own.md").read_text()


@pytest.fixture
def recipe(tmp_path, monkeypatch, mesh):
    """The page's recipe as a module, and a config for it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_recipes.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_recipes", raising=False)
    rows = [{"prompt": f"The {a} was {b}.\nTitle:", "completion": f" The {a}\n"} for a in ("roof", "door")
            for b in ("red", "old")]  # fmt: skip
    model = rj.transformer(rj.ModelConfig(layers=1, d_model=32, heads=2, max_length=128), ByteTokenizer(), mesh)
    with rj.Run(tmp_path / "base", {"name": "base"}, quiet=True) as made:
        made.round(0).train("base", model, rows, {"steps": 150, "batch": 4, "length": 64, "learning_rate": 5e-3})
        made.name_model("base", made.round(0), "base", default=True)
    config = {
        "recipe": "my_recipes:titles", "base": str(tmp_path / "base"), "rounds": 1,
        "train": {"steps": 3, "batch": 8, "length": 80, "tensorboard": False}, "sampling": {"max_tokens": 20},
    }  # fmt: skip

    def with_keys(**more):
        (tmp_path / "mine.yaml").write_text(json.dumps({**config, **more}))
        return load_config(tmp_path / "mine.yaml")

    return with_keys


@pytest.mark.slow
def test_the_page_runs_in_arms_and_replicates(recipe, tmp_path):
    """40 lines are a recipe; two arms of two replicates are one run, whose replicates differ and whose arms share their
    random numbers; a second start makes nothing anew."""
    config = recipe(arms={"main": {}, "short": {"sampling": {"max_tokens": 14}}}, replicates=2, profile=True)
    records = run(config, tmp_path / "run", quiet=True)
    assert [(r["arm"], r["replicate"]) for r in records] == [("main", 0), ("main", 1), ("short", 0), ("short", 1)]
    read = lambda path: Dataset.read([str(tmp_path / "run" / path / "rounds/0001/titles-replies/rows-00000.parquet")])
    main, other, short = (read(path) for path in ("replicate-0", "replicate-1", "short/replicate-0"))
    assert main.column("text") != other.column("text") and max(len(t) for t in short.tokens()) <= 14
    assert [t[:14].tolist() for t in main.tokens()] == [t.tolist() for t in short.tokens()]
    names = json.loads((tmp_path / "run/models.json").read_text())
    assert names["default"] == "student" and {"student-main-1", "student-short-0"} <= names["models"].keys()
    missing = json.loads((tmp_path / "run/profiles/missing.json").read_text())
    assert "no real row" in missing["main"] and "no real row" in (tmp_path / "run/report.html").read_text()
    before = (tmp_path / "run/commits.jsonl").read_bytes()
    assert run(config, tmp_path / "run", quiet=True) == records
    assert (tmp_path / "run/commits.jsonl").read_bytes() == before
    assert len(find_recipe("my_recipes:titles").summary) > 10
    code = PAGE.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def test_arms_are_held_to_the_recipes_keys(recipe, tmp_path):
    for arms, said in (
        ({"main": {"sampling": {"max_tokans": 3}}}, "did you mean sampling.max_tokens"),
        ({"a": {"seed": 3}}, "arms.a.seed is of the whole run"),
        ({"rounds": {}}, "an arm is a folder"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            run(recipe(arms=arms), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="llm2llm has arms of its own"):
        load_config(overrides=["recipe=llm2llm", "base=x", "task={path: x}", "arms={a: {}}"])


def test_what_generated_rows_lack(mesh, tmp_path):
    """Rows that repeat themselves are less varied than the real ones by every measure of variety; rows like the real
    ones are not."""
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(60)]
    made = lambda few: [" ".join(rng.choice(words[:few], 12)) for _ in range(60)]
    model = rj.transformer(rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=128), ByteTokenizer(), mesh)
    parts = [(False, made(60)), (True, made(4)), (True, made(60))]
    with rj.Run(tmp_path / "run", {"name": "x"}, quiet=True) as opened:
        for number, (_, texts) in enumerate(parts[1:], 1):
            rows = [{"id": f"{flag}/{n}", "synthetic": flag, "text": t} for flag, part in (parts[0], (True, texts))
                    for n, t in enumerate(part)]  # fmt: skip
            data = opened.round(number).dataset("data", tokenized, rows)
            opened.round(number).train("student", model, data, {"steps": 1, "batch": 4, "length": 128})
    found = synthetic_profiles(tmp_path / "run")
    few, alike = (m for m in found.profiles["main"].measurements)
    assert not found.missing and few["distinct_2"].verdict == "lower" and few["types_alive"].verdict == "lower"
    assert alike["distinct_2"].verdict == "same"


def tokenized(rows):
    data, tokenizer = Dataset.from_rows(rows), ByteTokenizer()
    return data.with_column("tokens", [[*tokenizer.encode(t), tokenizer.eos] for t in data.column("text")])


def test_a_templates_own_words_are_left_out():
    ids = [np.array(x) for x in ([1, 2, 7, 9, 5], [1, 2, 8, 5], [1, 2, 7, 7, 7, 5])]
    found = without_common(ids, [np.array([3])] * 3)
    assert [x.tolist() for x in found] == [[7, 9, 3], [8, 3], [7, 7, 7, 3]]
    assert [x.tolist() for x in without_common(ids[:1] * 2, [np.array([3])] * 2)] == [[3], [3]]
