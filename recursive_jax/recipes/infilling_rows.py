"""Texts written anew by a decoder or an encoder, and what they are worth: of `infilling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from recursive_jax.collapse.scrubbing import probe
from recursive_jax.config import SamplingConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.generate.denoise import fill_masks
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import Request
from recursive_jax.models.hidden import mask_id
from recursive_jax.models.model import Model

#: Ways to fill what is hidden, as settings of `sampling.denoise`.
FILLED = {
    "mlm_one_shot": {"steps": 1, "remasking": "random"},
    "mlm_left_to_right": {"remasking": "left_to_right"},
    "mlm_mask_predict": {"steps": 10, "remasking": "mask_predict"},
    "mlm_gibbs": {"remasking": "gibbs", "steps": 64},
}


def written_anew(model: Model, how: str, texts: list[list[int]], hidden: float, sampling: Any, seed: int) -> Dataset:
    """The texts with a part written by the model: `tokens` as they now stand, and `new`, which of them it wrote."""
    bos, rows = model.tokenizer.bos, []
    rng = np.random.default_rng(seed)
    if how == "clm":
        cuts = [max(1, round(len(t) * (1 - hidden))) for t in texts]
        asked = [Request(n, np.asarray(t[:c], np.int32)) for n, (t, c) in enumerate(zip(texts, cuts, strict=True))]
        settings = sampling.model_copy(update={"max_tokens": max(map(len, texts)), "denoise": None})
        for t, c, new in zip(texts, cuts, generate(model, asked, settings, seed=seed).tokens(), strict=True):
            new = [x for x in new.tolist() if x != model.tokenizer.eos][: len(t) - c]
            rows.append({"tokens": [*t[:c], *new], "new": [0] * c + [1] * len(new)})
        return Dataset.from_rows(rows)
    mask = mask_id(model)
    chosen = [np.sort(rng.permutation(len(t))[: max(1, round(len(t) * hidden))]) for t in texts]
    gaps = []
    for t, at in zip(texts, chosen, strict=True):
        ids = np.array([bos, *t, model.tokenizer.eos])
        ids[at + 1] = mask
        gaps.append(ids)
    settings = SamplingConfig(**{**sampling.model_dump(exclude_unset=True), "denoise": FILLED[how]})
    for t, at, (ids, _) in zip(texts, chosen, fill_masks(model, gaps, settings, seed=seed), strict=True):
        rows.append({"tokens": ids[1:-1].tolist(), "new": np.isin(np.arange(len(t)), at).astype(int).tolist()})
    return Dataset.from_rows(rows)


def overlap(written: Dataset, texts: list[list[int]]) -> dict[str, float]:
    """Of written positions alone: the share that has the original's token (`exact`), the F1 of the bag of written
    tokens with that of those that stood there (`unigram_f1`), and of as many tokens copied from the context
    (`copy_f1`)."""
    exact, ours, copied = [], [], []
    for tokens, new, t in zip(written.column("tokens"), written.column("new"), texts, strict=True):
        is_new = np.asarray(new, bool)
        there = [t[i] for i in range(len(t)) if i >= len(new) or new[i]]
        said, seen = np.asarray(tokens)[is_new].tolist(), np.asarray(tokens)[~is_new].tolist()
        exact.append(
            np.mean([i < len(t) and tokens[i] == t[i] for i in np.flatnonzero(is_new)]) if is_new.any() else 0.0
        )
        ours.append(unigram_f1(said, there))
        copied.append(unigram_f1((seen * len(there))[: len(there)], there))
    return {"exact": float(np.mean(exact)), "unigram_f1": float(np.mean(ours)), "copy_f1": float(np.mean(copied))}


def unigram_f1(a: list[int], b: list[int]) -> float:
    common = sum(min(a.count(x), b.count(x)) for x in set(a))
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def utility(rows: Sequence[Sequence[int]], labels: Sequence[str], test: Any, vocab: int) -> float:
    """The accuracy on real held-out rows of a linear classifier of token counts that learnt from the rows."""
    texts, wanted = test
    names = sorted({*labels, *wanted})
    bags = lambda found: np.sqrt(np.stack([np.bincount(t, minlength=vocab)[:vocab] for t in found])).astype(float)
    ids = lambda found: np.array([names.index(x) for x in found])
    return probe(bags(rows), ids(labels), bags(texts), ids(wanted), c=10.0)
