"""How text is sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field, PositiveInt, model_validator

from recursive_jax.config.section import Section


class DenoiseConfig(Section):
    """How a text is written out of order: all of it is hidden, and some of it comes to light in every step."""

    steps: PositiveInt | None = Field(
        None, le=2**16, description="of a row, spread evenly over its blocks; default: one for each token"
    )
    block_size: int = Field(0, ge=0, description="blocks of so many tokens, one after the other; 0: all at once")
    remasking: Literal["random", "ancestral", "low_confidence", "entropy", "left_to_right", "mask_predict", "gibbs"] = (
        Field(
            "random",
            description="what stays hidden. random (so many), ancestral (each by itself): by the model's own law; "
            "low_confidence: what is least sure; entropy: most uncertain; left_to_right: what lies to the right; "
            "mask_predict: what is least sure is hidden again; gibbs: one token at a time is hidden and drawn anew",
        )
    )
    threshold: float = Field(
        0.0, ge=0.0, lt=1.0, description="every token that is surer than this comes to light at once; 0: off"
    )
    cfg_scale: float = Field(0.0, ge=0.0, description="classifier-free guidance: sampling.guidance less 1")
    suppress_tokens: tuple[int, ...] = Field((), description="ids that are never written")
    mask_id: int | None = Field(None, description="id that hides a token; default: the tokenizer's, or the model's")
    fill: int = Field(0, ge=0, description="the model was trained on rows of so many positions that end tokens fill up")
    block_causal: bool = Field(
        False, description="the model reads only the blocks before (trained by blocks): what it has read is kept"
    )

    @model_validator(mode="after")
    def _check(self) -> DenoiseConfig:
        if self.threshold and self.remasking in ("ancestral", "mask_predict", "gibbs"):
            raise ValueError(f"threshold={self.threshold} has no use with remasking={self.remasking}: one of the two")
        return self


class SamplingConfig(Section):
    """How text is sampled. All but the last group may differ from request to request in one batch."""

    HOW = frozenset(("batch", "chunk", "weights"))

    temperature: float = Field(1.0, ge=0.0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="0: off")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    typical_p: float = Field(1.0, gt=0.0, le=1.0, description="locally typical sampling; 1: off")
    repetition_penalty: float = Field(
        1.0, gt=0.0, description="divides positive and multiplies negative logits of tokens in prompt or row; 1: off"
    )
    presence_penalty: float = Field(0.0, description="taken off the logits of tokens the row already holds")
    frequency_penalty: float = Field(0.0, description="taken off once for every time the row holds the token")
    bad_words: tuple[str, ...] = Field((), description="texts that are never completed")
    min_tokens: int = Field(0, ge=0, description="no row ends before it holds this many new tokens")
    max_tokens: int | None = Field(None, ge=0, description="new tokens per row; default: what the context leaves")
    stop: tuple[str, ...] = Field((), description="texts that end a row; they are not part of it")
    stop_tokens: tuple[int, ...] = Field((), description="ids that end a row, besides the end token")
    guidance: float = Field(
        1.0, ge=0.0, description="weight of the prompt against the empty (or the request's negative) prompt; 1: off"
    )

    denoise: DenoiseConfig | None = Field(
        None, description="write out of order, by a model that fills gaps; default: as the model was trained to"
    )
    beams: PositiveInt = Field(1, description="beam search of this width; no sampling")
    length_penalty: float = Field(1.0, description="beams are ranked by log-probability / length ** length_penalty")
    best_of: PositiveInt = Field(1, description="rows sampled per request, of which the n_best most probable are kept")
    n_best: PositiveInt = Field(1, description="rows kept per request, of its beams or of best_of")
    regex: str | None = Field(None, description="every row matches this regular expression, whole")
    json_schema: str | None = Field(None, description="every row is JSON by this schema (its text, or a .json file)")
    grammar: str | None = Field(None, description="every row follows this context-free grammar (Lark, or a .lark file)")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="compute dtype, as in train.dtype")
    batch: PositiveInt = Field(256, description="rows decoded together: a finished one makes room for the next")
    chunk: PositiveInt = Field(16, description="decode steps per dispatch, after which finished rows are replaced")
    weights: Literal["auto", "whole", "sharded"] = Field(
        "auto",
        description="over mesh.fsdp, while writing. whole: a copy on every shard, in the compute dtype; sharded: "
        "gathered anew for every token; auto: whole on TPU and GPU where that takes at most 0.4 of a device's memory",
    )
    prompt_tokens: int = Field(0, ge=0, description="0: from the start token; n: the first n tokens of a row")
    prompt_source: Literal["real", "previous"] = Field("real", description="which rows give the prompts")

    @pydantic.field_validator("json_schema", "grammar", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """A file's text stands in its place, so that a run knows what it was made with."""
        if isinstance(value, Mapping):
            return json.dumps(value)
        if isinstance(value, str) and "\n" not in value and value.endswith((".json", ".lark")):
            if not Path(value).is_file():
                raise ValueError(f"there is no file {value}")
            try:
                return Path(value).read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{value} is not UTF-8 (byte {error.start}): convert it") from None
        return value

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        errors = []
        if self.beams > 1 and self.best_of > 1:
            errors.append(f"beams={self.beams} and best_of={self.best_of}: one of the two")
        if self.n_best > max(self.beams, self.best_of):
            errors.append(f"n_best={self.n_best} needs beams or best_of of at least as many")
        constraints = [k for k in ("regex", "json_schema", "grammar") if getattr(self, k) is not None]
        if len(constraints) > 1:
            errors.append(f"{' and '.join(constraints)}: one of them")
        if self.beams > 1:
            used = [k for k in UNBEAMED if getattr(self, k) != type(self).model_fields[k].default]
            errors += [f"{k} has no use with beams={self.beams}" for k in [*used, *constraints]]
        if constraints:
            used = [k for k in ("stop", "stop_tokens", "bad_words", "min_tokens") if getattr(self, k)]
            errors += [f"{k} has no use with {constraints[0]}, which says where a row ends" for k in used]
        if self.denoise is not None:
            used = [k for k in UNDENOISED if getattr(self, k) != type(self).model_fields[k].default]
            errors += [f"{k} has no use with denoise, which writes out of order" for k in used]
            if self.guidance != 1.0 and self.denoise.cfg_scale:
                errors.append("guidance and denoise.cfg_scale: one of the two (guidance = 1 + cfg_scale)")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            errors.append(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if "" in (*self.stop, *self.bad_words):
            errors.append("stop and bad_words: an empty text is in every row")
        if errors:
            raise ValueError("; ".join(errors))
        return self


UNDENOISED = (
    "beams",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "bad_words",
    "regex",
    "json_schema",
    "grammar",
)
UNBEAMED = ("top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "stop", "guidance")
