"""Alpaca (tatsu-lab/stanford_alpaca): one pass of Self-Instruct with a stronger teacher, whole rows at a time.

    for k = 1 .. batches:
        proposed = teacher(what is wanted, 3 seed rows), up to `per_request` rows that go on
        rows    += proposed whose instruction is of 4 to 150 words, of no forbidden word, ROUGE-L at most `novelty`
    student = train(base, rows), loss on outputs

Only seed rows are shown. A reply that was cut loses its last row. Departures: what is asked for is said in our words;
replies of 1,024 tokens (the released code: 3,072); the student is asked in its own chat form where it has one.
Expect: 52,002 rows for less than 500 dollars in 2023, about 40% with an input."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax.curate import rules
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.parsers import Sections
from recursive_jax.recipes import instruction_rows as shared
from recursive_jax.recipes.instruction_config import InstructionsConfig, check, cost
from recursive_jax.recipes.instructions import Studio
from recursive_jax.recipes.proposals import keepers
from recursive_jax.recipes.recipe import Recipe, concluded
from recursive_jax.recipes.self_instruct import valid
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report.written import written_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run

ASK = """Write {count} diverse tasks for an assistant, each with an instruction, an input and an output.
The instructions differ in their verbs, their kind and their length, and can be followed in text alone. An input is one
concrete example of at most 100 words; where an instruction needs none, the input is <none>. The output is what a good
assistant would answer.

{shown}
###
Instruction:"""
EMPTY = "<none>"
PARSER = Sections(
    {"instruction": "Instruction:", "input": "Input:", "output": "Output:"}, separator="###", opened=True,
    empty=("input",),
)  # fmt: skip


class AlpacaConfig(InstructionsConfig):
    """A teacher writes whole rows."""

    recipe: str = "alpaca"

    batches: PositiveInt = Field(4, description="of requests")
    requests: PositiveInt = Field(16, description="requests in a batch")
    epochs: float = Field(3.0, gt=0.0, description="over the rows learnt from; decides train.steps")
    per_request: PositiveInt = Field(20, description="rows that a request asks for")
    novelty: float = Field(0.7, gt=0.0, lt=1.0, description="ROUGE-L of a new instruction with any other, at most")
    keep_seed: bool = Field(False, description="learn from the seed rows too")


def shown_rows(seed: Dataset, count: int, per_request: int, draw: int) -> Dataset:
    """`count` requests, each with three seed rows."""
    rng, rows = np.random.default_rng(draw), [row for row in python_rows(seed.table) if row["output"]]
    made = []
    for n in range(count):
        drawn = [rows[i] for i in rng.permutation(len(rows))[:3]]
        texts = [f"Instruction: {r['instruction']}\nInput: {r['input'] or EMPTY}\nOutput: {r['output']}" for r in drawn]
        made.append({"id": f"ask/{draw}/{n}", "shown": "\n###\n".join(texts), "count": str(per_request)})
    return Dataset.from_rows(made)


def without_marks(data: Dataset) -> Dataset:
    """Inputs that say there is none, as none."""
    inputs = ["" if (text or "").strip() == EMPTY else (text or "") for text in data.column("input")]
    return shared.with_asked(data.with_column("input", inputs))


def proposed(studio: Studio, round: Round, seed: Stored) -> list[Stored]:
    config, found = studio.config, []
    settings = studio.settings(temperature=1.0, max_tokens=1024)
    for k in range(1, config.batches + 1):
        draw = round.seed(f"ask-{k}") % 2**31
        asked = round.dataset(f"ask-{k}", shown_rows, seed, config.requests, config.per_request, draw)
        new = round.generate(f"proposed-{k}", studio.teacher, asked, settings, template=studio.ask(ASK, PARSER))
        readable = round.dataset(f"readable-{k}", without_marks, new)
        known = tuple(text for part in (seed, *found) for text in part.value.column("instruction"))
        found.append(
            round.select(f"kept-{k}", readable, [rules.cap(config.per_request), valid, *keepers(config.novelty, known)])
        )
    return found


def alpaca(config: AlpacaConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records: round 0 is the base, round 1 the student."""
    studio = Studio(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 5 * config.batches + 8
        first, round = run.round(0), run.round(1)
        seed = studio.seed(first, studio.seeds)
        before = studio.measure(first, studio.base)
        parts = proposed(studio, round, seed)
        data = round.dataset("data", shared.joined, *([seed] if config.keep_seed else []), *parts)
        student = studio.tuned(round, data)
        studio.measure(round, student, before, len(data))
        return concluded(run, round, written_layout)


recipe = Recipe(
    "alpaca",
    "a teacher writes whole rows of instruction, input and output after three of the seed; a student learns from them",
    AlpacaConfig,
    alpaca,
    check,
    cost,
    written_layout,
    paper="github.com/tatsu-lab/stanford_alpaca",
    example="recursive-jax run configs/alpaca.yaml --workdir runs/alpaca",
)
