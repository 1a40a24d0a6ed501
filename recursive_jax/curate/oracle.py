"""Exact teachers: rows whose answers can be computed, written anew with other values. No model, no mistake.

NumberSlots().varied(rows, each=1, seed=0)    word problems with number slots and an equation (MAWPS)
SlotValues().varied(rows, each=1, seed=0)     utterances with marked slots (SNIPS)"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from recursive_jax.curate.arithmetic import NotArithmetic, arithmetic
from recursive_jax.errors import InputError
from recursive_jax.identity import Value

Row = Mapping[str, Any]
TRIES = 200  # draws of a row's values, until its answer is one that such a problem may have
_SLOT = re.compile(r"\bnumber(\d+)\b")


class Oracle(Value):
    """varied(rows) -> new rows, each with `parents`: the `id` of the one that it varies. Subclasses have `one`."""

    def one(self, row: Row, rows: Sequence[Row], rng: np.random.Generator) -> dict[str, Any] | None:
        """A row like `row` with other values, of those of `rows` where they are words; None: it has no other."""
        raise NotImplementedError

    def varied(self, rows: Sequence[Row], each: int = 1, seed: int = 0, of: Sequence[Row] | None = None) -> list[dict]:
        """`each` variations of every row, as many as there are. of: rows that values are taken from."""
        found = []
        for n, row in enumerate(rows):
            for k in range(each):
                new = self.one(row, rows if of is None else of, np.random.default_rng([seed, n, k]))
                if new is not None:
                    found.append({**new, "id": f"oracle/{seed}/{n}/{k}", "parents": [str(row.get("id", n))]})
        return found


@dataclasses.dataclass(frozen=True)
class NumberSlots(Oracle):
    """Problems whose text has `number0`, `number1`, ..., with `Numbers` (their values) and `Equation` over them (with
    operators in front, or between). Every number is drawn anew with as many digits; the answer stays a whole number
    where it was one, and never falls below 0."""

    def filled(self, row: Row) -> dict[str, Any]:
        """The row with `question`, `working` (the equation with the numbers in it) and `answer` as texts. Raises
        InputError where the equation cannot be read."""
        text, values = self._parts(row)
        answer = self._answer(str(row.get("Equation")), values)
        if answer is None:
            raise InputError(f"{str(row.get('Equation'))!r} has no value: an equation over the row's numbers is wanted")
        filled = lambda slots: _SLOT.sub(lambda m: _written(values[m[0]]), slots)
        return {
            **row,
            "question": filled(text),
            "working": filled(str(row["Equation"])),
            "answer": _written(answer),
        }

    def one(self, row: Row, rows: Sequence[Row], rng: np.random.Generator) -> dict[str, Any] | None:
        text, values = self._parts(row)
        if not _SLOT.search(str(row["Equation"])):
            return None  # its answer does not follow from the slots
        before = self._answer(str(row["Equation"]), values)
        whole = before is None or before.denominator == 1
        for _ in range(TRIES):
            drawn = {name: _like(value, rng) for name, value in values.items()}
            found = self._answer(str(row["Equation"]), drawn)
            plain = (
                found is not None and found >= 0 and (found.denominator == 1 if whole else 100 % found.denominator == 0)
            )
            if drawn != values and plain:
                numbers = " ".join(_written(drawn[f"number{n}"]) for n in range(len(drawn)))
                own = {k: v for k, v in row.items() if k not in ("id", "parents", "Answer", "Body", "Ques_Statement")}
                return self.filled({**own, "Question": text, "Numbers": numbers})
        return None

    def _parts(self, row: Row) -> tuple[str, dict[str, Fraction]]:
        """(the text with slots, their values)."""
        missing = [name for name in ("Question", "Equation") if not row.get(name)]
        if missing:
            raise InputError(f"a problem has Question and Equation; this row has no {missing[0]}: {', '.join(row)}")
        question, equation = str(row["Question"]), str(row["Equation"])
        body = str(row.get("Body") or "").strip()
        text = question if question.startswith(body) else f"{body.rstrip('.')}. {question}"
        values = {f"number{n}": Fraction(x) for n, x in enumerate(str(row.get("Numbers") or "").split())}
        missing = [m[0] for m in _SLOT.finditer(f"{text} {equation}") if m[0] not in values]
        if missing:
            raise InputError(f"a problem names {missing[0]}, and Numbers={row.get('Numbers')!r} has no value for it")
        return text, values

    def _answer(self, equation: str, values: Mapping[str, Fraction]) -> Fraction | None:
        try:
            return arithmetic(equation, {name: str(value) for name, value in values.items()})
        except (NotArithmetic, ZeroDivisionError):
            return None


def _written(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _like(value: Fraction, rng: np.random.Generator) -> Fraction:
    """A number with as many digits and decimals."""
    text = _written(abs(value))
    decimals = len(text.partition(".")[2])
    units = int(abs(value) * 10**decimals)
    low = 10 ** (len(str(units)) - 1)
    return Fraction(int(rng.integers(max(low, 2 if not decimals else 1), 10 * low)), 10**decimals)


@dataclasses.dataclass(frozen=True)
class SlotValues(Oracle):
    """Utterances whose words are marked: `slots` has a tag for each blank-separated word of `text` (`O`, `B-artist`,
    `I-artist`). At least one slot gets the value that another row has for it; the class stays."""

    text: str = "text"
    slots: str = "slots"

    def one(self, row: Row, rows: Sequence[Row], rng: np.random.Generator) -> dict[str, Any] | None:
        values: dict[str, list[str]] = {}
        for other in rows:
            for name, words in self._spans(other):
                if name:
                    values.setdefault(name, []).append(words)
        spans = self._spans(row)
        others = {n: [v for v in values[name] if v != words] for n, (name, words) in enumerate(spans) if name}
        free = [n for n, found in others.items() if found]
        if not free:
            return None
        chosen = {n for n in free if rng.random() < 0.5} or {free[int(rng.integers(len(free)))]}
        new = [
            (name, others[n][int(rng.integers(len(others[n])))] if n in chosen else words)
            for n, (name, words) in enumerate(spans)
        ]
        tags = [
            tag
            for name, words in new
            for k in range(len(words.split()))
            for tag in [("B-" if k == 0 else "I-") + name if name else "O"]
        ]
        own = {k: v for k, v in row.items() if k not in ("id", "parents")}
        return {**own, self.text: " ".join(words for _, words in new), self.slots: " ".join(tags)}

    def _spans(self, row: Row) -> list[tuple[str, str]]:
        """(slot or none, its words) in order."""
        words, tags = str(row.get(self.text, "")).split(), str(row.get(self.slots, "")).split()
        if len(words) != len(tags) or not words:
            raise InputError(
                f"a row has {len(words)} words in {self.text!r}, {len(tags)} tags in {self.slots!r}: one each is wanted"
            )
        spans: list[tuple[str, str]] = []
        for word, tag in zip(words, tags, strict=True):
            name = tag[2:] if tag[:2] in ("B-", "I-") else ""
            if spans and spans[-1][0] == name and tag[:2] != "B-":
                spans[-1] = (name, f"{spans[-1][1]} {word}")
            else:
                spans.append((name, word))
        return spans


def oracle_of(rows: Sequence[Row]) -> Oracle:
    """The oracle that can vary such rows. Raises InputError, naming what rows need, where there is none."""
    if all(row.get("Equation") for row in rows):
        return NumberSlots()
    if all(row.get("slots") for row in rows):
        return SlotValues()
    raise InputError(
        "teacher=oracle computes new rows: rows have either Question, Numbers and Equation (MAWPS), or text and "
        f"slots, a tag for each word (SNIPS); these have {', '.join(rows[0])}"
    )
