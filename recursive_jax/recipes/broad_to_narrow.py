"""From broad to narrow: a broad teacher writes highly specific data, and a narrow student learns it.

    student_0 = train(new, seed)                                         `train.steps` steps, as every student
    written_k = teacher(description, seed rows of one class), a list that goes on
    kept_k    = written_k, readable, of 2 to 60 words, none of the held-out rows, ROUGE-L at most `novelty`
                (`verify`: and answered as it is labelled by the last student, or by the teacher)
    student_k = train(new, seed + kept_1 .. kept_k)
    evaluate: student_0, student_k and the teacher itself (shown seed rows) on the same held-out rows

The two steps of ZeroGen and SuperGen (arXiv:2202.07922, arXiv:2202.04538) with seed rows and curation; real rows stay
in every round (arXiv:2404.01413). Expect: more right answers than of the seed alone, where the teacher knows the task's
words; docs/recipes/broad-to-narrow.md has what was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from recursive_jax import mesh as meshes
from recursive_jax.collapse.tasks import Task, answered
from recursive_jax.config import row_length
from recursive_jax.curate import rules
from recursive_jax.data.task import class_field
from recursive_jax.data.template import Examples, Template, examples_dataset, task_rows
from recursive_jax.generate.remote.model import Remote
from recursive_jax.models.model import Model, transformer
from recursive_jax.recipes import narrow_rows as rows
from recursive_jax.recipes.llm2llm_rows import given, held_out_task
from recursive_jax.recipes.narrow_config import BroadToNarrowConfig, check_size, tokenizer_of
from recursive_jax.recipes.narrow_rows import Asking
from recursive_jax.recipes.recipe import Recipe, concluded, task_problems
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.report.narrow import narrow_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training, Work


def broad_to_narrow(config: BroadToNarrowConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records. RUN/exported is the last student as a Hugging Face
    folder, where its kind can be written as one."""
    mesh = meshes.make_mesh(config.mesh)
    seed_rows, held_out, _ = task_rows(config.task, config.seed)
    template = Template(config.task.prompt, config.task.completion, config.task.system)
    by = config.task.stratify or class_field(seed_rows, template.fields())
    asking = Asking.of(config, by)
    texts = [f"{template.asks(row)}{row[c]}" for row in seed_rows for c in template.fields()]
    new = transformer(config.model, tokenizer_of(config, texts), mesh)
    teacher = load_model(config.teacher, mesh)
    check_size(new, teacher, config.largest)
    held_out = [{**row, "asked": template.asks(row)} for row in held_out]
    task = held_out_task(held_out, template, config.sampling.max_tokens or 32)
    chat = isinstance(teacher, Remote) if config.teacher_chat is None else config.teacher_chat
    shots = min(config.teacher_shots, len(seed_rows) - 1)
    shown = Examples(((tuple(seed_rows), shots),), seed=config.seed, fixed=True)
    prompt = asking.about * chat + template.prompt
    asks = dataclasses.replace(template, chat=chat, system="", examples=shown, prompt=prompt)
    broad = dataclasses.replace(task, template=asks)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 9 + config.rounds * (10 if config.verify == "none" else 12)
        first = run.round(0)
        seed = data = first.dataset("seed", rows.joined, asking.columns, template, given(seed_rows))
        student, before = trained(first, config, new, template, task, data, by, None)
        of_teacher = first.dataset("held-out-teacher", answered, teacher, broad, {"stop": ("\n",)})
        first.evaluate("teacher", teacher, rows.narrow_numbers, broad, of_teacher, 0, by, None)
        for number in range(1, config.rounds + 1):
            round = run.round(number)
            kept = written(round, config, asking, teacher, broad, student, task, seed, data)
            data = round.dataset("data", rows.joined, asking.columns, template, data, kept)
            student, _ = trained(round, config, new, template, task, data, by, before)
        for name, model, ask in (("speed", student, template), ("speed-teacher", teacher, broad.template)):
            if isinstance(model, Model):
                round.evaluate(name, model, rows.speed, model, ask, held_out, config.sampling.max_tokens or 32)
        if meshes.is_main():
            rows.export(student, run.path / run.own_name("exported"))
        return concluded(run, round, narrow_layout)


def trained(
    round: Round, config: BroadToNarrowConfig, new: Model, template: Template, task: Task, data: Stored,
    by: str | None, before: Stored | None,
) -> tuple[Model, Stored]:  # fmt: skip
    """(the student of the data, its answers to the held-out rows), measured."""
    examples = round.dataset("examples", examples_dataset, data, template, new.tokenizer)
    student = round.train("student", new, examples, config.train)
    held = round.dataset("held-out", answered, student, task, {})
    arguments = (task, held, len(data), by, before)
    round.evaluate("evaluation", student, rows.narrow_numbers, *arguments, inputs={"answers": held})
    return student, held


def written(
    round: Round, config: BroadToNarrowConfig, asking: Asking, teacher: Any, broad: Task, student: Model, task: Task,
    seed: Stored, data: Stored,
) -> Stored:  # fmt: skip
    """What the teacher writes and what is kept of it."""
    asked = round.dataset("asked", asking, seed, round.seed("asked") % 2**31)
    settings = {"max_tokens": 40 * config.per_request, "temperature": 0.9, "top_p": 0.95}
    settings |= {"stop": ("\n\n",)} if asking.by and not broad.template.chat else {}
    settings |= config.sampling.model_dump(exclude_unset=True, exclude={"max_tokens"})
    new = round.generate("written", teacher, asked, settings, template=asking.template(broad.template.chat))
    found = round.dataset("readable", rows.readable, new, asking.columns)
    known = tuple(str(text) for text in data.value.column(asking.text))
    held = [str(row[asking.text]) for row in task.rows]
    chosen = [
        rules.cap(config.per_request),
        rules.words(2, 60, asking.text),
        rules.fits(task.template, student.tokenizer, row_length(config.train.length, student.max_length)),
        rules.decontaminate(held, drop=True, column=asking.text),
        rules.novel(config.novelty, asking.text, known),
    ]
    kept = round.select("novel", found, chosen)
    if config.verify == "none" or not len(kept):
        return kept
    judge, how = (student, task) if config.verify == "student" else (teacher, broad)
    checked = round.dataset("checked", rows.verified, kept, judge, how)
    return round.select("verified", checked, [rules.correct()])


def cost(config: BroadToNarrowConfig) -> list[Work]:
    """All students."""
    network = transformer(config.model, tokenizer_of(config, ["text"])).network
    return [Training("", network, config.train, 1.0 + config.rounds)]


def check(config: BroadToNarrowConfig) -> list[str]:
    return task_problems(config.task, config.seed) or batch_problems(config.mesh, train=config.train)


recipe = Recipe(
    "broad_to_narrow",
    "a broad teacher writes data for one task; a narrow student learns it and is held against teacher and seed",
    BroadToNarrowConfig,
    broad_to_narrow,
    check,
    cost,
    narrow_layout,
    paper="arXiv:2202.07922, arXiv:2202.04538",
    example="recursive-jax run configs/broad_to_narrow.yaml --workdir runs/narrow",
)
