"""`collapse_profile`: anyone's samples, round by round, against real data: every metric with its interval, its null and
a verdict; the definitions of collapse in use side by side; early warnings with their lead."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recursive_jax.collapse import profile_page, profile_text
from recursive_jax.collapse.definitions import Finding, definitions, warnings
from recursive_jax.collapse.inputs import Cloud, Texts, as_samples, one_vocabulary
from recursive_jax.collapse.intervals import Measurement, measured
from recursive_jax.collapse.scaling import scaling_exponents
from recursive_jax.collapse.suite import TEXT, VECTORS, Measured
from recursive_jax.csv_text import csv_text
from recursive_jax.errors import InputError

FEWEST = 4  # groups below which a spread says nothing


@dataclasses.dataclass(frozen=True)
class Profile:
    """measurements: for each round, for each metric. definitions: the notions of collapse in the literature. warnings:
    early signs. settings: what every number was measured with."""

    rounds: tuple[str, ...]
    measurements: tuple[dict[str, Measurement], ...]
    definitions: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    settings: dict[str, Any]

    def __getitem__(self, metric: str) -> list[Measurement]:
        """A metric over the rounds. KeyError if it was not measured."""
        return [m[metric] for m in self.measurements]

    @property
    def metrics(self) -> list[str]:
        return list(self.measurements[0])

    def records(self) -> list[dict[str, Any]]:
        """One object for each round: {"generation", "name", metric: {"value", "n", "ci_lo", ..., "verdict"}}."""
        return [
            {"generation": k, "name": name, **self.settings, **{m: x.to_dict() for m, x in found.items()}}
            for k, (name, found) in enumerate(zip(self.rounds, self.measurements, strict=True), start=1)
        ]

    def __str__(self) -> str:
        return profile_text.text(self)

    def save(self, folder: str | Path) -> Path:
        """Writes profile.jsonl, profile.csv, profile.html and, where matplotlib is installed (the extra `plots`), its
        figures as SVG and PNG. Returns the page's path."""
        return profile_page.write(self, Path(folder))

    def jsonl(self) -> str:
        return "".join(json.dumps(r) + "\n" for r in self.records())

    def csv(self) -> str:
        """One line for each round and metric."""
        fields = [f.name for f in dataclasses.fields(Measurement)]
        rows: list[list[Any]] = [["generation", "name", "metric", *fields]]
        for k, (name, found) in enumerate(zip(self.rounds, self.measurements, strict=True), start=1):
            rows += [[k, name, metric, *(getattr(m, f) for f in fields)] for metric, m in found.items()]
        return csv_text(rows)


