"""YAML -> frozen typed config, dotted overrides, all errors in one message.

A config file has one section per noun below. `load_config(path, ["train.steps=100"])` merges the overrides
into the file, fills `student` from `train`, and checks everything before anything is compiled.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
import yaml
from pydantic import Field, PositiveInt, model_validator

from recursive_jax.errors import InputError, problems
from recursive_jax.model_config import LoraConfig, ModelConfig, Section


class LanguageConfig(Section):
    """Sizes of the embedded language (`recursive_jax.data.language`)."""

    seed: int = 0
    types: PositiveInt = Field(4, description="noun types; verbs select them")
    nouns: PositiveInt = Field(8, description="nouns per type and number")
    verbs: PositiveInt = Field(4, description="verbs per subject type, number and valency")
    first_names: PositiveInt = 12
    last_names: PositiveInt = 12
    attributes: PositiveInt = 3
    values: PositiveInt = Field(12, description="values per attribute")
    depth: int = Field(2, ge=0, le=4, description="nested relative clauses")
    word_exponent: float = Field(1.1, gt=0.0, description="Zipf exponent of nouns and verbs")
    entity_exponent: float = Field(1.0, gt=0.0, description="Zipf exponent of names")
    fact_share: float = Field(0.4, gt=0.0, lt=1.0, description="share of sentences that state a fact")
    stop: float = Field(0.45, gt=0.05, lt=1.0, description="probability that a document ends after a sentence")


class DataConfig(Section):
    """Where real text comes from."""

    kind: Literal["auto", "language", "files", "text", "jsonl", "parquet", "huggingface", "tfds", "arrayrecord"] = (
        "auto"
    )
    path: str | None = Field(None, description="file, folder or glob; for tfds the dataset name")
    validation: str | None = Field(None, description="held-out files; else the last share of the documents")
    holdout: float = Field(0.05, gt=0.0, lt=1.0, description="share held out when `validation` is not given")
    field: str = Field("text", description="column or key that holds the text")
    split: str = Field("train", description="split of a tfds or Hugging Face dataset")
    data_dir: str | None = Field(None, description="tfds data_dir")
    tokenizer: str = Field("byte", description="byte, bpe, or the path of a tokenizer.json")
    vocab_size: PositiveInt = Field(4096, description="size of a bpe trained on the corpus")
    tokens: PositiveInt = Field(400_000, description="real tokens sampled from the embedded language")
    limit: PositiveInt | None = Field(None, description="keep at most this many real tokens")
    language: LanguageConfig = LanguageConfig()

    @property
    def resolved_kind(self) -> str:
        if self.kind != "auto":
            return self.kind
        return "language" if self.path is None else "files"


class TrainConfig(Section):
    """One training: steps, batch, optimizer, dtype, logging."""

    steps: PositiveInt = 1000
    batch: PositiveInt = Field(16, description="rows per step over all devices")
    length: PositiveInt | None = Field(None, description="tokens per packed row; default: model.context")
    accumulate: PositiveInt = Field(1, description="micro-batches per step")
    learning_rate: float = Field(1e-3, gt=0.0)
    warmup: float = Field(0.05, ge=0.0, le=1.0, description="share of the steps")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final: float = Field(0.1, ge=0.0, le=1.0, description="last learning rate as a share of the peak")
    decay: float = Field(0.2, gt=0.0, le=1.0, description="wsd: share of the steps that decay")
    weight_decay: float = Field(0.1, ge=0.0)
    clip: float = Field(1.0, gt=0.0, description="global gradient norm")
    truncate: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="tokens that the model gives more than this are left out of the loss (arXiv:2509.08972); 1: none",
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; params stay float32. auto: bfloat16 on TPU and GPU, float32 on CPU"
    )
    checkpoint_every: PositiveInt = Field(1000, description="steps between resumable checkpoints")
    log_every: PositiveInt = 10
    tensorboard: bool = True


class SamplingConfig(Section):
    """How text is sampled. All but the last group may differ from request to request in one batch."""

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
            return Path(value).read_text(encoding="utf-8")
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
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            errors.append(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if "" in (*self.stop, *self.bad_words):
            errors.append("stop and bad_words: an empty text is in every row")
        if errors:
            raise ValueError("; ".join(errors))
        return self


UNBEAMED = ("top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "stop", "guidance")


class RoundsConfig(Section):
    """The recursion: how many rounds, what a student starts from, how much it is trained on."""

    count: int = Field(5, ge=0, le=10_000)
    init: Literal["base", "previous", "scratch"] = "scratch"
    tokens: PositiveInt = Field(100_000, description="tokens of data per round and arm: synthetic plus real")
    budget: Literal["fixed", "grow"] = Field(
        "fixed", description="fixed: every round trains on as many tokens; grow: on the whole pool, equal epochs"
    )
    growth: float = Field(0.0, ge=0.0, description="round k has tokens * k^growth, and its steps grow with them")
    schedule: tuple[PositiveInt, ...] = Field((), description="tokens of each round, in place of growth")

    @model_validator(mode="after")
    def _check(self) -> RoundsConfig:
        if self.schedule and len(self.schedule) != self.count:
            raise ValueError(f"schedule has {len(self.schedule)} sizes, count={self.count}; give as many")
        if self.schedule and self.growth:
            raise ValueError(f"schedule and growth={self.growth}: one of the two")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of rounds 1 .. count."""
        return self.schedule or tuple(round(self.tokens * k**self.growth) for k in range(1, self.count + 1))


