"""Instruction backtranslation (Humpback, arXiv:2308.06259): texts that people wrote become answers, a model writes the
questions to them, and chooses the good ones itself.

    backward  = train(base, seed turned round: output -> instruction)
    augmented = backward(segments), an instruction to each, at 0.7
    student_0 = train(base, seed)
    for t = 1 .. iterations:
        curated_t = augmented, rated 1 to 5 by student_t-1 on the rubric, those with at least `keep`
        student_t = train(base, seed + curated_t), loss on outputs; seed rows and curated ones have a system text each

planted: a share of held-out seed pairs joins the candidates, half of them with another's answer: the curator's
precision and recall on these are reported for every iteration. Departures: the rubric is our words; the curator gives
no reasons before its score (`reasons`); ratings are held to the form `Score: n` (a public reproduction could not read
45% of them). Expect: the paper's 7B curator has precision 0.44 and recall 0.09 before, 0.52 and 0.44 after an
iteration."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from recursive_jax import rewards
from recursive_jax.config import DataConfig
from recursive_jax.curate import rules
from recursive_jax.curate.select import Rule
from recursive_jax.data.parsers import Score
from recursive_jax.data.template import Template
from recursive_jax.models.model import Model
from recursive_jax.recipes import backtranslation_rows as rows
from recursive_jax.recipes import instruction_rows as shared
from recursive_jax.recipes.instruction_config import InstructionsConfig, check, cost
from recursive_jax.recipes.instructions import Studio
from recursive_jax.recipes.recipe import Recipe, concluded
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report.written import written_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run

BACKWARD = "Write the question or instruction that this text answers.\n\n{output}\n\n"
RUBRIC = """Rate the answer to the instruction.
1: beside the point, incomplete, or no answer. 2: answers part of it. 3: helps, but is not written as an assistant's
answer. 4: an assistant's answer with small faults. 5: a perfect one.
Instruction: {asked}

Answer: {output}

End with the line Score: N.
"""


class BacktranslationConfig(InstructionsConfig):
    """Texts without questions, and a model that finds them."""

    recipe: str = "backtranslation"

    @model_validator(mode="after")
    def _no_teacher(self) -> BacktranslationConfig:
        if self.teacher or self.teacher_chat is not None:
            raise ValueError("teacher: backtranslation has none, the base writes and chooses")
        return self

    segments: DataConfig = Field(description="texts whose paragraphs become answers; keys as in `data`")
    shortest: PositiveInt = Field(100, description="characters of a segment, at least")
    longest: PositiveInt = Field(3000, description="characters of a segment, at most")
    most: PositiveInt | None = Field(None, description="segments, the first ones; default: all")
    iterations: PositiveInt = Field(2, description="of curating and training")
    keep: float = Field(5.0, ge=1.0, le=5.0, description="the least rating that is learnt from")
    rubric: str = Field(RUBRIC, description="what the curator reads; the reply ends with Score: n")
    reasons: int = Field(0, ge=0, description="characters that the curator may write before its score")
    planted: float = Field(0.0, ge=0.0, lt=1.0, description="share of the seed held back to measure the curator")
    seed_tag: str = Field("Answer in the style of an AI Assistant.", description="system text of seed rows")
    web_tag: str = Field("Answer with knowledge from web search.", description="system text of curated rows")


def candidates(studio: Studio, round: Round, seed: Stored, held_back: Stored) -> Stored:
    """Instructions to the segments, and the planted pairs."""
    c: Any = studio.config
    texts = round.dataset("segments", shared.given, rows.segments(c.segments, c.shortest, c.longest, c.most))
    template = Template(BACKWARD, "{asked}", chat=studio.template.chat)
    fitting = studio.fitting(round, seed, template, "backward-rows")
    examples = round.dataset("backward-examples", shared.learnt, fitting, template, studio.tokenizer)
    backward = studio.train(round, "backward", examples)
    settings = {"max_tokens": 64, "temperature": 0.7, "top_p": 0.9, **c.sampling.model_dump(exclude_unset=True)}
    new = round.generate("augmented", backward, texts, settings, template=template)
    return round.dataset("candidates", rows.together, new, held_back)


def curated(studio: Studio, round: Round, candidates_: Stored, student: Model) -> tuple[Stored, Stored]:
    """(the candidates with their ratings, those that are learnt from)."""
    c: Any = studio.config
    template = Template(c.rubric, parser=Score(low=1, high=5, reasons=c.reasons), chat=studio.template.chat)
    rated = round.score("rated", candidates_, rewards.judge(student, template))
    chosen = [Rule("not planted", rows.not_planted), Rule(f"rated at least {c.keep:g}", rules.Between(c.keep, 5.0))]
    return rated, round.select("curated", rated, chosen)


def backtranslation(
    config: BacktranslationConfig, workdir: Any, *, fork: Any = None, quiet: bool = False
) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records: round t is the student of iteration t, round 0 that
    of the seed alone. Held-out instructions are asked under both tags."""
    studio, tags = Studio(config), (config.seed_tag, config.web_tag)
    both = rows.tagged(studio.template, " ".join(filter(None, tags)))
    studio.task = dataclasses.replace(studio.task, template=both)
    order = np.random.default_rng(config.seed).permutation(len(studio.seeds))
    seeds = [studio.seeds[n] for n in order] if config.planted else studio.seeds
    cut = max(2, len(seeds) - rows.round_to_even(len(seeds) * config.planted))
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 12 + 9 * config.iterations
        round, kept, student, before = run.round(0), None, None, None
        seed = studio.seed(round, seeds[:cut])
        held_back = round.dataset("held-back", shared.given, seeds[cut:])
        found = candidates(studio, round, seed, held_back)
        for number in range(config.iterations + 1):
            round = run.round(number)
            if student is not None:
                rated, kept = curated(studio, round, found, student)
                round.evaluate("curator", student, rows.curator_numbers, rated, config.keep)
            fit = lambda part, name, round=round: studio.fitting(round, part, both, name)
            parts = [fit(seed, "seed-rows"), None if kept is None else fit(kept, "kept")]
            data = round.dataset("examples", rows.examples, *parts, studio.template, tags, studio.tokenizer)
            student = studio.train(round, "student", data)
            held = studio.measure(round, student, before, len(data))
            before = before or held
        return concluded(run, round, written_layout)


recipe = Recipe(
    "backtranslation",
    "a model writes the questions to people's texts, chooses the good ones itself, and learns them",
    BacktranslationConfig,
    backtranslation,
    check,
    cost,
    written_layout,
    paper="arXiv:2308.06259",
    example="recursive-jax run configs/backtranslation.yaml --workdir runs/backtranslation",
)
