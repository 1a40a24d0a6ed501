"""Rows for other tools: the files open, the card says what they are and whence."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import yaml

from recursive_jax.cli import main
from recursive_jax.data.dataset import Dataset
from recursive_jax.rounds import export_rows as module
from recursive_jax.rounds.export_rows import export_rows
from recursive_jax.rounds.lineage import manifests, stored_rows
from tests.small_run import SmallRun


@pytest.fixture(scope="module")
def run(tokenizer, mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    SmallRun(tokenizer, mesh)(folder)
    return folder


def header(folder):
    _, above, below = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(above), below


def test_a_run_s_rows_are_written_with_their_lineage(run, tmp_path, capsys):
    out = tmp_path / "rows"
    assert main(["export-data", str(run), str(out), "--license", "cc0-1.0"]) == 0
    said = capsys.readouterr().out
    trained = [m for m in manifests(run) if m["name"] in said.split(" of ")[1].split(" written")[0].split("/")]
    data = stored_rows(run, trained[-1])
    assert pq.read_table(out / "data").num_rows == len(data) and f"{len(data):,} rows" in said
    top, card = header(out)
    assert top["license"] == "cc0-1.0" and top["size_categories"] == ["n<1K"] and "synthetic" in top["tags"]
    assert top["configs"][0]["data_files"][0]["path"] == "data/*.parquet"
    for manifest in manifests(run):
        if manifest["verb"] in ("data", "generate") and manifest["round"] <= trained[-1]["round"]:
            assert f"| {manifest['path']} | {manifest['verb']} |" in card
    assert set(data.column("model")) - {""} <= {w for w in card.split("`")} and "| tokens |" in card
    assert main(["export-data", str(run), str(out)]) == 2 and "is there already" in capsys.readouterr().err
    assert main(["export-data", str(run), str(tmp_path / "x"), "--rows", "nope"]) == 2
    error = capsys.readouterr().err
    assert "no rows called 'nope'; there are: " in error and trained[-1]["path"] in error
    other = next(m["path"] for m in manifests(run) if m["verb"] == "data")
    assert export_rows(str(run), str(tmp_path / "other"), other)[0] == other
    assert main(["export-data", str(tmp_path / "none"), str(tmp_path / "y")]) == 2


def test_a_file_s_rows_keep_their_columns(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n}", "answer": n}) + "\n" for n in range(5)))
    monkeypatch.setattr(module, "PART", 2)
    chosen, data = export_rows(str(path), str(tmp_path / "out"), paper="arXiv:1; arXiv:2", name="mine")
    assert chosen == "rows.jsonl" and data.column("answer") == [0, 1, 2, 3, 4]
    names = sorted(p.name for p in (tmp_path / "out" / "data").iterdir())
    assert names == [f"train-0000{n}-of-00003.parquet" for n in range(3)]
    found = Dataset.read([str(tmp_path / "out" / "data" / n) for n in names])
    assert found.column("question") == [f"q{n}" for n in range(5)]
    top, card = header(tmp_path / "out")
    assert top["license"] == "other" and "# mine" in card and "- arXiv:1\n- arXiv:2" in card


@pytest.mark.parity
def test_the_hub_s_library_opens_them(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    _, data = export_rows(str(run), str(tmp_path / "out"))
    found = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["id"][:] == data.column("id") and list(found.column_names) == data.table.column_names