class FilterConfig(Section):
    """A verifier that sees every generated row and keeps right ones at one rate, wrong ones at another (arXiv:2406.07515)."""

    verifier: Literal["syntax", "semantics", "facts"] = Field(
        "facts",
        description="what makes a row of the embedded language right; facts: form, agreement and facts all right",
    )
    keep_right: float = Field(1.0, ge=0.0, le=1.0)
    keep_wrong: float = Field(0.0, ge=0.0, le=1.0)


class ArmConfig(Section):
    """One regime: what a round's student is trained on, by the names of the laboratory (arXiv:2404.01413, arXiv:2410.16713)."""

    data: Literal["replace", "accumulate", "accumulate_subsample", "window"] = "replace"
    window: PositiveInt = Field(2, description="rounds kept when data is `window`")
    anchor: float = Field(0.0, ge=0.0, le=1.0, description="share of real rows, the same every round")
    fresh: float = Field(0.0, ge=0.0, le=1.0, description="share of real rows, new ones every round")
    carry: float = Field(
        0.0, ge=0.0, le=1.0, description="share of the last round's training rows, passed on unchanged"
    )
    weighted: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="as many new real tokens again, their loss weighted w against 1 - w (arXiv:2502.18049)",
    )
    filtered: FilterConfig | None = Field(None, description="a verifier of generated rows")
    init: Literal["base", "previous", "scratch"] | None = Field(None, description="default: rounds.init")
    sampling: dict[str, Any] = Field({}, description="overrides of `sampling` for this arm")
    student: dict[str, Any] = Field({}, description="overrides of `student` for this arm")

    @model_validator(mode="after")
    def _check(self) -> ArmConfig:
        if self.real + self.carry > 1.0:
            raise ValueError(
                f"anchor={self.anchor} + fresh={self.fresh} + carry={self.carry} is more than the whole round"
            )
        if self.weighted is not None and self.real + self.carry > 0:
            raise ValueError(f"weighted={self.weighted} brings its own real rows: without anchor, fresh and carry")
        return self

    @property
    def real(self) -> float:
        """Share of real rows in a round."""
        return self.anchor + self.fresh

    def real_tokens(self, sizes: Sequence[int]) -> int:
        """Real tokens that rounds of these sizes use."""
        new = self.fresh + (self.weighted is not None)
        return round(self.anchor * max(sizes, default=0) + new * sum(sizes))


