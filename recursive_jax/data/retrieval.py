"""Documents at hand: a retriever by words, documents beside a question as a column that any template can show, and the
rows of retrieval-augmented fine-tuning (RAFT, arXiv:2403.10131; Gorilla's RAT, arXiv:2305.15334)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from recursive_jax.data import fields
from recursive_jax.errors import InputError
from recursive_jax.identity import Value, fingerprint


class Retriever(Protocol):
    """texts: what it looks through. search(queries, k) -> for each query the numbers of k texts, the best first."""

    texts: Sequence[str]

    def search(self, queries: Sequence[str], k: int) -> list[list[int]]: ...


class Bm25:
    """By words (Okapi BM25 with Lucene's formula, k1 1.5, b 0.75), as `bm25s` has it. Raises InputError for no texts,
    and where the package is not installed."""

    def __init__(self, texts: Sequence[str]):
        try:
            import bm25s
        except ImportError:
            raise InputError("retrieval by words needs bm25s: pip install 'recursive-jax[retrieval]'") from None
        self.texts = list(texts)
        if not self.texts:
            raise InputError("there are no texts to look through")
        if not any(text.strip() for text in self.texts):
            raise InputError("the texts to look through are all empty")
        self._words = lambda found: bm25s.tokenize(found, stopwords=None, show_progress=False)
        self._index = bm25s.BM25()
        self._index.index(self._words(self.texts), show_progress=False)
        self.fingerprint = fingerprint({"bm25": 1, "texts": self.texts})

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[int]]:
        if not len(queries):
            return []
        found, _ = self._index.retrieve(
            self._words(list(queries)), k=min(k, len(self.texts)), show_progress=False, sorted=True
        )
        return [[int(n) for n in row] for row in found]


def with_documents(
    rows: Sequence[Mapping[str, Any]],
    retriever: Retriever,
    query: str = "{question}",
    k: int = 3,
    column: str = "documents",
    between: str = "\n\n",
) -> list[dict[str, Any]]:
    """The rows with the k texts that answer best to `query` (a text with {fields} of the row) under `column`, one after
    the other. A template then shows them as any other field: `{documents}\\n\\n{question}`."""
    asked = [fields.filled(query, row) for row in rows]
    found = retriever.search(asked, k)
    return [
        {**row, column: between.join(retriever.texts[n] for n in hits)} for row, hits in zip(rows, found, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Question(Value):
    """document: the number of the one that answers it (the golden one)."""

    question: str
    answer: str
    document: int


@dataclasses.dataclass(frozen=True)
class Mixture(Value):
    """What stands in the context of a row. golden: the share of rows that have their golden document (0.8 in RAFT's
    paper, sec. 4.1; 1.0 in its code); the others have one more distractor in its place. edited: of those with it, the
    share whose document was changed, and the answer with it (RAT: what is at hand is to be followed, not what is
    remembered). distractors: how many other documents."""

    golden: float = 0.8
    edited: float = 0.0
    distractors: int = 3

    def __post_init__(self):
        if not (0 <= self.golden <= 1 and 0 <= self.edited <= 1) or self.distractors < 0:
            raise InputError(f"{self}: shares lie between 0 and 1, and there are 0 distractors at least")


PROMPT = "{documents}\n\nQuestion: {question}\nAnswer:"
UNKNOWN = "The documents do not say."


def raft_rows(
    questions: Sequence[Question],
    documents: Sequence[str],
    mixture: Mixture = Mixture(),
    *,
    seed: int = 0,
    edit: Callable[[str, str, np.random.Generator], tuple[str, str]] | None = None,
    missing: str | None = None,
    near: Retriever | None = None,
    quotes: bool = False,
    prompt: str = PROMPT,
) -> list[dict[str, Any]]:
    """A row for each question: `prompt` (the documents, shuffled, and the question), `completion`, `kind` (`golden`,
    `edited`, `missing`), `place` (of the golden document, -1 where it is not there).

    edit(document, answer, rng) -> (another document, the answer that it gives). missing: what is to be answered without
    the golden document (None: the answer itself, as RAFT trains). near: a retriever whose best other documents are the
    distractors (hard ones), else they are drawn evenly. quotes: the completion quotes the golden document between
    RAFT's marks before the answer. Row n depends on the seed and n alone.

    Raises InputError for a document that does not exist, and for edited rows without `edit`."""
    if mixture.edited and edit is None:
        raise InputError("edited documents need edit=: (document, answer, rng) -> (document, answer)")
    if len(documents) <= mixture.distractors + (mixture.golden < 1):  # without the golden one there is one more
        raise InputError(
            f"{mixture.distractors} distractors beside the golden one: there are {len(documents)} documents"
        )
    asked = [q.question for q in questions]
    hard = near.search(asked, mixture.distractors + 2) if near is not None else None
    rows = []
    for n, q in enumerate(questions):
        if not 0 <= q.document < len(documents):
            raise InputError(f"question {n}: its document {q.document} is none of {len(documents)}")
        rng = np.random.default_rng([seed, n])
        has = rng.random() < mixture.golden
        changed = has and rng.random() < mixture.edited
        golden, answer = documents[q.document], q.answer
        if changed:
            golden, answer = edit(golden, answer, rng)
        count = mixture.distractors + (not has)
        others = [d for d in (hard[n] if hard else rng.permutation(len(documents))) if d != q.document][:count]
        while len(others) < count:
            one = int(rng.integers(len(documents)))
            if one != q.document and one not in others:
                others.append(one)
        context = [documents[d] for d in others] + ([golden] if has else [])
        order = rng.permutation(len(context)).tolist()
        if not has and missing is not None:
            answer = missing
        said = f"##begin_quote##{golden}##end_quote## <ANSWER>: {answer}" if quotes and has else answer
        shown = "\n\n".join(f"Document {i + 1}: {context[j]}" for i, j in enumerate(order))
        rows.append({
            "prompt": fields.filled(prompt, {"documents": shown, "question": q.question}),
            "completion": f" {said}",
            "question": q.question,
            "answer": answer,
            "kind": "edited" if changed else "golden" if has else "missing",
            "place": order.index(len(context) - 1) if has else -1,
        })  # fmt: skip
    return rows
