"""Symbol tuning's prompts (arXiv:2305.08298): labelled tasks shown in context with arbitrary symbols for labels, so
that what a symbol means can only be read off the exemplars.

Symbols are of three kinds, as often each: integers, strings of letters (numbered as columns of a spreadsheet are),
words. Those for tuning and those for evaluation have none in common (sec. 3.2 and app. A.2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recursive_jax.errors import InputError
from recursive_jax.identity import Value

TUNED = 10_000  # of each kind for tuning; what follows is for evaluation
TRIES = 2000  # symbols that are drawn for one prompt, at most
RANGES = {"tuning": (0, TUNED), "evaluation": (TUNED, 10 * TUNED)}
FORMATS = (
    ("Input: {input}", "Label: "),
    ("Input: {input}", "Target: "),
    ("Input: {input}", "Symbol: "),
    ("Question: {input}", "Answer: "),
    ("Student: {input}", "Teacher: "),
    ("X = {input}", "Y = "),
    ("Q: {input}", "A: "),
    ("Sentence: {input}", "Output: "),
    ("{input}", "-> "),
    ("Sentences: {input}", "Mapped To: "),
)
LABELS = ("symbols", "natural", "flipped")


@dataclasses.dataclass(frozen=True)
class Labelled(Value):
    """A classification task. rows: (text, label); instruction: what it asks, in words."""

    name: str
    rows: tuple[tuple[str, str], ...]
    instruction: str = ""

    def __post_init__(self):
        object.__setattr__(self, "rows", tuple((str(text), str(label)) for text, label in self.rows))
        if not all(label.strip() for label in self.classes):
            raise InputError(f"the task {self.name} has a row without a label")
        if len(self.classes) < 2:
            raise InputError(f"the task {self.name} has {len(self.classes)} classes; two at least are wanted")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({label for _, label in self.rows}))


def letters(number: int) -> str:
    """a, b, ..., z, aa, ab, ...: the number (from 0) in bijective base 26."""
    found, number = "", number + 1
    while number:
        number, digit = divmod(number - 1, 26)
        found = chr(97 + digit) + found
    return found


def symbol(rng: np.random.Generator, split: str, words: Sequence[str] = ()) -> str:
    """One symbol of a split (`tuning`, `evaluation`). words: of the third kind, the most common first; the first tenth,
    10,000 at most, is for tuning; those that are symbols of the other kinds (`cat` is a string of letters) are left
    out. Without any, the other two kinds. Raises InputError for another split, and for fewer than two words."""
    if split not in RANGES:
        raise InputError(f"split={split!r}: tuning or evaluation is wanted")
    low, high = RANGES[split]
    kind = rng.integers(3 if words else 2)
    if kind == 2:
        own = own_words(tuple(words), split)
        return str(own[rng.integers(len(own))])
    number = int(rng.integers(low, high))
    return str(number) if kind == 0 else letters(number)


@functools.lru_cache(maxsize=8)
def own_words(words: tuple[str, ...], split: str) -> tuple[str, ...]:
    """The words of a split: each once, and none that is a symbol of another kind."""
    kept = tuple(dict.fromkeys(w for w in words if not w.isdigit() and not _is_numbered(w)))
    if len(kept) < 2:
        raise InputError(
            f"of {len(words)} words {len(kept)} are no numbers or short strings of letters; two are wanted"
        )
    cut = min(TUNED, max(1, len(kept) // 10))
    return kept[:cut] if split == "tuning" else kept[cut:]


def _is_numbered(word: str) -> bool:
    """Whether a word is one of the strings of letters that are symbols."""
    if not (word.isascii() and word.isalpha() and word.islower()):
        return False
    number = 0
    for letter in word[:8]:
        number = 26 * number + ord(letter) - 96
    return len(word) <= 8 and number <= 10 * TUNED


def prompt_row(
    task: Labelled,
    rng: np.random.Generator,
    *,
    split: str = "tuning",
    labels: str = "symbols",
    instruction: bool = False,
    per_class: tuple[int, int] = (2, 10),
    words: Sequence[str] = (),
    query: int | None = None,
) -> dict[str, Any]:
    """One prompt and its answer: exemplars of every class, shuffled, in one of the formats, then the query.

    labels: `symbols`, drawn anew and unlike each other and every natural label; `natural`; `flipped`: the natural ones
    moved on by one class, of exemplars and answer alike. per_class: the least and the most exemplars of a class. query:
    the number of the row that is asked; by default one is drawn, and it is never among the exemplars.

    Columns: `prompt`, `completion`, `symbols` (what stands for which class, in the order of `classes`), `choices`,
    `question` and `answer` as `rj.tasks.Choices` reads them, `task`. Raises InputError for other labels."""
    if labels not in LABELS:
        raise InputError(f"labels={labels!r}: {', '.join(LABELS)} is wanted")
    classes = task.classes
    if labels == "symbols":
        # Not even inside of a symbol: nothing of the natural labels is in sight.
        forbidden = {c.lower() for c in classes}
        drawn: list[str] = []
        for _ in range(TRIES):
            if len(drawn) == len(classes):
                break
            one = symbol(rng, split, words)
            if one not in drawn and not any(c in one.lower() for c in forbidden):
                drawn.append(one)
        if len(drawn) < len(classes):
            raise InputError(
                f"the task {task.name}: hardly a symbol does without {', '.join(sorted(forbidden))[:60]!r}"
            )
    elif labels == "natural":
        drawn = list(classes)
    else:
        drawn = [*classes[1:], classes[0]]
    stands_for = dict(zip(classes, drawn, strict=True))
    asked = int(rng.integers(len(task.rows))) if query is None else query
    shown: list[tuple[str, str]] = []
    count = int(rng.integers(per_class[0], per_class[1] + 1))
    for name in classes:
        members = [n for n, (_, label) in enumerate(task.rows) if label == name and n != asked]
        if not members:
            raise InputError(f"the task {task.name} has one row of the class {name!r}: it cannot be shown and asked")
        shown += [task.rows[n] for n in rng.permutation(members)[:count]]
    shown = [shown[i] for i in rng.permutation(len(shown))]
    before, behind = FORMATS[rng.integers(len(FORMATS))]
    text, label = task.rows[asked]
    parts = [task.instruction] if instruction and task.instruction else []
    parts += [f"{before.replace('{input}', x)}\n{behind}{stands_for[y]}" for x, y in shown]
    parts.append(f"{before.replace('{input}', text)}\n{behind.rstrip()}")
    prompt = "\n\n".join(parts)
    return {
        "task": task.name,
        "prompt": prompt,
        "completion": f" {stands_for[label]}",
        "symbols": drawn,
        "question": prompt,
        "choices": drawn,
        "answer": classes.index(label),
    }


def symbol_rows(tasks: Sequence[Labelled], count: int, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """`count` rows of `prompt_row`, the tasks in turn; row n depends on the seed and n alone. settings: of
    `prompt_row`."""
    if not tasks:
        raise InputError("there are no tasks to make prompts of")
    return [prompt_row(tasks[n % len(tasks)], np.random.default_rng([seed, n]), **settings) for n in range(count)]


def labelled_task(name: str, rows: Sequence[Mapping[str, Any]], text: str = "text", label: str = "label",
                  instruction: str = "") -> Labelled:  # fmt: skip
    """A task of rows with two columns. Raises InputError for a row that lacks one, with its number."""
    for number, row in enumerate(rows):
        missing = [key for key in (text, label) if row.get(key) is None]
        if missing:
            raise InputError(f"{name}, row {number}: no {missing[0]!r}, there are: {', '.join(map(str, row))}")
    return Labelled(name, tuple((row[text], row[label]) for row in rows), instruction)
