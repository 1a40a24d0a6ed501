"""Symbol tuning (arXiv:2305.08298): a model learns to read what a label means off the exemplars.

    tasks   = every pair of the classes of a labelled file, as a task of its own
    rows    = exemplars with arbitrary symbols for labels, then a query; only the symbol is learnt
    student = train(base, rows)                        `labels: natural` is the twin that it is compared with
    measured on pairs of classes that were never tuned on, by the likelihood of each label: with an instruction or
    without, with natural labels or with symbols of the evaluation's own, and with flipped natural labels

Departures: one file's classes in place of 22 data sets; words among the symbols only where a list is given; 20% of
instruction rows (sec. 4.2's remedy) by `keep_natural`. Expect (Flan-PaLM 8B): symbols without instruction 44.2 to 52.8,
flipped labels +26.5 towards chance, with natural labels and instruction a loss (63.9 to 57.6)."""

from __future__ import annotations

import functools
import itertools
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax import mesh as meshes
from recursive_jax.collapse.tasks import Choices, choices_numbers
from recursive_jax.config import LoraConfig, TaskConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.files import read_lines
from recursive_jax.data.symbols import Labelled, labelled_task, symbol_rows
from recursive_jax.data.task import read_rows
from recursive_jax.data.template import Template, examples_dataset
from recursive_jax.errors import InputError
from recursive_jax.identity import named
from recursive_jax.recipes.finetune import as_they_are
from recursive_jax.recipes.recipe import Recipe, RecipeConfig, concluded, student_network, with_adapter
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training

ROW = Template("{prompt}", "{completion}", chat=False)
#: name of a measurement -> (labels, whether the instruction is given).
SETTINGS = {
    "symbols": ("symbols", False),
    "symbols_instruction": ("symbols", True),
    "natural": ("natural", False),
    "natural_instruction": ("natural", True),
    "flipped": ("flipped", False),
}


class SymbolTuningConfig(RecipeConfig):
    """A model learns labels from context."""

    NEEDS = ("base", "task", "held_out")

    recipe: str = "symbol_tuning"

    base: str = Field("", description="the model: a run, a Hugging Face folder, a GGUF, smollm2")
    task: TaskConfig
    text: str = Field("text", description="the rows' column with the text")
    label: str = Field("label", description="the rows' column with the class")
    held_out: tuple[str, ...] = Field((), description="classes whose pairs are evaluated, and never tuned on")
    instruction: str = Field("", description="what the task is, in words, with {a} and {b} for the two classes")
    labels: Literal["symbols", "natural"] = Field("symbols", description="natural: the twin it is compared with")
    keep_natural: float = Field(0.0, ge=0.0, lt=1.0, description="share of rows with natural labels and instruction")
    per_class: tuple[PositiveInt, PositiveInt] = Field((2, 4), description="least and most exemplars of a class")
    words: str | None = Field(None, description="a file of words, the most common first: the third kind of symbols")
    prompts: PositiveInt = Field(400, description="rows to tune on")
    evaluated: PositiveInt = Field(100, description="prompts of each evaluation")
    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")


def tasks(config: SymbolTuningConfig) -> tuple[list[Labelled], list[Labelled]]:
    """(tasks to tune on, held-out ones): every pair of classes. Raises InputError for held-out classes that are
    none."""
    rows = read_rows(config.task.path)
    whole = labelled_task(config.task.path, rows, config.text, config.label)
    unknown = set(config.held_out) - set(whole.classes)
    if unknown or not 2 <= len(config.held_out) <= len(whole.classes) - 2:
        wrong = f"{', '.join(sorted(unknown))} is no class" if unknown else f"{len(config.held_out)} classes"
        raise InputError(f"held_out: {wrong}; two of the file's at least, and two left: {', '.join(whole.classes)}")

    def pairs(classes: list[str]) -> list[Labelled]:
        found = []
        for a, b in itertools.combinations(sorted(classes), 2):
            told = config.instruction.replace("{a}", a).replace("{b}", b)
            found.append(Labelled(f"{a}/{b}", tuple(r for r in whole.rows if r[1] in (a, b)), told))
        return found

    return pairs([c for c in whole.classes if c not in config.held_out]), pairs(list(config.held_out))


def words_of(config: SymbolTuningConfig) -> tuple[str, ...]:
    return tuple(line for _, line in read_lines(config.words)) if config.words else ()


def prompts(config: SymbolTuningConfig, tuned: list[Labelled], seed: int, tokenizer: Any) -> Dataset:
    """The rows to tune on."""
    settings = {"per_class": config.per_class, "words": words_of(config)}
    natural = round(config.prompts * config.keep_natural)
    rows = symbol_rows(tuned, config.prompts - natural, seed, labels=config.labels, **settings)
    rows += symbol_rows(tuned, natural, seed + 1, labels="natural", instruction=True, **settings) if natural else []
    kept = [{key: row[key] for key in ("prompt", "completion", "task")} for row in rows]
    return examples_dataset([kept[i] for i in np.random.default_rng(seed).permutation(len(kept))], ROW, tokenizer)


def measured(config: SymbolTuningConfig, held_out: list[Labelled], model: Any) -> dict[str, float]:
    """Accuracy in each setting, with the symbols of the evaluation; the prompts are the same for every model."""
    found: dict[str, float] = {}
    for name, (labels, told) in SETTINGS.items():
        if told and not config.instruction:
            continue
        rows = symbol_rows(held_out, config.evaluated, 7, split="evaluation", labels=labels, instruction=told,
                           per_class=config.per_class, words=words_of(config))  # fmt: skip
        metrics, _ = choices_numbers(model, Choices(name, tuple(rows), prompt="{question}"))
        found |= {key.replace("accuracy", f"accuracy_{name}", 1): value for key, value in metrics.items()
                  if key.startswith("accuracy") and "norm" not in key}  # fmt: skip
    return found


def assess(round: Round, config: SymbolTuningConfig, held_out: list[Labelled], model: Any) -> None:
    measure = named("symbol_tuning", 1)(functools.partial(measured, config, held_out, model))
    round.evaluate("evaluation", model, measure, config=[config.instruction, config.evaluated, config.per_class])


def symbol_tuning(config: SymbolTuningConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records: round 0 the base, round 1 the student."""
    base = load_model(config.base, meshes.make_mesh(config.mesh))
    tuned, held_out = tasks(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        first, second = run.round(0), run.round(1)
        assess(first, config, held_out, base)
        rows = prompts(config, tuned, second.seed("prompts") % 2**31, base.tokenizer)
        data = second.dataset("prompts", as_they_are, rows)
        start = with_adapter(second, base, config.lora)
        student = second.train("student", start, data, config.train)
        assess(second, config, held_out, student)
        return concluded(run, second)


recipe = Recipe(
    "symbol_tuning",
    "exemplars with arbitrary symbols for labels teach a model to learn from its context",
    SymbolTuningConfig,
    symbol_tuning,
    lambda config: batch_problems(config.mesh, train=config.train),
    lambda config: [Training("", student_network(config.base, config.lora), config.train)],
    paper="arXiv:2305.08298",
    example="recursive-jax run configs/symbol_tuning.yaml --workdir runs/symbol_tuning",
)
