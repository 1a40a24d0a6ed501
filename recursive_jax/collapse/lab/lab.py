"""`lab`: options in, measured and expected statistics out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.collapse.lab.chain import Family, Regime, chain
from recursive_jax.collapse.lab.options import Point
from recursive_jax.collapse.lab.theory import expected
from recursive_jax.errors import InputError
from recursive_jax.mesh import TRACES

VALUES = 2**23  # numbers of one round held at once, over the replicates side by side


@dataclasses.dataclass(frozen=True)
class LabResult:
    """values: for each statistic `[replicates, rounds + 1]`, float64; round 0 is the truth. mean, stderr: over
    replicates. expected: `[rounds + 1]` where a law is known, NaN in rounds of which it says nothing."""

    family: str
    config: dict[str, Any]
    values: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]

    @property
    def mean(self) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return {name: x.mean(0) for name, x in self.values.items()}

    @property
    def stderr(self) -> dict[str, np.ndarray]:
        """Of the mean; NaN for a single replicate."""
        with np.errstate(invalid="ignore"):
            some = lambda x: x.std(0, ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.full(x.shape[1], np.nan)
            return {name: some(x) for name, x in self.values.items()}

    def to_dict(self) -> dict[str, Any]:
        """`{"family", "config", "rounds": [{"round", "statistics": {name: {"mean", "stderr", "expected"?}}}]}`. A value
        that is not a finite number is None."""
        mean, stderr, rounds = self.mean, self.stderr, []
        for k in range(self.config["rounds"] + 1):
            statistics = {}
            for name in self.values:
                statistics[name] = {"mean": _number(mean[name][k]), "stderr": _number(stderr[name][k])}
                if name in self.expected and np.isfinite(self.expected[name][k]):
                    statistics[name]["expected"] = float(self.expected[name][k])
            rounds.append({"round": k, "statistics": statistics})
        return {"family": self.family, "config": self.config, "rounds": rounds}


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def lab(family: str, *, sweep: Mapping[str, Sequence[Any]] | None = None, **options: Any) -> Any:
    """Runs `replicates` chains of `rounds` rounds and returns a `LabResult`.

    family: gaussian, categorical, mixture, poisson, kde, regression, classifier, ngram, vae or transformer.
    Options of every family: samples (rows of a round; `inf` for categorical: no sampling noise), rounds, regime (see
    `Regime`) with its fraction, weight, keep_right and keep_wrong, replicates, seed, growth (round k has
    samples * k^growth rows) or schedule (the rows of each round), precision (float64 or float32), statistics (only
    these). Options of a family: the fields of its class. sweep: values for some options; every combination runs in the
    same program, and a list of results comes back, the last option varying fastest.

    Raises InputError that names every unknown option and every value out of range.
    """
    sweep = dict(sweep or {})
    names, grid = list(sweep), list(itertools.product(*sweep.values()))
    points = [Point.of(family, {**options, **dict(zip(names, values, strict=True))}) for values in grid]
    seen = {(p.replicates, p.seed, p.precision, p.statistics) for p in points}
    if len(seen) > 1:
        raise InputError(
            "replicates, seed, precision and statistics are those of the whole program: they cannot be swept"
        )
    ((replicates, seed, precision, statistics),) = seen
    with jax.enable_x64(precision == "float64"):
        if points[0].family.traced:
            layout = tuple((p.family, p.regime, p.sizes) for p in points)
            found = jax.device_get(_program(layout, replicates, statistics)(jax.random.key(seed)))
        else:
            found = [_in_turn(p, replicates, statistics, jax.random.key(seed)) for p in points]
    results = []
    for point, values in zip(points, found, strict=True):
        law = expected(point.family, point.regime, point.sizes)
        law = {k: v for k, v in law.items() if k in values}
        values = {k: np.asarray(v[:replicates], np.float64) for k, v in values.items()}
        results.append(LabResult(family, point.config, values, law))
    return results if sweep else results[0]


@functools.lru_cache(64)
def _program(layout: tuple[tuple[Family, Regime, tuple[int, ...]], ...], replicates: int, statistics: tuple[str, ...]):
    """key -> for each point `{statistic: [R, K + 1]}`, R at least the replicates."""

    def one(family, regime, sizes, knobs, key):
        of_family = {k: v for k, v in knobs.items() if hasattr(family, k)}
        of_regime = {k: v for k, v in knobs.items() if k not in of_family}
        family, regime = dataclasses.replace(family, **of_family), dataclasses.replace(regime, **of_regime)
        return _wanted(family, chain(family, regime, sizes, key), statistics)

    def run(key):
        TRACES["lab"] += 1
        keys_R, results = jax.random.split(key, replicates), [None] * len(layout)
        for (family, regime, sizes), members in _groups(layout):
            knobs = {k: jnp.asarray([m[k] for _, m in members]) for k in members[0][1]}
            width = max(1, _row_values(family)) * max(sizes) * len(members)
            batch = None if family.apart else max(1, min(replicates, VALUES // width))
            over = _over(functools.partial(one, family, regime, sizes), knobs)
            found = jax.lax.map(over, keys_R, batch_size=batch)
            for i, (index, _) in enumerate(members):
                results[index] = {name: x[:, i] for name, x in found.items()}
        return results

    return jax.jit(run)


def _wanted(family: Family, found: dict[str, Any], statistics: tuple[str, ...]) -> dict[str, Any]:
    unknown = [s for s in statistics if s not in found]
    if unknown:
        raise InputError(f"lab {family.name}: no statistic {', '.join(unknown)}; there are: {', '.join(found)}")
    return {k: v for k, v in found.items() if not statistics or k in statistics}


def _in_turn(point: Point, replicates: int, statistics: tuple[str, ...], key: jax.Array) -> dict[str, np.ndarray]:
    """The chains of a family that cannot be traced: `{statistic: [R, K + 1]}`."""
    chains = [chain(point.family, point.regime, point.sizes, k) for k in jax.random.split(key, replicates)]
    found = {name: np.stack([x[name] for x in chains]) for name in chains[0]}
    return _wanted(point.family, found, statistics)


def _over(chains, knobs):
    """key -> statistics `[points, K + 1]` of one replicate, all points from the same random numbers."""
    if not knobs:
        return lambda key: jax.tree.map(lambda x: x[None], chains({}, key))
    return lambda key: jax.vmap(lambda point: chains(point, key))(knobs)


def _groups(layout):
    """Points that differ only in numbers that can be traced (the fields typed Any), together: ((family, regime, sizes),
    [(index, the numbers that differ)]). Every other difference gets a scan of its own in the one program."""
    groups: dict[Any, list[tuple[int, dict[str, float]]]] = {}
    for index, (family, regime, sizes) in enumerate(layout):
        numbers = {f.name: getattr(x, f.name) for x in (family, regime) for f in _dynamic(x)}
        fixed = tuple(
            (f.name, getattr(x, f.name))
            for x in (family, regime)
            for f in dataclasses.fields(x)
            if f not in _dynamic(x)
        )
        groups.setdefault((type(family), fixed, sizes), []).append((index, numbers))
    for members in groups.values():
        varying = [k for k in members[0][1] if len({numbers[k] for _, numbers in members}) > 1]
        yield layout[members[0][0]], [(index, {k: numbers[k] for k in varying}) for index, numbers in members]


def _dynamic(x: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(x) if f.type == "Any"]


def _row_values(family: Family) -> int:
    return getattr(family, "dimensions", 1) * getattr(family, "length", 1) * getattr(family, "components", 1)
