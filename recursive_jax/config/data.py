"""Where rows come from: real text, the embedded language, a supervised task."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from recursive_jax.config.section import Section


class LanguageConfig(Section):
    """Sizes of the embedded language (`recursive_jax.data.language`)."""

    seed: int = 0
    types: PositiveInt = Field(4, le=100, description="noun types; verbs select them")
    nouns: PositiveInt = Field(8, le=10_000, description="nouns per type and number")
    verbs: PositiveInt = Field(4, le=10_000, description="verbs per subject type, number and valency")
    first_names: PositiveInt = Field(12, le=10_000)
    last_names: PositiveInt = Field(12, le=10_000)
    attributes: PositiveInt = Field(3, le=1000)
    values: PositiveInt = Field(12, le=10_000, description="values per attribute")
    depth: int = Field(2, ge=0, le=4, description="nested relative clauses")
    word_exponent: float = Field(1.1, gt=0.0, description="Zipf exponent of nouns and verbs")
    entity_exponent: float = Field(1.0, gt=0.0, description="Zipf exponent of names")
    fact_share: float = Field(0.4, gt=0.0, lt=1.0, description="share of sentences that state a fact")
    stop: float = Field(0.45, gt=0.05, lt=1.0, description="probability that a document ends after a sentence")


class DataConfig(Section):
    """Where real text comes from."""

    RENAMED = {"tokens": "real_tokens"}  # noqa: RUF012

    kind: Literal[
        "auto", "language", "files", "text", "jsonl", "csv", "parquet", "huggingface", "tfds", "arrayrecord"
    ] = "auto"
    path: str | None = Field(None, description="file, folder or glob; for tfds the dataset name")
    validation: str | None = Field(None, description="held-out files; else the last share of the documents")
    holdout: float = Field(0.05, gt=0.0, lt=1.0, description="share held out when `validation` is not given")
    field: str = Field("text", description="column or key that holds the text")
    split: str = Field("train", description="split of a dataset, or of a folder whose files are named by split")
    data_dir: str | None = Field(None, description="tfds data_dir")
    tokenizer: str = Field("byte", description="byte, bpe, or the path of a tokenizer.json")
    vocab_size: PositiveInt = Field(4096, description="size of a bpe trained on the corpus")
    real_tokens: PositiveInt = Field(400_000, description="real tokens sampled from the embedded language")
    limit: PositiveInt | None = Field(None, description="keep at most this many real tokens")
    language: LanguageConfig = LanguageConfig()

    @property
    def resolved_kind(self) -> str:
        if self.kind != "auto":
            return self.kind
        return "language" if self.path is None else "files"


class RetrieveConfig(Section):
    """Texts that are looked up for each row of a task, by words, and stand in its field `documents`."""

    path: str = Field(description="texts: a file of rows (.jsonl, .csv, .parquet) or of lines (.txt)")
    field: str = Field("text", description="the rows' column that holds a text")
    query: str = Field("{question}", description="what is looked for; {field} is a row's field")
    k: PositiveInt = Field(3, description="texts of a row, the best first")


class TaskConfig(Section):
    """A supervised task: rows with named fields, and how a row reads as a prompt and its completion."""

    path: str = Field(description="rows to learn from: .jsonl, .csv, .parquet; a row may hold a chat in `messages`")
    validation: str | None = Field(None, description="held-out rows; else a share of `path`, drawn by the seed")
    holdout: float = Field(0.2, gt=0.0, lt=1.0, description="share held out when `validation` is not given")
    stratify: str | None = Field(
        None,
        description="field whose values are held out in equal shares; default: the completion's, if it names classes",
    )
    limit: PositiveInt | None = Field(None, description="learn from at most this many rows")
    prompt: str = Field("{prompt}", description="what the model reads; {field} is a row's field")
    completion: str = Field("{completion}", description="what it is to write, and how its answer is read back")
    system: str = Field("", description="system message, in a chat")
    retrieve: RetrieveConfig | None = Field(None, description="documents for each row, shown as {documents}")
    chat: bool | None = Field(None, description="render with the model's chat template; default: where it has one")
