"""The recipes over the objectives on text, each whole and small, from its config, and started again: nothing is made
twice."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import recursive_jax as rj
from recursive_jax.config import ModelConfig
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.models.model import transformer
from recursive_jax.recipes import load_config, run
from recursive_jax.rounds.writing import save_imported

TINY = ["model.layers=1", "model.d_model=32", "model.heads=2", "train.batch=8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, mesh):
    """A model of bytes that has learnt nothing."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = ModelConfig(layers=1, d_model=32, heads=2, d_ff=64, max_length=512)
    save_imported(transformer(config, ByteTokenizer(), mesh).initialized(0), folder)
    return str(folder)


def write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return str(path)


def ran(name, overrides, workdir):
    config = load_config(f"configs/{name}.yaml", [*overrides, "mesh.data=1"])
    records = run(config, workdir, quiet=True)
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("manifest.json")}
    assert run(config, workdir, quiet=True) == records
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("manifest.json")} == before
    assert (workdir / "report.html").stat().st_size > 1000
    return records


@pytest.mark.slow
def test_infilling(tmp_path):
    records = ran(
        "infilling", [*TINY, "train.steps=2", "rewritten=8", "task.limit=24", "task.validation=null"], tmp_path
    )
    assert len(records) == 5
    for r in records:
        assert {"exact", "unigram_f1", "copy_f1", "utility", "utility_real"} <= set(r["metrics"])
    rows = pq.read_table(tmp_path / "rounds/0000/mlm_gibbs-texts/rows-00000.parquet").to_pylist()
    assert rows and all(len(r["tokens"]) == len(r["new"]) for r in rows)


def test_symbol_tuning(tmp_path, base):
    overrides = [f"base={base}", "lora=null", "prompts=6", "evaluated=4", "train.steps=2", "train.batch=2",
                 "train.length=512", "per_class=[1, 1]"]  # fmt: skip
    records = ran("symbol_tuning", overrides, tmp_path)
    assert {r["arm"] for r in records} == {"symbols", "natural"}
    names = {k for r in records for k in r["metrics"] if not k.endswith(("low", "high"))}
    assert {
        f"accuracy_{k}" for k in ("symbols", "symbols_instruction", "natural", "natural_instruction", "flipped")
    } <= names


def test_grit(tmp_path):
    words = [f"thing{n}" for n in range(30)]
    pairs = write(tmp_path / "pairs.jsonl", [{"query": w, "positive": f"about {w}"} for w in words])
    (tmp_path / "corpus.txt").write_text("a text that goes on and on. " * 200)
    overrides = [*TINY, f"pairs={pairs}", f"text={tmp_path / 'corpus.txt'}", "vocab_size=300", "pretrain_steps=2",
                 "train.steps=2", "model.max_length=48"]  # fmt: skip
    records = ran("grit", overrides, tmp_path / "run")
    assert [r["round"] for r in records] == [0, 1]
    assert all(0 <= r["metrics"]["mrr"] <= 1 and np.isfinite(r["metrics"]["ce_real"]) for r in records)


@pytest.mark.slow
def test_linkbert(tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for n in range(6):
        (folder / f"page{n}.md").write_text(f"Page {n} says that {chr(97 + n) * 30}. See [[page{(n + 1) % 6}]]. " * 3)
    overrides = [*TINY, f"documents={folder}", "vocab_size=300", "train.steps=2", "model.max_length=32"]
    (record,) = ran("linkbert", overrides, tmp_path / "run")
    assert record["metrics"]["links"] == 6 and 0 <= record["metrics"]["relation_accuracy"] <= 1
    config = json.loads((tmp_path / "run" / "exported" / "config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"]
    assert rj.load_model(tmp_path / "run" / "exported").network.config.token_types == 2


def test_raft(tmp_path, base):
    cards = tmp_path / "cards.txt"
    cards.write_text("\n".join(f"call{n}(x={n}) does {'abcdef'[n]}" for n in range(6)))
    rows = [
        {"question": f"do {'abcdef'[n % 6]}", "answer": f"call{n % 6}(x={n % 6})", "document": n % 6} for n in range(12)
    ]
    asked = write(tmp_path / "q.jsonl", rows)
    overrides = [f"base={base}", "lora=null", f"documents={cards}", f"questions={asked}", "train.steps=2",
                 "train.batch=2", "train.length=512", "distractors=2", "right=call", "answer_tokens=8"]  # fmt: skip
    records = ran("raft", overrides, tmp_path / "run")
    for r in records:
        for kind in ("golden", "distractors", "bm25"):
            shares = [r["metrics"][f"{kind}_{name}"] for name in ("right", "wrong", "unknown", "hallucination")]
            assert 0 <= sum(shares) <= 1
