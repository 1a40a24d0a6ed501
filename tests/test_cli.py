"""Bad input gives one clear message and exit code 2; and the commands do what their help says."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil

import pyarrow.parquet as pq
import pytest

from recursive_jax import cli, storage
from tests.conftest import ROOT

CONFIG = """
data:
  real_tokens: 2500
  language: {types: 2, nouns: 4, verbs: 2, first_names: 5, last_names: 5, attributes: 2, values: 5}
model: {layers: 1, d_model: 16, heads: 2, max_length: 32}
train: {steps: 6, batch: 8, tensorboard: false}
sampling: {batch: 32}
rounds: {count: 1, token_budget: 800}
evaluate: {rows: 16, samples: 16, token_budget: 200}
mesh: {data: 1}
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return file


def run(*words) -> int:
    return cli.main([str(w) for w in words])


def refused(capsys, *words) -> str:
    """The message of a command that must exit with 2, in one piece and without a traceback."""
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("recursive-jax: ") and "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.yaml").write_text(CONFIG)
    assert run("run", folder / "config.yaml", "--workdir", folder / "run", "--quiet") == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.stepz=3"], ["unknown key train.stepz", "did you mean train.steps?"]),
        (["learning_rate=3"], ["unknown key learning_rate", "did you mean train.learning_rate?"]),
        (["arms.main.anchr=0.1"], ["unknown key arms.main.anchr", "did you mean arms.main.anchor?"]),
        (["train.steps=many"], ["train.steps='many'", "valid integer"]),
        (
            ["train.steps=0", "rounds.init=bass", "model.heads=3"],
            ["train.steps=0", "rounds.init='bass'", "base", "heads=3"],
        ),
        (["arms.main.anchor=0.7", "arms.main.fresh=0.7"], ["more than the whole round"]),
        (["arms.main.sampling={temperatur: 1}"], ["temperatur", "did you mean temperature?"]),
        (["train.length=64"], ["train.length=64 is longer than model.max_length=32"]),
        (["sampling.prompt_tokens=32"], ["leaves nothing"]),
        (["justaword"], ["not of the form key=value"]),
        (["train=3"], ["train"]),
        (["model.vocab=5"], ["model.vocab=5", "tokenizer"]),
        (
            ["mesh.tensor=4", "mesh.data=2", "model.d_ff=42", "train.batch=7"],
            ["model.heads=2", "model.d_ff=42", "train.batch=7", "divisible"],
        ),
        (["mesh.data=9"], ["needs 9 devices, 8 are here"]),
        (["data.path=nowhere/*.txt"], ["nowhere/*.txt does not exist"]),
        (["data.path=README.md", "data.tokenizer=none.json"], ["none.json does not exist"]),
    ],
)
def test_bad_config(capsys, config, tmp_path, overrides, expected):
    error = refused(capsys, "run", config, *overrides, "--workdir", tmp_path / "run")
    for piece in expected:
        assert piece in error, error
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_missing_and_broken_config_files(capsys, tmp_path):
    assert "does not exist" in refused(capsys, "run", tmp_path / "no.yaml", "--workdir", tmp_path / "run")
    (tmp_path / "bad.yaml").write_text("train: [unclosed")
    assert "cannot be read as YAML" in refused(capsys, "run", tmp_path / "bad.yaml", "--workdir", tmp_path / "run")
    (tmp_path / "list.yaml").write_text("- 1\n- 2")
    assert "must be a mapping" in refused(capsys, "run", tmp_path / "list.yaml", "--workdir", tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", b"", "is empty"),
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 200, "is not UTF-8"),
        ("short.txt", b"ten bytes.", "shorter than one row"),
        ("bad.jsonl", b'{"text": "a"}\n{oops\n', "line 2: not JSON"),
        ("other.jsonl", b'{"body": "a"}\n', "no key 'text', there are: body"),
        ("bad.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("blank.jsonl", b"\n\n", "holds no text"),
    ],
)
def test_bad_data(capsys, config, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    error = refused(capsys, "run", config, f"data.path={tmp_path / name}", "--workdir", tmp_path / "run")
    assert expected in error and name in error


def test_another_config_is_refused_with_the_difference_and_can_fork(capsys, finished, tmp_path):
    workdir = finished / "run"
    error = refused(capsys, "run", finished / "config.yaml", "sampling.temperature=0.5", "--workdir", workdir)
    assert "sampling.temperature: 1.0 -> 0.5" in error and "--fork" in error
    code = run(
        "run",
        finished / "config.yaml",
        "sampling.temperature=0.5",
        "--workdir",
        tmp_path / "new",
        "--fork",
        workdir,
        "--quiet",
    )
    assert code == 0
    kept = json.loads((tmp_path / "new/rounds/0000/teacher/manifest.json").read_text())
    original = json.loads((workdir / "rounds/0000/teacher/manifest.json").read_text())
    assert kept == original  # copied, not trained again: even the seconds are the same
    changed = json.loads((tmp_path / "new/rounds/0001/student/manifest.json").read_text())
    assert (
        changed["fingerprint"] != json.loads((workdir / "rounds/0001/student/manifest.json").read_text())["fingerprint"]
    )


def test_fork_with_other_logging_and_evaluation_retrains_nothing(finished, tmp_path):
    words = [
        "train.log_every=1",
        "evaluate.token_budget=150",
        "--workdir",
        tmp_path / "new",
        "--fork",
        finished / "run",
        "--quiet",
    ]
    assert run("run", finished / "config.yaml", *words) == 0
    for name in ("rounds/0000/teacher", "rounds/0001/student"):
        old, new = (json.loads((f / name / "manifest.json").read_text()) for f in (finished / "run", tmp_path / "new"))
        assert old == new


def test_a_killed_start_and_leftover_checkpoints_are_no_obstacle(finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.tmp").write_text("{")
    words = ["run", finished / "config.yaml", "--workdir", tmp_path / "run", "--quiet"]
    assert run(*words) == 0
    leftover = tmp_path / "run/rounds/0001/student/resume/3"
    leftover.mkdir(parents=True)
    assert run(*words) == 0 and not leftover.parent.exists()


def test_a_start_that_made_nothing_leaves_the_folder_free(capsys, config, tmp_path):
    words = ["--workdir", tmp_path / "run", "--quiet"]
    (tmp_path / "short.txt").write_text("short")
    refused(capsys, "train", config, f"data.path={tmp_path / 'short.txt'}", *words)
    assert run("train", config, *words) == 0


def test_buckets_are_refused(capsys, config):
    assert "not supported yet" in refused(capsys, "run", config, "--workdir", "gs://bucket/run")


def test_a_second_start_returns_what_is_stored(finished):
    before = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("manifest.json")}
    assert run("run", finished / "config.yaml", "--workdir", finished / "run", "--quiet") == 0
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("manifest.json")}


@pytest.mark.parametrize("victim", ["rows-00000.parquet", "checkpoint", "metrics.json"])
def test_damage_is_named_and_nothing_starts_from_scratch(capsys, finished, copy, victim):
    folders = {
        "rows-00000.parquet": "rows",
        "checkpoint": "student",
        "metrics.json": "evaluation",
    }
    folder = copy / "rounds/0001" / folders[victim]
    target = folder / victim
    if victim == "checkpoint":
        target = max((p for p in target.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(target.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4] = b"\0\xff\0\xff"
    target.write_bytes(bytes(data))
    before = sorted(p for p in copy.rglob("*") if "tensorboard" not in str(p))
    error = refused(capsys, "run", finished / "config.yaml", "--workdir", copy, "--quiet")
    assert "damaged" in error and str(target) in error
    assert before == sorted(p for p in copy.rglob("*") if "tensorboard" not in str(p))


def test_two_processes_on_one_folder(capsys, finished, copy):
    with open(copy / ".lock", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "in use by another process" in refused(capsys, "run", finished / "config.yaml", "--workdir", copy)


def test_disk_trouble(capsys, config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(capsys, "run", config, "--workdir", tmp_path / "file" / "run")
    assert "cannot use" in refused(capsys, "run", config, "--workdir", "/proc/recursive-jax")

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(storage, "write_atomic", full)
    assert "no space is left" in refused(capsys, "run", config, "--workdir", tmp_path / "full")
    monkeypatch.undo()
    assert run("run", config, "--workdir", tmp_path / "full", "--quiet") in (
        0,
        2,
    )  # 2: only if a half-made folder has no record


def test_a_folder_that_is_not_a_run(capsys, config, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    assert "not empty and has no run.json" in refused(capsys, "run", config, "--workdir", tmp_path / "photos")
    assert "not a run folder" in refused(capsys, "status", tmp_path / "photos")


def test_source_data_that_changed_is_an_input_that_changed(capsys, config, tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 80)
    assert run("train", config, f"data.path={text}", "--workdir", tmp_path / "run", "--quiet") == 0
    text.write_text("something else entirely, and more of it than before. " * 80)
    assert "other inputs" in refused(capsys, "train", config, f"data.path={text}", "--workdir", tmp_path / "run")


def test_dry_run_costs_and_writes_nothing(capsys, config, tmp_path):
    assert run("run", config, "--workdir", tmp_path / "run", "--dry-run") == 0
    out = capsys.readouterr().out
    for word in ("parameters", "memory", "compute", "max_length: 32", "TFLOP"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_status_report_generate_evaluate(capsys, finished, tmp_path):
    workdir = finished / "run"
    assert run("status", workdir) == 0
    out = capsys.readouterr().out
    assert "rounds/0001/student" in out and "<- " in out and "kl_total" in out
    assert run("status", workdir, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["round"] for r in records] == [0, 1]
    assert records == [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    row = pq.read_table(workdir / "rounds/0001/samples/rows-00000.parquet")["id"][3].as_py()
    assert run("status", workdir, "--row", row) == 0
    told = capsys.readouterr().out
    assert (
        "written by the model rounds/0001/student" in told
        and "rounds/0000/teacher" in told
        and "rounds/0000/real" in told
    )
    assert run("report", workdir) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert run("generate", workdir, "--count", "2", "sampling.temperature=0.5", "--seed", "4") == 0
    assert len(capsys.readouterr().out.strip().split("\n\n")) <= 2
    for name, mesh in (("out.jsonl", "mesh.data=8"), ("out.parquet", "mesh.tensor=2")):
        assert run("generate", workdir / "rounds/0000/teacher", "--count", "3", mesh, "--out", tmp_path / name) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    others = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [x["tokens"] for x in lines] == [x["tokens"] for x in others] and len(lines) == 3
    capsys.readouterr()
    assert run("evaluate", workdir, "evaluate.rows=8", "evaluate.samples=8", "mesh.data=1") == 0
    assert "kl_total" in json.loads(capsys.readouterr().out)


def test_bad_words_for_the_small_commands(capsys, finished, tmp_path):
    workdir = finished / "run"
    assert "does not exist" in refused(capsys, "generate", tmp_path / "none")
    assert "no stored model" in refused(capsys, "generate", tmp_path)
    assert "unknown key train" in refused(capsys, "generate", workdir, "train.steps=3")
    assert "mesh -1x3x1" in refused(capsys, "generate", workdir, "mesh.fsdp=3")
    assert "--count=0" in refused(capsys, "generate", workdir, "--count", "0")
    assert "is not a word" in refused(capsys, "generate", workdir, "--prompt", "xyzzy")
    assert ".jsonl or .parquet" in refused(capsys, "generate", workdir, "--out", "rows.csv")
    assert "no generated row" in refused(capsys, "status", workdir, "--row", "1/samples/99999")


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "configs/quickstart.yaml" in out and "exit codes" in out


def test_doctor(capsys):
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert "ok, params read back bit-equal" in out and "jax" in out


def test_words_may_stand_anywhere_and_stray_ones_exit_2(capsys, config, tmp_path):
    """Options were pulled apart with a list kept by hand, and one was missing in it."""
    assert run("run", "--workdir", tmp_path / "a", "train.steps=3", config, "--dry-run", "train.batch=16") == 0
    shown = capsys.readouterr().out
    assert "steps: 3" in shown and "batch: 16" in shown
    for words, says in (
        (("status", tmp_path, "train.steps=3"), "takes no key=value words, got train.steps=3"),
        (("run", config, "--workdir", tmp_path / "a", "stray"), "stray"),
        (("run", config, "--workdir", tmp_path / "a", "--nope"), "unrecognized arguments: --nope"),
        (("run", config, "--work", tmp_path / "a"), "--workdir"),
    ):
        try:
            code = run(*words)
        except SystemExit as stop:
            code = stop.code
        assert code == 2, words
        assert says in capsys.readouterr().err


def test_keys_that_nothing_reads_are_refused_in_every_command(capsys, config, finished, tmp_path):
    workdir = tmp_path / "run"
    for words, says in (
        (("evaluate", finished / "run", "train.steps=3"), "unknown key train"),
        (("generate", finished / "run", "evaluate.rows=3"), "unknown key evaluate"),
        (
            ("run", config, "task.path=x", "--workdir", workdir),
            "unknown key task: it is for recipe=broad_to_narrow, finetune",
        ),
        (("run", config, "arms.main.window=3", "--workdir", workdir), "window=3 has no use with data=replace"),
        (("run", config, "base=smollm2", "data.path=README.md", "--workdir", workdir), "model.d_model, model.heads"),
        (("run", config, "recipe=nope", "--workdir", workdir), "recipe=nope: there is none of that name"),
        (("train", ROOT / "configs/snips.yaml", "--workdir", workdir), "has none; use `run`"),
    ):
        assert says in refused(capsys, *words), words
    assert not workdir.exists()


@pytest.mark.parametrize(
    "name", ["report.html", "metrics.jsonl", "run.json", "models.json", "rounds", ".lock", "a/b", "x" * 200]
)
def test_an_arm_is_no_file_of_the_run(capsys, config, tmp_path, name):
    config.write_text(config.read_text() + f"arms: {{'{name}': {{}}}}\n")
    assert "arms." in refused(capsys, "run", config, "--workdir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_old_names_of_keys_work_and_say_the_new_ones(capsys, config, tmp_path):
    from recursive_jax import errors

    errors._said.clear()
    old = ["model.width=32", "train.accumulate=2", "data.tokens=3000", "rounds.tokens=900", "evaluate.tokens=100"]
    assert run("run", config, *old, "--workdir", tmp_path / "run", "--dry-run") == 0
    shown = capsys.readouterr()
    for key in (
        "d_model: 32",
        "gradient_accumulation: 2",
        "real_tokens: 3000",
        "token_budget: 900",
        "token_budget: 100",
    ):
        assert key in shown.out
    for said in ("model.width was renamed to d_model", "train.accumulate was renamed to gradient_accumulation"):
        assert said in shown.err
    config.write_text(config.read_text().replace("d_model: 16", "d_model: 16, width: 16"))
    assert "width was renamed to d_model, and both are given" in refused(
        capsys, "run", config, "--workdir", tmp_path / "x"
    )


def test_a_shell_inside_an_allocation_is_one_process(monkeypatch):
    """SLURM_NTASKS is of the allocation: only a step that srun started has several processes."""
    from recursive_jax import mesh

    for name in (
        "SLURM_STEP_ID",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "JAX_COORDINATOR_ADDRESS",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert not mesh._several_processes()
    for name, value in (("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "8")):
        monkeypatch.setenv(name, value)
    assert mesh._several_processes()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --pty bash
    assert not mesh._several_processes()


def test_old_names_work_inside_arms_and_adapters(capsys, config, tmp_path):
    from recursive_jax.config import LoraConfig
    from recursive_jax.identity import fingerprint
    from recursive_jax.recipes import load_config

    assert LoraConfig(base="float32").quantization == "none" and LoraConfig(base="nf4").quantization == "nf4"
    arm = "arms={main: {student: {accumulate: 2, log_every: 7}}}"
    assert load_config(config, [arm]).arm_student(load_config(config, [arm]).arms["main"]).gradient_accumulation == 2
    plain = "arms={main: {student: {gradient_accumulation: 2}}}"
    assert fingerprint(load_config(config, [arm])) == fingerprint(load_config(config, [plain]))
    assert "no use without data.path" in refused(capsys, "run", config, "data.field=x", "--workdir", tmp_path / "r")
    assert "is a folder" in refused(capsys, "run", tmp_path, "--workdir", tmp_path / "r")


def test_an_arm_of_the_file_may_be_left_out_and_errors_stand_once(capsys, config, tmp_path):
    from recursive_jax.recipes import load_config

    config.write_text(config.read_text() + "arms: {one: {}, two: {anchor: 0.1}}\n")
    assert list(load_config(config, ["arms.one=null"]).arms) == ["two"]
    error = refused(capsys, "run", config, "train.stepz=3", "--workdir", tmp_path / "r")
    assert "train.stepz" in error and "student" not in error


@pytest.mark.parametrize(
    "text", [" #[0-9]{3}", " (yes|no) #[0-9]{3}", "[abc]", "yes", "1234", "1e3", "a: b", "{x", "'q'", "null?"]
)
def test_text_on_the_command_line_is_the_text(text):
    """It went through YAML: what followed a `#` was a comment, `yes` a truth, `[abc]` a list."""
    from recursive_jax.config.loader import parse_section
    from recursive_jax.recipes import load_config
    from recursive_jax.rounds.options import GenerateOptions

    assert parse_section(GenerateOptions, {}, [f"sampling.regex={text}"]).sampling.regex == text
    assert load_config(None, [f"name={text}", f"data.path={text}"]).data.path == text
    assert load_config(None, ["data.path=null"]).data.path is None
    assert load_config(None, ["train.steps=12", "sampling.stop=[a, b]", "model.tied=false"]).sampling.stop == ("a", "b")
