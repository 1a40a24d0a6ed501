"""Hostile and accidental input: configs, model folders, GGUF headers, tokenizers, prompts, Parquet, chat templates and
stored metadata. Each gives a result, or one message (`InputError`, exit code 2); nothing else leaves the product.

2,600 examples, the same at every run; FUZZ_RANDOM=N draws N times as many new ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
import yaml

from recursive_jax.config import ModelConfig, SamplingConfig
from recursive_jax.config.loader import parse_section
from recursive_jax.data.chat_template import render_template
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.files import read_rows, read_text
from recursive_jax.data.gguf_tokenizer import gguf_tokenizer
from recursive_jax.data.tokenizer_files import read_tokenizer
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.files import Prompts
from recursive_jax.generate.generate import generate
from recursive_jax.models.families import FAMILIES, read_config
from recursive_jax.models.gguf import read_gguf
from recursive_jax.models.huggingface import params_from, read_huggingface
from recursive_jax.models.model import transformer
from recursive_jax.recipes import load_config
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.options import GenerateOptions
from recursive_jax.rounds.status import status_text
from recursive_jax.rounds.writing import save_imported
from tests.conftest import ROOT
from tests.helpers import write_llama_gguf
from tests.small_run import SmallRun
from tests.test_families import FOLDER

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.slow


def examples(count: int):
    return settings(
        max_examples=count * int(os.environ.get("FUZZ_RANDOM", 1)),
        deadline=None,
        derandomize="FUZZ_RANDOM" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def only_one_message():
    """Results or one message; notices of what was mended are not looked at."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(InputError):
        yield


# JSON and YAML values as nobody should write them
numbers = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([0, -1, 2**31, 2**40, 2**63, 10**30, 10**400, 1e308, -1e-300, 0.5, True, False]),
    st.floats(allow_nan=True, allow_infinity=True),
)
texts = st.one_of(
    st.text(max_size=12), st.sampled_from(["", " ", "null", "../x", "/etc/passwd", "a" * 5000, "\x00", "\ud800"])
)
leaves = st.one_of(st.none(), numbers, texts)
values = st.recursive(
    leaves, lambda v: st.one_of(st.lists(v, max_size=4), st.dictionaries(texts, v, max_size=4)), max_leaves=6
)


def mangled(data: bytes, seed: int) -> bytes:
    """Bytes with a few of them flipped, cut, doubled or replaced by numbers without measure."""
    rng = random.Random(seed)
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if not found:
            break
        at = rng.randrange(len(found))
        kind = rng.randrange(5)
        if kind == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found = found[:at]
        elif kind == 2:
            found[at:at] = found[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            found[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f\0\0\0\0", b"99999999"])
        else:
            found[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
    return bytes(found)


seeds = st.integers(0, 2**32)
CONFIGS = [p.read_text() for p in sorted((ROOT / "configs").glob("*.yaml"))]
WORDS = (
    "&a [*a, *a]",
    "<<: *b",
    "arms",
    "{",
    "]",
    ": ",
    "- ",
    "!!python/object:os.system x",
    "1" * 5000,
    "...\n",
    "~",
    "'",
)


@examples(300)
@given(text=st.sampled_from(CONFIGS), seed=seeds)
def test_config_files(tmp_path_factory, text, seed):
    rng = random.Random(seed)
    data = text
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data))
        data = data[:at] + rng.choice(WORDS) + data[at + rng.randrange(30) :]
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_bytes(mangled(data.encode(), seed) if rng.random() < 0.5 else data.encode())
    with only_one_message():
        load_config(file)


SECTIONS = ("train", "sampling", "model", "rounds", "evaluate", "data", "mesh", "arms", "student")


@examples(300)
@given(path=st.sampled_from(CONFIGS), section=st.sampled_from(SECTIONS), key=texts, value=values, seed=seeds)
def test_config_values(tmp_path_factory, path, section, key, value, seed):
    """Every key that there is, with any value; and keys that there are not."""
    rng = random.Random(seed)
    raw = yaml.safe_load(path)
    inner = raw.setdefault(section, {})
    if isinstance(inner, dict) and inner and rng.random() < 0.7:
        inner[rng.choice(list(inner))] = value
    elif isinstance(inner, dict):
        inner[key] = value
    else:
        raw[section] = value
    file = tmp_path_factory.getbasetemp() / "values.yaml"
    with contextlib.suppress(UnicodeEncodeError, yaml.YAMLError, ValueError):
        file.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    with only_one_message():
        load_config(file)


KEYS = [f"sampling.{name}" for name in SamplingConfig.model_fields] + ["mesh.data", "sampling.", ".", "x.y.z"]


@examples(250)
@given(
    pairs=st.lists(st.tuples(st.sampled_from(KEYS), st.one_of(texts, values.map(lambda v: repr(v)[:4000]))), max_size=3)
)
def test_overrides(pairs):
    with only_one_message():
        parse_section(GenerateOptions, {}, [f"{key}={value}" for key, value in pairs], "generate")


@pytest.fixture(scope="module")
def writer(mesh):
    config = ModelConfig(layers=1, d_model=16, heads=2, max_length=24)
    return transformer(config, ByteTokenizer(), mesh).initialized(0)


likely = {
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]), "top_k": st.integers(0, 300), "top_p": st.floats(0.01, 1.0),
    "min_p": st.floats(0.0, 0.99), "typical_p": st.floats(0.01, 1.0), "repetition_penalty": st.floats(0.1, 9.0),
    "presence_penalty": st.floats(-3.0, 3.0), "frequency_penalty": st.floats(-3.0, 3.0),
    "bad_words": st.lists(texts, max_size=2), "min_tokens": st.integers(0, 9), "max_tokens": st.integers(0, 9),
    "stop": st.lists(texts, max_size=2), "stop_tokens": st.lists(st.integers(-2, 400), max_size=2),
    "guidance": st.sampled_from([0.0, 1.0, 2.0]), "beams": st.integers(1, 3), "best_of": st.integers(1, 3),
    "n_best": st.integers(1, 3), "length_penalty": st.floats(-2.0, 2.0),
    "regex": st.sampled_from(["[ab]+", "(", "a{3}", "", "\\d*"]),
    "json_schema": st.sampled_from(['{"type": "null"}', "{", "5"]),
    "grammar": st.sampled_from(['start: "a"+', "start:", "\x00"]),
}  # fmt: skip


