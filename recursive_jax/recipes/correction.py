"""What the corrections of answers share (survey: arXiv:2308.03188): a model answers held-out problems, something is
done about the answers, and both are graded. No training. Without an outside check, correction often lowers accuracy
(arXiv:2310.01798): the difference is told with its paired test, whichever way it falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.collapse.intervals import proportion
from recursive_jax.collapse.paired import two_sided_p
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.template import Template, task_rows
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import AnswersConfig, Course
from recursive_jax.recipes.recipe import prompt_tokens
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.opening import load_model, open_network
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.report.corrections import correction_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Work, Writing

Corrected = Callable[[Course, Round, Model, Stored], Stored]


def correction(config: AnswersConfig, workdir: Any, corrected: Corrected, *, fork: Any = None, quiet: bool = False):
    """Runs (or goes on with) it in `workdir` and returns the metrics records: round 0 is the greedy answer, round 1 the
    corrected one. corrected(course, round, model, before): a graded row for each problem, in their order."""
    model = load_model(config.base, meshes.make_mesh(config.mesh))
    _, held_out, _ = task_rows(config.task, config.seed)
    template = Template.of(config.task, model.tokenizer)
    course = Course(config, template, held_out[: config.problems])
    problems = course.problems
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 8
        first, second = run.round(0), run.round(1)
        greedy = course.answers(first, "answers", model, problems, temperature=0.0)
        before = first.dataset("held-out", one_each, problems, greedy)
        first.evaluate("evaluation", model, compared, before, before, inputs={"answers": before})
        after = second.dataset("held-out", one_each, problems, corrected(course, second, model, before), before)
        second.evaluate("evaluation", model, compared, after, before, inputs={"answers": after})
        records = run.refresh_metrics()
        meshes.on_main(lambda: write_report(run.path, correction_layout))
        return records


def cost(config: AnswersConfig) -> list[Work]:
    """The greedy answers, and what is written to correct them."""
    _, held_out, _ = task_rows(config.task, config.seed)
    rows, network = len(held_out[: config.problems]), open_network(config.base)
    prompt, answer = prompt_tokens(config.task, held_out), config.sampling.max_tokens or 256
    more = rows * config.written(answer) / answer
    longer = min(prompt + answer, network.max_length - answer) if network.max_length > 2 * answer else prompt
    greedy = config.sampling.model_copy(update={"temperature": 0.0})
    return [
        Writing("greedy answers", network, greedy, rows, prompt, answer),
        Writing("corrections", network, config.sampling, more, longer, answer),
    ]


def one_each(problems: Dataset, *answers: Dataset) -> Dataset:
    """An answer to each problem, in their order: the first there is, of the first that have one. One without a grade
    counts as wrong."""
    found = Dataset.concat(answers, fill=True)
    first: dict[str, int] = {}
    for n, parents in enumerate(found.column("parents")):
        first.setdefault(parents[0], n)
    rows = found.take(np.array([first[name] for name in problems.column("id")], np.int64))
    return rows.with_column("score", [0.0 if s is None else s for s in rows.column("score")])


def compared(after: Dataset, before: Dataset) -> dict[str, Any]:
    """Of the corrected answers: `accuracy` (Wilson interval), that before, how many became right and wrong, and the
    p-value of the difference (McNemar, two-sided)."""
    new, old = (np.asarray(rows.column("score"), float) for rows in (after, before))
    return {
        **proportion("accuracy", int(new.sum()), len(new)),
        "accuracy_before": float(old.mean()),
        "became_right": int(np.sum(new > old)),
        "became_wrong": int(np.sum(new < old)),
        "p": two_sided_p(new, old),
        "rows": len(new),
    }
