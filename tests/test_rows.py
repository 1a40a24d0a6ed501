"""Rows: one meaning for every column, strict joins, and what training makes of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from recursive_jax.config import SamplingConfig
from recursive_jax.data.dataset import SCHEMA, Dataset, real_rows
from recursive_jax.data.packing import Example, Packed, pack_tokens, stack_arrays, stack_groups
from recursive_jax.data.template import Template, examples_dataset
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import FromRows, FromTemplate, Request
from recursive_jax.models.model import transformer

TOKENIZER = SimpleNamespace(bos=1, pad=0)


def test_rows_of_any_columns_survive():
    data = Dataset.from_rows([{"text": "a", "own": 1, "tags": ["x"]}, {"text": "b", "own": 2.5, "tags": []}])
    assert (
        data.column("own") == [1.0, 2.5] and data.column("tags") == [["x"], []] and data.column("status") == ["ok"] * 2
    )
    assert data.column("id") == ["row/0", "row/1"] and data.where(own=2.5).column("text") == ["b"]
    with pytest.raises(InputError, match="'own'"):
        Dataset.from_rows([{"own": 1}, {"own": "x"}])
    assert "2 rows" in repr(data) and "own" in repr(data)
    assert data[::-1].column("own") == [2.5, 1.0] and data[-1]["text"] == "b"


def test_joins_are_strict_with_declared_defaults():
    a = real_rows([[1, 2], [3]], ["x", "y"], prefix="a")
    b = real_rows([[4]], ["z"], prefix="b")
    masked = a.with_column("loss", [[True, False], [True]]) + b
    assert masked.column("loss") == [[True, False], [True], None]  # missing: every token
    assert (b + a.with_column("weight", [0.5, 2.0])).column("weight") == [1.0, 0.5, 2.0]
    assert (b + a.with_column("score", [0.5, 2.0])).column("score") == [None, 0.5, 2.0]
    with pytest.raises(InputError, match="no column 'own'"):
        a.with_column("own", [1, 2]) + b
    numbers = a.with_column("n", [1, 2]) + b.with_column("n", [0.5])
    assert numbers.column("n") == [1.0, 2.0, 0.5]
    with pytest.raises(InputError, match="'n' holds"):
        a.with_column("n", [1, 2]) + b.with_column("n", ["x"])
    mixed = a.with_column("loss", [[True, False], [True]]) + b.with_column("loss", [[0.25]])
    assert mixed.column("loss") == [[1.0, 0.0], [1.0], [0.25]]
    assert a.with_column("own", [1, 2]).without("own").table.column_names == SCHEMA.names
    assert len(Dataset.concat([])) == 0 and len(Dataset.empty() + b) == 1


def test_generated_rows_beside_examples_are_learnt():
    """A missing `loss` is every token (it became none), and a missing weight is 1 (it became NaN)."""
    template = Template("Q{q}", "A{a}")
    tokenizer = ByteTokenizer()
    examples = examples_dataset([{"q": "1", "a": "22"}], template, tokenizer).with_column("weight", [2.0])
    written = real_rows([[65, 66, 67]], ["ABC"], prompts=[[256, 81]], prefix="g")
    packed = pack_tokens(examples + written, 16, tokenizer)
    learnt = {
        int(t): float(w) for t, w in zip(packed.columns["tokens"][0], packed.columns["loss"][0], strict=True) if w
    }
    assert {65: 1.0, 66: 1.0, 67: 1.0}.items() <= learnt.items() and np.isfinite(packed.columns["loss"]).all()
    assert learnt[ord("2")] == 2.0 and learnt[tokenizer.eos] == 2.0
    assert packed.targets == 3 + 4  # ABC; A22 and the end


def test_float_weights_of_tokens_stay_floats():
    data = real_rows([[5, 6, 7]], [""]).with_column("loss", pa.array([[0.25, 0.5, 0.0]], pa.list_(pa.float32())))
    packed = pack_tokens(data, 5, TOKENIZER)
    assert packed.columns["loss"].tolist() == [[0.0, 0.25, 0.5, 0.0, 0.0, 0.0]]


def test_prompts_are_context_and_never_learnt():
    data = real_rows([[7, 8], [9]], ["", ""], prompts=[[1, 5, 6], []]).with_column("logprobs", [[-1.0, -2.0], [-3.0]])
    packed = pack_tokens(data, 9, TOKENIZER, extra=("logprobs",))
    assert packed.columns["tokens"].tolist() == [[1, 5, 6, 7, 8, 1, 9, 0, 0, 0]]
    assert packed.columns["segments"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 0, 0, 0]]
    assert packed.columns["loss"].tolist() == [[False, False, False, True, True, True, True, False, False, False]]
    assert packed.columns["logprobs"].tolist() == [[0, 0, 0, -1, -2, 0, -3, 0, 0, 0]]
    with pytest.raises(InputError, match="one for each"):
        pack_tokens(data.with_column("loss", [[True], [True]]), 9, TOKENIZER)
    with pytest.raises(InputError, match="longer than a row of 4"):
        pack_tokens(data, 3, TOKENIZER)
    with pytest.raises(InputError, match="no column 'advantages'"):
        pack_tokens(data, 9, TOKENIZER, extra=("advantages",))


def test_groups_and_arrays_stack():
    pair = [
        Example(np.array([1, 2, 3], np.int32), np.array([False, True, True])),
        Example(np.array([1, 4], np.int32), np.array([False, True])),
    ]
    packed = stack_groups([pair, pair[::-1]], 3, None)
    assert packed.columns["tokens"].tolist() == [[[1, 2, 3, 0], [1, 4, 0, 0]], [[1, 4, 0, 0], [1, 2, 3, 0]]]
    assert packed.columns["segments"][0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]] and packed.positions == 6
    with pytest.raises(InputError, match="one size"):
        stack_groups([pair, pair[:1]], 3, None)
    with pytest.raises(InputError, match="group 1"):
        stack_groups([pair, [Example(np.arange(9), np.ones(9, bool))] * 2], 3, None)
    arrays = stack_arrays({"images": np.zeros((4, 2, 2)), "labels": np.arange(4)})
    assert len(arrays) == 4 and arrays[1]["labels"] == 1
    with pytest.raises(InputError, match="one length"):
        stack_arrays({"images": np.zeros((4, 2)), "labels": np.arange(3)})
    arrays.begin(2, seed=1)
    later = arrays.next(5)
    again = Packed(arrays.columns)
    again.begin(2, seed=1)
    for step in range(6):
        found = again.next(step)
    assert (later["labels"] == found["labels"]).all()  # a function of the seed and the step


def test_a_generated_row_holds_its_prompt_and_carries_its_row_s_columns(tiny, tokenizer, mesh):
    model = transformer(tiny, tokenizer, mesh).initialized(3)
    source = (
        real_rows([[5, 6, 7, 8], [9, 10, 11, 12]], ["", ""]).with_column("topic", ["a", "b"]).with_column("n", [1, 2])
    )
    rows = generate(model, FromRows(source, 2)(0, 3), SamplingConfig(max_tokens=4, batch=4))
    assert [p.tolist() for p in rows.prompts()] == [
        [tokenizer.bos, 5, 6],
        [tokenizer.bos, 9, 10],
        [tokenizer.bos, 5, 6],
    ]
    assert rows.column("topic") == ["a", "b", "a"] and rows.column("n") == [1, 2, 1]
    assert set(rows.column("model")) == {model.fingerprint} and len(model.fingerprint) == 16
    assert rows.column("parents")[0] == ["real/0"]
    packed = pack_tokens(rows, 32, tokenizer)
    assert packed.targets == rows.token_count
    clash = generate(
        model, [Request(0, np.array([5]), columns={"text": "given", "own": 3})], SamplingConfig(max_tokens=2, batch=1)
    )
    assert clash.column("source_text") == ["given"] and clash.column("own") == [3]


def test_a_template_asks_each_row(mesh):
    data = Dataset.from_rows([{"q": "one"}, {"q": "two"}])
    asked = FromTemplate(data, Template("say {q}", "{a}"), ByteTokenizer(), each=2)
    requests = asked(0, 4)
    assert len(asked) == 4 and [r.columns["q"] for r in requests] == ["one", "one", "two", "two"]
    assert bytes(requests[2].prompt[1:].tolist()) == b"say two" and requests[2].opened
    with pytest.raises(InputError, match="2 rows give 4"):
        asked(3, 2)


def test_rows_without_tokens_are_left_out():
    """A prompt that did not fit has written nothing: there is nothing to learn of it."""
    data = real_rows([[], [7]], ["", ""], prompts=[[1, 2], [1, 3]])
    assert pack_tokens(data, 6, TOKENIZER).columns["tokens"].tolist() == [[1, 3, 7, 0, 0, 0, 0]]
