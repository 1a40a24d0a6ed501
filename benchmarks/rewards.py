"""Rounds of rewards on arithmetic: GRPO, RLOO, PPO, DPO from one base model, three rounds each, several seeds.

    python benchmarks/rewards.py --work DIR [--seeds 3] [--steps 100] [--methods grpo,rloo,ppo,dpo,dpo_sft]

A model of 0.6M params learns sums of two numbers below 100 from texts, until it is right about every third time. Then
it answers other problems, an exact check rewards it, and what is learnt is measured on held-out ones: the share of
right answers, drawn (temperature 1) and greedy. Runs are kept in DIR and go on where they stopped."""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import recursive_jax as rj
from recursive_jax.curate.rollouts import Rollouts
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.tokenizers import ByteTokenizer

o = rj.objectives
ASK = rj.Template("{problem}")
RIGHT = rj.rewards.exact_match("answer")
MODEL = rj.ModelConfig(layers=3, d_model=128, heads=4, max_length=16)
BASE = {"steps": 700, "batch": 64, "learning_rate": 2e-3, "length": 15}
EACH, LENGTH, TOKENS = 8, 15, 4
TRAIN = {"batch": 256, "length": LENGTH, "schedule": "constant", "warmup": 0.05, "weight_decay": 0.0, "log_every": 1}
#: name -> (objective, learning rate)
METHODS = {
    "grpo": (o.PolicyGradient(loss_type="grpo"), 1e-4),
    "rloo": (o.PolicyGradient(signal="rloo", loss_type="ppo", beta=0.02, kl_in_reward=True), 1e-4),
    "ppo": (o.PolicyGradient(signal="gae", loss_type="ppo", beta=0.02, kl_in_reward=True, value_coef=0.5), 1e-4),
    "dpo": (o.DPO(beta=0.1), 3e-5),
    "dpo_sft": (o.DPO(beta=0.1, loss_type=("sigmoid", "sft")), 3e-5),
}


def problems(count: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(10_000)[:count]
    return [{"problem": f"{n // 100}+{n % 100}=", "answer": f"{n // 100 + n % 100}"} for n in pairs]


def measured(policy, held) -> dict:
    """Shares of right answers, a number for each held-out problem behind them."""
    drawn = rj.generate(policy, Dataset.from_rows(held), template=ASK, each=4, max_tokens=TOKENS, seed=7)
    greedy = rj.generate(policy, Dataset.from_rows(held), template=ASK, max_tokens=TOKENS, temperature=0.0)
    of_problem = np.array(RIGHT(drawn), float).reshape(len(held), 4).mean(1)
    return {"pass_rate": of_problem.mean(), "greedy": float(np.mean(RIGHT(greedy))), "of_problem": of_problem.tolist()}


def course(folder: Path, name: str, seed: int, steps: int) -> list[dict]:
    """What a method reaches, round by round."""
    objective, rate = METHODS[name]
    all_problems = problems(8000, seed)
    held, asked, texts = all_problems[:500], all_problems[500:6500], all_problems[6500:]
    own, others = folder / f"{name}-{seed}", [f.parent for f in folder.glob(f"*-{seed}/run.json")]
    fork = next((f for f in sorted(others) if f != own), None) if own not in others else None  # has the base model
    with rj.Run(own, {"name": f"{name}, seed {seed}", "steps": steps}, seed=seed, fork=fork, quiet=True) as run:
        base = rj.transformer(MODEL, ByteTokenizer())
        rows = [{"prompt": p["problem"], "completion": p["answer"]} for p in texts]
        policy = run.round(0).train("base", base, rows, BASE)
        found = [run.round(0).evaluate("held-out", policy, measured, policy, held)]
        for number in (1, 2, 3):
            round, config = run.round(number), {**TRAIN, "steps": steps, "learning_rate": rate}
            if name.startswith("dpo"):
                answers = round.generate("answers", policy, asked, {"max_tokens": TOKENS}, template=ASK, each=EACH)
                pairs = round.select("pairs", round.score("graded", answers, RIGHT), rj.rules.pairs())
                policy = round.train("student", policy, pairs, config, objective)
            else:
                rollouts = Rollouts(policy, asked, ASK, RIGHT, objective, num_generations=EACH, length=LENGTH,
                                    max_tokens=TOKENS)  # fmt: skip
                policy = round.train("student", policy, rollouts, config, objective)
            found.append(round.evaluate("held-out", policy, measured, policy, held))
    rj.write_report(own)
    return found


def interval(values: np.ndarray) -> str:
    """Mean and 95% interval by a bootstrap over problems (each the mean of its seeds)."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(2000)]
    return f"{values.mean():.3f} [{np.quantile(means, 0.025):.3f}, {np.quantile(means, 0.975):.3f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--methods", default=",".join(METHODS))
    args = parser.parse_args()
    for name in args.methods.split(","):
        begun = time.perf_counter()
        of_seeds = [course(args.work, name, seed, args.steps) for seed in range(args.seeds)]
        seconds = (time.perf_counter() - begun) / args.seeds
        rates = [[record["pass_rate"] for record in rounds] for rounds in of_seeds]
        gains = np.concatenate([np.subtract(r[3]["of_problem"], r[0]["of_problem"]) for r in of_seeds])
        print(f"{name:5} {seconds:4.0f} s a seed; pass rate by round, by seed:")
        for seed, (row, rounds) in enumerate(zip(rates, of_seeds, strict=True)):
            greedy = " ".join(f"{record['greedy']:.3f}" for record in rounds)
            print(f"      seed {seed}: {' '.join(f'{x:.3f}' for x in row)}   greedy {greedy}")
        print(f"      gained over three rounds: {interval(gains)}", flush=True)
        print(json.dumps({"method": name, "pass_rate": rates, "seconds": seconds}), flush=True)
