"""Documents that link to each other, and the pairs of segments that LinkBERT learns from (arXiv:2203.15827, sec. 4).

A pair is two segments of text: one after the other in a document, of two documents that have nothing to do with each
other, or of a document and one that it links to, each as often. Of the links of a document those to what is linked to
from everywhere are drawn less: by 1 / in-degree."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recursive_jax.data import files
from recursive_jax.errors import InputError

RELATIONS = ("contiguous", "random", "linked")
TRIES = 1000  # draws of a pair without a link, before there is none
WIKI = re.compile(r"\[\[([^\]|#]+)(?:#[^\]|]*)?(?:\|([^\]]*))?\]\]")
MARKDOWN = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


@dataclasses.dataclass(frozen=True)
class Linked:
    """name: by which others link to it. text: without the marks of its links. links: names that it links to, in
    order."""

    name: str
    text: str
    links: tuple[str, ...]


def linked_document(name: str, source: str) -> Linked:
    """A document of Markdown or wiki text: `[[Target]]`, `[[Target|shown]]`, `[shown](target.md)`. What is shown stays
    in the text."""
    links = [m.group(1).strip() for m in WIKI.finditer(source)]
    links += [Path(m.group(2)).stem for m in MARKDOWN.finditer(source) if "://" not in m.group(2)]
    text = WIKI.sub(lambda m: m.group(2) if m.group(2) is not None else m.group(1), source)
    return Linked(name, MARKDOWN.sub(lambda m: m.group(1), text), tuple(dict.fromkeys(links)))


def read_linked(folder: str | Path) -> list[Linked]:
    """All Markdown, wiki and text files below a folder, by their names without the ending. Raises InputError for a
    folder without any, and for two files of one name."""
    found = {}
    for file in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".md", ".wiki", ".txt") and p.is_file()):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.stem in found:
            raise InputError(f"{folder} has two documents called {file.stem}: links would not say which is meant")
        found[file.stem] = linked_document(file.stem, files.read_text(file, None))
    if not found:
        raise InputError(f"{folder} has no .md, .wiki or .txt files")
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class LinkGraph:
    """neighbours: for each document the others that it links to; links to what is not there, and to itself, are left
    out. in_degree: how many documents link to each."""

    neighbours: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, documents: Sequence[Linked], aliases: Mapping[str, str] | None = None) -> LinkGraph:
        """aliases: names that stand for others (redirects). Names are compared without regard to case, `_` as a
        blank."""
        plain = lambda name: name.replace("_", " ").strip().lower()
        number = {plain(d.name): n for n, d in enumerate(documents)}
        others = {plain(a): plain(b) for a, b in (aliases or {}).items()}
        found = []
        for n, d in enumerate(documents):
            ends = [number.get(others.get(plain(link), plain(link))) for link in d.links]
            found.append(tuple(dict.fromkeys(e for e in ends if e is not None and e != n)))
        return cls(tuple(found))

    @property
    def in_degree(self) -> np.ndarray:
        counts = collections.Counter(e for ends in self.neighbours for e in ends)
        return np.array([counts[n] for n in range(len(self.neighbours))])


class PairSource:
    """Draws pairs of segments. segments: for each document its segments, token ids, in order. relations: of RELATIONS
    those that are drawn, as often each (all but `linked` is BERT's own next-sentence prediction).

    Raises InputError where a relation cannot be drawn at all."""

    def __init__(
        self, segments: Sequence[Sequence[np.ndarray]], graph: LinkGraph, relations: Sequence[str] = RELATIONS
    ):
        unknown = [r for r in relations if r not in RELATIONS]
        if unknown or not relations:
            raise InputError(f"relations={tuple(relations)}: some of {', '.join(RELATIONS)} are wanted")
        self.segments, self.graph, self.relations = segments, graph, tuple(relations)
        filled = [n for n, s in enumerate(segments) if len(s)]
        degree = np.maximum(graph.in_degree, 1)
        self.ends = [tuple(e for e in ends if len(segments[e])) for ends in graph.neighbours]
        self.shares = [
            (1.0 / degree[list(ends)]) / (1.0 / degree[list(ends)]).sum() if ends else None for ends in self.ends
        ]
        self.starts = {
            "contiguous": [(n, i) for n in filled for i in range(len(segments[n]) - 1)],
            "random": [(n, i) for n in filled for i in range(len(segments[n]))],
            "linked": [(n, i) for n in filled if self.ends[n] for i in range(len(segments[n]))],
        }
        empty = [r for r in self.relations if not self.starts[r]]
        if empty:
            raise InputError(f"no pair of segments is {empty[0]}: the documents have no such links, or are too short")
        self.filled = np.array(filled)
        self.related = [frozenset(ends) for ends in graph.neighbours]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """(segment A, segment B, the number of their relation in RELATIONS)."""
        relation = self.relations[rng.integers(len(self.relations))]
        n, i = self.starts[relation][rng.integers(len(self.starts[relation]))]
        if relation == "contiguous":
            other, j = n, i + 1
        elif relation == "linked":
            other = int(rng.choice(self.ends[n], p=self.shares[n]))
            j = int(rng.integers(len(self.segments[other])))
        else:
            other = n
            for _ in range(TRIES):  # pairs are drawn together: a document that all link to has no part in any
                if other != n and other not in self.related[n] and n not in self.related[other]:
                    break
                n, i = self.starts[relation][rng.integers(len(self.starts[relation]))]
                other = int(self.filled[rng.integers(len(self.filled))])
            else:
                raise InputError("no two documents are without a link between them: there are no random pairs")
            j = int(rng.integers(len(self.segments[other])))
        return self.segments[n][i], self.segments[other][j], RELATIONS.index(relation)
