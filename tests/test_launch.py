"""The launchers: what they print is what their pages say; babysit.sh brings back what may come back, and nothing else.

`python tests/test_launch.py` writes the pages anew."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "launch").glob("*.md"))
BABYSIT = str(ROOT / "launch" / "babysit.sh")


def made_anew(page: str) -> str:
    """The page with every command's output as it is now."""

    def block(found):
        commands = [line for line in found[1].splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{c}\n{printed(c[2:])}" for c in commands) + "```\n"

    return re.sub(r"```console\n(.*?)```\n", block, page, flags=re.S)


def printed(command: str) -> str:
    made = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and not made.stderr, made.stderr
    return made.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pages_show_what_the_scripts_print(page):
    text = page.read_text()
    assert made_anew(text) == text
    for command in re.findall(r"^\$ (.*)$", text, flags=re.M):
        assert "--dry-run" in command


def test_every_script_says_how_it_is_used():
    for script in sorted((ROOT / "launch").glob("*.sh")):
        if script.name in ("lib.sh", "tpu_env.sh"):  # sourced
            continue
        made = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=60)
        assert made.returncode == 2 and f"launch/{script.name}" in made.stdout, script.name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tpu_vm.sh create --zone z", "--name is wanted"),
        ("tpu_vm.sh create --name n --zone z", "--type is wanted"),
        ("tpu_vm.sh run --name n --zone z --workdir w", "a config is wanted"),
        ("tpu_vm.sh fly --name n --zone z", "fly: create, setup"),
        ("tpu_vm.sh create --nme n", "--nme is no option"),
        ("gke.sh apply --name n --image i", "--accelerator is wanted"),
        ("slurm.sh -- c.yaml", "--workdir is wanted"),
        ("slurm.sh --workdir", "--workdir wants a value"),
        ("babysit.sh --times", "--times wants a value"),
        ("babysit.sh --times x -- true", "a whole number above 0"),
        ("local_processes.sh two 2 run", "whole numbers are wanted"),
    ],
)
def test_what_is_missing_is_one_message(words, message):
    script, *rest = words.split()
    made = subprocess.run(["bash", str(ROOT / "launch" / script), *rest], capture_output=True, text=True, timeout=60)
    assert made.returncode == 2 and message in made.stderr and made.stderr.count("\n") == 1


def test_the_manifests_are_yaml_of_the_run():
    text = printed(
        "launch/gke.sh apply --dry-run --name n --image i --accelerator tpu-v5p-slice --topology 2x2x2 --hosts 2 "
        "--claim c --workdir '/data/a b' --spot -- c.yaml 'data.path=\"x\" y'"
    )
    manifest = yaml.safe_load(text.split("<<'EOF'\n", 1)[1].removesuffix("EOF\n"))
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (2, 2) and pod["nodeSelector"][
        "cloud.google.com/gke-spot"
    ] == "true"
    assert pod["containers"][0]["command"] == [
        "recursive-jax",
        "run",
        "c.yaml",
        'data.path="x" y',
        "--workdir",
        "/data/a b",
    ]
    sky = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    assert set(sky) == {"resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run"}
    assert 75 in sky["resources"]["job_recovery"]["recover_on_exit_codes"]


def babysit(tmp_path, script: str, *options: str) -> tuple[int, list[str]]:
    (tmp_path / "work.sh").write_text(script)
    made = subprocess.run(
        [BABYSIT, "--pause", "0", "--log", str(tmp_path / "log"), *options, "--", "bash", str(tmp_path / "work.sh")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return made.returncode, (tmp_path / "log").read_text().splitlines()


def test_a_preempted_run_comes_back_until_it_is_done(tmp_path):
    script = "echo x >> n; [ $(wc -l < n) -ge 3 ] && { echo done; exit 0; }; echo saved at step 4; exit 75"
    code, log = babysit(tmp_path, script)
    assert code == 0 and len(log) == 3
    assert "start 1 ended with 75" in log[0] and "saved at step 4" in log[0] and "start 3 ended with 0" in log[2]


def test_bad_input_and_failures_do_not_come_back(tmp_path):
    for final in (2, 1):
        (tmp_path / "log").unlink(missing_ok=True)
        code, log = babysit(tmp_path, f"echo no; exit {final}")
        assert code == final and f"start 1 ended with {final}" in log[-1]


def test_a_killed_run_comes_back_so_many_times(tmp_path):
    code, log = babysit(tmp_path, "kill -9 $$", "--times", "3")
    assert code == 137 and len(log) == 3


def test_sigterm_goes_to_the_run_and_ends_it(tmp_path):
    (tmp_path / "work.sh").write_text("trap 'echo saved; exit 75' TERM; echo up; while :; do sleep 0.05; done")
    process = subprocess.Popen(
        [BABYSIT, "--log", str(tmp_path / "log"), "--", "bash", str(tmp_path / "work.sh")],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert "ended with 75" in (tmp_path / "log").read_text() and "saved" in (tmp_path / "log").read_text()


if __name__ == "__main__":
    os.environ.pop("DRY_RUN", None)
    for path in PAGES:
        path.write_text(made_anew(path.read_text()))
    sys.exit(0)
