"""Damaged bits: whatever file of a half-done or a finished run is flipped, cut, emptied, deleted or another run's, the
next start ends with the same bits, or with one message that names the file. Nothing is silent, and nothing is a
traceback."""

from __future__ import annotations

import collections
import dataclasses
import random
import shutil
from pathlib import Path

import pytest

from recursive_jax.data.files import read_rows
from recursive_jax.errors import InputError, Preempted
from recursive_jax.rounds import journal
from recursive_jax.rounds.lineage import read_record
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.status import status_text
from recursive_jax.rounds.writing import save_imported
from recursive_jax.train import signals
from tests.small_run import SAMPLING, TRAIN, Grammar, SmallRun, _params

KINDS = ("flip", "cut", "empty", "delete", "replace", "tail")


class Killed(BaseException):
    """Stands for a kill: nothing may catch it and clean up."""


def stopped_after(monkeypatch, calls: int) -> None:
    count = iter(range(10**9))
    monkeypatch.setattr(signals, "stop_requested", lambda now=False: next(count) >= calls)


def half_generated(run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A run that was stopped in the middle of its generation, with a frame of the journal for every row."""
    patch.setattr(journal, "EVERY", -1.0)
    run(folder, "model")
    with pytest.MonkeyPatch.context() as stopping:
        stopped_after(stopping, 14)
        with pytest.raises(Preempted):
            run(folder)


@pytest.fixture(scope="module")
def small(tokenizer, mesh):
    return SmallRun(tokenizer, mesh)


@pytest.fixture(scope="module")
def states(small, tokenizer, mesh, tmp_path_factory):
    """{name: folder of a run in that state}, the same of another seed, and what a whole run ends with."""
    root = tmp_path_factory.mktemp("states")
    found = {}
    for label, run in (("own", small), ("other", SmallRun(tokenizer, mesh, seed=1))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "EVERY", -1.0)  # a frame for every row
            run(root / label / "data", "data")
            shutil.copytree(root / label / "data", root / label / "training")
            stopped_after(patch, 4)  # after step 5, checkpoints at 2 and 4
            with pytest.raises(Preempted):
                run(root / label / "training", "model")
        shutil.copytree(root / label / "training", root / label / "trained")
        run(root / label / "trained", "model")
        shutil.copytree(root / label / "trained", root / label / "generation")
        with pytest.MonkeyPatch.context() as patch:
            half_generated(run, root / label / "generation", patch)
        shutil.copytree(root / label / "trained", root / label / "uncommitted")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "EVERY", -1.0)

            patch.setattr("recursive_jax.storage.write_json", _not_the_manifest_of("rows"))
            with pytest.raises(Killed):
                run(root / label / "uncommitted")
        shutil.copytree(root / label / "trained", root / label / "finished")
        found[label] = run(root / label / "finished")
    assert found["own"] != found["other"]
    names = ("training", "generation", "uncommitted", "finished")
    for name in names:
        assert_state(name, root / "own" / name)
    return {name: (root / "own" / name, root / "other" / name) for name in names}, found["own"]


def _not_the_manifest_of(result: str):
    from recursive_jax import storage

    write = storage.write_json

    def other(path, value):
        if Path(path).parent.name == result and Path(path).name == "manifest.json":
            raise Killed
        write(path, value)

    return other


def assert_state(name: str, run: Path) -> None:
    """The states are what they are called: else the trials would damage nothing."""
    rows, resume = run / "rounds/0000/rows", run / "rounds/0000/model/resume"
    if name == "training":
        assert sorted(p.name for p in resume.iterdir() if p.name.isdigit()) == ["4", "5"]
    elif name == "generation":
        assert list(rows.glob("partial-*")) and not (rows / "manifest.json").exists()
    elif name == "uncommitted":
        assert list(rows.glob("partial-*")) and list(rows.glob("rows-*")) and not (rows / "manifest.json").exists()
    else:
        assert len(list(run.rglob("manifest.json"))) == 6


def damage(kind: str, file: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if kind == "delete":
        file.unlink()
    elif kind == "replace":
        file.write_bytes(other.read_bytes() if other.is_file() else bytes(reversed(data)))
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(bytes(data[: rng.randrange(len(data))]))
    elif kind == "tail":
        file.write_bytes(bytes(data) + rng.randbytes(rng.randrange(1, 64)))
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(data))


def victims(run: Path) -> list[Path]:
    """Every file that is not empty, but the lock."""
    return sorted(p for p in run.rglob("*") if p.is_file() and p.stat().st_size and p.name != ".lock")


def trial(small, states, tmp_path, name: str, seed: int) -> str:
    """One damaged file, one start: `equal` or `refused`."""
    (own, other), wanted = states[0][name], states[1]
    rng = random.Random(f"{name} {seed}")
    run = tmp_path / f"{name}-{seed}"
    shutil.copytree(own, run)
    kind = KINDS[seed % len(KINDS)]
    weights = [3 if any(w in str(p) for w in ("resume", "partial", "rows-")) else 1 for p in victims(run)]
    file = rng.choices(victims(run), weights)[0]
    damage(kind, file, other / file.relative_to(run), rng)
    try:
        found = small(run)
    except InputError as error:
        told = str(error)
        known = (str(file), str(file.parent), file.name)
        assert any(word in told for word in known), f"{kind} {file.relative_to(run)}: {told}"
        return "refused"
    finally:
        shutil.rmtree(run, ignore_errors=True)
    assert found == wanted, f"{kind} {file.relative_to(run)}: other bits, and nothing was said"
    return "equal"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", ["training", "generation", "uncommitted", "finished"])
def test_no_damage_is_silent_and_none_is_a_traceback(small, states, tmp_path, name, part):
    """320 trials in all."""
    outcomes = collections.Counter(
        trial(small, states, tmp_path, name, seed) for seed in range(part * 20, part * 20 + 20)
    )
    assert sum(outcomes.values()) == 20
    print(name, dict(outcomes))


@pytest.mark.slow
def test_the_trials_would_see_silence(small, states, tmp_path, monkeypatch):
    """Without the checks another run's rows are used, and the results differ: these are no trials that cannot fail."""
    (own, other), wanted = states[0]["finished"], states[1]
    monkeypatch.setattr("recursive_jax.storage.verify", lambda *args: None)
    shutil.copytree(own, tmp_path / "run")
    file = Path("rounds/0000/rows/rows-00000.parquet")
    damage("replace", tmp_path / "run" / file, other / file, random.Random(0))
    assert small(tmp_path / "run") != wanted


@pytest.mark.slow
def test_a_damaged_import_is_named(small, mesh, tmp_path):
    """Twenty trials on a stored model: equal params, or a refusal that names the file."""
    model = small.model().initialized(0)
    save_imported(model, tmp_path / "own")
    save_imported(small.model().initialized(1), tmp_path / "other")
    wanted = _params(load_model(tmp_path / "own", mesh))
    assert wanted == _params(model)
    refused = 0
    for seed in range(36):
        rng = random.Random(seed)
        folder = tmp_path / f"trial-{seed}"
        shutil.copytree(tmp_path / "own", folder)
        file = rng.choice(victims(folder))
        damage(KINDS[seed % len(KINDS)], file, tmp_path / "other" / file.relative_to(folder), rng)
        try:
            found = load_model(folder, mesh)
        except InputError as error:
            assert file.name in str(error) or str(folder) in str(error)
            refused += 1
        else:
            assert _params(found) == wanted, file
    assert refused > 18


def test_a_flipped_bit_in_the_weights_is_found_before_they_are_read(small, mesh, tmp_path):
    """60 of 60 flips in an OCDBT data file loaded as other weights."""
    save_imported(small.model().initialized(0), tmp_path / "model")
    file = max(
        (p for p in (tmp_path / "model" / "checkpoint").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    whole = file.read_bytes()
    for seed in range(60):
        damage("flip", file, file, random.Random(seed))
        with pytest.raises(InputError, match=f"{file.name} is damaged"):
            load_model(tmp_path / "model", mesh)
        file.write_bytes(whole)
    load_model(tmp_path / "model", mesh)


def test_a_damaged_resume_point_falls_back_to_the_one_before(small, tmp_path, capsys):
    """It ended as 'loss became nan, lower the learning rate' at every start."""
    wanted = small(tmp_path / "whole", "model")
    with pytest.MonkeyPatch.context() as patch:
        small(tmp_path / "run", "data")
        stopped_after(patch, 4)
        with pytest.raises(Preempted):
            small(tmp_path / "run", "model")
    newest = tmp_path / "run/rounds/0000/model/resume/5"
    file = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damage("flip", file, file, random.Random(0))
    assert small(tmp_path / "run", "model") == wanted
    said = capsys.readouterr().err
    assert f"{file} is damaged" in said and "goes on from before step 5" in said


def test_rows_behind_a_damaged_part_are_made_again(small, tmp_path, capsys, monkeypatch):
    """8 of 9 flips in a half-done generation were used without a word, and one crashed the process."""
    wanted = small(tmp_path / "whole")
    half_generated(small, tmp_path / "begun", monkeypatch)
    part = next((tmp_path / "begun/rounds/0000/rows").glob("partial-*"))
    for place in (0, 50, part.stat().st_size // 2, part.stat().st_size - 9):
        shutil.copytree(tmp_path / "begun", tmp_path / f"run-{place}")
        file = tmp_path / f"run-{place}" / part.relative_to(tmp_path / "begun")
        data = bytearray(file.read_bytes())
        data[place] ^= 4
        file.write_bytes(bytes(data))
        assert small(tmp_path / f"run-{place}") == wanted
        assert f"{file} is damaged" in capsys.readouterr().err


def test_a_lost_manifest_is_restored_where_the_files_are_whole(small, tmp_path, capsys):
    wanted = small(tmp_path / "run")
    manifest = tmp_path / "run/rounds/0000/model/manifest.json"
    before = manifest.read_bytes()
    manifest.unlink()
    capsys.readouterr()
    assert small(tmp_path / "run") == wanted and manifest.read_bytes() == before
    assert "is missing; restored from" in capsys.readouterr().err
    manifest.write_text("null")
    assert small(tmp_path / "run") == wanted and manifest.read_bytes() == before
    manifest.unlink()
    (tmp_path / "run/commits.jsonl").unlink()
    kept = sorted(p for p in manifest.parent.rglob("*"))
    with pytest.raises(InputError, match=r"neither a manifest.json nor a pending.json"):
        small(tmp_path / "run")
    assert kept == sorted(p for p in manifest.parent.rglob("*"))  # nothing is thrown away unasked


def test_another_environment_is_said_marked_or_refused(small, tmp_path, capsys, monkeypatch):
    from recursive_jax import environment
    from recursive_jax.rounds.lineage import manifests
    from recursive_jax.rounds.status import status_text

    small(tmp_path / "run", "model")
    capsys.readouterr()
    plain = environment.environment
    monkeypatch.setattr(environment, "environment", lambda mesh=None: {**plain(mesh), "jaxlib": "0.9.9"})
    monkeypatch.setattr(environment, "_strict", True)
    with pytest.raises(InputError, match="--same-environment is given") as refused:
        small(tmp_path / "run")
    assert "jaxlib" in str(refused.value) and "0.9.9" in str(refused.value)
    monkeypatch.setattr(environment, "_strict", False)
    small(tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("was made in another environment") == 1 and "jaxlib" in said
    made = {m["name"]: [e["jaxlib"] == "0.9.9" for e in m["environments"]] for m in manifests(tmp_path / "run")}
    assert made["model"] == [False] and made["rows"] == made["student"] == [True]
    text = status_text(tmp_path / "run")
    assert "[environment 2]" in text and "bits may differ from there on" in text
    assert "[environment 1" in text and "environment 3" not in text


def test_a_lost_record_does_not_hand_the_work_to_another_command(small, tmp_path, monkeypatch, capsys):
    """A damaged pending.json was written anew by whatever command came first, and the right one was then refused."""
    wanted = small(tmp_path / "whole")
    half_generated(small, tmp_path / "run", monkeypatch)
    record = tmp_path / "run/rounds/0000/rows/pending.json"
    for damaged in (lambda: record.write_text("{"), record.unlink):
        damaged()
        with pytest.raises(InputError, match="is half-done from other inputs"):
            dataclasses.replace(small, rows=small.rows + 1)(tmp_path / "run")
        assert "restored from" in capsys.readouterr().err
    assert small(tmp_path / "run") == wanted


def test_rows_that_no_manifest_names_are_not_read(small, tmp_path):
    wanted = small(tmp_path / "run")
    folder = tmp_path / "run/rounds/0000/rows"
    shutil.copy(folder / "rows-00000.parquet", folder / "rows-00001.parquet")
    assert small(tmp_path / "run") == wanted


def test_a_lost_run_record_forgets_no_environment(small, tmp_path, capsys, monkeypatch):
    from recursive_jax import environment

    small(tmp_path / "run", "model")
    plain = environment.environment
    monkeypatch.setattr(environment, "environment", lambda mesh=None: {**plain(mesh), "jaxlib": "0.9.8"})
    (tmp_path / "run/run.json").unlink()
    small(tmp_path / "run", "model")
    assert "was made in another environment" in capsys.readouterr().err


def test_a_file_that_is_no_partial_of_ours_is_kept(small, tmp_path, mesh):
    from recursive_jax.generate.files import Prompts, generate_file

    model = dataclasses.replace(small.model().initialized(0))
    partial = tmp_path / "out.jsonl.partial"
    for text in ("my own notes\n", "notes"):
        partial.write_text(text)
        with pytest.raises(InputError, match="is damaged, or no rows"):
            generate_file(model, Prompts(None, ""), str(tmp_path / "out.jsonl"), SAMPLING)
        assert partial.read_text() == text
    partial.write_text('{"comm')  # torn by a kill: nothing is lost
    assert generate_file(model, Prompts(None, ""), str(tmp_path / "out.jsonl"), SAMPLING)


def test_a_damaged_run_record_is_restored_and_no_other_config_takes_its_place(small, tmp_path, capsys):
    """It refused at every start; and a start with another config wrote that one into it."""
    wanted = small(tmp_path / "run")
    record = tmp_path / "run/run.json"
    whole = record.read_bytes()
    for damage_it in (lambda: record.write_text("null"), record.unlink):
        damage_it()
        with pytest.raises(InputError, match=r"seed: 0 -> 5"):
            dataclasses.replace(small, seed=5)(tmp_path / "run")
        assert "restored from" in capsys.readouterr().err and record.read_bytes() == whole
    record.write_text("null")
    (tmp_path / "run/commits.jsonl").unlink()
    assert small(tmp_path / "run") == wanted  # written anew, every result held against the config
    assert "is written anew from this config" in capsys.readouterr().err
    record.write_bytes(record.read_bytes().replace(b'"format": 3', b'"format": 2'))
    with pytest.raises(InputError, match="is damaged"):
        read_record(tmp_path / "run")


def test_a_run_s_own_rows_are_checked_wherever_they_are_read(small, tmp_path):
    small(tmp_path / "run")
    file = tmp_path / "run/rounds/0000/rows/rows-00000.parquet"
    assert len(list(read_rows(file))) == small.rows
    damage("flip", file, file, random.Random(3))
    with pytest.raises(InputError, match="rows-00000.parquet is damaged"):
        list(read_rows(file))


def test_a_fork_takes_a_result_whose_manifest_was_lost(small, tmp_path, tokenizer, mesh, capsys):
    wanted = small(tmp_path / "old")
    (tmp_path / "old/rounds/0000/model/manifest.json").unlink()
    assert "its manifest.json is missing" in status_text(tmp_path / "old")
    with Run(tmp_path / "new", {"what": "small"}, fork=tmp_path / "old", quiet=True) as run:
        data = run.round(0).dataset("data", Grammar(tokenizer.language.config, 40))
        model = run.round(0).train("model", small.model(), data, TRAIN.model_copy(update={"steps": small.steps}))
        assert _params(model) == wanted["model"]
    assert not (tmp_path / "new/rounds/0000/model/train.jsonl.tmp").exists()
    before = (tmp_path / "old/rounds/0000/model/train.jsonl").read_bytes()
    assert (tmp_path / "new/rounds/0000/model/train.jsonl").read_bytes() == before  # copied, not trained


def test_an_output_file_notices_another_environment(small, tmp_path, monkeypatch, capsys):
    from recursive_jax import environment
    from recursive_jax.generate.files import Prompts, generate_file

    model = small.model().initialized(0)
    prompts, out = Prompts(None, "", count=6), str(tmp_path / "out.jsonl")
    calls = iter(range(100))
    assert not generate_file(model, prompts, out, SAMPLING, stopped=lambda: next(calls) == 2)
    plain = environment.environment
    monkeypatch.setattr(environment, "environment", lambda mesh=None: {**plain(mesh), "jaxlib": "0.9.7"})
    monkeypatch.setattr(environment, "_strict", True)
    with pytest.raises(InputError, match="--same-environment"):
        generate_file(model, prompts, out, SAMPLING)
    monkeypatch.setattr(environment, "_strict", False)
    assert generate_file(model, prompts, out, SAMPLING)
    assert "was made in another environment" in capsys.readouterr().err
