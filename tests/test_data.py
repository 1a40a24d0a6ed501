"""Sources, tokenizers, packing and batches."""

from __future__ import annotations

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recursive_jax.config import DataConfig
from recursive_jax.data.dataset import Dataset, real_rows
from recursive_jax.data.packing import batches, pack
from recursive_jax.data.sources import documents, open_world
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer, tokenizer_from_json
from recursive_jax.errors import InputError
from tests.conftest import SHARED_DATA

TEXTS = ["The first text, with ünïcode.\nTwo lines.", "A second one.", "Third: 漢字 and an emoji 🙂."]


def write_jsonl(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    return DataConfig(path=str(folder / "a.jsonl"))


def write_parquet(folder):
    pq.write_table(pa.table({"body": TEXTS}), folder / "a.parquet")
    return DataConfig(path=str(folder / "a.parquet"), field="body")


def write_text_folder(folder):
    (folder / "corpus" / "sub").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.txt", "sub/c.txt"), TEXTS, strict=True):
        (folder / "corpus" / name).write_text(text, encoding="utf-8")
    return DataConfig(path=str(folder / "corpus"))


def write_glob(folder):
    for i, text in enumerate(TEXTS):
        (folder / f"part-{i}.txt").write_text(text, encoding="utf-8")
    return DataConfig(path=str(folder / "part-*.txt"))


def write_huggingface(folder):
    """What `datasets.save_to_disk` leaves: a state file and Arrow streams."""
    root = folder / "hf" / "train"
    root.mkdir(parents=True)
    table = pa.table({"text": TEXTS})
    with (
        pa.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (root / "dataset_info.json").write_text("{}")
    (folder / "hf" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return DataConfig(path=str(folder / "hf"))


def write_array_record(folder):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    writer.write(TEXTS[0].encode())
    for text in TEXTS[1:]:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    return DataConfig(path=str(folder / "a.array_record"))


def write_tfds(folder):
    """A dataset prepared without TensorFlow, read through tfds.data_source."""
    (folder / "tiny_texts.py").write_text(
        "import tensorflow_datasets as tfds\n"
        "class TinyTexts(tfds.core.GeneratorBasedBuilder):\n"
        "    VERSION = tfds.core.Version('1.0.0')\n"
        "    def _info(self):\n"
        "        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'text': "
        "tfds.features.Text()}))\n"
        "    def _split_generators(self, dl_manager):\n"
        "        return {'train': self._generate_examples()}\n"
        "    def _generate_examples(self):\n"
        f"        for i, t in enumerate({TEXTS!r}):\n"
        "            yield i, {'text': t}\n"
    )
    sys.path.insert(0, str(folder))
    try:
        import tiny_texts

        builder = tiny_texts.TinyTexts(data_dir=str(folder / "tfds"), file_format="array_record")
        builder.download_and_prepare()
    finally:
        sys.path.remove(str(folder))
    return DataConfig(kind="tfds", path=str(builder.data_dir))


WRITERS = [write_jsonl, write_parquet, write_text_folder, write_glob, write_huggingface, write_array_record, write_tfds]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__.removeprefix("write_"))
def test_every_source_gives_the_texts(tmp_path, write):
    config = write(tmp_path)
    assert sorted(documents(config, config.path)) == sorted(TEXTS)


def test_huggingface_split_is_checked(tmp_path):
    config = write_huggingface(tmp_path).model_copy(update={"split": "validation"})
    with pytest.raises(InputError, match="no split 'validation', there are: train, test"):
        list(documents(config, config.path))


def test_world_from_text_holds_out_and_keeps_every_byte(tmp_path):
    text = "".join(f"line {i} of the corpus\n" for i in range(400))
    (tmp_path / "c.txt").write_text(text)
    world = open_world(DataConfig(path=str(tmp_path / "c.txt"), holdout=0.1), context=64)
    whole = "".join(world.train.column("text")) + "".join(world.held_out.column("text"))
    assert whole == text
    assert len("".join(world.held_out.column("text"))) == pytest.approx(0.1 * len(text), rel=0.1)
    assert max(map(len, world.train.tokens())) == 64
    assert all(not s for s in world.train.column("synthetic"))


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real corpora are not beside the project")
def test_real_corpora_open():
    for path, tokenizer in (
        (SHARED_DATA / "tinyshakespeare/input.txt", "byte"),
        (SHARED_DATA / "wikitext2/raw_valid.txt", "bpe"),
    ):
        world = open_world(DataConfig(path=str(path), tokenizer=tokenizer, vocab_size=1000), context=128)
        text = path.read_text(encoding="utf-8")
        assert world.train.column("text")[0] == text[: len(world.train.column("text")[0])]
        assert world.train.token_count + world.held_out.token_count >= len(text) / 5


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: FileTokenizer.train_bpe(TEXTS * 10, 320)], ids=["byte", "bpe"])
def test_tokenizers_round_trip_and_store(make):
    tokenizer = make()
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert len({tokenizer.bos, tokenizer.eos, tokenizer.pad}) == 3
    for text in [*TEXTS, "", " ", "\n\n"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and again.encode(text) == ids
        assert not ids or (0 <= min(ids) and max(ids) < tokenizer.vocab == again.vocab)


def test_tokenizer_file_without_specials_gets_its_own_padding(tmp_path):
    import tokenizers

    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<|endoftext|>": 2}, unk_token="a"))
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer.open(tmp_path)
    assert tokenizer.eos == 2 and tokenizer.pad != tokenizer.eos and tokenizer.vocab == 5
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer.json"):
        FileTokenizer.open(tmp_path / "broken.json")


def test_packing_keeps_every_token_once_and_apart():
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 50, rng.integers(1, 20)).astype(np.int32) for _ in range(200)]
    packed = pack(rows, 32, bos=1, pad=0)
    assert packed.columns["tokens"].shape[1] == 33 and packed.fill > 0.9
    found = []
    for tokens, segments in zip(packed.columns["tokens"], packed.columns["segments"], strict=True):
        for s in range(1, segments.max() + 1):
            piece = tokens[segments == s]
            assert piece[0] == 1
            found.append(tuple(piece[1:]))
        assert (tokens[segments == 0] == 0).all()
    assert sorted(found) == sorted(tuple(r) for r in rows)
    assert packed.targets == sum(map(len, rows))


