"""LLM2LLM (arXiv:2403.15042): what a student gets wrong is what a teacher writes more of.

    student_k = train(base, data_k)             from base every round; data_0 is the seed
    wrong_k   = rows of the seed that student_k gets wrong
    new_k     = teacher(wrong_k), a variation of each
    data_k+1  = data_k + novel(new_k)

Departures: answers are greedy (the released code draws at 0.7 and cuts at 100 tokens, so that long right answers count
as wrong); training and evaluation have one prompt; `teacher: oracle` computes exact variations where rows have number
slots and an equation, or marked slots. Novelty as in the code: ROUGE-L of what is asked, at most 0.95.
Expect, of Llama-2-7B: SNIPS from 10 rows a class 60.1 to 92.1%; not measured here yet."""

from __future__ import annotations

import math
from typing import Any

from recursive_jax import mesh as meshes
from recursive_jax.collapse.tasks import Task, answered
from recursive_jax.curate import rules
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model
from recursive_jax.recipes import llm2llm_rows as rows
from recursive_jax.recipes.answers import measured
from recursive_jax.recipes.llm2llm_config import Arm, Llm2llmConfig, arms_of
from recursive_jax.recipes.recipe import Recipe, student_network
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.report.ablations import ablations_layout
from recursive_jax.rounds.round import Chain, Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training, Work

EXTRA = 1.5  # of what an ablation needs is asked for, since some of it is not novel


def llm2llm(config: Llm2llmConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the rounds in `workdir` and returns the metrics records: round k is the student of data_k,
    round 0 that of the seed alone."""
    mesh = meshes.make_mesh(config.mesh)
    base = load_model(config.base, mesh)
    teacher = None if config.teacher == "oracle" else load_model(config.teacher, mesh)
    seed_rows, held_out = rows.task_of(config)
    template = Template.of(config.task, base.tokenizer)
    task = rows.held_out_task(held_out, template, config.sampling.max_tokens or 64)
    arms = arms_of(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = len(arms) * config.replicates * (9 * config.rounds + 5)
        for replicate in range(config.replicates):
            added: list[int] = []  # rows by round, in the first arm: the others add as many
            first = run.chain("main", replicate, config.replicates).round(0)
            for name, arm in arms.items():
                chain = run.chain(name, replicate, config.replicates)
                found = course(chain, first, arm, config, base, teacher, template, task, seed_rows, added)
                added = added or found
        records = run.refresh_metrics()
        meshes.on_main(lambda: write_report(run.path, ablations_layout))
        return records


def course(
    chain: Chain, first: Round, arm: Arm, config: Llm2llmConfig, base: Model, teacher: Model | None,
    template: Template, task: Task, seed_rows: list[dict], added: list[int],
) -> list[int]:  # fmt: skip
    """One arm; returns how many rows each round added. first: the round of the seed alone, which all arms share. added:
    how many rows are wanted by round; none: as many as come."""
    names, found = list(seed_rows[0]), []
    start = base if config.lora is None else adapted_model(base, config.lora, seed=config.seed)
    seed = data = first.dataset("data", rows.given, seed_rows)
    student = start
    for number in range(1 + (1 if arm.bulk else config.rounds)):
        round = chain.round(number) if number else first
        if number:
            count = None if not added else sum(added) if arm.bulk else added[number - 1]
            parents = data if arm.parents == "all" else seed
            wrong = round.dataset("graded", rows.answers_to, parents, names, student, task)
            before = len(data)
            data = grown(round, arm, config, teacher, template, names, data, parents, wrong, count)
            found.append(len(data) - before)
        examples = round.dataset("examples", rows.learnt, data, names, template, base.tokenizer)
        steps = max(1, math.ceil(config.epochs * len(data) / config.train.batch))
        begun = student if number and arm.init == "previous" else start
        student = round.train("student", begun, examples, config.train.model_copy(update={"steps": steps}))
        held = round.dataset("held-out", answered, student, task, {})
        round.evaluate("evaluation", student, measured, task, held, len(data), inputs={"answers": held})
    name = chain.arm if config.replicates == 1 else f"{chain.arm}-{chain.replicate}"
    chain.run.name_model(name, round, "student", default=chain.arm == "main" and chain.replicate == 0)
    return found


def grown(
    round: Round, arm: Arm, config: Llm2llmConfig, teacher: Model | None, template: Template, names: list[str],
    data: Stored, parents: Stored, graded: Stored, count: int | None,
) -> Stored:  # fmt: skip
    """The data of this round: the last one's, and what the teacher makes of what its student got wrong, at most `count`
    rows (None: as many as come)."""
    ask = None if count is None else math.ceil(count * EXTRA)
    seed = round.seed("picked")
    picked = round.dataset("picked", rows.chosen, parents, graded, arm.targeted, config.per_wrong, ask, seed)
    if teacher is None or not len(picked):
        new = round.dataset("new", rows.computed, picked, data, names, round.seed("new") % 2**31)
    else:
        shown = round.dataset("shown", rows.shown, picked, names, template)
        settings = {"max_tokens": 256, **config.sampling.model_dump(exclude_unset=True)}
        new = round.generate("new", teacher, shown, settings, template=rows.vary_template(template), attempts=2)
    readable = round.dataset("readable", rows.with_asked, new, names, template)
    known = tuple(template.asks(row) for row in rows.plain(data.value, names))
    kept = round.select("kept", readable, [rules.novel(config.novelty, "asked", known)])
    return round.dataset("data", rows.joined, data, kept, names, count, f"{round.number}/new")


def cost(config: Llm2llmConfig) -> list[Work]:
    """All students, if every round had the seed's rows alone: at least that."""
    steps = math.ceil(config.epochs * len(rows.task_of(config)[0]) / config.train.batch)
    students = 1 + (len(arms_of(config)) * config.rounds)
    train = config.train.model_copy(update={"steps": steps})
    return [Training("", student_network(config.base, config.lora), train, float(students * config.replicates))]


def check(config: Llm2llmConfig) -> list[str]:
    """What can be said before a model is loaded: the files are there, the first rows fill the template, and the oracle
    can vary them."""
    try:
        train, test = rows.task_of(config)
        template = Template(config.task.prompt, config.task.completion, config.task.system)
        for row in (train[0], test[0]):
            template.messages(row)
        if config.teacher == "oracle":
            rows.oracle_of(train)
    except InputError as error:
        return [str(error)]
    return batch_problems(config.mesh, train=config.train)


recipe = Recipe(
    "llm2llm",
    "a student's mistakes are varied by a teacher, round after round; with the paper's ablations",
    Llm2llmConfig,
    llm2llm,
    check,
    cost,
    ablations_layout,
    paper="arXiv:2403.15042",
    example="recursive-jax run configs/llm2llm.yaml --workdir runs/llm2llm",
    own_arms=True,
)
