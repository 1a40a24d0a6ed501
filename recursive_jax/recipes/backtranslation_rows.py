"""What `backtranslation` does with rows: each step a function of stored ones."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from recursive_jax.config import DataConfig
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.sources import documents
from recursive_jax.data.template import Template
from recursive_jax.errors import InputError
from recursive_jax.recipes import instruction_rows as shared


def segments(config: DataConfig, shortest: int, longest: int, most: int | None) -> list[dict[str, Any]]:
    """The paragraphs of the wanted length, each once, as `output`."""
    found = (part.strip() for text in documents(config, config.path) for part in text.split("\n\n"))
    fitting = (text for text in dict.fromkeys(found) if shortest <= len(text) <= longest)
    rows = [{"id": f"segment/{n}", "output": text} for n, text in enumerate(itertools.islice(fitting, most))]
    if not rows:
        raise InputError(f"segments.path={config.path}: no paragraph has {shortest} to {longest} characters")
    return rows


def together(new: Dataset, held_back: Dataset) -> Dataset:
    """The candidates, and among them the planted ones, of which every other has the answer to the one before: `planted`
    is true for a good pair, false for a bad one, null where no one knows."""
    rows = [row for row in python_rows(new.table) if row["status"] in ("ok", "length") and row["asked"]]
    core = ("id", "parents", "model", "round", "asked", "output")
    found = [{**{key: row[key] for key in core}, "synthetic": True, "planted": None} for row in rows]
    pairs = python_rows(held_back.table)
    for n, row in enumerate(pairs):
        bad = n % 2 == 1
        output = pairs[n - 1]["output"] if bad else row["output"]
        found.append({"id": f"planted/{n}", "asked": row["asked"], "output": output, "planted": not bad})
    return Dataset.from_rows([{**row, "instruction": row["asked"], "input": ""} for row in found])


def not_planted(data: Dataset) -> list[bool]:
    return [flag is None for flag in data.column("planted")]


def tagged(template: Template, tag: str) -> Template:
    """With a system text; where it is no chat, before the prompt."""
    if template.chat or not tag:
        return dataclasses.replace(template, system=tag or template.system)
    return dataclasses.replace(template, prompt=f"{tag}\n\n{template.prompt}")


def examples(seed: Dataset, kept: Dataset | None, template: Template, tags: tuple[str, str], tokenizer: Any) -> Dataset:
    """Rows to train on, of the seed and of what was curated, each with its tag."""
    parts = [shared.learnt(shared.joined(seed), tagged(template, tags[0]), tokenizer)]
    if kept is not None and len(kept):
        curated_rows = shared.joined(kept)
        parts.append(shared.learnt(curated_rows, tagged(template, tags[1]), tokenizer))
    return Dataset.concat(parts)


def curator_numbers(rated: Dataset, keep: float) -> dict[str, Any]:
    """Of the planted rows: the curator's precision and recall; and how many ratings could be read, and their mean."""
    scores = np.array([np.nan if s is None else s for s in rated.column("score")], float)
    planted = rated.column("planted")
    known = np.array([n for n, flag in enumerate(planted) if flag is not None], int)
    read = scores[~np.isnan(scores)]
    found = {"rated": len(read), "candidates": len(scores), "rating_mean": float(read.mean()) if len(read) else None}
    if len(known):
        good, kept = np.array([planted[n] for n in known]), scores[known] >= keep
        found |= {"precision": float((good & kept).sum() / kept.sum()) if kept.any() else None}
        found |= {"recall": float((good & kept).sum() / good.sum()), "planted": len(known)}
    return found


def round_to_even(x: float) -> int:
    return 2 * int(x / 2 + 0.5)
