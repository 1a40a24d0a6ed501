"""A few rows as they are asked, answered and read, before anything long starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from recursive_jax.config import SamplingConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.template import Template, with_specials
from recursive_jax.generate.generate import generate
from recursive_jax.generate.reading import column_name, failed, read_replies
from recursive_jax.generate.request import Request
from recursive_jax.models.model import Model
from recursive_jax.waiting import Wait


def preview_text(
    model: Model, requests: Sequence[Request], sampling: SamplingConfig, template: Template, seed: int = 0
) -> str:
    """Each request's prompt with its special tokens by name, the reply, and what is read of it."""
    with Wait("generating"):
        replies = generate(model, requests, sampling, seed=seed)
    parts = []
    for n, request in enumerate(requests):
        one = replies[n : n + 1]
        parts.append(f"--- row {n}: what is asked\n{with_specials(request.prompt, model.tokenizer)}")
        parts.append(f"--- the reply\n{one[0]['text']}\n--- what is read")
        parts += [*read_lines(read_replies(one, template), template), ""]
    return "\n".join(parts)


def read_lines(rows: Dataset, template: Template) -> list[str]:
    """What was read, a JSON object for each row; of what could not be read, the status and the reply."""
    names = [column_name(name) for name in template.columns] or ["text"]
    return [json.dumps(_shown(row, names), ensure_ascii=False, default=str) for row in rows]


def _shown(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    read = {"text": row["text"]} if failed(row["status"]) else {name: row[name] for name in names}
    return {"id": row["id"], "status": row["status"], **read}
