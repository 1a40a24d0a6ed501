"""What a teacher says of rows, stored with them: then it need not be there when a student learns."""

from __future__ import annotations

import numpy as np

from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.generate.score import token_alternatives
from recursive_jax.models.model import Model


def with_teacher(data: Dataset, teacher: Model, top_k: int = 32) -> Dataset:
    """The rows with columns `teacher_ids` and `teacher_logprobs`: in the place of each of their tokens the teacher's
    `top_k` most probable ones, and their log-probabilities (nats, temperature 1), for `DistillTopK`. In a run:
    `round.dataset("taught", with_teacher, rows, teacher, 32)`. Raises InputError for top_k below 1, and rows that are
    longer than the teacher reads."""
    if top_k < 1:
        raise InputError(f"top_k={top_k}: at least 1 is wanted")
    lead = np.array([teacher.tokenizer.bos], np.int32)
    tokens = data.tokens()
    whole = [np.concatenate([p if len(p) else lead, t]) for p, t in zip(data.prompts(), tokens, strict=True)]
    whole = [row if len(t) else lead for row, t in zip(whole, tokens, strict=True)]
    long = [n for n, row in enumerate(whole) if len(row) > teacher.max_length + 1]
    if long:
        raise InputError(f"row {long[0]} has {len(whole[long[0]])} tokens, the teacher reads {teacher.max_length}")
    ids, logprobs = [], []
    for row, (_, ids_TK, logprobs_TK) in zip(
        tokens, token_alternatives(teacher, whole, top_k, opened=True), strict=True
    ):
        first = len(ids_TK) - len(row)
        ids.append(ids_TK[first:].tolist())
        logprobs.append(logprobs_TK[first:].tolist())
    return data.with_column("teacher_ids", ids).with_column("teacher_logprobs", logprobs)
