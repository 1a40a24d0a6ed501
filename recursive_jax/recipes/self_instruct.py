"""Self-Instruct (arXiv:2212.10560, sec. 2): a model writes instructions and their instances, and learns from them.

    pool = seed tasks
    for k = 1 .. batches:
        proposed = teacher(8 of the pool: 6 seed, 2 of its own, where there are some), a list that goes on
        pool    += proposed of 4 to 150 words, of no forbidden word, ROUGE-L with every other at most `novelty`
    kind     = teacher(instruction): classification or not, greedy
    instance = teacher(instruction): a label and an input for it (classification), an input and its output (else)
    rows     = instances with an output that is not the input, one for each instruction and input
    student  = train(base, rows), loss on outputs

Departures: a cut reply loses its last instruction, not all; Alpaca's words are forbidden too; the examples of the
second and third step are drawn from the seed tasks (the released prompts are fixed); one instance to an instruction;
one prompt template in training, not thirteen; seed tasks are learnt from only with `keep_seed`. Expect: 46% of the
paper's rows have a field that is not valid; GPT-3's ROUGE-L on Super-NaturalInstructions went from 6.8 to 39.9."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax.curate import rules
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.parsers import Label, Numbered, Sections
from recursive_jax.data.template import Examples
from recursive_jax.recipes import instruction_rows as shared
from recursive_jax.recipes.instruction_config import InstructionsConfig, check, cost
from recursive_jax.recipes.instructions import Studio
from recursive_jax.recipes.proposals import keepers, shown_lists
from recursive_jax.recipes.recipe import Recipe, concluded
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report.written import written_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run

PROPOSE = "Come up with a series of tasks:\n\n{shown}\n{next}."
KIND = "Is this task a classification task, whose output is one of a few labels?\nTask: {instruction}\nAnswer:"
INSTANCE = "Write an example of the task.\nTask: {instruction}\n"
FORMS = {True: "Label: {output}\nInput: {input}", False: "Input: {input}\nOutput: {output}"}
PARSERS = {
    True: Sections({"output": "Label:", "input": "Input:"}, empty=("input",)),
    False: Sections({"input": "Input:", "output": "Output:"}, empty=("input",)),
}


class SelfInstructConfig(InstructionsConfig):
    """A model writes its own instructions."""

    recipe: str = "self_instruct"

    batches: PositiveInt = Field(4, description="of requests for instructions, each shown what is kept so far")
    requests: PositiveInt = Field(16, description="requests in a batch")
    novelty: float = Field(0.7, gt=0.0, lt=1.0, description="ROUGE-L of a new instruction with any other, at most")
    shots: PositiveInt = Field(3, description="seed tasks shown before an instance is asked for")
    keep_seed: bool = Field(False, description="learn from the seed tasks too")


def proposed(studio: Studio, round: Round, seed: Stored) -> Stored:
    """The instructions that are kept, of all batches."""
    config, pool = studio.config, []
    settings = studio.settings(temperature=0.7, top_p=0.5, presence_penalty=2.0, stop=(*studio.stops("\n\n"), "16."))
    for k in range(1, config.batches + 1):
        own = round.dataset(f"own-{k}", together, *pool)
        draw = round.seed(f"ask-{k}") % 2**31
        asked = round.dataset(f"ask-{k}", shown_lists, config.requests, draw, (6, 2), "instruction", seed, own)
        template = studio.ask(PROPOSE, Numbered("instruction", opened=True))
        new = round.generate(f"proposed-{k}", studio.teacher, asked, settings, template=template)
        readable = round.dataset(f"readable-{k}", shared.with_asked, new)
        known = tuple(text for part in (seed, *pool) for text in part.value.column("instruction"))
        pool.append(round.select(f"kept-{k}", readable, keepers(config.novelty, known)))
    return round.dataset("instructions", together, *pool)


def together(*parts: Dataset) -> Dataset:
    rows = [row for part in parts for row in shared.plain(part, ("instruction",))]
    return Dataset.from_rows(rows)


def instances(studio: Studio, round: Round, instructions: Stored) -> list[Stored]:
    """Inputs and outputs to the instructions: first those of classification, the label before its input."""
    config = studio.config
    seeds = [{**row, "kind": "Yes" if row.get("is_classification") else "No"} for row in studio.seeds]
    kinds = {flag: tuple(r for r in seeds if (r["kind"] == "Yes") is flag and r["output"]) for flag in (True, False)}
    shots = lambda flag: (kinds[flag], min(config.shots, max(0, len(kinds[flag]) - 1)))
    several = Examples((shots(True), shots(False)), seed=config.seed)
    template = studio.ask(KIND, Label(("Yes", "No"), "kind", lenient=True), " {kind}", examples=several)
    settings = {"temperature": 0.0, "max_tokens": 4, "stop": studio.stops("\n"), "batch": config.sampling.batch}
    kind = round.generate("kinds", studio.teacher, instructions, settings, template=template)
    found = []
    for flag, name in ((True, "labelled"), (False, "answered")):
        of_kind = round.dataset(f"{name}-instructions", of_the_kind, kind, "Yes" if flag else "No")
        if not len(of_kind):
            continue
        one = Examples((shots(flag),), seed=config.seed)
        template = studio.ask(INSTANCE, PARSERS[flag], FORMS[flag], examples=one)
        settings = studio.settings(
            temperature=0.0, presence_penalty=1.5, stop=studio.stops("Write an example of the task.", "Task:")
        )
        new = round.generate(name, studio.teacher, of_kind, settings, template=template)
        found.append(round.dataset(f"{name}-readable", shared.with_asked, new))
    return found


def of_the_kind(kinds: Dataset, kind: str) -> Dataset:
    """The instructions of a kind; what could not be read counts as no classification."""
    keep = [n for n, k in enumerate(kinds.column("kind")) if (k or "No") == kind]
    return Dataset.from_rows(shared.plain(kinds.take(np.array(keep, np.int64)), ("instruction",)))


def valid(row: dict[str, Any]) -> bool:
    """An output that is neither nothing nor the input, and no field that breaks off behind a colon."""
    given, out = (row.get("input") or "").strip(), (row["output"] or "").strip()
    return bool(out) and out != given and not given.endswith(":") and not out.endswith(":")


def self_instruct(config: SelfInstructConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records: round 0 is the base, round 1 the student."""
    studio = Studio(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 4 * config.batches + 15
        first, round = run.round(0), run.round(1)
        seed = studio.seed(first, studio.seeds)
        before = studio.measure(first, studio.base)
        kept = proposed(studio, round, seed)
        written = round.dataset("instances", shared.joined, *instances(studio, round, kept))
        rows = round.select("kept", written, [valid, rules.distinct("asked")])
        data = round.dataset("data", shared.joined, *([seed] if config.keep_seed else []), rows)
        student = studio.tuned(round, data)
        studio.measure(round, student, before, len(data))
        return concluded(run, round, written_layout)


recipe = Recipe(
    "self_instruct",
    "a model writes instructions like the seed's, their inputs and outputs, and learns from them",
    SelfInstructConfig,
    self_instruct,
    check,
    cost,
    written_layout,
    paper="arXiv:2212.10560",
    example="recursive-jax run configs/self_instruct.yaml --workdir runs/self_instruct",
)
