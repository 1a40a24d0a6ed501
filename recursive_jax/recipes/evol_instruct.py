"""Evol-Instruct (WizardLM, arXiv:2304.12244): a teacher makes prompts harder and rarer, round after round.

    pool_0 = seed prompts
    for k = 1 .. rounds:
        evolved_k = teacher(operator, pool_k-1), one of six operators for each prompt: five in depth, one in breadth
        answers_k = teacher(evolved_k)
        kept_k    = not judged equal to the prompt before; no short "sorry"; more than stop words; no operator's words
        data     += kept_k
        pool_k    = what became of each prompt, or itself where that was eliminated
    student = train(base, seed + data)

Departures: operators are our words; the seed's own answers stay. Expect: LLaMA-13B on nine benchmarks 54.6 to 59.0 on
average; the released script does one round without elimination."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from recursive_jax.data.dataset import Dataset
from recursive_jax.data.parsers import Completion, Label
from recursive_jax.recipes import instruction_rows as shared
from recursive_jax.recipes.evolution import ELIMINATION, OPERATORS, as_asked, next_pool, to_evolve
from recursive_jax.recipes.instruction_config import InstructionsConfig, check, cost
from recursive_jax.recipes.instructions import Studio
from recursive_jax.recipes.recipe import Recipe, concluded
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report.written import written_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run

EQUAL = (
    "Do these two prompts ask for the same, with the same conditions, as deeply and as broadly?\nFirst: {before}\n"
    "Second: {asked}\nEqual or Not Equal: "
)


class EvolInstructConfig(InstructionsConfig):
    """Rounds of evolution, and a student of what survives."""

    recipe: str = "evol_instruct"

    rounds: PositiveInt = Field(4, description="of evolution")
    keep_seed: bool = Field(True, description="learn from the seed's own answers too")
    judge_equal: bool = Field(True, description="ask the teacher whether an evolved prompt gained anything")


def evolved(studio: Studio, round: Round, pool: Stored) -> Stored:
    """What the pool's prompts become, answered; of these what survives."""
    draw = round.seed("operators") % 2**31
    asked = round.dataset("operators", to_evolve, pool, OPERATORS, draw)
    settings = studio.settings(temperature=1.0, top_p=0.95)
    new = round.generate(
        "evolved", studio.teacher, asked, settings, template=studio.ask("{ask}", Completion("{evolved}", whole=True))
    )
    rows = round.dataset("prompts", as_asked, new)
    if not len(rows):
        return rows
    if studio.config.judge_equal:
        template = studio.ask(EQUAL, Label(("Equal", "Not Equal"), "equal", lenient=studio.remote))
        greedy = {"temperature": 0.0, "max_tokens": 8, "batch": studio.config.sampling.batch}
        judged = round.generate(
            "compared", studio.teacher, rows, greedy, template=template, constrained=not studio.remote
        )
        rows = round.dataset("judged", with_equal, rows, judged)
    template = studio.ask("{asked}\n\nAnswer:\n", Completion("{output}", whole=True))
    written = round.generate("answers", studio.teacher, rows, settings, template=template)
    return round.select("kept", written, list(ELIMINATION))


def with_equal(rows: Dataset, judged: Dataset) -> Dataset:
    return rows.with_column("equal", [value or "" for value in judged.column("equal")])


def evol_instruct(config: EvolInstructConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records: round 0 is the base, the last one the student."""
    studio = Studio(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 8 + 10 * config.rounds
        round = run.round(0)
        seed = pool = studio.seed(round, studio.seeds)
        before, found = studio.measure(round, studio.base), []
        for number in range(1, config.rounds + 1):
            round = run.round(number)
            kept = evolved(studio, round, pool)
            found.append(kept)
            pool = round.dataset("pool", next_pool, pool, kept)
        data = round.dataset("data", shared.joined, *([seed] if config.keep_seed else []), *found)
        student = studio.tuned(round, data)
        studio.measure(round, student, before, len(data))
        return concluded(run, round, written_layout)


recipe = Recipe(
    "evol_instruct",
    "a teacher makes prompts harder and rarer, round after round; a student learns what survives",
    EvolInstructConfig,
    evol_instruct,
    check,
    cost,
    written_layout,
    paper="arXiv:2304.12244",
    example="recursive-jax run configs/evol_instruct.yaml --workdir runs/evol_instruct",
)
