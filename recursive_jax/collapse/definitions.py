"""The notions of model collapse that the literature uses (arXiv:2503.03150 lists eight), each answered from the same
measurements, and the signs that come before it. An answer is `yes`, `no`, or `not measured`, never a guess."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from recursive_jax.collapse.intervals import Measurement

Series = Mapping[str, Sequence[Measurement]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """answer: yes, no, not measured. first: the first round that left the null's band. lead: of a warning, rounds
    before the risk left its own."""

    name: str
    question: str
    answer: str
    evidence: str = ""
    first: int | None = None
    lead: int | None = None


def _first(series: Series, metric: str, directions: tuple[str, ...]) -> int | None:
    """The first round from which the metric stays outside its band, in one of the directions, to the end."""
    found = None
    for k, m in enumerate(series.get(metric, ()), start=1):
        if m.verdict in directions:
            found = found or k
        else:
            found = None
    return found


def _tested(series: Series, metric: str) -> bool:
    return metric in series and all(m.verdict != "untested" for m in series[metric])


def _any(name: str, question: str, series: Series, signs: Sequence[tuple[str, tuple[str, ...]]]) -> Finding:
    """Yes where one of the metrics ends outside its band."""
    tested = [(metric, directions) for metric, directions in signs if _tested(series, metric)]
    if not tested:
        return Finding(name, question, "not measured", f"needs one of: {', '.join(m for m, _ in signs)}")
    hits = [(k, metric) for metric, d in tested if (k := _first(series, metric, d)) is not None]
    if not hits:
        return Finding(name, question, "no", f"{', '.join(m for m, _ in tested)} within the band")
    parts = []
    for k, metric in sorted(hits):
        m = series[metric][-1]
        band = f" outside [{m.null_lo:.4g}, {m.null_hi:.4g}]" if m.value is not None else ""
        parts.append(f"{metric} {m.why if m.value is None else format(m.value, '.4g')}{band} (from round {k})")
    return Finding(name, question, "yes", "; ".join(parts), min(k for k, _ in hits))


RISK = ("ce_real", "kl_total", "kl_1gram")


def _risk(series: Series) -> str | None:
    return next((m for m in RISK if _tested(series, m)), None)


def definitions(series: Series) -> tuple[Finding, ...]:
    risk = _risk(series)
    rises = [(risk, ("higher",))] if risk else [(m, ("higher",)) for m in RISK]
    return (
        _catastrophe(series, risk),
        _any("risk rises", "Is the risk on real data higher than before recursion?", series, rises),
        _divergence(series, risk),
        _any(
            "variance collapses",
            "Has the spread of what is generated shrunk?",
            series,
            [("variance_ratio", ("lower",)), ("logdet_diff", ("lower",)), ("entropy_1gram_mm", ("lower",))],
        ),
        _any(
            "scaling law changes",
            "Does more data help less than it did?",
            series,
            [("scaling_exponent", ("lower",))],
        ),
        _any(
            "tail is lost",
            "Are types of the truth gone that chance alone would have kept?",
            series,
            [("tail_mass_lost", ("higher",)), ("types_alive", ("lower",))],
        ),
        _any(
            "modes are lost",
            "Are regions of the real data no longer covered?",
            series,
            [("recall", ("lower",)), ("coverage", ("lower",)), ("vendi_1", ("lower",)), ("distinct_2", ("lower",))],
        ),
        _any(
            "hallucination",
            "Is more generated that the truth does not contain?",
            series,
            [("valid", ("lower",)), ("precision", ("lower",)), ("density", ("lower",))],
        ),
    )


def _catastrophe(series: Series, risk: str | None) -> Finding:
    question = "Has the risk become that of knowing nothing?"
    if risk is None:
        return Finding("risk is catastrophic", question, "not measured", f"needs one of: {', '.join(RISK)}")
    last = series[risk][-1]
    nothing = series.get("ce_nothing", ())
    if nothing and nothing[-1].value is not None:
        limit, says = nothing[-1].value, "ce_nothing, the entropy of the unigrams"
    elif last.null > np.log(2):
        limit, says = 2 * last.null, f"twice its value before recursion, {last.null:.4g}"
    else:
        limit, says = 2 * np.log(2), f"2 ln 2, the least; twice its value before recursion is {2 * last.null:.3g}"
    answer = "yes" if last.value >= limit else "no"
    return Finding(
        "risk is catastrophic", question, answer, f"{risk} {last.value:.4g}; the limit is {limit:.4g}: {says}"
    )


def _divergence(series: Series, risk: str | None) -> Finding:
    """Linear growth against the bounded growth of accumulation, sum of 1/i^2 (arXiv:2404.01413): whichever fits
    better."""
    question = "Does the risk grow without bound, rather than levelling off?"
    if risk is None or len(series[risk]) < 4:
        need = "four rounds" if risk else f"one of: {', '.join(RISK)}"
        return Finding("risk diverges", question, "not measured", f"needs {need}")
    y = np.array([m.value for m in series[risk]])
    k = np.arange(1, len(y) + 1)
    errors = {}
    for name, x in (("linear", k), ("bounded", np.cumsum(1 / k**2))):
        fit = np.polynomial.polynomial.polyfit(x, y, 1)
        errors[name] = float(((y - np.polynomial.polynomial.polyval(x, fit)) ** 2).sum()), float(fit[1])
    slope = errors["linear"][1]
    error = np.sqrt(errors["linear"][0] / (len(y) - 2) / ((k - k.mean()) ** 2).sum())
    grows = slope > 4 * error and _first(series, risk, ("higher",)) is not None
    answer = "yes" if grows and errors["linear"][0] < errors["bounded"][0] else "no"
    evidence = (
        f"{risk}: slope {slope:.3g} +- {error:.2g} a round; squared error linear {errors['linear'][0]:.3g}, bounded "
        f"{errors['bounded'][0]:.3g}"
    )
    return Finding("risk diverges", question, answer, evidence)


#: Sign, its metrics in the order of preference, the direction that warns.
SIGNS = (
    ("entropy contracts", ("anchor_entropy", "entropy_2gram_mm", "neighbour_entropy"), ("lower",)),
    ("tail erodes", ("tail_mass_lost", "decile_drift", "coverage"), ("higher", "lower")),
    ("representation drifts", ("representation_drift", "frechet", "js_1gram"), ("higher",)),
)


def warnings(series: Series) -> tuple[Finding, ...]:
    """Precursors (arXiv:2605.14588): each with the round in which it first left its band for good, and its lead over
    the risk."""
    risk = _risk(series)
    failure = _first(series, risk, ("higher",)) if risk else None
    found = []
    for name, metrics, directions in SIGNS:
        metric = next((m for m in metrics if _tested(series, m)), None)
        question = f"Does it before the risk on real data rises ({risk or 'no risk measured'})?"
        if metric is None:
            found.append(Finding(name, question, "not measured", f"needs one of: {', '.join(metrics)}"))
            continue
        direction = (
            ("lower",) if metric == "coverage" else tuple(d for d in directions if d != "lower" or len(directions) == 1)
        )
        first = _first(series, metric, direction)
        values = [m.value for m in series[metric] if m.value is not None]
        slope = np.polynomial.polynomial.polyfit(np.arange(len(values)), values, 1)[1] if len(values) > 1 else 0.0
        lead = failure - first if first is not None and failure is not None else None
        says = f"{metric}: {slope:+.3g} a round"
        if first is not None and failure is None and risk:
            says += f"; {risk} is still within its band"
        found.append(Finding(name, question, "no" if first is None else "yes", says, first, lead))
    return tuple(found)