def collapse_profile(
    rounds: Any,
    reference: Any,
    *,
    logprobs: Sequence[Any] | None = None,
    reference_logprobs: Any = None,
    models: Sequence[Any] | None = None,
    encoder: Callable[[Sequence[Any]], Any] | Any = None,
    scaling: tuple[Any, Any] | None = None,
    tokenizer: Any = None,
    metrics: Sequence[str] | None = None,
    groups: int = 10,
    budget: int | None = None,
    confidence: float = 0.99,
    seed: int = 0,
) -> Profile:
    """Measures what each round's samples lost against `reference`.

    rounds: one sample of each round, as a list or as {name: sample}; or a single sample. A sample is a list of texts,
    of token-id arrays, a `Dataset`, the path of a .parquet, .jsonl or .txt file (a `text` column or key, or one text on
    each line), or an array `[rows, ...]` of numbers: embeddings or images. reference: real data of the same kind.

    logprobs: for each round, log p (nats) of the reference's rows under that round's model: an array or a list of
    per-token arrays; adds `ce_real`. reference_logprobs: the same under the round-0 model, its null. models: the
    rounds' models, instead of logprobs, for token ids or texts of their tokenizer; the first is round 0. encoder: texts
    -> `[rows, features]`, or a `Model` whose states are averaged, `load_model("minilm")` for one: adds the metrics of
    vectors for texts. scaling: (sizes `[S]`, risks `[rounds + 1, S]`) of models trained on S amounts of data, round 0
    first: adds `scaling_exponent` (see `scaling.scaling_exponents`). tokenizer: `encode(text) -> ids`; default: words
    and punctuation marks.

    Every metric is the mean over `groups` disjoint groups of `budget` tokens (vectors: rows) each, of the same size for
    all samples and the reference; default: what the smallest of them allows. The null of a metric is the reference's
    own groups, each against the rest of the reference. A verdict is given outside its `confidence` band.

    Raises InputError for samples that are empty, of another kind than the reference, hold NaN, or are too few for four
    groups.
    """
    named = dict(rounds) if isinstance(rounds, Mapping) else _numbered(rounds)
    if not named:
        raise InputError("collapse_profile: no round was given")
    if models is not None:
        named_models = list(models)
        if len(named_models) != len(named) + 1:
            raise InputError(
                f"models: round 0 and {len(named)} rounds are wanted, there are {len(named_models)} models"
            )
    real = as_samples(reference, "reference", tokenizer)
    samples = {name: as_samples(x, name, tokenizer or real.tokenizer, like=real) for name, x in named.items()}
    one_vocabulary([real, *samples.values()])
    plan = _Plan.of([real, *samples.values()], groups, budget, seed)
    chosen = [m for m in real.metrics() if metrics is None or m.name in metrics]
    null, found = plan.null(real, chosen), {}
    for name, sample in samples.items():
        found[name] = plan.measure(sample, real, chosen, null, confidence)
    if encoder is not None and isinstance(real, Texts):
        clouds = _encoded({"reference": real, **samples}, encoder)
        cloud_plan = _Plan.of(list(clouds.values()), groups, None, seed)
        chosen = [m for m in VECTORS if metrics is None or m.name in metrics]
        null = cloud_plan.null(clouds["reference"], chosen)
        for name in samples:
            found[name] |= cloud_plan.measure(clouds[name], clouds["reference"], chosen, null, confidence)
    if models is not None:
        logprobs, reference_logprobs = _scored(named_models, real)
    if logprobs is not None:
        _likelihoods(found, logprobs, reference_logprobs, confidence)
    if scaling is not None:
        exponents = scaling_exponents(*scaling, confidence)
        if len(exponents) != len(found):
            raise InputError(
                f"scaling: risks of round 0 and {len(found)} rounds are wanted, there are {len(exponents) + 1}"
            )
        for values, exponent in zip(found.values(), exponents, strict=True):
            values["scaling_exponent"] = exponent
    if metrics is not None and (missing := set(metrics) - set(next(iter(found.values())))):
        known = [m.name for m in (*TEXT, *VECTORS)] + ["ce_real", "scaling_exponent"]
        raise InputError(
            f"metrics: {', '.join(sorted(missing))} cannot be measured here; there are: {', '.join(known)}"
        )
    settings = {"groups": plan.groups, plan.unit: plan.size, "confidence": confidence, "seed": seed}
    series = {m: [found[name][m] for name in samples] for m in next(iter(found.values()))}
    return Profile(tuple(samples), tuple(found.values()), definitions(series), warnings(series), settings)


def _numbered(rounds: Any) -> dict[str, Any]:
    single = isinstance(rounds, str | Path | np.ndarray) or hasattr(rounds, "table") or hasattr(rounds, "shape")
    if not single and len(rounds) and isinstance(rounds[0], str | int):
        # A list of texts is one sample; a list of paths to files is one for each round.
        single = not all(isinstance(r, str) and r.endswith((".parquet", ".jsonl", ".txt")) for r in rounds)
    if not single and len(rounds) and isinstance(rounds[0], np.ndarray) and rounds[0].ndim == 1:
        single = True
    return {f"round {k}": x for k, x in enumerate([rounds] if single else rounds, start=1)}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How samples are cut into groups: `groups` of `size` tokens or rows."""

    groups: int
    size: int
    unit: str
    seed: int

    @classmethod
    def of(cls, samples: Sequence[Texts | Cloud], groups: int, budget: int | None, seed: int) -> _Plan:
        fewest = min(s.rows for s in samples)
        groups = min(groups, fewest // samples[0].least)
        if groups < FEWEST:
            small = min(samples, key=lambda s: s.rows)
            raise InputError(
                f"{small.name}: {small.rows} rows are too few; {FEWEST} groups of {samples[0].least} are the least"
            )
        size = min(s.group_size(groups, seed) for s in samples)
        if budget is not None:
            if budget > size:
                small = min(samples, key=lambda s: s.group_size(groups, seed))
                raise InputError(f"budget={budget}: {small.name} has {size} {small.unit} for each of {groups} groups")
            size = budget
        return cls(groups, size, samples[0].unit, seed)

    def null(self, real, metrics: Sequence[Measured]) -> dict[str, list[float] | str]:
        """The reference's groups, each against the rest."""
        return self._values(real, real, metrics)

    def measure(self, sample, real, metrics, null, confidence) -> dict[str, Measurement]:
        found = {}
        for name, values in self._values(sample, real, metrics).items():
            own = null[name] if isinstance(null[name], list) else ()
            found[name] = (
                Measurement(None, why=values)
                if isinstance(values, str)
                else measured(values, own, confidence, self.seed, name)
            )
        return found

    def _values(
        self, sample, real, metrics: Sequence[Measured], leave_out: bool = False
    ) -> dict[str, list[float] | str]:
        """For each metric its value on every group, or why there is none. A group is always compared with the reference
        less one group, so that samples and reference are treated alike."""
        parts = sample.groups(self.groups, self.size, self.seed)
        rests = real.rests(self.groups, self.size, self.seed)
        found: dict[str, list[float] | str] = {}
        for metric in metrics:
            try:
                found[metric.name] = [metric.of(a, b) for a, b in zip(parts, rests, strict=True)]
            except InputError as error:
                found[metric.name] = str(error)
        return found


