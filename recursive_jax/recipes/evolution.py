"""The operators of Evol-Instruct (arXiv:2304.12244, sec. 3.2) and of WizardMath (arXiv:2308.09583, sec. 3.1) in our
words, and which of what they give is eliminated."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from recursive_jax.curate.select import with_status
from recursive_jax.data.dataset import Dataset, python_rows

DEEPER = (
    "Rewrite the prompt as a somewhat harder one that people can still understand and answer. {how} Add 10 to 20 words "
    "at most, and keep its tables, its code and its input.\n\nThe prompt:\n{instruction}\n\nThe new prompt:\n"
)
BROADER = (
    "Write a new prompt of the same field as the prompt below, but a rarer one, about as long and as hard. People can "
    "understand and answer it.\n\nThe prompt:\n{instruction}\n\nThe new prompt:\n"
)
HARDER = (
    "Write a harder version of the problem. {how} It has one answer, a number.\n\nThe problem:\n{instruction}\n\nThe "
    "harder problem:\n"
)
EASIER = (
    "Write an easier problem than the one below: {how} It has one answer, a number.\n\nThe problem:\n{instruction}\n\n"
    "The easier problem:\n"
)
#: name -> (template, how).
OPERATORS: dict[str, tuple[str, str]] = {
    "constraint": (DEEPER, "Add one more condition or requirement."),
    "deepen": (DEEPER, "If it asks about a matter, ask more deeply and broadly about it."),
    "concretise": (DEEPER, "Replace general notions by more specific ones."),
    "reasoning": (DEEPER, "If it can be answered in a few simple thoughts, ask for reasoning in several steps."),
    "complicate": (DEEPER, "Add data to its input: a table, code, a formula, JSON."),
    "breadth": (BROADER, ""),
}
MATHS: dict[str, tuple[str, str]] = {
    "down-revise": (EASIER, "simplify it."),
    "down-topic": (EASIER, "a simpler question on another subject."),
    "up-constraint": (HARDER, "Add one more condition."),
    "up-concretise": (HARDER, "Replace general notions by specific ones."),
    "up-reasoning": (HARDER, "Let it need more steps."),
}
#: What an evolved prompt has where it copies its operator.
COPIED = ("the new prompt", "given prompt", "rewritten prompt", "the harder problem", "the easier problem")
STOP_WORDS = frozenset(
    "a an the and or but if of in on at to for with by from as is are was were be been it its this that these those i "
    "you he she we they not no yes do does did so than then there here what which who".split()
)


def to_evolve(pool: Dataset, operators: dict[str, tuple[str, str]], draw: int) -> Dataset:
    """A row for each prompt of the pool, with `ask`, an operator drawn evenly for it, and the operator's name."""
    rng, names, rows = np.random.default_rng(draw), list(operators), []
    for row in python_rows(pool.table):
        name = names[int(rng.integers(len(names)))]
        form, how = operators[name]
        ask = form.replace("{how}", how).replace("{instruction}", row["asked"])
        rows.append({"id": row["id"], "before": row["asked"], "operator": name, "ask": ask})
    return Dataset.from_rows(rows)


def as_asked(evolved: Dataset) -> Dataset:
    """The evolved prompts that could be read, as rows that are answered: `asked`, `before`, `source` (the row of the
    pool)."""
    rows = []
    for row in python_rows(evolved.table):
        text = (row["evolved"] or "").strip()
        if row["status"] == "ok" and text and "#" not in row["id"]:
            kept = {key: row[key] for key in ("id", "model", "round", "before", "operator")}
            rows.append({**kept, "source": row["parents"][0], "asked": text, "instruction": text, "input": ""})
    return Dataset.from_rows(rows) if rows else evolved.take([])


def next_pool(pool: Dataset, kept: Dataset) -> Dataset:
    """Of each prompt what it became, or itself where that was eliminated: it is tried again."""
    became = dict(zip(kept.column("source"), kept.column("asked"), strict=True)) if len(kept) else {}
    rows = zip(pool.column("id"), pool.column("asked"), strict=True)
    return Dataset.from_rows([{"id": name, "asked": became.get(name, asked)} for name, asked in rows])


# ---- what is eliminated (arXiv:2304.12244, sec. 3.2)


def gains(row: dict[str, Any]) -> bool:
    """The evolved prompt is not judged equal to the one before."""
    return row.get("equal") != "Equal" and row["asked"].strip() != row["before"].strip()


def answered(row: dict[str, Any]) -> bool:
    """No short answer that says sorry."""
    text = row["output"] or ""
    return bool(text) and not ("sorry" in text.lower() and len(text.split()) < 80)


def says_something(row: dict[str, Any]) -> bool:
    """The answer has a word that is no stop word."""
    return any(word not in STOP_WORDS for word in re.findall(r"\w+", (row["output"] or "").lower()))


def copies_nothing(row: dict[str, Any]) -> bool:
    """The prompt has none of its operator's words."""
    return not any(words in row["asked"].lower() for words in COPIED)


ELIMINATION = (with_status("ok"), copies_nothing, gains, answered, says_something)
