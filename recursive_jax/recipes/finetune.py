"""Fine-tuning a real model on a task: whole or with an adapter, measured before and after on held-out rows.

Supervised fine-tuning as in InstructGPT's first step (arXiv:2203.02155, sec. 3.5) with the loss on completions; LoRA
(arXiv:2106.09685), QLoRA's four-bit base (arXiv:2305.14314).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from recursive_jax import mesh as meshes
from recursive_jax.collapse.likelihood import example_losses
from recursive_jax.config import Config, SamplingConfig
from recursive_jax.data.template import ParseError, Template, examples_dataset, preview, read_rows
from recursive_jax.errors import InputError
from recursive_jax.generate.request import Request
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model
from recursive_jax.rounds.durable import Stored, fingerprint
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.stored import load_model
from recursive_jax.train.log import console


def finetune(config: Config, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the fine-tuning in `workdir` and returns the metrics records: round 0 is the model as it
    came, round 1 the trained one. Shows the first packed row with its loss before the first step."""
    base = load_model(config.base, meshes.make_mesh(config.mesh))
    train_rows, test_rows = task_rows(config)
    template = Template.of(config.task, base.tokenizer)
    length = config.train.length or min(base.context, 1024)
    if length > base.context:
        raise InputError(f"train.length={length} is longer than the context of {config.base}, {base.context}")
    examples = examples_dataset(train_rows, template, base.tokenizer)
    with Run(workdir, config.model_dump(), seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 6
        first, second = run.round(0), run.round(1)
        files = {"task": config.task.model_dump(), "tokenizer": base.fingerprint}
        data = first.dataset("examples", lambda: examples, {"rows": fingerprint(train_rows)}, files)
        if not quiet and meshes.is_main():
            console.print("the first packed row:", style="dim")
            console.print(preview(data.value, base.tokenizer, length), markup=False, highlight=False)
        assess(first, base, config, template, test_rows)
        start = base if config.lora is None else adapted_model(base, config.lora, seed=second.seed("adapter"))
        model = second.train("student", start, data, config.train.model_copy(update={"length": length}))
        assess(second, model, config, template, test_rows)
        records = run.refresh_metrics()
        if meshes.is_main():
            write_report(run.path)
        meshes.barrier("report")
        return records


def task_rows(config: Config) -> tuple[list[dict], list[dict]]:
    """(rows to learn from, held-out rows)."""
    rows = read_rows(config.task.path)
    if config.task.validation:
        held_out = read_rows(config.task.validation)
    else:
        cut = max(1, round(len(rows) * config.task.holdout))
        if cut >= len(rows):
            raise InputError(f"{config.task.path} has {len(rows)} rows: too few to hold out {config.task.holdout:.0%}")
        rows, held_out = rows[:-cut], rows[-cut:]
    return rows[: config.task.limit], held_out


def assess(round: Round, model: Model, config: Config, template: Template, rows: list[dict]) -> dict[str, Any]:
    """Greedy answers to the held-out rows, read back and compared; and the loss of the right answers."""
    prompts = [template.request(row, model.tokenizer) for row in rows]
    requests = lambda first, count: [
        Request(i, prompts[i], (f"held-out/{i}",), opened=True) for i in range(first, first + count)
    ]
    sampling = config.sampling.model_copy(update={"temperature": 0.0, "batch": min(config.sampling.batch, len(rows))})
    sampling = SamplingConfig(**{**sampling.model_dump(), "max_tokens": config.sampling.max_tokens or 64})
    answers = round.generate("answers", model, requests, sampling, count=len(rows), inputs={"rows": fingerprint(rows)})
    inputs = {"answers": answers.fingerprint}
    return round.evaluate(
        "evaluation", model, lambda: task_metrics(model, template, rows, answers), inputs, config.task.model_dump()
    )


def task_metrics(model: Model, template: Template, rows: list[dict], answers: Stored) -> dict[str, Any]:
    """accuracy: every field of the completion right. format: the answer has the completion's form and ended by itself.
    ce_task: nats per token of the right completions. Standard errors are over rows."""
    right, formed = [], []
    for row, text, status in zip(rows, answers.value.column("text"), answers.value.column("status"), strict=True):
        found, wanted = template.read(row, text), template.wanted(row)
        well = not isinstance(found, ParseError) and status == "ok"
        formed.append(well)
        right.append(well and bool(wanted) and found == wanted)
    losses = example_losses(model, [template.example(row, model.tokenizer) for row in rows])
    n = len(rows)
    spread = lambda x: float(np.std(np.asarray(x, float), ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    means = [float(np.mean(x)) for x in losses]
    shown = [
        {"prompt": template.asked(row)[-1]["content"], "answer": text, "right": bool(ok)}
        for row, text, ok in zip(rows[:8], answers.value.column("text"), right, strict=False)
    ]
    return {
        "accuracy": float(np.mean(right)),
        "accuracy_stderr": spread(right),
        "format": float(np.mean(formed)),
        "format_stderr": spread(formed),
        "ce_task": float(np.concatenate(losses).mean()),
        "ce_task_stderr": spread(means),
        "rows": n,
        "shown": shown,
    }


def check(config: Config) -> None:
    """What can be said before the model is loaded: the files are there, and the first rows fill the template."""
    train, test = task_rows(config)
    template = Template(config.task.prompt, config.task.completion, config.task.system)
    for row in (train[0], test[0]):
        template.messages(row)
