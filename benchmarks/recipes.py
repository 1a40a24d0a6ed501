"""What the recipes reach, on real data and on arithmetic: the figures of docs/recipes/.

    python benchmarks/recipes.py llm2llm --work DIR --data DIR [--seeds 3]     MAWPS with the oracle: the four ablations
    python benchmarks/recipes.py sums --work DIR [--seeds 3]                   STaR, RFT, ReST-EM, SPIN, iterative DPO
                                                                               and GRPO on the same sums

--data: a folder with gsm8k/train.jsonl (MIT) and mawps/fold0/{train,dev}.csv (github.com/arkilpatel/SVAMP). Runs are
kept in DIR and go on where they stopped."""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

import recursive_jax as rj
from recursive_jax.curate.oracle import NumberSlots
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.task import read_rows
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from recursive_jax.recipes import load_config, run
from recursive_jax.rounds.lineage import manifests
from recursive_jax.rounds.report.compare import held_out, verdict
from recursive_jax.rounds.report.page import View


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- LLM2LLM on MAWPS: the student writes a problem's equation, with the numbers of the text in it

READER = rj.ModelConfig(layers=4, d_model=192, heads=6, max_length=256)
READING = {"steps": 900, "batch": 32, "length": 160, "learning_rate": 1.5e-3, "log_every": 50, "tensorboard": False}
CALCULATION = re.compile(r"<<(\d+)([-+*/])(\d+)=")
NUMBER = re.compile(r"(?<![\d.,/])\d+(?![\d,/]|\.\d)")


def reader(folder: Path, data: Path) -> Path:
    """The students' base: 2.3M params that have read GSM8K's problems, each with its solution's first calculation where
    both of its numbers stand in the problem; six times, with other numbers. It can copy numbers and knows how sums are
    written; MAWPS it has not seen."""
    problems = [json.loads(line) for line in (data / "gsm8k/train.jsonl").read_text().splitlines()]
    digits_apart = lambda text: re.sub(r"(\d)", r" \1 ", text)  # then no token holds two of them
    tokenizer = FileTokenizer.train_bpe([digits_apart(p["question"]) for p in problems], 2048)
    rng, rows = np.random.default_rng(0), []
    for problem in problems:
        found, numbers = CALCULATION.search(problem["answer"]), NUMBER.findall(problem["question"])
        if not found or not {found[1], found[3]} <= set(numbers) or len(problem["question"]) > 300:
            continue
        for _ in range(6):
            drawn = {n: str(rng.integers(10 ** (len(n) - 1) + 1, 10 ** len(n) + 1)) for n in set(numbers)}
            question = NUMBER.sub(lambda m, drawn=drawn: drawn[m[0]], problem["question"])
            completion = f"{found[2]} {drawn[found[1]]} {drawn[found[3]]}"
            rows.append({"prompt": f"{question}\n", "completion": completion})
    rows = [rows[i] for i in rng.permutation(len(rows))]
    with rj.Run(folder, {"name": "reader"}, quiet=True) as made:
        made.round(0).train("base", rj.transformer(READER, tokenizer), rows, READING)
        made.name_model("base", made.round(0), "base", default=True)
    return folder


def llm2llm(args: argparse.Namespace) -> None:
    base = reader(args.work / "reader", args.data)
    filled = lambda name: map(NumberSlots().filled, read_rows(str(args.data / f"mawps/fold0/{name}.csv")))
    problems = {name: [row for row in filled(name) if len(row["question"]) <= 300] for name in ("train", "dev")}
    config = args.work / "llm2llm.yaml"
    written(config, [{
        "recipe": "llm2llm", "base": str(base), "teacher": "oracle", "rounds": 3, "epochs": 3, "ablations": True,
        "replicates": args.seeds, "novelty": 0.98,
        "task": {"path": written(args.work / "train.jsonl", problems["train"][:150]),
                 "validation": written(args.work / "dev.jsonl", problems["dev"]),
                 "prompt": "{question}\n", "completion": "{working}"},
        "train": {"batch": 16, "length": 160, "learning_rate": 3e-4, "weight_decay": 0.0, "log_every": 50,
                  "tensorboard": False},
        "sampling": {"max_tokens": 24, "batch": 64},
    }])  # fmt: skip
    begun = time.perf_counter()
    run(load_config(config), args.work / "llm2llm", quiet=True)
    print(f"{time.perf_counter() - begun:.0f} s in this call")
    print_arms(args.work / "llm2llm")


def print_arms(folder: Path) -> None:
    view = View.of(folder)
    scores = held_out(view.run, view.stored)
    for arm in view.arms:
        of = lambda k, arm=arm: f"{arm.mean('score', k):.3f} ({arm.mean('data_rows', k):.0f} rows)"
        print(f"{arm.name:12}", " ".join(of(k) for k in sorted(arm.rounds)))
    first, last = view.arms[0].name, {arm: rounds[max(rounds)] for arm, rounds in scores.items()}
    for name, other in [("seed alone", scores[first][0]), *((a, s) for a, s in last.items() if a != first)]:
        gain, p, said = verdict(last[first], other)
        each = " ".join(f"{x.mean() - y.mean():+.3f}" for x, y in zip(last[first], other, strict=True))
        print(f"{first} against {name}: {gain:+.3f} (by seed {each}), p = {p:.2g}: {said}", flush=True)