def test_long_rows_become_several_segments():
    packed = pack([np.arange(3, 28, dtype=np.int32)], 10, 1, 0)
    assert packed.targets == 25 and sorted(packed.columns["tokens"][packed.columns["segments"] > 0][:3]) == [1, 3, 4]


def test_limit_keeps_at_most_so_many_real_tokens(tmp_path):
    (tmp_path / "c.txt").write_text("abcdefgh\n" * 500)
    world = open_world(DataConfig(path=str(tmp_path / "c.txt"), limit=1000), context=64)
    assert world.train.token_count == 1000 and world.held_out.token_count < 300


def test_packing_refuses_nothing():
    with pytest.raises(InputError, match="nothing to train on"):
        pack([], 8, 1, 0)


def test_batches_are_a_function_of_seed_and_step():
    packed = pack([np.full(7, i + 3, np.int32) for i in range(40)], 8, 1, 0)
    stream = batches(packed, 8, seed=1)
    first = [next(stream) for _ in range(12)]
    for start in (0, 4, 11):
        again = next(batches(packed, 8, seed=1, start=start))
        assert np.array_equal(again["tokens"], first[start]["tokens"])
    epoch = np.concatenate([b["tokens"][:, 1] for b in first[:5]])
    assert sorted(epoch) == sorted(range(3, 43))  # one epoch is every row once
    assert not np.array_equal(next(batches(packed, 8, seed=2))["tokens"], first[0]["tokens"])


def test_dataset_joins_selects_and_survives_parquet(tmp_path):
    a = real_rows([[1, 2], [3]], ["x", "y"], prefix="a")
    b = real_rows([[4, 5, 6]], ["z"], prefix="b")
    both = a + b
    assert both.column("id") == ["a/0", "a/1", "b/0"] and both.token_count == 6
    assert both.where(text="z")[0]["tokens"] == [4, 5, 6]
    assert len(both.where(lambda row: len(row["tokens"]) > 1)) == 2
    assert [t.tolist() for t in both.take([2, 0]).tokens()] == [[4, 5, 6], [1, 2]]
    assert both.first_tokens(3).column("id") == ["a/0", "a/1"]
    scored = both.with_column("score", [0.5, 1.0, 2.0])
    scored.write(str(tmp_path / "rows.parquet"))
    again = Dataset.read([str(tmp_path / "rows.parquet")])
    assert again.table.equals(scored.table)
    assert both.table.num_columns == 12  # nothing changed in place
    with pytest.raises(InputError, match="no column"):
        both.column("nope")


def test_a_limit_is_a_limit_of_what_is_read(tmp_path, monkeypatch):
    """`data.limit` acted after everything was read and tokenised. Here the corpus is 300 times as long as is wanted, in
    files of every kind; what lies behind is never opened."""
    from recursive_jax.data import sources

    for i in range(300):
        (tmp_path / f"{i:03d}.txt").write_text("the cat sat on the mat\n" * 100)
    opened = []
    read = sources._READERS["text"]
    monkeypatch.setitem(sources._READERS, "text", lambda file, config: (opened.append(file), read(file, config))[1])
    world = open_world(DataConfig(path=str(tmp_path), limit=2000), context=64)
    assert world.train.token_count == 2000 and len(opened) < 20
    big = tmp_path / "big.txt"
    with big.open("w") as file:
        file.truncate(3 * 2**30)  # three gigabytes of nothing, behind
        file.seek(0)
        file.write("words and words\n" * 4000)
    world = open_world(DataConfig(path=str(big), limit=1000), context=64)
    assert world.train.token_count == 1000
    table = pa.table({"text": ["some text of a row\n" * 10] * 5000, "other": ["x" * 100] * 5000})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=100)
    batches = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, **kw: (batches.append(b) or b for b in iter_batches(self, 100, **kw)),
    )
    world = open_world(DataConfig(path=str(tmp_path / "t.parquet"), limit=1000), context=64)
    assert world.train.token_count == 1000 and len(batches) < 5 and batches[0].schema.names == ["text"]


def test_a_data_listing_opens_nothing_outside_its_folder(tmp_path):
    from recursive_jax.data.sources import documents

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow")):
        (tmp_path / "data" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(InputError, match="lies outside"):
            list(documents(DataConfig(path=str(tmp_path / "data")), str(tmp_path / "data")))


def test_offsets_hold_more_tokens_than_32_bits(tmp_path):
    """A column's offsets are of 64 bits: 2^31 tokens are a corpus of eight gigabytes."""
    from recursive_jax.data.dataset import SCHEMA, Dataset

    for name in ("prompt", "tokens", "logprobs"):
        assert pa.types.is_large_list(SCHEMA.field(name).type)
    data = real_rows([[1, 2], [3]], ["a", "b"])
    assert data.table["tokens"].chunk(0).offsets.type == pa.int64()
    data.write(str(tmp_path / "x.parquet"))
    assert pa.types.is_large_list(Dataset.read([str(tmp_path / "x.parquet")]).table.schema.field("tokens").type)