class EvaluateConfig(Section):
    """How much is scored, sampled and counted in an evaluation."""

    rows: PositiveInt = Field(256, description="held-out real rows scored")
    samples: PositiveInt = Field(512, description="rows sampled from each model for the sample statistics")
    tokens: PositiveInt = Field(8192, description="fixed token budget of every count statistic")
    show: int = Field(4, ge=0, description="sample texts kept for the report")


class TaskConfig(Section):
    """A supervised task: rows with named fields, and how a row reads as a prompt and its completion."""

    path: str = Field(description="rows to learn from: .jsonl or .parquet; a row may also hold a chat in `messages`")
    validation: str | None = Field(None, description="held-out rows; else the last share of `path`")
    holdout: float = Field(0.2, gt=0.0, lt=1.0, description="share held out when `validation` is not given")
    limit: PositiveInt | None = Field(None, description="learn from at most this many rows")
    prompt: str = Field("{prompt}", description="what the model reads; {field} is a row's field")
    completion: str = Field("{completion}", description="what it is to write, and how its answer is read back")
    system: str = Field("", description="system message, in a chat")
    chat: bool | None = Field(None, description="render with the model's chat template; default: where it has one")


class MeshConfig(Section):
    """Devices per axis; one axis may be -1: all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class Config(Section):
    """A whole experiment, as read by `load_config`."""

    name: str = "run"
    recipe: Literal["collapse", "finetune"] = Field(
        "collapse", description="collapse: rounds of students; finetune: one model on a task, before and after"
    )
    seed: int = 0
    base: str | None = Field(
        None,
        description="start from this model instead of random params: a run, a Hugging Face folder, a GGUF, smollm2; "
        "its architecture and tokenizer replace `model` and `data.tokenizer`",
    )
    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")
    task: TaskConfig | None = Field(None, description="the task of the recipe finetune")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    student: TrainConfig = Field(TrainConfig(), description="the rounds' training; what is left out is as in `train`")
    sampling: SamplingConfig = SamplingConfig()
    rounds: RoundsConfig = RoundsConfig()
    arms: dict[str, ArmConfig] = Field({"main": ArmConfig()}, min_length=1)
    replicates: PositiveInt = Field(1, description="chains per arm, differing by seed, from one shared teacher")
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="before")
    @classmethod
    def _student_follows_train(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        train, student = raw.get("train", {}), raw.get("student") or {}
        train = train.model_dump(exclude_unset=True) if isinstance(train, TrainConfig) else train
        if isinstance(train, Mapping) and isinstance(student, Mapping):
            return {**raw, "student": {**train, **student}}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Config:
        errors = []
        if self.recipe == "finetune":
            errors += [f"recipe=finetune needs {key}" for key in ("base", "task") if getattr(self, key) is None]
        elif self.task is not None or self.lora is not None:
            errors.append(f"{'task' if self.task is not None else 'lora'} is for recipe=finetune")
        if self.recipe == "collapse" and self.base is not None and self.data.path is None:
            errors.append("base needs data.path: real text for its tokenizer (the embedded language has its own words)")
        if self.data.resolved_kind == "language" and self.data.tokenizer != "byte":
            errors.append(
                f"data.tokenizer={self.data.tokenizer} has no use without data.path: the embedded language has its own words"
            )
        for section, train in (("train", self.train), ("student", self.student)):
            if self.base is None and train.length and train.length > self.model.context:
                errors.append(f"{section}.length={train.length} is longer than model.context={self.model.context}")
            if train.batch % train.accumulate:
                errors.append(f"{section}.batch={train.batch} is not a multiple of accumulate={train.accumulate}")
        if self.base is None and self.sampling.prompt_tokens >= self.model.context:
            errors.append(
                f"sampling.prompt_tokens={self.sampling.prompt_tokens} leaves nothing of "
                f"model.context={self.model.context}"
            )
        for name, arm in self.arms.items():
            if name == "rounds" or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                errors.append(f"arms.{name}: an arm is a folder: letters, digits, '-', '_', '.'; not 'rounds'")
            try:
                sampling = self.arm_sampling(arm)
                if (
                    self.base is None
                    and sampling.prompt_tokens >= self.model.context
                    and "prompt_tokens" in arm.sampling
                ):
                    errors.append(
                        f"arms.{name}.sampling.prompt_tokens={sampling.prompt_tokens} leaves nothing of model.context={self.model.context}"
                    )
            except pydantic.ValidationError as error:
                errors.extend(f"arms.{name}.sampling: {line}" for line in _explain(error, SamplingConfig))
            try:
                self.arm_student(arm)
            except pydantic.ValidationError as error:
                errors.extend(f"arms.{name}.student: {line}" for line in _explain(error, TrainConfig))
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def arm_sampling(self, arm: ArmConfig) -> SamplingConfig:
        return SamplingConfig(**{**self.sampling.model_dump(), **arm.sampling})

    def arm_student(self, arm: ArmConfig) -> TrainConfig:
        return TrainConfig(**{**self.student.model_dump(), **arm.student})


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key=value` overrides (dotted keys, YAML values).

    Raises `InputError` with every problem at once: unknown keys (with the nearest known one), wrong types,
    values out of range.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            near = sorted(str(p) for p in Path(path).parent.glob("*.yaml")) if Path(path).parent.is_dir() else []
            hint = f"; there are: {', '.join(near)}" if near else ""
            raise InputError(f"config file {path} does not exist{hint}") from None
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"config file {path} cannot be read as YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise InputError(f"config file {path} must be a mapping of sections, it is a {type(loaded).__name__}")
        raw = loaded or {}
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, where=str(path) if path else "config")


def parse_config(raw: Mapping[str, Any], where: str = "config") -> Config:
    try:
        return Config.model_validate(raw)
    except pydantic.ValidationError as error:
        raise problems(f"{where} has {error.error_count()} problem(s):", _explain(error, Config)) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override '{override}' is not of the form key=value, for example train.steps=100")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise InputError(f"override '{override}': {parent} is a value, not a section")
        node = child
    node[last] = value


def _explain(error: pydantic.ValidationError, root: type[Section]) -> list[str]:
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = ".".join(location) or "config"
        if item["type"] == "extra_forbidden":
            known = _known_keys(root, location[:-1])
            near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
            elsewhere = [k for k in _all_keys(root) if k.rsplit(".", 1)[-1] == location[-1]]
            hint = (
                f"did you mean {'.'.join([*location[:-1], near[0]])}?"
                if near
                else (f"did you mean {elsewhere[0]}?" if elsewhere else f"known here: {', '.join(known)}")
            )
            lines.append(f"unknown key {key}; {hint}")
        elif item["type"] == "value_error":
            prefix = "" if key == "config" else f"{key}: "
            lines.extend(prefix + line for line in str(item["ctx"]["error"]).split("\n"))
        else:
            lines.append(f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return list(dict.fromkeys(lines))


def _section_of(annotation: Any) -> type[Section] | None:
    """The Section class inside an annotation such as `X`, `X | None` or `dict[str, X]`."""
    candidates = [annotation]
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is dict:
        candidates = list(get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _known_keys(root: type[Section], path: Sequence[str]) -> list[str]:
    section: type[Section] | None = root
    in_dict = False
    for part in path:
        if section is None:
            return []
        if in_dict:
            in_dict = False
            continue
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        in_dict = get_origin(annotation) is dict
        section = _section_of(annotation)
    return [] if section is None else list(section.model_fields)


def _all_keys(root: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, field in root.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            keys.append(prefix + name)
        elif get_origin(field.annotation) is dict:
            keys.extend(_all_keys(inner, f"{prefix}{name}.<name>."))
        else:
            keys.extend(_all_keys(inner, f"{prefix}{name}."))
    return keys


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two resolved configs differ, as `key: old -> new` lines."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines.extend(difference(a, b, f"{prefix}{key}."))
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