# ---- six ways to learn from one's own answers, on the sums of benchmarks/rewards.py

ADDER = rj.ModelConfig(layers=3, d_model=128, heads=4, max_length=32)
STEP = {"batch": 32, "length": 24, "learning_rate": 2e-3, "log_every": 50, "tensorboard": False}
#: A first student of 500 solutions; 1,000 other problems whose answer alone is known; each recipe as its paper has
#: it, its samples fewer.
WAYS = {
    "star": {"rounds": 3, "first_steps": 312, "growth": 1.2},
    "rft": {"samples": 8},
    "rest_em": {"rounds": 3, "samples": 8, "cap": 1, "keep_seed": True},
    "spin": {"rounds": 3, "preference_rate": 3e-5, "preference_epochs": 4, "temperature": 1.0},
    "iterative_dpo": {"rounds": 3, "samples": 8, "preference_rate": 1e-4, "preference_epochs": 4, "temperature": 1.0},
    "grpo": {"rounds": 3, "samples": 8, "policy_steps": 60, "policy_batch": 256, "policy_rate": 1e-4},
}


def adder(folder: Path) -> Path:
    """A base that has seen the form of sums."""
    with rj.Run(folder, {"name": "adder"}, quiet=True) as made:
        rows = [{"prompt": f"{p['problem']}\n", "completion": p["answer"]} for p in sums(100, 99)]
        made.round(0).train("base", rj.transformer(ADDER, ByteTokenizer()), rows, {**STEP, "steps": 20})
        made.name_model("base", made.round(0), "base", default=True)
    return folder


def sums(count: int, seed: int) -> list[dict]:
    pairs = np.random.default_rng(seed).permutation(10_000)[:count]
    return [{"problem": f"{n // 100}+{n % 100}=", "answer": f"{n // 100 + n % 100}"} for n in pairs]


def sums_config(args: argparse.Namespace, recipe: str, seed: int, **more: Any) -> Any:
    problems, folder = sums(2000, seed), args.work / "sums"
    folder.mkdir(exist_ok=True)
    config = folder / f"{recipe}-{seed}.yaml"
    written(config, [{
        "recipe": recipe, "base": str(adder(folder / "adder")), "right": "exact_match", "column": "answer",
        "task": {"path": written(folder / f"train-{seed}.jsonl", problems[500:]),
                 "validation": written(folder / f"held-out-{seed}.jsonl", problems[:500]),
                 "prompt": "{problem}\n", "completion": "{answer}"},
        "train": STEP, "sampling": {"max_tokens": 5, "batch": 256}, "seed": seed, **more,
    }])  # fmt: skip
    return load_config(config)


def control(args: argparse.Namespace) -> None:
    """The given solutions alone, for three times as many steps: what more training does without more answers."""
    found = []
    for seed in range(args.seeds):
        problems, folder = sums(2000, seed), args.work / f"sums/control-{seed}-run"
        with rj.Run(folder, {"name": "control"}, seed=seed, quiet=True) as made:
            base = rj.load_model(adder(args.work / "sums/adder"))
            rows = [{"prompt": f"{p['problem']}\n", "completion": p["answer"]} for p in problems[500:1000]]
            student = made.round(0).train("student", base, rows, {**STEP, "steps": 3 * 313})
            ask, settings = rj.Template("{problem}\n"), {"temperature": 0.0, "max_tokens": 5}
            answers = made.round(0).generate("answers", student, problems[:500], settings, template=ask)
            found.append(np.mean(rj.rewards.exact_match("answer")(answers.value)))
    print(f"{'solutions, 3x':14} {np.mean(found):.3f}", flush=True)


def compare_ways(args: argparse.Namespace) -> None:
    control(args)
    print(f"{'':14} {'right answers by round, mean of seeds':45} {'gain':>18} {'tokens written':>15} {'seconds':>8}")
    for recipe, more in WAYS.items():
        rows, tokens, seconds = [], 0, 0.0
        for seed in range(args.seeds):
            folder = args.work / f"sums/{recipe}-{seed}-run"
            config = sums_config(args, recipe, seed, solved=500, epochs=20, **more)
            rows.append([r["metrics"]["accuracy"] for r in run(config, folder, quiet=True)])
            stored = [m for m in manifests(folder) if m["round"]]
            tokens += sum(m["counts"]["tokens"] for m in stored if m["verb"] == "generate")
            tokens += sum(rollout_tokens(folder / m["path"]) for m in stored if m["verb"] == "train")
            seconds += sum(m["seconds"] for m in stored)
        gains = np.array([row[-1] - row[0] for row in rows])
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        means = " ".join(f"{x:.3f}" for x in np.mean(rows, axis=0))
        shown = f"{gains.mean():+.3f} ± {error:.3f}"
        print(
            f"{recipe:14} {means:45} {shown:>18} {tokens / args.seeds:15,.0f} {seconds / args.seeds:8.0f}", flush=True
        )


def rollout_tokens(folder: Path) -> int:
    files = sorted((folder / "rollouts").glob("*.parquet"))
    return Dataset.read([str(f) for f in files]).token_count if files else 0


BENCHMARKS = {"llm2llm": llm2llm, "sums": compare_ways}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    BENCHMARKS[args.name](args)
