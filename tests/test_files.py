"""Prompts from files, rows to files: what is asked is there, once and in order, also after an interruption."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recursive_jax.config import SamplingConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.generate.files import Prompts, generate_file
from recursive_jax.generate.generate import generate, to_dataset
from recursive_jax.generate.prefill import Row
from recursive_jax.generate.request import Request
from recursive_jax.rounds.journal import Budget, Journal
from tests.test_engine import model as model

SAMPLING = SamplingConfig(max_tokens=4, batch=4, chunk=4)
TEXTS = ["one", "", "three and more", "four", "five", "six"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in TEXTS))
    return path


def test_every_format_gives_the_rows_of_generate(model, prompts, tmp_path, monkeypatch, capsys):
    requests = [Request(i, np.array(model.tokenizer.encode(TEXTS[i // 2]), np.int32)) for i in range(12)]
    wanted = [t.tolist() for t in generate(model, requests, SAMPLING, seed=3).tokens()]
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in.parquet")
    for source in ("in.jsonl", "in.txt", "in.parquet"):
        for out in ("out.jsonl", "out.parquet"):
            target = tmp_path / f"{source}-{out}"
            assert generate_file(model, Prompts(str(tmp_path / source), count=2), str(target), SAMPLING, seed=3)
            data = Dataset.read([str(target)]) if out.endswith("parquet") else None
            found = [t.tolist() for t in data.tokens()] if data else [r["tokens"] for r in lines(target)]
            assert found == wanted, (source, out)
            assert not list(tmp_path.glob("*.partial"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS) + "\n"))
    assert generate_file(model, Prompts("-", count=2), "-", SAMPLING, seed=3)
    printed = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda r: int(r["id"].split("/")[1]))
    assert [r["tokens"] for r in printed] == wanted


def test_an_interrupted_file_goes_on(model, prompts, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    sampling = SAMPLING.model_copy(update={"best_of": 2, "n_best": 2})
    generate_file(model, Prompts(str(prompts)), str(whole), sampling, seed=1)
    calls = iter(range(100))
    assert not generate_file(model, Prompts(str(prompts)), str(out), sampling, seed=1, stopped=lambda: next(calls) == 4)
    partial = tmp_path / "out.jsonl.partial"
    assert len(partial.read_text().splitlines()) == 6 and not out.exists()  # a line for the command, five rows
    with open(partial, "a") as file:
        file.write('{"id": "rows/5", "tok')  # a kill in the middle of a line
    with pytest.raises(InputError, match="rows of another command"):
        generate_file(model, Prompts(str(prompts)), str(out), sampling, seed=2)
    assert generate_file(model, Prompts(str(prompts)), str(out), sampling, seed=1)
    assert lines(out) == lines(whole) and not partial.exists()
    with pytest.raises(InputError, match="is there already"):
        generate_file(model, Prompts(str(prompts)), str(out), sampling, seed=1)


def test_rows_bring_settings_of_their_own(model, tmp_path):
    path = tmp_path / "in.jsonl"
    own = [{}, {"temperature": 0.0}, {"top_k": 2, "max_tokens": 2}]
    path.write_text("".join(json.dumps({"prompt": "p", "sampling": s}) + "\n" for s in own))
    generate_file(model, Prompts(str(path)), str(tmp_path / "out.jsonl"), SAMPLING)
    for i, (settings, row) in enumerate(zip(own, lines(tmp_path / "out.jsonl"), strict=True)):
        request = Request(i, np.array([112], np.int32))
        alone = generate(model, [request], SAMPLING.model_copy(update=settings))
        assert alone.tokens()[0].tolist() == row["tokens"]
    for text, message in (
        ('{"prompt": "p", "sampling": {"top_k": -1}}\n', "top_k"),
        ('{"other": 1}\n', "prompt"),
        ("{", "in.jsonl"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            generate_file(model, Prompts(str(path)), str(tmp_path / "bad.jsonl"), SAMPLING)
    with pytest.raises(InputError, match="there is no such file"):
        generate_file(model, Prompts(str(tmp_path / "none.txt")), str(tmp_path / "bad.jsonl"), SAMPLING)


def row(number, length, model):
    return Row(
        Request(number, np.empty(0, np.int32)),
        np.empty(0),
        SAMPLING,
        (),
        tokens=[1] * length,
        logprobs=[0.0] * length,
        status="ok",
        text="t",
    )


def test_a_torn_journal_keeps_its_whole_batches(model, tmp_path, monkeypatch):
    from recursive_jax.rounds import journal

    monkeypatch.setattr(journal, "EVERY", -1.0)  # a batch for every row
    make = lambda rows: to_dataset(rows, model, seed=0)
    first = Journal(tmp_path, "mark")
    for number in (2, 0, 3):
        first.append(row(number, number + 1, model), make)
    first.close()
    file = tmp_path / "partial-00000.rows"
    file.write_bytes(file.read_bytes()[:-300])
    second = Journal(tmp_path, "mark")
    assert set(second.lengths) < {0, 2, 3} and 2 in second.lengths
    for number in {0, 1, 2, 3} - set(second.lengths):
        second.append(row(number, number + 1, model), make)
    data = second.finish(3)
    assert [len(t) for t in data.tokens()] == [1, 2, 3]
    kept = ["partial-00000.rows", "partial-00001.rows", "rows-00000.parquet"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept  # the journal goes with the commit


@pytest.mark.parametrize("done", [{}, {0: 5, 3: 9}])
def test_a_budget_wants_the_same_rows_however_they_finish(done):
    """Lengths by request; finished in any order, the wanted prefix is that of the first requests that hold the
    tokens."""
    lengths = np.random.default_rng(0).integers(1, 12, 200)
    lengths[[0, 3]] = 5, 9
    expected = int(np.searchsorted(np.cumsum(lengths), 300) + 1)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        budget = Budget(
            done,
            lambda first, count: [Request(i, np.empty(0, np.int32)) for i in range(first, first + count)],
            None,
            300,
        )
        open_rows, source = [], iter(budget)
        while True:
            request = next(source, "end")
            if request == "end" and not open_rows:
                break
            if request not in (None, "end"):
                open_rows.append(request.id)
            if open_rows and (request in (None, "end") or len(open_rows) >= 8):
                number = open_rows.pop(rng.integers(len(open_rows)))
                budget.finished(row(number, int(lengths[number]), None))
        assert budget.wanted == expected
