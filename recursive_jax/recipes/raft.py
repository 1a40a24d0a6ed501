"""Retriever-aware training (Gorilla's RAT, arXiv:2305.15334; RAFT, arXiv:2403.10131): a model answers from documents at
hand, which may be changed, or not be there.

    rows    = a question among its golden document and distractors; of some the golden one is missing
    student = train(base, rows)
    measured on held-out questions, before and after: with the golden document among distractors, with distractors
    alone, and with what a retriever by words (BM25) finds; of API calls which are right, wrong, or call what does not
    exist

Departures: the answers are the rows' own, not written by a teacher (give `quotes` for RAFT's marks). Expect (Gorilla
7B): 59 to 72% of calls right without documents, with BM25's worse than without for a model that never saw wrong
ones."""

from __future__ import annotations

import collections
from typing import Any, Literal

from pydantic import Field, PositiveInt

from recursive_jax import mesh as meshes
from recursive_jax.config import LoraConfig
from recursive_jax.curate.api_calls import calls_in, check_call
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.retrieval import UNKNOWN, Bm25, Mixture, Question, raft_rows, with_documents
from recursive_jax.data.task import hold_out, read_rows, texts_of
from recursive_jax.data.template import Template, examples_dataset
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.identity import named
from recursive_jax.models.model import Model
from recursive_jax.recipes.finetune import as_they_are
from recursive_jax.recipes.recipe import Recipe, RecipeConfig, concluded, student_network, with_adapter
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training

SHOWN = "{documents}\n\nQuestion: {question}\nAnswer:"


class RaftConfig(RecipeConfig):
    """A model answers from documents."""

    NEEDS = ("base", "documents", "questions")

    recipe: str = "raft"

    base: str = Field("", description="the model: a run, a Hugging Face folder, a GGUF, smollm2")
    documents: str = Field("", description="texts: rows with `text`, or a .txt file of lines")
    questions: str = Field("", description="rows with `question`, `answer` and `document` (its number, from 0)")
    holdout: float = Field(0.2, gt=0.0, lt=1.0, description="share of the questions that is held out")
    golden: float = Field(0.8, ge=0.0, le=1.0, description="share of rows that have their golden document")
    distractors: int = Field(3, ge=0, description="other documents of a row")
    hard: bool = Field(True, description="distractors are what BM25 finds next best, not drawn")
    quotes: bool = Field(False, description="answers quote the golden document between RAFT's marks")
    unknown: str | None = Field(UNKNOWN, description="the answer without the golden document; null: the answer itself")
    right: Literal["call", "text"] = Field("text", description="what is right: the call (by syntax tree), or the text")
    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")
    answer_tokens: PositiveInt = Field(64, description="of an answer, at most")


def graded(config: RaftConfig, model: Model, rows: list[dict[str, Any]], apis: tuple[str, ...]) -> dict[str, float]:
    """Shares of the answers: right, unknown, and of calls those that do not exist."""
    asked = Dataset.from_rows([{"prompt_text": r["prompt"], "answer": r["answer"]} for r in rows])
    replies = answers(model, asked, config)
    found: collections.Counter[str] = collections.Counter()
    for text, row in zip(replies, rows, strict=True):
        text = text.split("<ANSWER>:")[-1].strip()
        if config.unknown is not None and text == config.unknown:
            found["unknown"] += 1
        elif row["answer"] == config.unknown:  # what is asked stands in no document here
            invented = [c for c in calls_in(text) if c.name not in apis]
            found["hallucination" if config.right == "text" or invented else "wrong"] += 1
        elif config.right == "call":
            found[check_call(text, row["answer"], apis).replace(" ", "_")] += 1
        else:
            found["right" if text == row["answer"].strip() else "wrong"] += 1
    return {name: found[name] / len(rows) for name in ("right", "wrong", "unknown", "hallucination", "no_call")}


def answers(model: Model, asked: Dataset, config: RaftConfig) -> list[str]:
    # With quotes the golden document stands whole before the answer: no prompt holds a longer one.
    longest = max(len(model.tokenizer.encode(text)) for text in asked.column("prompt_text")) if config.quotes else 0
    changed = {"temperature": 0.0, "max_tokens": config.answer_tokens + longest, "stop": () if longest else ("\n",)}
    settings = config.sampling.model_copy(update=changed)
    return generate(model, asked, settings, template=Template("{prompt_text}")).column("text")


def assess(round: Round, config: RaftConfig, model: Model, held: list[Question], found: Bm25, apis: Any) -> None:
    texts = found.texts

    def numbers() -> dict[str, float]:
        own = {"seed": 1, "near": found if config.hard else None, "missing": config.unknown, "prompt": SHOWN}
        kinds = {
            "golden": raft_rows(held, texts, Mixture(1.0, 0.0, config.distractors), **own),
            "distractors": raft_rows(held, texts, Mixture(0.0, 0.0, config.distractors), **own),
        }
        rows = with_documents(
            [{"question": q.question, "answer": q.answer} for q in held], found, k=config.distractors + 1
        )
        asks = Template(SHOWN)
        kinds["bm25"] = [{"prompt": asks.asks(row), "answer": row["answer"]} for row in rows]
        found_ = {kind: graded(config, model, rows, apis) for kind, rows in kinds.items()}
        return {f"{kind}_{name}": value for kind, values in found_.items() for name, value in values.items()}

    round.evaluate("evaluation", model, named("raft", 1)(numbers), config=[config.distractors, config.hard])


def raft(config: RaftConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records: round 0 the base, round 1 the student."""
    texts, rows = texts_of(config.documents), read_rows(config.questions)
    for n, row in enumerate(rows):
        if not {"question", "answer", "document"} <= set(row):
            raise InputError(f"{config.questions}, row {n}: question, answer and document are wanted")
    questions = [Question(str(r["question"]), str(r["answer"]), int(r["document"])) for r in rows]
    apis = tuple(sorted({c.name for q in questions for c in calls_in(q.answer)})) if config.right == "call" else ()
    learnt, held, _ = hold_out([{"n": n} for n in range(len(rows))], config.holdout, config.seed)
    learnt, held = ([questions[r["n"]] for r in part] for part in (learnt, held))
    found, base = Bm25(texts), load_model(config.base, meshes.make_mesh(config.mesh))
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        first, second = run.round(0), run.round(1)
        assess(first, config, base, held, found, apis)
        mixture = Mixture(config.golden, 0.0, config.distractors)
        made = raft_rows(learnt, texts, mixture, seed=config.seed, near=found if config.hard else None,
                         missing=config.unknown, quotes=config.quotes, prompt=SHOWN)  # fmt: skip
        examples = examples_dataset(made, Template("{prompt}", "{completion}"), base.tokenizer)
        data = second.dataset("rows", as_they_are, examples)
        start = with_adapter(second, base, config.lora)
        student = second.train("student", start, data, config.train)
        assess(second, config, student, held, found, apis)
        return concluded(run, second)


recipe = Recipe(
    "raft",
    "a model answers from documents at hand, which may be the wrong ones; right, unknown and invented answers",
    RaftConfig,
    raft,
    lambda config: batch_problems(config.mesh, train=config.train),
    lambda config: [Training("", student_network(config.base, config.lora), config.train)],
    paper="arXiv:2305.15334, arXiv:2403.10131",
    example="recursive-jax run configs/raft.yaml documents=cards.txt questions=rows.jsonl --workdir runs/raft",
)
