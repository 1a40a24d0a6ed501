"""The stages of accelerator.sh. Each is a process of its own with a limit of its own; what it prints as JSON lines are
its figures. A stage that fails, or runs past its limit, says so and the next one begins."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
ALL_SECONDS = 480


@dataclasses.dataclass(frozen=True)
class Stage:
    """command: on an accelerator; small: in a rehearsal on a CPU. seconds: its limit. env: variables beside."""

    name: str
    what: str
    command: list[str]
    small: list[str]
    seconds: int
    env: dict[str, str] = dataclasses.field(default_factory=dict)


def stages(out: Path) -> list[Stage]:
    python, cli = sys.executable, [sys.executable, "-m", "recursive_jax.cli"]
    ours, torch = [python, str(HERE / "ours_train.py")], [python, str(HERE / "peers" / "torch_train.py")]
    measure = [python, str(HERE / "ours_accelerator.py")]
    tests = [python, "-m", "pytest", "-q", "-o", "addopts=", "-m", "not slow and not parity", "-p", "no:cacheprovider"]
    files = ["tests/test_model.py", "tests/test_engine.py", "tests/test_sampling.py"]
    full, one = ["--dtype", "bfloat16", "--scan", "1", "--length", "2048"], ["--steps", "3", "--warmup", "1"]
    tiny = ["--size", "tiny", "--batch", "2", "--length", "64", *one]
    quick = [*cli, "run", str(REPO / "configs" / "quickstart.yaml"), "--workdir", str(out / "quickstart"), "--quiet"]
    few = ["rounds.count=1", "train.steps=20", "student.steps=20", "evaluate.samples=64", "replicates=1"]
    return [
        Stage("doctor", "what this machine is, and whether the installation works", [*cli, "doctor"], [*cli, "doctor"],
              60),
        Stage("train-135m", "135M, batch 16 x 2,048, bfloat16", [*ours, "--size", "135m", "--batch", "16", *full],
              [*ours, *tiny], 70),
        Stage("train-1b", "1B, batch 8 x 2,048, bfloat16, remat full",
              [*ours, "--size", "1b", "--batch", "8", "--remat", "full", *full], [*ours, *tiny, "--remat", "full"], 90),
        Stage("torch-1b", "the same step in torch.compile", [*torch, "--mode", "compile", "--device", "cuda", "--size",
              "1b", "--batch", "8", "--length", "2048", "--dtype", "bfloat16"], [*torch, *tiny], 90),
        Stage("decode", "135M: tokens/s at batch 1 and 64, and the share of the memory's bandwidth; prefill",
              [*measure, "decode", "--size", "135m"], [*measure, "decode", "--size", "tiny", "--new", "16"], 80),
        Stage("memory", "peak memory of a training step beside what plan says", [*measure, "memory", "--size", "135m",
              "--batch", "16", "--length", "2048"], [*measure, "memory", "--size", "tiny", "--length", "64"], 60),
        Stage("grpo", "a GRPO step of 135M", [*measure, "grpo", "--size", "135m"],
              [*measure, "grpo", "--size", "tiny", "--new", "8"], 60),
        Stage("quickstart", "the main job", [*quick], [*quick, *few], 120),
        Stage("tests", "model, sampling and engine on the device, float32", [*tests, *files],
              [*tests, "tests/test_sampling.py"], 120, {"RECURSIVE_JAX_TESTS_ON": "device",
              "JAX_DEFAULT_MATMUL_PRECISION": "highest"}),
    ]  # fmt: skip


def run(stage: Stage, rehearse: bool, log, left: float) -> dict:
    """The figures of a stage, or why there are none."""
    env = {**os.environ, **stage.env}
    if rehearse:
        env |= {"JAX_PLATFORMS": "cpu"}
        env.pop("RECURSIVE_JAX_TESTS_ON", None)
    begin = time.perf_counter()
    found: dict = {"what": stage.what}
    limit = min(stage.seconds, max(5.0, left))
    try:
        made = subprocess.run(stage.small if rehearse else stage.command, env=env, cwd=REPO, timeout=limit, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        output, found["rc"] = made.stdout, made.returncode
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        found["rc"] = 124
    found["seconds"] = round(time.perf_counter() - begin, 1)
    log.write(f"\n=== {stage.name}: rc {found['rc']}, {found['seconds']} s\n{output}\n")
    log.flush()
    found["figures"] = [f for f in map(parsed, output.splitlines()) if f is not None]
    if not found["figures"]:
        found["said"] = output.splitlines()[-25:] if stage.name == "doctor" else output.splitlines()[-4:]
    return found


def parsed(line: str) -> dict | None:
    """A line of figures; one that was cut off in its middle is none."""
    try:
        return json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None


def table(found: dict) -> str:
    """The figures as Markdown."""
    lines = ["| stage | what | seconds | figures |", "|---|---|---|---|"]
    for name, stage in found["stages"].items():
        kept = lambda f: {k: v for k, v in f.items() if k not in ("name", "peak_rss_mb") and v is not None}
        figures = "; ".join(", ".join(f"{k} {v}" for k, v in kept(f).items()) for f in stage.get("figures", []))
        failed = "" if stage["rc"] == 0 else f"**failed (rc {stage['rc']})** "
        said = " / ".join(stage.get("said", [])[-2:]) if not figures else figures
        lines.append(f"| {name} | {stage['what']} | {stage['seconds']} | {failed}{said} |")
    kind = "A rehearsal on a CPU: no figure of an accelerator." if found["rehearsal"] else found["machine"]
    return f"{kind}\n\n" + "\n".join(lines) + "\n"


def machine() -> str:
    """The device's name, as JAX says it, in a process of its own."""
    asked = "import jax; d = jax.devices(); print(len(d), 'x', d[0].device_kind, '- jax', jax.__version__)"
    made = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    return made.stdout.strip() or made.stderr.strip().splitlines()[-1:] or "no device"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=os.environ.get("OUT", "accelerator-out"))
    parser.add_argument("--only", default="", help="stages, by name, with commas between")
    parser.add_argument("--rehearse", action="store_true", help="small, on a CPU")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in stages(out) if not args.only or s.name in args.only.split(",")]
    begin = time.perf_counter()
    found = {"rehearsal": args.rehearse, "machine": str(machine()), "stages": {}}
    with (out / "log.txt").open("w") as log:
        for stage in chosen:
            left = ALL_SECONDS - (time.perf_counter() - begin)
            if args.rehearse or left >= 10:
                made = run(stage, args.rehearse, log, 600 if args.rehearse else left)
            else:
                made = {"what": stage.what, "rc": 125, "seconds": 0, "said": ["no time was left"]}
            found["stages"][stage.name] = made
            (out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
            (out / "figures.md").write_text(table(found))
            print(f"{stage.name}: rc {made['rc']}, {made['seconds']} s", flush=True)
    print(table(found))
    return 0 if all(s["rc"] == 0 for s in found["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
