"""The collapse profile of a run: its stored samples against those of its round-0 model, with the exact measures of
every round beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from recursive_jax.collapse.definitions import definitions, warnings
from recursive_jax.collapse.intervals import Z95, Measurement, measured, within
from recursive_jax.collapse.profile import Profile, collapse_profile
from recursive_jax.errors import InputError
from recursive_jax.rounds.lineage import evaluations, manifests, stored_rows

#: Of the evaluations: measured on fixed held-out rows, so that only the model differs between rounds.
EXACT = ("ce_real", "kl_total", "kl_syn", "kl_sem", "kl_fact", "kl_dist", "anchor_entropy", "knowledge", "valid")


ENDS = (("ci_lo", -1.0), ("ci_hi", 1.0))


def run_profiles(run: Any, confidence: float = 0.99) -> dict[str, Profile]:
    """One profile for each arm. Samples of all replicates count together; round 0's own are the reference and the null.

    The exact measures get their error from replicates where there are several, else from the evaluation itself
    (`ce_real`, `kl_total`), else none. Raises InputError for a run without a stored round.
    """
    run = epath.Path(run)
    stored = [m for m in manifests(run) if m["verb"] == "generate" and m["name"] == "samples"]
    samples: dict[tuple[str, int], list[np.ndarray]] = {}
    for m in stored:
        data = stored_rows(run, m)
        key = ("", 0) if m["round"] == 0 else (m["arm"], m["round"])
        samples.setdefault(key, []).extend(np.asarray(t, np.int64) for t in data.tokens() if len(t))
    if ("", 0) not in samples or len(samples) < 2:
        raise InputError(f"{run} has no samples of a round to compare with those of its round 0 yet")
    records = evaluations(run)
    base = [r["metrics"] for r in records if r["round"] == 0]
    profiles = {}
    for arm in dict.fromkeys(a for a, k in samples if k):
        rounds = {f"round {k}": rows for (a, k), rows in sorted(samples.items()) if a == arm}
        profile = collapse_profile(rounds, samples["", 0], confidence=confidence)
        exact = _exact([r for r in records if r["arm"] == arm and r["round"]], base, list(rounds), confidence)
        found = tuple(exact[name] | m for name, m in zip(profile.rounds, profile.measurements, strict=True))
        series = {m: [x[m] for x in found] for m in found[0] if all(m in x for x in found)}
        found = tuple({m: x[m] for m in series} for x in found)
        profiles[arm] = dataclasses.replace(
            profile, measurements=found, definitions=definitions(series), warnings=warnings(series)
        )
    return profiles


def _exact(records, base, rounds: list[str], confidence: float) -> dict[str, dict[str, Measurement]]:
    found: dict[str, dict[str, Measurement]] = {name: {} for name in rounds}
    for name in rounds:
        here = [r["metrics"] for r in records if f"round {r['round']}" == name]
        for metric in EXACT:
            values = [m[metric] for m in here if metric in m]
            null = [m[metric] for m in base if metric in m]
            if not values or not null:
                continue
            error = [m.get(f"{metric}_stderr") for m in here]
            if len(values) > 1:
                x = measured(values)
                spread = np.std(values, ddof=1) / np.sqrt(len(values))
                found[name][metric] = _against(metric, x, null[0], spread, len(values), confidence)
            elif error[0] is not None:
                around = [here[0].get(f"{metric}_{end}", values[0] + sign * Z95 * error[0]) for end, sign in ENDS]
                x = Measurement(values[0], 1, *within(metric, *around))
                # Of a difference: row by row where both were asked the same rows, else of two independent samples.
                paired, before = here[0].get(f"{metric}_change_stderr"), base[0].get(f"{metric}_stderr", 0.0)
                error_of_change = np.hypot(error[0], before) if paired is None else paired
                found[name][metric] = _against(metric, x, null[0], error_of_change, 0, confidence)
            else:
                found[name][metric] = Measurement(values[0], 1)
    return found


def _against(metric: str, x: Measurement, null: float, error: float, n: int, confidence: float) -> Measurement:
    """Beside round 0: a band of the t quantile (n values) or the normal one (n = 0) times the error."""
    from scipy.stats import norm, t

    tail = (1 + confidence) / 2
    band = float((t.ppf(tail, n - 1) if n else norm.ppf(tail)) * error)
    low, high = null - band, null + band
    slack = 1e-9 * max(1.0, abs(null))  # equal numbers, added up in another order
    verdict = "lower" if x.value < low - slack else "higher" if x.value > high + slack else "same"
    low, high = within(metric, low, high)
    return dataclasses.replace(x, null_lo=low, null_hi=high, null=null, verdict=verdict)
