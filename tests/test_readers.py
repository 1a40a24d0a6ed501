"""Files that people bring: what of a folder is data, and what a text, a line and a row are. Expected values are the
inputs as they were written, by Python's own codecs and by pyarrow."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recursive_jax.collapse.inputs import as_samples
from recursive_jax.config import DataConfig, SamplingConfig
from recursive_jax.data import chat, files
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.sources import documents, source_files
from recursive_jax.data.task import read_rows
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.files import Prompts

ODD = 'a\u2028b\u0085c\x0bd "é"'  # str.splitlines cuts it into four


def texts(path, **config):
    return list(documents(DataConfig(path=str(path), **config), str(path)))


def prompts(path):
    return [row.get("prompt", row.get("text")) for row in Prompts(str(path)).rows()]


def profile(path):
    return as_samples(str(path), "texts").texts


def task(path):
    return [row["text"] for row in read_rows(str(path))]


READERS = {"data": texts, "in": prompts, "profile": profile, "task": task}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_json_lines_reads_the_same(reader, tmp_path):
    wanted = [ODD, "two", "three \U0001f642"]
    for name, form in (("plain", {}), ("escaped", {"ensure_ascii": True}), ("raw", {"ensure_ascii": False})):
        for end in ("\n", "\r\n"):
            for mark in (b"", b"\xef\xbb\xbf"):
                text = end.join(json.dumps({"text": t}, **form) for t in wanted)
                data = mark + text.replace(f"{end}{{", f"{end}{end}{{").encode()  # and blank lines
                path = tmp_path / f"{name}.jsonl"
                path.write_bytes(data)
                assert READERS[reader](path) == wanted
                for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress)):
                    packed = tmp_path / f"{name}.jsonl{suffix}"
                    packed.write_bytes(pack(data))
                    assert READERS[reader](packed) == wanted
    with pa.output_stream(str(tmp_path / "z.jsonl.zst"), compression="zstd") as out:
        out.write(data)
    assert READERS[reader](tmp_path / "z.jsonl.zst") == wanted
    pq.write_table(pa.table({"text": wanted}), tmp_path / "x.parquet")
    assert READERS[reader](tmp_path / "x.parquet") == wanted
    (tmp_path / "x.json").write_text(json.dumps([{"text": t} for t in wanted], indent=1))
    assert READERS[reader](tmp_path / "x.json") == wanted
    (tmp_path / "x.csv").write_text('id,text\n1,"a, ""b""\nc"\n2,NA\n', encoding="utf-8")
    assert READERS[reader](tmp_path / "x.csv") == ['a, "b"\nc', "NA"]
    (tmp_path / "x.tsv").write_text("id\ttext\n1\ta, b\n", encoding="utf-8")
    assert READERS[reader](tmp_path / "x.tsv") == ["a, b"]
    long = "word, " * 400_000
    (tmp_path / "long.csv").write_text(f'text,l,,\n"{long}",1,,\n02139,true,,\nnull,NA,,\n', encoding="utf-8")
    if reader in ("data", "profile"):  # they want one column; the others all, and two here have no name
        assert READERS[reader](tmp_path / "long.csv") == [long, "02139", "null"]
    else:
        with pytest.raises(InputError, match="has the column '' twice"):
            READERS[reader](tmp_path / "long.csv")
    (tmp_path / "quotes.tsv").write_text('text\tl\n"a b\t1\nc" d\t3\n')
    assert READERS[reader](tmp_path / "quotes.tsv") == ['"a b', 'c" d']
    for content, message in (
        (b"text,l\ncaf\xe9,1\n", "line 2: byte 3 .*is not UTF-8"),
        (b"caf\xe9,text\nx,1\n", "line 1: byte 3 .*is not UTF-8"),
        ("text\na\n".encode("utf-16"), "is UTF-16"),
        (b"text,l\na,1,2\n", "row 0: 3 values, the first line names 2"),
        (b'text,l\n"a,1\n', "cannot be read as a table"),
    ):
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(InputError, match=f"bad.csv.*{message}"):
            READERS[reader](tmp_path / "bad.csv")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"x.jsonl, line 2: byte 13 \(0xe9\) is not UTF-8.*iconv"),
        ('{"text": "a"}\n'.encode("utf-16"), "x.jsonl is UTF-16.*iconv"),
        (b'{"text": "a"}\n{"text": "\\ud83d x"}\n', r"x.jsonl, line 2: \\ud83d is half a character"),
        (b'{"text": "a"}\n{oops\n', "x.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\n' + b"[" * 100_000, "x.jsonl, line 2: not JSON"),
    ],
)
def test_bad_json_lines_are_named(reader, content, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        READERS[reader](tmp_path / "x.jsonl")


def test_lines_of_text(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + f"one\r\n{ODD}\n\nlast".encode())
    assert prompts(tmp_path / "x.txt") == ["one", ODD, "", "last"]
    assert profile(tmp_path / "x.txt") == ["one", ODD, "last"]
    assert texts(tmp_path / "x.txt") == [f"one\n{ODD}\n\nlast"]
    (tmp_path / "y.txt").write_bytes(b"fine\n" * 5000 + b"caf\xe9\n")
    for reader in (prompts, profile, texts):
        with pytest.raises(InputError, match=r"y.txt, line 5001: byte 3 \(0xe9\)"):
            reader(tmp_path / "y.txt")
    for content, wanted in ((b"\xef\xbb\xbfone\r\ntwo\n", ["one", "two"]), (b"caf\xe9\n", None)):
        pipe = io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")  # no locale is set
        monkeypatch.setattr(sys, "stdin", pipe)
        if wanted:
            assert prompts("-") == wanted
        else:
            with pytest.raises(InputError, match="standard input, line 1: byte 3"):
                prompts("-")
    monkeypatch.setattr(sys, "stdin", io.StringIO('\ufeff{"prompt": "a"}\n\n{"prompt": "b"}\n'))
    assert prompts("-") == ["a", "b"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".parquet", ".array_record"])
def test_a_file_that_was_cut_is_named(suffix, tmp_path):
    path = tmp_path / f"x.jsonl{suffix}" if suffix in files.PACKED else tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": ["a"] * 100}), path)
    elif suffix == ".array_record":
        _records(path, [b"row %d" % i for i in range(100)])
    else:
        with pa.output_stream(str(path), compression=files.PACKED[suffix]) as out:
            out.write(b'{"text": "a"}\n' * 1000)
    whole = path.read_bytes()
    assert len(texts(path)) >= 100
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match=f"{path.name}.* cannot be read"):
        texts(path)


def test_columns_that_cannot_be_told_apart(tmp_path):
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "x.parquet"
    )
    for reader in READERS.values():
        with pytest.raises(InputError, match="has the column 'text' twice"):
            reader(tmp_path / "x.parquet")


def _records(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_shards_are_recognised_by_name(tmp_path):
    for i in range(2):
        _records(tmp_path / f"s.array_record-0000{i}-of-00002", [b"shard %d" % i])
    assert texts(tmp_path) == texts(f"{tmp_path}/s.array_record-*") == ["shard 0", "shard 1"]
    _records(tmp_path / "b.array_record", [b'{"text": "caf\xe9"}'])
    with pytest.raises(InputError, match="b.array_record, record 0: byte 13"):
        texts(tmp_path / "b.array_record")


def test_what_of_a_folder_is_data(tmp_path, capsys):
    """A snapshot of the hub with an editor's checkpoint, a resource fork and a split that is not asked for."""
    for name, content in {
        "README.md": b"---\nlicense: mit\n---\n# Card\n",
        "LICENSE": b"MIT",
        ".ipynb_checkpoints/a-checkpoint.txt": b"one",
        "._a.txt": b"\x00\x05\x16\x07",
        "a.txt": b"one",
        "B.JSONL.GZ": gzip.compress(b'{"text": "zipped"}\n'),
        "c.csv": b"text\ntable\n",
        "d.bin": b"\x00",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert sorted(texts(tmp_path)) == ["one", "table", "zipped"]
    said = capsys.readouterr().err
    assert "3 file(s) are read, these are not: LICENSE, README.md, d.bin" in said
    (tmp_path / "data").mkdir()
    for split in ("train", "test", "dev"):
        pq.write_table(pa.table({"text": [split]}), tmp_path / f"data/{split}-00000-of-00001.parquet")
    assert sorted(texts(tmp_path)) == ["one", "table", "train", "zipped"]
    assert "data/dev-00000-of-00001.parquet, data/test-00000-of-00001.parquet" in capsys.readouterr().err
    assert sorted(texts(tmp_path, split="validation"))[0] == "dev"
    assert texts(tmp_path, kind="parquet", split="test") == ["test"]
    assert len(texts(tmp_path, split="best")) == 6
    assert "all of the splits test, train, validation are read" in capsys.readouterr().err
    assert texts(f"{tmp_path}/data/*") == ["dev", "test", "train"]  # a glob names what is wanted
    config = DataConfig(path=str(tmp_path))
    assert len(source_files(config)) == 4
    (tmp_path / "meta.csv").write_text("file,author\na.txt,Ann\n")
    assert sorted(texts(tmp_path)) == ["one", "table", "train", "zipped"]
    assert "meta.csv" in capsys.readouterr().err
    (tmp_path / "prose").mkdir()
    for name in ("training.md", "testing.md", "test_of_time.txt", "dev.md"):
        (tmp_path / "prose" / name).write_text(name)
    assert len(texts(tmp_path / "prose")) == 4
    held = DataConfig(path=str(tmp_path / "a.txt"), validation=str(tmp_path / "data"), field="text")
    assert len(source_files(held)) == 4  # all of data.validation: data.split is of what is learnt
    (tmp_path / "export").write_text("text\nby its kind\n")  # a name that says nothing
    assert texts(tmp_path / "export", kind="csv") == ["by its kind"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only/README.md").write_text("a card")
    with pytest.raises(InputError, match="cards and licences are not data"):
        texts(tmp_path / "only")


def test_a_key_that_is_absent_stays_so_in_parquet(tmp_path):
    """Arrow writes all keys of a column into each of its objects; templates ask which a message has."""
    rows = [
        {
            "messages": [{"role": "user", "content": "What time?"}, {"role": "assistant", "content": "Noon."}],
            "sampling": {"temperature": 0.5, "stop": ["x"]},
        },
        {"messages": [{"role": "user", "name": "Ann", "content": "And now?"}]},
        {
            "messages": [
                {"role": "user", "content": "Call."},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]},
                {"role": "user", "content": "Done?"},
            ],
            "sampling": {"top_k": 3},
        },
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}>"
        "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    read = [[chat.render(tokenizer, row["messages"]) for row in read_rows(str(tmp_path / f"m.{s}"))] for s in FORMS]
    assert read[0] == read[1]
    assert read[0][1:] == ["<user Ann>And now?", '<user>Call.<assistant>[{"name": "clock"}]<user>Done?']
    held = Dataset.from_rows([{"text": "x", **row} for row in rows])
    assert held.column("messages") == [row["messages"] for row in rows]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    pq.write_table(pa.Table.from_pylist([{"messages": [call]}]), tmp_path / "null.parquet")
    assert read_rows(str(tmp_path / "null.parquet")) == [{"messages": [call]}]  # templates ask whether it is none
    meta = [{"score": None, "source": "x"}, {"score": 1.0, "source": None}]
    own = Dataset.from_rows([{"text": "x", "meta": m} for m in meta])
    assert own.column("meta") == meta and len(own.where(lambda row: row["meta"]["score"] is None)) == 1
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": None, "text": "there"}) + "\n")
    for name in ("m.jsonl", "m.parquet"):
        found = list(Prompts(str(tmp_path / name)).requests(_Chat(), SamplingConfig(), bytearray()))
        own = [r.sampling and (r.sampling.temperature, r.sampling.top_k, r.sampling.stop) for r in found]
        assert own == [(0.5, 0, ("x",)), None, (1.0, 3, ())]
    found = list(Prompts(str(tmp_path / "p.jsonl")).requests(ByteTokenizer(), SamplingConfig(), bytearray()))
    assert bytes(t for t in found[0].prompt.tolist() if t < 256) == b"there"


FORMS = ("jsonl", "parquet")


class _Chat(ByteTokenizer):
    chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "sampling": [1]}, "row 0: `sampling` is a list"),
        ({"prompt": "a", "negative": 5}, "row 0: `negative` is a int"),
        ({"messages": "hello"}, "row 0: `messages` is no list"),
        ({"messages": ["hello"]}, "row 0: `messages` is no list"),
        ({"question": "a"}, "there are: question"),
    ],
)
def test_rows_that_ask_nothing_are_refused(row, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        list(Prompts(str(tmp_path / "x.jsonl")).requests(_Chat(), SamplingConfig(), bytearray()))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": {"b": 1}}\n{"a": {"b": 1, "b": 2}}\n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 2: not JSON \(the key 'b' stands twice in one object"):
        list(files.read_rows(str(path)))
