"""New instructions in the manner of the old ones: how Self-Instruct and Alpaca ask for them, and which are kept."""

from __future__ import annotations

import numpy as np

from recursive_jax.curate import rules
from recursive_jax.curate.select import Rule
from recursive_jax.data.dataset import Dataset

#: Words of instructions that a text model cannot follow (arXiv:2212.10560, app. A; Alpaca adds the last five).
KEYWORDS = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
            "go to", "video", "audio", "music", "flowchart", "diagram")  # fmt: skip


def keepers(novelty: float, known: tuple[str, ...], column: str = "instruction") -> list[Rule]:
    """The rules by which a proposed instruction stays: 4 to 150 words, none of the keywords, no program to be written,
    no odd first character, and unlike all others."""
    return [
        rules.words(4, 150, column),
        rules.without_keywords(KEYWORDS, column),
        Rule("no program", rules.Pattern(r"(?i)^\s*write a program", column, False)),
        rules.first_character(r"[A-Za-z0-9]", column),
        rules.novel(novelty, column, known),
    ]


def shown_lists(count: int, seed: int, shots: tuple[int, ...], column: str, *pools: Dataset) -> Dataset:
    """`count` rows with `shown`, a numbered list of texts of the column in any order, so many drawn from each pool
    (`shots`; all where there are fewer), and `next`, the number that comes."""
    rng, rows = np.random.default_rng(seed), []
    texts = [pool.column(column) if len(pool) else [] for pool in pools]
    for n in range(count):
        drawn = [t[i] for t, k in zip(texts, shots, strict=True) for i in rng.permutation(len(t))[:k]]
        drawn = [" ".join(drawn[i].split()) for i in rng.permutation(len(drawn))]
        listed = "\n".join(f"{k}. {text}" for k, text in enumerate(drawn, 1))
        rows.append({"id": f"ask/{seed}/{n}", "shown": listed, "next": str(len(drawn) + 1)})
    return Dataset.from_rows(rows)
