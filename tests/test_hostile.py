"""What a stranger's files may hold: each kind is refused by one message that says what and where, before it costs
memory or time; and what is written for people is escaped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import tokenizers
import yaml

from recursive_jax import cli, load_model
from recursive_jax.config.yaml_text import parse_yaml, read_yaml
from recursive_jax.csv_text import csv_text
from recursive_jax.data.chat_template import SIZE, render_template
from recursive_jax.data.tokenizer_files import read_tokenizer
from recursive_jax.errors import InputError, explain
from recursive_jax.models.families import read_config
from recursive_jax.models.gguf import read_gguf
from recursive_jax.rounds.opening import weights_fingerprint
from recursive_jax.rounds.report import write_report
from tests.helpers import write_llama_gguf
from tests.small_run import SmallRun
from tests.test_families import FOLDER

CHAT = [{"role": "user", "content": "hello"}]


# ---- configs


@pytest.mark.parametrize(
    "text, says",
    [
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("train: {steps: 1, steps: 2}", "the key 'steps' is given twice"),
        (
            "a0: &a0 [1, 2]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
            "by its anchors",
        ),
        ("a: " + "[" * 200 + "]" * 200, "nested more than 50 deep"),
        ("a: " + "[" * 20_000, "nested more than 50 deep"),
        ("a: &a [*a]", "inside of what it names"),
        ("a: " + "9" * 6000, "cannot be read"),
        ("a: " + "9" * 60, "more than 64 bits"),
        ("1: 2", "keys are names, 1 is none"),
        ("\x00", "special characters are not allowed"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_yaml_that_explodes_repeats_or_runs_is_refused(text, says, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="config.yaml") as error:
        read_yaml(tmp_path / "config.yaml")
    assert says in str(error.value) and len(str(error.value)) < 1000


def test_anchors_and_merges_of_people_are_read():
    text = "base: &b {steps: 3, batch: 8}\ntrain: {<<: *b, steps: 5}\nlist: [*b, *b]"
    assert parse_yaml(text)["train"] == {"steps": 5, "batch": 8}
    merged = "base: &a {a: 1}\ndeep: {inner: {mid: &m {<<: *a, a: 2}}}\ntop: {<<: *m}\n1: one\n'1': text"
    assert parse_yaml(merged) == yaml.safe_load(merged)


@pytest.mark.parametrize(
    "name", ["report.html", "metrics.jsonl", "run.json", "commits.jsonl", ".lock", "a" * 300, "ä" * 90, "a/b"]
)
def test_an_arm_is_no_file_of_the_run(name, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(json.dumps({"arms": {name: {"data": "replace"}}}))
    assert cli.main(["run", str(tmp_path / "config.yaml"), "--workdir", str(tmp_path / "run")]) == 2
    assert "arms." in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---- models

LLAMA = json.loads((FOLDER / "llama" / "config.json").read_text())


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("num_attention_heads", 0, "num_attention_heads=0: an integer from 1"),
        ("vocab_size", 2**40, "vocab_size=1099511627776: an integer from 1 to"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000: an integer from 1 to 10,000"),
        ("hidden_size", "32", "hidden_size='32': an integer"),
        ("hidden_size", [32], "hidden_size=[32]: an integer"),
        ("hidden_size", True, "hidden_size=True: an integer"),
        ("intermediate_size", 24.5, "intermediate_size=24.5: an integer"),
        ("rms_norm_eps", 0, "rms_norm_eps=0: a number above 0"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps=nan: a number"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 0},
            "rope_parameters.rope_theta=0: a number above 0",
        ),
        ("rope_parameters", [1], "rope_parameters=[1]: a mapping"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings='yes': true or false"),
        ("hidden_act", 3, "hidden_act=3: a text"),
        ("model_type", ["llama"], "is not known"),
    ],
)
def test_config_json_is_held_to_types_and_ranges(key, value, says):
    with pytest.raises(InputError) as error:
        read_config({**LLAMA, key: value}, "config.json")
    assert says in str(error.value) and "config.json" in str(error.value)


def test_every_problem_of_a_config_json_is_said_at_once():
    with pytest.raises(InputError) as error:
        read_config(
            {**LLAMA, "hidden_size": 0, "vocab_size": "x", "hidden_act": None, "rms_norm_eps": -1.0}, "config.json"
        )
    assert sum(word in str(error.value) for word in ("hidden_size", "vocab_size", "rms_norm_eps")) == 3


def copied(tmp_path, **files):
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "llama", folder)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.mark.parametrize("value", ["2", [["a"]], {"a": 1}, [1, "2"], 1.5, True])
def test_token_ids_are_ids(value, tmp_path):
    folder = copied(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(InputError, match="eos_token_id"):
        read_tokenizer(folder, 48)


def test_an_edited_template_or_vocabulary_is_another_model(tmp_path):
    folder = copied(tmp_path)
    before = weights_fingerprint(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert weights_fingerprint(folder) != before


def test_deep_and_mistyped_json_is_named(tmp_path, mesh):
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    for name in ("config", "generation_config", "tokenizer_config"):
        folder = copied(tmp_path / name, **{name: deep})
        with pytest.raises(InputError, match=f"{name}.json is damaged"):
            load_model(folder, mesh)
    for i, places in enumerate(([], "model.safetensors", {"a": ["b"]}, {"a": 1}, None)):
        folder = copied(tmp_path / str(i), **{"model.safetensors.index": {"weight_map": places}})
        with pytest.raises(InputError, match="weight_map is a mapping"):
            load_model(folder, mesh)


def test_a_weights_index_follows_no_link_out_of_its_folder(tmp_path, mesh):
    """But the links of the hub's own cache, from snapshots/REVISION into blobs, are followed."""
    secret = tmp_path / "elsewhere.safetensors"
    shutil.copy(FOLDER / "llama" / "model.safetensors", secret)
    from safetensors import safe_open

    with safe_open(secret, "np") as file:
        names = list(file.keys())
    for home, refused in ((tmp_path / "plain", True), (tmp_path / "hub" / "snapshots", False)):
        folder = home / "revision"
        folder.mkdir(parents=True)
        blob = secret if refused else home.parent / "blobs" / "0123"
        if not refused:
            blob.parent.mkdir()
            shutil.copy(secret, blob)
        shutil.copy(FOLDER / "llama" / "config.json", folder)
        (folder / "part.safetensors").symlink_to(blob)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {n: "part.safetensors" for n in names}})
        )
        if refused:
            with pytest.raises(InputError, match="lies outside"):
                load_model(folder, mesh)
        else:
            assert load_model(folder, mesh).params is not None