@examples(60)
@given(
    chosen=st.lists(st.sampled_from(sorted(likely)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({n: st.one_of(likely[n], likely[n], likely[n], values) for n in names})
    ),
    prompts=st.lists(st.sampled_from(["", "a", "ab cd", "é\x00", "x" * 40]), min_size=1, max_size=3),
)
def test_sampling_settings(writer, chosen, prompts):
    """Rows with a status, or one message: whatever settings meet, and whatever values they have."""
    given = {"max_tokens": 5, **chosen}
    with only_one_message():
        rows = generate(writer, prompts, {"batch": 2, "chunk": 4, **given})
        assert len(rows) >= len(prompts)
        assert set(rows.column("status")) <= {"ok", "length", "constraint", "prompt_too_long"}
        assert all(np.isfinite(x).all() for x in rows.lists("logprobs"))


FAMILY_CONFIGS = {p.name: json.loads((p / "config.json").read_text()) for p in sorted(FOLDER.iterdir()) if p.is_dir()}


@examples(300)
@given(name=st.sampled_from(sorted(FAMILY_CONFIGS)), value=values, seed=seeds)
def test_config_json(mesh, name, value, seed):
    """One key of a real config with any value, up to the shapes of the params (nothing is allocated)."""
    config = dict(FAMILY_CONFIGS[name])
    rng = random.Random(seed)
    config[rng.choice(sorted(config))] = value
    with only_one_message():
        read_config(config, "config.json")


@examples(60)
@given(name=st.sampled_from(sorted(FAMILY_CONFIGS)), number=numbers, seed=seeds)
def test_shapes_of_config_json(mesh, name, number, seed):
    config = dict(FAMILY_CONFIGS[name])
    config[random.Random(seed).choice([k for k, v in config.items() if isinstance(v, int)] or ["vocab_size"])] = number
    with only_one_message():
        found = read_config(config, "config.json")
        params_from(found, {}, lambda name: None, mesh, "float32", "folder")
        raise AssertionError("a file without tensors was taken")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with every companion file."""
    from recursive_jax.data.tokenizer_files import write_tokenizer
    from recursive_jax.data.tokenizers import ByteTokenizer

    found = tmp_path_factory.mktemp("folder") / "model"
    shutil.copytree(FOLDER / "llama", found)
    write_tokenizer(found, ByteTokenizer(), 64)
    settings = json.loads((found / "tokenizer_config.json").read_text())
    (found / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    (found / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eos|>"}}))
    return found


@examples(250)
@given(
    name=st.sampled_from(
        ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json", "tokenizer.json"]
    ),
    key=texts,
    value=values,
    seed=seeds,
)
def test_tokenizer_files(folder, tmp_path_factory, name, key, value, seed):
    rng = random.Random(seed)
    copy = tmp_path_factory.getbasetemp() / "tokenizer"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    file = copy / name
    if rng.random() < 0.5 or name == "tokenizer.json":
        file.write_bytes(mangled(file.read_bytes(), seed))
    else:
        stored = json.loads(file.read_text())
        stored[rng.choice([*stored, key, "eos_token_id", "bos_token", "pad_token"])] = value
        file.write_text(json.dumps(stored))
    with only_one_message():
        read_tokenizer(copy, 300)


@examples(200)
@given(seed=seeds, name=st.sampled_from(["model.safetensors", "config.json", "index"]))
def test_model_folders(folder, mesh, tmp_path_factory, seed, name):
    copy = tmp_path_factory.getbasetemp() / "weights"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    rng = random.Random(seed)
    if name == "index":
        places = rng.choice(
            [
                [],
                None,
                {"a": 1},
                {"a": ["b"]},
                {"a": "../x"},
                {"a": "/etc/passwd"},
                {"a": "gone.safetensors"},
                {"a": ""},
                {"a": "config.json"},
                {"a": "."},
            ]
        )
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        data = (copy / name).read_bytes()
        edge = 8 + int.from_bytes(data[:8], "little") if name.startswith("model") else len(data)
        (copy / name).write_bytes(mangled(data[:edge], seed) + data[edge:])
    with only_one_message():
        read_huggingface(copy, mesh)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_llama_gguf(path)
    return path.read_bytes()


@examples(250)
@given(seed=seeds)
def test_gguf_headers(gguf_bytes, mesh, tmp_path_factory, seed):
    end = 3000  # keys, tokenizer, tensor table
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(mangled(gguf_bytes[:end], seed) + gguf_bytes[end:])
    with only_one_message():
        config, _, fields = read_gguf(path, mesh)
        gguf_tokenizer(fields, config.vocab, str(path))


LINES = [
    b'{"prompt": "a", "negative": "b"}\n',
    b'{"messages": [{"role": "user", "content": null}]}\n',
    b'{"prompt": 1}\n',
    b'{"text": "a", "sampling": {"temperature": 0.5}}\n',
    b"[1]\n",
    b'"a"\n',
    b"\n",
    b"{\n",
    b'{"a": NaN}\n',
]


@examples(250)
@given(
    parts=st.lists(st.sampled_from(LINES), max_size=4),
    kind=st.sampled_from(["jsonl", "csv", "tsv", "txt", "json", "gz"]),
    junk=st.binary(max_size=40),
    seed=seeds,
)
def test_prompts_and_texts(tmp_path_factory, parts, kind, junk, seed):
    data = b"".join(parts) + junk
    file = tmp_path_factory.getbasetemp() / f"prompts.{kind}"
    file.write_bytes(mangled(data, seed) if seed % 2 else data)
    with only_one_message():
        list(Prompts(str(file)).rows())
    with only_one_message():
        list(read_rows(file))
    with only_one_message():
        "".join(map(str, read_text(file)))


@pytest.fixture(scope="module")
def parquet_bytes(tmp_path_factory):
    import pyarrow.parquet as pq

    file = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"] * 50, "messages": [[{"role": "user", "content": "x"}]] * 100}), file)
    return file.read_bytes()


@examples(150)
@given(seed=seeds)
def test_parquet(parquet_bytes, tmp_path_factory, seed):
    file = tmp_path_factory.getbasetemp() / "fuzz.parquet"
    file.write_bytes(mangled(parquet_bytes, seed))
    with only_one_message():
        Dataset.read([str(file)])
    with only_one_message():
        list(Prompts(str(file)).rows())


PIECES = (
    "{{ messages }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{{ messages[0]['role'] }}",
    "{% if x %}",
    "{% endif %}",
    "{{ 'a' * 10**9 }}",
    "{{ range(10**8) }}",
    "{% set x = 1 %}",
    "{{ x ~ x }}",
    "{% macro f(n) %}",
    "{% endmacro %}",
    "{{ f(3) }}",
    "{{ messages|tojson }}",
    "{{ raise_exception('no') }}",
    "{{ 1/0 }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ x.__class__ }}",
    "{{ ''|center(10**9) }}",
    "{%",
    "}}",
    "text\n",
    "{{ loop.index }}",
    "{% set ns = namespace(a='b') %}",
    "{% set ns.a = ns.a + ns.a %}",
    "{{ strftime_now('%Y') }}",
    "{{ '%d' % x }}",
)


@examples(250)
@given(pieces=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=9))
def test_chat_templates(pieces):
    with only_one_message():
        render_template("".join(pieces), messages=[{"role": "user", "content": "hello"}], add_generation_prompt=True)


@pytest.fixture(scope="module")
def finished(tokenizer, mesh, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    small = SmallRun(tokenizer, mesh, steps=3, rows=5, student=False)
    small(root / "run")
    save_imported(small.model().initialized(0), root / "model")
    return root, small


METADATA = (
    "run.json",
    "models.json",
    "commits.jsonl",
    "metrics.jsonl",
    "rounds/0000/model/manifest.json",
    "rounds/0000/model/train.jsonl",
    "rounds/0000/rows/manifest.json",
    "rounds/0001/evaluation/metrics.json",
    "rounds/0000/model/model.json",
)


@examples(60)
@given(name=st.sampled_from(METADATA), value=values, seed=seeds)
def test_stored_metadata(finished, tmp_path_factory, mesh, name, value, seed):
    root, small = finished
    run = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(root / "run", run)
    rng = random.Random(seed)
    data = (run / name).read_bytes()
    written = mangled(data, seed) if rng.random() < 0.5 else json.dumps(value).encode(errors="surrogatepass")
    (run / name).write_bytes(written)
    for use in (lambda: status_text(run), lambda: load_model(run, mesh), lambda: small(run)):
        with only_one_message():
            use()


def test_every_family_is_among_them():
    assert {FAMILY_CONFIGS[n]["model_type"] for n in FAMILY_CONFIGS} == set(FAMILIES)
