"""Fine-tuning a real model on a task: whole or with an adapter, measured before and after on held-out rows.

Supervised fine-tuning as in InstructGPT's first step (arXiv:2203.02155, sec. 3.5) with the loss on completions; LoRA
(arXiv:2106.09685), QLoRA's four-bit base (arXiv:2305.14314).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from recursive_jax import mesh as meshes
from recursive_jax.collapse.task import task_metrics
from recursive_jax.config import LoraConfig, SamplingConfig, TaskConfig, row_length
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.template import Template, examples_dataset, preview, task_rows
from recursive_jax.errors import InputError
from recursive_jax.generate.preview import preview_text
from recursive_jax.generate.request import Request
from recursive_jax.identity import fingerprint, named
from recursive_jax.models.model import Model
from recursive_jax.recipes.recipe import Recipe, RecipeConfig, student_network, task_problems, with_adapter
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.report.task import task_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training
from recursive_jax.train.log import console


class FinetuneConfig(RecipeConfig):
    """One model on a task, before and after."""

    NEEDS = ("base", "task")

    recipe: str = "finetune"

    base: str = Field(description="the model: a run, a Hugging Face folder, a GGUF, smollm2")
    task: TaskConfig
    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")


def finetune(config: FinetuneConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) the fine-tuning in `workdir` and returns the metrics records: round 0 is the model as it
    came, round 1 the trained one. Shows the first packed row with its loss before the first step."""
    base = load_model(config.base, meshes.make_mesh(config.mesh))
    train_rows, test_rows, how = task_rows(config.task, config.seed)
    template = Template.of(config.task, base.tokenizer)
    length = row_length(config.train.length, base.max_length)
    if length > base.max_length:
        raise InputError(f"train.length={length} is longer than {config.base} reads, {base.max_length} tokens")
    examples = examples_dataset(train_rows, template, base.tokenizer)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 6
        first, second = run.round(0), run.round(1)
        data = first.dataset("examples", as_they_are, examples)
        shown = preview(data.value, base.tokenizer, length)  # on every process: it refuses rows that do not fit
        if not quiet and meshes.is_main():
            console.print(f"{how}; the first packed row:", style="dim")
            console.print(shown, markup=False, highlight=False)
        assess(first, base, config, template, test_rows)
        start = with_adapter(second, base, config.lora)
        model = second.train("student", start, data, config.train.model_copy(update={"length": length}))
        run.name_model("student", second, "student", default=True)
        assess(second, model, config, template, test_rows)
        records = run.refresh_metrics()
        meshes.on_main(lambda: write_report(run.path, task_layout))
        return records


def as_they_are(data: Dataset) -> Dataset:
    return data


def assess(round: Round, model: Model, config: FinetuneConfig, template: Template, rows: list[dict]) -> dict[str, Any]:
    """Greedy answers to the held-out rows, read back and compared; and the loss of the right answers."""
    requests, sampling = asked(config, template, rows, model.tokenizer)
    answers = round.generate("answers", model, requests, sampling)
    inputs = {"answers": answers.fingerprint, "rows": fingerprint(rows)}
    measured = named("task_metrics", 3)(lambda: task_metrics(model, template, rows, answers.value))
    return round.evaluate("evaluation", model, measured, inputs=inputs, config=template)


def asked(config: FinetuneConfig, template: Template, rows: list[dict], tokenizer: Any) -> tuple[list[Request], Any]:
    """(requests of the held-out rows, how they are answered: greedily)."""
    prompts = [template.request(row, tokenizer) for row in rows]
    sampling = config.sampling.model_copy(update={"temperature": 0.0})
    settings = {**sampling.model_dump(exclude_unset=True), "max_tokens": config.sampling.max_tokens or 64}
    requests = [Request(i, prompt, (f"held-out/{i}",), opened=True) for i, prompt in enumerate(prompts)]
    return requests, SamplingConfig(**settings)


def preview_rows(config: FinetuneConfig, rows: int) -> str:
    """The first held-out rows as the model answers them before it is trained."""
    base = load_model(config.base, meshes.make_mesh(config.mesh))
    template = Template.of(config.task, base.tokenizer)
    _, held_out, _ = task_rows(config.task, config.seed)
    return preview_text(base, *asked(config, template, held_out[:rows], base.tokenizer), template)


def check(config: FinetuneConfig) -> list[str]:
    return task_problems(config.task, config.seed) or batch_problems(config.mesh, train=config.train)


recipe = Recipe(
    "finetune",
    "one imported model on a task, whole or with an adapter, measured before and after on held-out rows",
    FinetuneConfig,
    finetune,
    check,
    lambda config: [Training("", student_network(config.base, config.lora), config.train)],
    task_layout,
    preview_rows,
    paper="arXiv:2203.02155, sec. 3.5; arXiv:2106.09685; arXiv:2305.14314",
    example="recursive-jax run configs/snips.yaml --workdir runs/snips",
)
