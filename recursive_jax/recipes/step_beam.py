"""Beam search over steps with a process reward (arXiv:2305.20050; arXiv:2408.03314, sec. 5): bad steps are left early.

    beams = the problem alone
    for step = 1 .. steps:
        next  = `samples` next steps of every open beam, at `temperature`, up to `separator`
        beams = the `beams` best of a problem, finished ones among them, by the scorer
    chosen = the best beam

scorer: a model with a head of scores, taught by ProcessReward (a probability on the end of every step; a beam has the
least of its steps'), or `likelihood`: the mean log-probability of a beam's tokens, which is no process reward.
Departures: the least step counts (the papers: the product; the last). Expect: with a trained process reward more than
best of n at as many tokens; with likelihood what beam search gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax.curate.judges import ProcessModel
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.template import Template
from recursive_jax.generate.request import Request
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import AnswersConfig, Course, check, same_tokenizer
from recursive_jax.recipes.correction import correction, cost
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.report.corrections import correction_layout
from recursive_jax.rounds.round import Round


class StepBeamConfig(AnswersConfig):
    """A search over steps."""

    recipe: str = "step_beam"

    beams: PositiveInt = Field(4, description="that a problem keeps")
    samples: PositiveInt = Field(4, description="next steps of a beam")
    steps: PositiveInt = Field(8, description="at most")
    step_tokens: PositiveInt = Field(64, description="of a step, at most")
    separator: str = Field("\n", description="ends a step")
    temperature: float = Field(0.7, gt=0.0)
    scorer: str = Field("likelihood", description="likelihood, or a process reward: a folder with model.head=score")

    def written(self, answer: int) -> float:
        return float(self.beams * self.samples * self.steps * self.step_tokens)


def searched(course: Course, round: Round, model: Model, before: Stored) -> Stored:
    config: Any = course.config
    scorer = None if config.scorer == "likelihood" else load_model(config.scorer, model.mesh)
    if scorer is not None:
        same_tokenizer(model, scorer, f"scorer={config.scorer}")
    beams = round.dataset("beams-0", begun, course.problems, course.template, model.tokenizer)
    settings = {"temperature": config.temperature, "max_tokens": config.step_tokens, "stop": (config.separator,)}
    settings |= {"batch": config.sampling.batch}
    for step in range(1, config.steps + 1):
        asked = requests(beams.value, config.samples)
        if not asked:
            break
        new = round.generate(f"steps-{step}", model, asked, settings)
        arguments = (beams, new, model.tokenizer, config.separator, config.beams, scorer)
        beams = round.dataset(f"beams-{step}", best_of, *arguments)
    return round.score("chosen", round.dataset("best", first_of, beams, course.problems), course.reward)


def begun(problems: Dataset, template: Template, tokenizer: Any) -> Dataset:
    """A beam of no step for each problem."""
    rows = []
    for row in python_rows(problems.table):
        prompt = template.request(row, tokenizer).tolist()
        start = {"total": 0.0, "drawn": 0, "choice": math.inf, "done": False}
        rows.append({"id": f"{row['id']}/0", "parents": [row["id"]], "prompt": prompt, **start})
    return Dataset.from_rows(rows)


def requests(beams: Dataset, samples: int) -> list[Request]:
    """`samples` requests for every open beam."""
    asked: list[Request] = []
    for name, done, prompt, tokens in zip(
        beams.column("id"), beams.column("done"), beams.prompts(), beams.tokens(), strict=True
    ):
        read = np.concatenate([prompt, tokens]).astype(np.int32)
        asked += [Request(len(asked) + k, read, (name,), opened=True) for k in range(0 if done else samples)]
    return asked


def best_of(beams: Dataset, new: Dataset, tokenizer: Any, separator: str, keep: int, scorer: Model | None) -> Dataset:
    """The best beams of each problem: those that were done, and the open ones with a step more."""
    kept = {row["id"]: row for row in python_rows(beams.table)}
    found, grown = [row for row in kept.values() if row["done"]], []
    ends = (tokenizer.eos, *getattr(tokenizer, "stops", ()))
    for n, row in enumerate(python_rows(new.table)):
        old, ids = kept[row["parents"][0]], list(row["tokens"])
        done = row["status"] != "ok" or bool(ids and ids[-1] in ends)  # ended by itself, or cut
        step = tokenizer.decode(ids)
        if not done and not step.strip():
            continue  # a blank line is no step
        if not done and not step.endswith(separator):
            ids += tokenizer.encode(separator)
        total = old["total"] + float(np.sum(row["logprobs"], dtype=np.float64))
        core = {"id": f"{old['parents'][0]}/{n}", "tokens": [*old["tokens"], *ids], "done": done}
        core |= {"total": total, "drawn": old["drawn"] + len(row["logprobs"])}
        grown.append({**old, **core, "text": tokenizer.decode(core["tokens"])})
    if scorer is None:
        choices = [row["total"] / max(1, row["drawn"]) for row in grown]
    else:
        graded = ProcessModel(scorer, separator, "min").grade(grown)
        choices = [-math.inf if grade.score is None else grade.score for grade in graded]
    found += [{**row, "choice": choice} for row, choice in zip(grown, choices, strict=True)]
    taken: dict[str, int] = {}
    best = []
    for row in sorted(found, key=lambda row: -row["choice"]):
        name = row["parents"][0]
        taken[name] = taken.get(name, 0) + 1
        if taken[name] <= keep:
            best.append(row)
    return Dataset.from_rows(best)


def first_of(beams: Dataset, problems: Dataset) -> Dataset:
    """The best beam of each problem, with the problem's columns."""
    best: dict[str, dict] = {}
    for row in python_rows(beams.table):
        best.setdefault(row["parents"][0], row)
    core = ("id", "parents", "prompt", "tokens", "text", "choice")
    own = lambda row: {
        k: v for k, v in row.items() if k not in ("id", "prompt", "tokens", "logprobs", "text", "parents")
    }
    rows = [{**own(row), **{k: best[row["id"]][k] for k in core}} for row in python_rows(problems.table)]
    return Dataset.from_rows([{**row, "synthetic": True} for row in rows])


def step_beam(config: StepBeamConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records, before and after."""
    return correction(config, workdir, searched, fork=fork, quiet=quiet)


recipe = Recipe(
    "step_beam",
    "a search over the steps of an answer, in which a process reward leaves bad ones early",
    StepBeamConfig, step_beam, check, cost, correction_layout,
    paper="arXiv:2305.20050, arXiv:2408.03314, arXiv:2308.03188",
    example="recursive-jax run configs/step_beam.yaml --workdir runs/step_beam",
)  # fmt: skip