@pytest.mark.parametrize(
    "place, value, says",
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, (9).to_bytes(4, "little"), "version 9"),
        (8, (2**60).to_bytes(8, "little"), "do not fit into"),
        (16, (2**61).to_bytes(8, "little"), "do not fit into"),
        (24, (2**50).to_bytes(8, "little"), "a key has 1,125,899,906,842,624 bytes"),
    ],
)
def test_a_gguf_is_held_against_its_size(place, value, says, tmp_path, mesh):
    pytest.importorskip("gguf")
    write_llama_gguf(tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[place : place + len(value)] = value
    (tmp_path / "m.gguf").write_bytes(bytes(data))
    begin = time.process_time()
    with pytest.raises(InputError, match="m.gguf") as error:
        read_gguf(tmp_path / "m.gguf", mesh)
    assert says in str(error.value) and time.process_time() - begin < 10


def test_offsets_and_dimensions_of_a_gguf_stay_inside(tmp_path, mesh):
    pytest.importorskip("gguf")
    write_llama_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight")
    for place, value in ((at, 2**31), (at + 4, 2**62), (at + 20 + 4, 2**40)):  # dimensions, a size, the offset
        size = 4 if place == at else 8
        (tmp_path / "bad.gguf").write_bytes(data[:place] + value.to_bytes(size, "little") + data[place + size :])
        with pytest.raises(InputError, match="truncated or damaged"):
            read_gguf(tmp_path / "bad.gguf", mesh)


# ---- chat templates


@pytest.mark.parametrize(
    "source, says",
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "at most 1,000,000"),
        ("a\nb\n{{ 'a' * 10**11 }}", "line 3"),
        ("{{ 10**100000 }}", "thousands of digits"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "turns of loops"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}", "turns of loops"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "characters"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "characters"),
        ("{% set x = 'a' * 10**6 %}{% for i in range(9999) %}{{ x }}{% endfor %}", "characters"),
        ("{{ 'a'|center(10**11) }}", "at most 1,000,000"),
        ("{{ '%1000000000d' % 1 }}", "width"),
        ("{{ '{:>1000000000}'.format(1) }}", "width"),
        ("{{ ('x' * 10**6).replace('', 'y' * 10**6) }}", "characters"),
        ("{{ ['a' * 10**6] * 100 }}", "characters"),
        ("{{ (['a' * 10**6] * 10**5)|join }}", "characters"),
        ("{{ '%100000000d'|format(1) }}", "width"),
        (
            "{% set n = namespace(a=1) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a == 1 }}",
            "parts",
        ),
        ("one\n{{ raise_exception('no system message') }}", "no system message (line 2"),
        ("one\n{% if %}", "line 2"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_chat_templates_run_under_limits(source, says, monkeypatch):
    monkeypatch.setattr("recursive_jax.data.chat_template.STEPS", 20_000)
    begin = time.process_time()
    with pytest.raises(InputError, match="the chat template") as error:
        render_template(source, messages=CHAT)
    assert says in str(error.value) and time.process_time() - begin < 15


def test_a_template_s_time_is_limited(monkeypatch):
    monkeypatch.setattr("recursive_jax.data.chat_template.SECONDS", 0.05)
    with pytest.raises(InputError, match="seconds"):
        render_template(
            "{% for i in range(9999) %}{% for j in range(99) %}{{ i }}{% endfor %}{% endfor %}", messages=CHAT
        )


@pytest.mark.parametrize(
    "source, text",
    [
        ("{{ 'User: {}'.format('x') }}", "User: x"),
        ("{{ 'id:12345 {}'.format(1) }}", "id:12345 1"),
        ('{{ \'{{"name": "{}"}}\'.format("a") }}', '{"name": "a"}'),
        ("{% macro f(v) %}{{ v }}{% endmacro %}{{ f(1700000000) }}", "1700000000"),
        ("{% set n = namespace(v=1700000000) %}{{ n.v + 1 }}", "1700000001"),
        ("{{ '%5.2f' % 1.5 }}{{ '100% of 12345 *' }}", " 1.50100% of 12345 *"),
        (
            "{% set a, b = (1, 2) %}{% for k, v in {'x': a}.items() %}{{ k ~ v }}{% endfor %}{{ 'a' in ['a'] }}",
            "x1True",
        ),
    ],
)
def test_ordinary_templates_are_not_refused(source, text):
    assert render_template(source, messages=CHAT) == text


def test_long_conversations_are_rendered():
    messages = [{"role": "user", "content": "word " * 200}] * 1000
    source = "{% for m in messages %}{{ '<|' ~ m['role'] + '|>' + m['content'] }}\n{% endfor %}"
    assert len(render_template(source, messages=messages)) == 1000 * (8 + 1000 + 1) < SIZE


# ---- what people and spreadsheets read


def test_a_cell_is_no_formula():
    rows = [["=cmd|' /C calc'!A0", "+1+1", "-2", "-x", "@SUM(A1)", "\t=1", -0.5, 3, None, "a,b", "plain"]]
    assert csv_text(rows) == "'=cmd|' /C calc'!A0,'+1+1,-2,'-x,'@SUM(A1),'\t=1,-0.5,3,,\"a,b\",plain\n"


def test_the_report_escapes_whatever_it_shows(tokenizer, mesh, tmp_path):
    evil = "<script>alert('x')</script>"
    SmallRun(tokenizer, mesh, steps=3, rows=5, student=False)(tmp_path / "run")
    from recursive_jax import storage

    for file in [tmp_path / "run/run.json", *(tmp_path / "run").rglob("manifest.json")]:
        stored = storage.read_json(file, "it")
        for key in ("fingerprint", "devices", "seed", "name", "verb"):
            if key in stored and not (key == "verb" and stored[key] == "evaluate"):
                stored[key] = f"{stored[key]}{evil}"
        storage.write_json(file, stored)
    text = write_report(tmp_path / "run").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


# ---- errors of the machine


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(28, "No space left on device", "/x/y"), "cannot use /x/y: no space is left"),
        (OSError(36, "File name too long", "/x"), "name is too long"),
        (OSError(21, "Is a directory", "/x"), "a folder stands where a file should be"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (ValueError("RESOURCE_EXHAUSTED: Failed writing: x [OS error 28: ENOSPC]"), "no space is left"),
        (
            ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']"),
            "no space",
        ),
        (RuntimeError("can't start new thread"), "threads"),
        (RuntimeError("Unable to initialize backend 'tpu': INTERNAL"), "the platform 'tpu' cannot be used"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "not enough memory"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_errors_of_the_machine_are_explained(error, says):
    assert says in explain(error, "/runs/a")


def test_other_errors_are_not():
    assert explain(ValueError("shapes do not match")) is None and explain(KeyError("a")) is None
    assert explain(OSError(9999, "odd")) is None


COMMAND = [sys.executable, "-m", "recursive_jax.cli"]
TINY = """
data: {real_tokens: 4000}
model: {layers: 1, d_model: 32, heads: 2, max_length: 32}
train: {steps: 8, batch: 8, checkpoint_every: 3}
rounds: {count: 0, token_budget: 1000}
evaluate: {rows: 8, samples: 8, token_budget: 100}
mesh: {data: 1}
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit, says", [("-f 48", "larger than allowed"), ("-n 20", "too many files")])
def test_limits_of_the_machine_are_one_message(limit, says, tmp_path):
    (tmp_path / "config.yaml").write_text(TINY)
    words = [*COMMAND, "run", str(tmp_path / "config.yaml"), "--workdir", str(tmp_path / "run"), "--quiet"]
    limited = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *words]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text(TINY)
    words = [*COMMAND, "run", str(tmp_path / "config.yaml"), "--workdir", str(tmp_path / "run"), "--quiet"]
    for platform in ("tpu", "cuda"):
        done = subprocess.run(words, env={**os.environ, "JAX_PLATFORMS": platform}, capture_output=True, text=True)
        assert done.returncode == 2 and f"{platform}" in done.stderr and "Traceback" not in done.stderr, done.stderr


INTERRUPTED_AT = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

class Interrupt:  # Ctrl-C in the moment that a module is looked for
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

module = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupt())
from recursive_jax.cli import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["recursive_jax.cli.run", "numpy", "jax", "optax"])
def test_ctrl_c_during_imports_is_130(module, tmp_path):
    """From our first line on; before that it is Python's own start that is interrupted, and says so its own way."""
    (tmp_path / "config.yaml").write_text(TINY)
    words = ["run", str(tmp_path / "config.yaml"), "--workdir", str(tmp_path / "run"), "--dry-run"]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_AT, module, *words], capture_output=True, text=True)
    assert done.returncode == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("text", ["seed: !!bool abc", "seed: !!timestamp abc", "seed: !!int x", "seed: !!float []"])
def test_yaml_tags_that_their_values_do_not_fit(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="cannot be read as YAML"):
        read_yaml(tmp_path / "config.yaml")


def test_pipes_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match="is not a file"):
        read_yaml(tmp_path / "pipe.yaml")


def test_a_failed_export_leaves_nothing_behind(mesh, tmp_path, monkeypatch):
    from recursive_jax import save_huggingface
    from recursive_jax.rounds import writing

    def full(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "tokenizer.json"))

    model = load_model(FOLDER / "llama", mesh)
    monkeypatch.setattr(writing, "write_tokenizer", full)
    with pytest.raises(InputError, match="no space is left"):
        save_huggingface(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_panic_are_one_message(tmp_path):
    folder = copied(tmp_path, generation_config={"eos_token_id": 2})
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), behavior="isolated")
    words.save(str(folder / "tokenizer.json"))
    found = read_tokenizer(folder, 48)
    with pytest.raises(InputError, match="cannot encode"):
        found.encode("hi a" + "a" * 28 + "!")
