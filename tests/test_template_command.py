"""`generate --template`: rows of a file asked, read, asked again, and written with all their columns."""

from __future__ import annotations

import json

import pytest

import recursive_jax as rj
from recursive_jax.cli import main
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.parsers import Completion, Json
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.files import Prompts, generate_file


@pytest.fixture(scope="module")
def model(mesh):
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=128)
    return rj.transformer(config, ByteTokenizer(), mesh).initialized(0)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"row {n}", "k": n}) + "\n" for n in range(8)))
    return str(path)


def test_a_file_is_asked_read_and_asked_again_until_it_is_whole(model, rows, tmp_path):
    template = Template("{q}", parser=Completion("e{rest}"))
    sampling = rj.SamplingConfig(max_tokens=2, regex="[aei][a-z]", batch=4)
    prompts = Prompts(rows, template=template)
    whole = str(tmp_path / "whole.parquet")
    assert generate_file(model, prompts, whole, sampling, attempts=6)
    found = Dataset.read([whole])
    assert found.column("k") == list(range(8)) and len(set(found.column("id"))) == 8
    good = [s in ("ok", "length") for s in found.column("status")]
    assert [r is not None for r in found.column("rest")] == good and sum(good) > 4

    stops = iter([False, False, False, True] * 20)  # stopped again and again, it ends with the same rows
    parts = str(tmp_path / "parts.parquet")
    starts = 1
    while not generate_file(model, prompts, parts, sampling, attempts=6, stopped=lambda: next(stops)):
        starts += 1
    assert starts > 2 and Dataset.read([parts]).table.equals(found.table)

    once = str(tmp_path / "once.jsonl")
    generate_file(model, prompts, once, sampling)
    first = [json.loads(line) for line in open(once)]
    assert [r["status"] for r in first] != found.column("status")
    for row, other in zip(first, found, strict=True):
        assert row["status"].startswith("parse_error") or row["text"] == other["text"]
    with pytest.raises(InputError, match="best_of keep the best"):
        generate_file(model, prompts, str(tmp_path / "x.jsonl"), rj.SamplingConfig(best_of=2), attempts=2)


def test_a_reply_gives_several_rows(model, rows, tmp_path):
    template = Template("{q}", parser=Json({"properties": {"k": {"type": "integer"}}, "required": ["k"]}, many=True))
    out = str(tmp_path / "out.parquet")
    sampling = rj.SamplingConfig(max_tokens=40, **template.constraint())
    assert generate_file(model, Prompts(rows, template=template), out, sampling)
    found = Dataset.read([out])
    assert len(found) > 8 and any("#" in name for name in found.column("id"))
    assert set(found.column("source_k")) == set(range(8)) and any(k is not None for k in found.column("k"))


def test_what_is_wrong_is_said(rows, tmp_path, capsys):
    def said(*arguments):
        assert main(["generate", "no-such-model", *arguments]) == 2
        return capsys.readouterr().err

    assert "--template asks the rows of --in" in said("--template", "t.yaml")
    assert "are for --template" in said("--in", rows, "--attempts", "2")
    assert "no use with it" in said("--in", rows, "--template", "t.yaml", "--chat")
    assert "1 to 255" in said("--in", rows, "--template", "t.yaml", "--attempts", "0", "--out", "x.jsonl")
    assert "a file to read and one to write" in said("--in", rows, "--template", "t.yaml", "--attempts", "2")
