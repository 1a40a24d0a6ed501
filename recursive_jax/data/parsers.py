"""Parsers: a model's reply as rows, or the reason why it gives none. One pass over the text, whatever a model wrote.

    Json({"properties": {"question": {"type": "string"}}, "required": ["question"]})     an object, or a list of them
    Sections({"question": "Question:", "answer": "Answer:"}, separator="###")            a marker before each field
    Numbered("instruction")                                                              1. ... 2. ... 3. ...
    Turns("[Human]", "[AI]")                                                             a transcript
    Score()                                                                              ends in "Score: 4"
    Answer()                                                                             \\boxed{..}, ####, a number
    Label(("yes", "no"))                                                                 one of a set

`Completion` (the form of a template's completion) is what a template without a parser reads. A new parser is a frozen
dataclass (here, or in a file of its own) and a line in `PARSERS`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from recursive_jax.data import fields
from recursive_jax.data.json_parser import Json
from recursive_jax.data.parser import TEXT, ParseError, Parser, Rows
from recursive_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Completion(Parser):
    """form: a text with {field}s. A field is as short as what follows it allows. whole: a reply that was cut is not
    read."""

    form: str
    whole: bool = False

    def __post_init__(self):
        fields.parts(self.form)

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        return dict.fromkeys(fields.names(self.form), TEXT)

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        if cut and self.whole:
            return ParseError(text, "cut")
        found = fields.found_in(self.form, text)
        return ParseError(text) if found is None else [found]


@dataclasses.dataclass(frozen=True)
class Sections(Parser):
    """markers: the text that stands before each field, in their order; what stands before the first is not read.
    separator: between records, of which a reply may have several; of a reply that was cut the last is left out.
    opened: the prompt ends with the first marker, so that the reply begins with that field (or says the marker again).
    empty: fields that may be empty."""

    markers: Mapping[str, str]
    separator: str = ""
    opened: bool = False
    empty: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.markers or not all(isinstance(m, str) and m.strip() for m in self.markers.values()):
            raise InputError(f"sections are {{field: marker}} with texts as markers, got {dict(self.markers)!r}")
        unknown = [name for name in self.empty if name not in self.markers]
        if unknown:
            raise InputError(f"empty={unknown[0]!r} is no section; there are {', '.join(self.markers)}")

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        return dict.fromkeys(self.markers, TEXT)

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        records = text.split(self.separator) if self.separator else [text]
        records = [r for n, r in enumerate(records) if r.strip() or (n == 0 and self.opened)]
        if cut:
            records = records[:-1]
        rows, reason = [], "cut" if cut else "empty"
        for n, record in enumerate(records):
            found = self._record(record, self.opened and n == 0)
            if isinstance(found, str):
                reason = found
            else:
                rows.append(found)
        return rows or ParseError(text, reason)

    def _record(self, text: str, opened: bool) -> dict[str, str] | str:
        """The fields, or what is wrong."""
        row, at, waiting = {}, 0, None
        first = next(iter(self.markers.values()))
        opened = opened and not text.lstrip().startswith(first)
        for n, (name, marker) in enumerate(self.markers.items()):
            start = at if opened and n == 0 else text.find(marker, at)
            if start < 0:
                return f"missing {name}"
            if waiting is not None:
                row[waiting] = text[at:start].strip()
            at, waiting = start + (0 if opened and n == 0 else len(marker)), name
        row[waiting] = text[at:].strip()
        blank = next((name for name, value in row.items() if not value and name not in self.empty), None)
        return row if blank is None else f"empty {blank}"


_ITEM = re.compile(r"^[ \t]*(?:\d{1,6}[.):]|[-*•])[ \t]+", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Numbered(Parser):
    """Items of a list, numbered or with bullets; lines without a number belong to the item above. What stands before
    the first is not read. opened: the prompt ends with a number, so that the reply begins within an item; what ends in
    a colon before a list is none ("Here are some more:"). Of a reply that was cut the last is left out."""

    field: str = "item"
    opened: bool = False

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        return {self.field: TEXT}

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        pieces = _ITEM.split(text)
        if not self.opened or (len(pieces) > 1 and pieces[0].rstrip().endswith(":")):
            pieces = pieces[1:]
        if cut:
            pieces = pieces[:-1]
        rows = [{self.field: piece.strip()} for piece in pieces if piece.strip()]
        return rows or ParseError(text, "cut" if cut else "no items")


@dataclasses.dataclass(frozen=True)
class Turns(Parser):
    """A transcript with a marker before each turn, read as one row with `messages`: from the first turn of the user to
    the last answer. It ends where two turns of one speaker follow each other, or one is empty; a cut last turn is left
    out. opened: the prompt ends with the user's marker. least: exchanges."""

    user: str = "[Human]"
    assistant: str = "[AI]"
    opened: bool = False
    least: int = 1

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        return {"messages": pa.large_list(pa.struct([("role", TEXT), ("content", TEXT)]))}

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        marker = re.compile(f"({re.escape(self.user)}|{re.escape(self.assistant)})")
        first, *rest = marker.split(text)
        said = [(self.user, first)] if self.opened else []
        said += list(zip(rest[::2], rest[1::2], strict=True))
        begins = next((n for n, (who, _) in enumerate(said) if who == self.user), len(said))
        said = said[begins : len(said) - 1 if cut else None]
        messages: list[dict[str, str]] = []
        for n, (who, what) in enumerate(said):
            if who != (self.assistant if n % 2 else self.user) or not what.strip():
                break
            messages.append({"role": "assistant" if n % 2 else "user", "content": what.strip()})
        del messages[len(messages) // 2 * 2 :]  # it ends with an answer
        if len(messages) < 2 * max(1, self.least):
            return ParseError(text, "cut" if cut else "few turns")
        return [{"messages": messages}]


_NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclasses.dataclass(frozen=True)
class Score(Parser):
    """A number from `low` to `high` on the last line, behind the marker, with nothing after it but `/high`. The lines
    above are its reasons, the column `score_text`. lenient: the last number behind a marker anywhere, or on the last
    line, will do; without it such a reply is counted as `parse_error:lenient score`, so that both counts are seen.
    reasons: characters that the constraint allows before the last line; 0: none."""

    marker: str = "Score:"
    low: float = 1
    high: float = 5
    lenient: bool = False
    reasons: int = 0

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        return {"score": pa.float64(), "score_text": TEXT}

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        *above, last = text.rstrip().split("\n")
        number = None if cut else self._strict(last.strip())
        if number is None:
            number = self._anywhere(text, last)
            if number is None or not self.lenient:
                return ParseError(text, "cut" if cut else "no score" if number is None else "lenient score")
        if not self.low <= number <= self.high:
            return ParseError(text, "score out of range")
        return [{"score": number, "score_text": "\n".join(above).strip()}]

    def _strict(self, line: str) -> float | None:
        if not line.startswith(self.marker):
            return None
        said = line[len(self.marker) :].strip().removesuffix(f"/{self.high:g}").strip()
        return _as_float(said) if _NUMBER.fullmatch(said) else None

    def _anywhere(self, text: str, last: str) -> float | None:
        """The first number behind the last marker, on its line; without a marker the last one of the last line."""
        _, marker, behind = text.rpartition(self.marker)
        found = _NUMBER.findall(behind.split("\n")[0] if marker else last)
        return _as_float(found[0 if marker else -1]) if found else None

    def constraint(self) -> dict[str, str]:
        if not (float(self.low).is_integer() and float(self.high).is_integer() and self.high - self.low <= 1000):
            return {}
        numbers = "|".join(str(n) for n in range(int(self.low), int(self.high) + 1))
        before = f"(?:(?s:.{{0,{self.reasons}}})\\n)?" if self.reasons else ""
        return {"regex": f"{before}{_literal(self.marker)} (?:{numbers})"}


@dataclasses.dataclass(frozen=True)
class Answer(Parser):
    """The answer at the end of a solution, as text in `field`. form: `boxed` (the last \\boxed{...}), `####` (behind
    the last mark, one line), `number` (the last number, without its thousands' commas), `any` (the first of these that
    there is)."""

    form: str = "any"
    field: str = "answer"

    def __post_init__(self):
        if self.form not in ("any", "boxed", "####", "number"):
            raise InputError(f"form={self.form!r}: any, boxed, #### or number is wanted")

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        return {self.field: TEXT}

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        readers = {"boxed": _boxed, "####": _hashed, "number": _last_number}
        for form, reader in readers.items():
            found = reader(text) if self.form in (form, "any") else None
            if found:
                return [{self.field: found}]
        return ParseError(text, "cut" if cut else "no answer")


def _boxed(text: str) -> str | None:
    """What the last \\boxed{...} (or \\fbox) holds, its braces paired."""
    at = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if at < 0:
        return None
    start = text.index("{", at) + 1
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return None


def _hashed(text: str) -> str | None:
    _, mark, behind = text.rpartition("####")
    return behind.strip().split("\n")[0].strip() if mark else None


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").replace("−", "-") if found else None


def _as_float(text: str) -> float | None:
    try:
        value = float(text.replace(",", "").replace("−", "-"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Label(Parser):
    """One of a set, case and punctuation around it aside. lenient: a longer reply in which exactly one of the labels
    stands as a word will do; without it such a reply is counted as `parse_error:lenient label`."""

    labels: tuple[str, ...]
    field: str = "label"
    lenient: bool = False

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))
        folded = [_folded(x) for x in self.labels]
        if not folded or len(set(folded)) < len(folded) or "" in folded:
            raise InputError(f"labels are texts that differ in more than case and punctuation, got {self.labels!r}")

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        return {self.field: TEXT}

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        reply = _folded(text)
        for label in self.labels:
            if _folded(label) == reply:
                return [{self.field: label}]
        within = [x for x in self.labels if re.search(rf"(?<!\w){re.escape(_folded(x))}(?!\w)", text.casefold())]
        if len(within) != 1:
            return ParseError(text, "several labels" if within else "no label")
        return [{self.field: within[0]}] if self.lenient else ParseError(text, "lenient label")

    def constraint(self) -> dict[str, str]:
        return {"regex": "|".join(map(_literal, self.labels))}


def _folded(text: str) -> str:
    return text.strip().strip("\"'`*.,:;!()[]").strip().casefold()


def _literal(text: str) -> str:
    """A text as a regular expression of llguidance's dialect, in which a blank needs no escape and may have none."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~/-])", r"\\\1", text)


PARSERS: dict[str, type[Parser]] = {
    "completion": Completion,
    "json": Json,
    "sections": Sections,
    "numbered": Numbered,
    "turns": Turns,
    "score": Score,
    "answer": Answer,
    "label": Label,
}


def parser_of(settings: Mapping[str, Any]) -> Parser:
    """`{"kind": "label", "labels": ["yes", "no"]}` as a parser. Raises InputError naming what is wrong."""
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if kind not in PARSERS:
        raise InputError(f"parser.kind={kind!r}: one of {', '.join(PARSERS)} is wanted")
    known = {f.name: f for f in dataclasses.fields(PARSERS[kind])}
    for key, value in settings.items():
        if key not in known:
            raise InputError(f"parser.{key}: {kind} has {', '.join(known) or 'no settings'}")
        settings[key] = tuple(value) if isinstance(value, list) else value
    try:
        return PARSERS[kind](**settings)
    except TypeError as error:
        raise InputError(f"parser.kind={kind}: {error}") from None