def _encoded(samples: Mapping[str, Texts], encoder: Any) -> dict[str, Cloud]:
    encode = _encoder(encoder)
    return {name: Cloud(encode(s), name) for name, s in samples.items()}


def _encoder(encoder: Any) -> Callable[[Texts], np.ndarray]:
    """A Model averages its states over a text's tokens."""
    if isinstance(encoder, str):
        raise InputError(f"encoder={encoder!r}: give a Model, for example load_model({encoder!r}), or a function")
    if hasattr(encoder, "network"):
        from recursive_jax.generate.score import embed

        return lambda s: np.asarray(embed(encoder, s.texts if s.texts is not None else s.tokens))
    return lambda s: np.asarray(encoder(s.texts if s.texts is not None else s.tokens))


def _scored(models: Sequence[Any], real: Texts) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """log p of the reference's rows under every model; round 0 apart."""
    from recursive_jax.generate.score import token_logprobs

    encoded = lambda m: real.tokens if real.texts is None else [np.asarray(m.tokenizer.encode(t)) for t in real.texts]
    rows = [list(token_logprobs(m, encoded(m))) for m in models]
    return rows[1:], rows[0]


def _likelihoods(found, logprobs, reference_logprobs, confidence: float) -> None:
    """`ce_real`: nats per token (per row, where rows come as sums). The null is round 0 on the same rows, so the band
    is that of the paired difference: what sampling of the rows moves."""
    if len(logprobs) != len(found):
        raise InputError(f"logprobs: {len(found)} rounds are wanted, there are {len(logprobs)}")
    first = None if reference_logprobs is None else _losses(reference_logprobs, "reference_logprobs")
    for (name, metrics), values in zip(found.items(), logprobs, strict=True):
        sums, counts = _losses(values, f"logprobs of {name}")
        ce, error = _ratio(sums, counts)
        here = Measurement(ce, len(sums), ce - 1.96 * error, ce + 1.96 * error)
        if first is not None:
            if len(first[0]) != len(sums):
                raise InputError(f"logprobs of {name}: {len(sums)} rows, reference_logprobs has {len(first[0])}")
            before = _ratio(*first)[0]
            band = _quantile(confidence, len(sums)) * _ratio(sums - first[0], counts)[1]
            low, high = before - band, before + band
            slack = 1e-9 * max(1.0, abs(before))
            verdict = "lower" if ce < low - slack else "higher" if ce > high + slack else "same"
            here = dataclasses.replace(here, null_lo=max(0.0, low), null_hi=high, null=before, verdict=verdict)
        metrics["ce_real"] = here


def _losses(values: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [np.atleast_1d(np.asarray(x, np.float64)) for x in values]
    if len(rows) < 2:
        raise InputError(f"{name}: at least 2 rows are wanted, there are {len(rows)}")
    sums = -np.array([x.sum() for x in rows])
    if not np.isfinite(sums).all():
        bad = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise InputError(f"{name}: row {bad} holds NaN or infinity; leave out what the model gives no probability")
    return sums, np.array([len(x) for x in rows], np.float64)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """A ratio of sums and its standard error (delta method), rows independent."""
    mean = sums.sum() / counts.sum()
    n = len(sums)
    return float(mean), float(math.sqrt(((sums - mean * counts) ** 2).sum() * n / (n - 1)) / counts.sum())


def _quantile(confidence: float, n: int) -> float:
    from scipy.stats import t as student

    return float(student.ppf((1 + confidence) / 2, n - 1))
