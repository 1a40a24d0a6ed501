"""The options of `lab`: names, defaults, ranges, and what does not go together."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from recursive_jax.collapse.lab.categorical import Categorical, Poisson
from recursive_jax.collapse.lab.chain import REGIMES, Family, Regime
from recursive_jax.collapse.lab.gaussian import ESTIMATORS, Gaussian
from recursive_jax.collapse.lab.kernels import Kernel, Mixture
from recursive_jax.collapse.lab.linear import Classifier, Regression
from recursive_jax.collapse.lab.network import TransformerFamily
from recursive_jax.collapse.lab.ngram import Ngram
from recursive_jax.collapse.lab.vae import VAE, resolve_images
from recursive_jax.errors import InputError, problems

FAMILIES: dict[str, type[Family]] = {
    "gaussian": Gaussian,
    "categorical": Categorical,
    "mixture": Mixture,
    "poisson": Poisson,
    "kde": Kernel,
    "regression": Regression,
    "classifier": Classifier,
    "ngram": Ngram,
    "vae": VAE,
    "transformer": TransformerFamily,
}
SAMPLES = {
    "kde": 100,
    "mixture": 1000,
    "regression": 111,
    "classifier": 1000,
    "ngram": 200,
    "vae": 2000,
    "transformer": 1000,
}
NETWORKS = ("vae", "transformer")  # trained by gradient steps: minutes a chain, in float32
VERIFIED = ("gaussian", "categorical", "classifier", "transformer")
_SET_BY_US = ("samples", "pooled", "population", "counted", "root")
_CHOICES = {
    "regime": REGIMES,
    "estimator": ESTIMATORS,
    "covariates": ("same", "fresh"),
    "draw": ("auto", "rows", "statistics"),
    "precision": ("float64", "float32"),
}
_RANGES = {
    "rounds": (1, 1e6),
    "replicates": (1, 1e7),
    "seed": (0, 2**63 - 1),
    "dimensions": (1, 1e5),
    "categories": (1, 1e8),
    "components": (1, 1e4),
    "order": (1, 4),
    "length": (1, math.inf),
    "right_types": (1, math.inf),
    "fraction": (0, 1),
    "weight": (0, 1),
    "keep_right": (0, 1),
    "keep_wrong": (0, 1),
    "error": (0, 1),
    "temperature": (1e-6, math.inf),
    "shrink": (0, math.inf),
    "guidance": (0, math.inf),
    "bandwidth": (0, math.inf),
    "noise": (0, math.inf),
    "radius": (0, math.inf),
    "rate": (0, math.inf),
    "zipf": (0, math.inf),
    "smoothing": (0, math.inf),
    "growth": (0, math.inf),
    "steps": (1, math.inf),
    "batch": (1, math.inf),
    "learning_rate": (1e-12, math.inf),
    "layers": (1, math.inf),
    "width": (1, math.inf),
    "heads": (1, math.inf),
    "context": (8, 512),
    "channels": (1, math.inf),
    "latent": (1, math.inf),
    "truncation": (0, math.inf),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One configuration, checked."""

    family: Family
    regime: Regime
    sizes: tuple[int, ...]
    replicates: int
    seed: int
    precision: str
    statistics: tuple[str, ...]
    config: dict[str, Any] = dataclasses.field(compare=False)

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Point:
        if name not in FAMILIES:
            raise InputError(f"lab: no family {name!r}; there are: {', '.join(FAMILIES)}")
        kind = FAMILIES[name]
        own = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in _SET_BY_US}
        common = {
            "samples": SAMPLES.get(name, 100),
            "rounds": 4 if name in NETWORKS else 10,
            "regime": "replace",
            "fraction": 0.1,
            "weight": 0.5,
            "keep_right": 1.0,
            "keep_wrong": 1.0,
            "replicates": 1 if name in NETWORKS else 1000,
            "seed": 0,
            "growth": 0.0,
            "schedule": (),
            "precision": "float32" if name in NETWORKS else "float64",
            "statistics": (),
        }
        wrong, config = [], {**common, **own}
        for key, value in options.items():
            if key not in config:
                near = difflib.get_close_matches(key, config, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(config)}"
                wrong.append(f"{key}={value}: {name} has no such option{hint}")
                continue
            try:
                config[key] = _value(key, value, config[key])
            except ValueError as error:
                wrong.append(f"{key}={value}: {error}")
        if not wrong:
            wrong = _contradictions(name, config, options)
        if wrong:
            raise problems(f"lab {name} has {len(wrong)} problem(s):", wrong)
        return cls._built(name, kind, own, config)

    @classmethod
    def _built(cls, name, kind, own, config) -> Point:
        regime = Regime(*(config[k] for k in ("regime", "fraction", "weight", "keep_right", "keep_wrong")))
        M, K = config["samples"], config["rounds"]
        sizes = tuple(config["schedule"]) or tuple(
            1 if M == math.inf else round(M * k ** config["growth"]) for k in range(1, K + 1)
        )
        fields = {k: config[k] for k in own}
        if kind is Categorical:
            few = max(sizes) > 30 * config["categories"] and regime.name != "accumulate_subsample"
            fields |= {"population": M == math.inf, "counted": few}
        elif kind is VAE:
            fields["population"] = M == math.inf
        elif kind is Gaussian:
            plain = regime.name in ("replace", "fresh", "anchor")
            few, many = plain and max(sizes) <= config["dimensions"], plain and min(sizes) >= 4 * config["dimensions"]
            many = many or config["draw"] == "statistics"
            fields["root"] = "rows" if few else "whitened" if many else "triangular"
        elif kind is Kernel:
            pooled = sum(sizes) if regime.name == "accumulate" else max(sizes) * (1 + (regime.name == "weighted"))
            fields |= {"samples": max(sizes), "pooled": pooled}
        elif kind is Regression:
            fields["samples"] = max(sizes)
        return cls(
            kind(**fields),
            regime,
            sizes,
            config["replicates"],
            config["seed"],
            config["precision"],
            tuple(config["statistics"]),
            {k: list(v) if isinstance(v, tuple) else ("inf" if v == math.inf else v) for k, v in config.items()},
        )


def _whole(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError("a whole number is wanted") from None


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError("a number is wanted") from None


def _value(key: str, value: Any, default: Any) -> Any:
    """The value in the type of the default, or ValueError with the remedy."""
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ValueError(f"one of {', '.join(_CHOICES[key])} is wanted")
        return value
    if isinstance(default, str):
        return str(value)
    if isinstance(default, tuple):
        items = value.split(",") if isinstance(value, str) else list(np.atleast_1d(value))
        kind = {"schedule": _whole, "statistics": str}.get(key, _number)
        return tuple(kind(x) for x in items)
    if key == "samples":
        if str(value) == "inf":
            return math.inf
        number = _whole(value)
        if number < 2:
            raise ValueError("at least 2 rows are wanted")
        return number
    number = _whole(value) if isinstance(default, int) else _number(value)
    low, high = _RANGES.get(key, (-math.inf, math.inf))
    if not low <= number <= high:
        raise ValueError(
            f"a number from {low:g} to {high:g} is wanted" if high < math.inf else f"at least {low:g} is wanted"
        )
    return number


def _contradictions(name: str, config: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Values that are fine alone and not together. Fills in what follows from others."""
    wrong, regime = [], config["regime"]
    if config["samples"] == math.inf:
        if name not in ("categorical", "vae"):
            wrong.append(f"samples=inf: only categorical and vae can be drawn from infinitely often, not {name}")
        if regime != "replace" and not (regime == "filtered" and name == "categorical"):
            wrong.append(f"samples=inf: with regime=replace or filtered, not {regime}")
    if regime in ("fresh", "anchor") and config["samples"] != math.inf:
        if not 1 <= round(config["fraction"] * config["samples"]) < config["samples"] and config["fraction"] > 0:
            wrong.append(
                f"fraction={config['fraction']}: it must leave a row of each kind among samples={config['samples']}"
            )
        if config["fraction"] == 0 and regime == "anchor":
            wrong.append("fraction=0: an anchor has rows; use regime=replace")
    if config["schedule"]:
        if "rounds" in given and len(config["schedule"]) != config["rounds"]:
            wrong.append(f"schedule has {len(config['schedule'])} sizes, rounds={config['rounds']}; give as many")
        config["rounds"] = len(config["schedule"])
        config["samples"] = config["schedule"][0]
    if name in NETWORKS and config["precision"] != "float32":
        wrong.append(f"precision={config['precision']}: {name} is trained in float32")
    if name == "vae":
        try:
            config["images"] = resolve_images(config["images"])
        except ValueError as error:
            wrong.append(f"images={config['images']}: {error}")
    if regime in ("fresh", "anchor") and (config["growth"] or len(set(config["schedule"])) > 1):
        wrong.append(f"regime={regime} has rounds of one size; leave growth and schedule away")
    if regime == "filtered" and name not in VERIFIED:
        wrong.append(f"regime=filtered: {name} has no verifier; {', '.join(VERIFIED)} have one")
    if regime == "weighted" and config.get("estimator") == "unbiased":
        wrong.append("estimator=unbiased: weighted rows have no n - 1; use estimator=mle or known_variance")
    if name == "categorical":
        if config["probabilities"]:
            if "categories" in given and len(config["probabilities"]) != config["categories"]:
                wrong.append(
                    f"probabilities: {config['categories']} are wanted, there are {len(config['probabilities'])}"
                )
            config["categories"] = len(config["probabilities"])
            if min(config["probabilities"]) <= 0:
                wrong.append("probabilities: every type needs a positive one; leave the others away")
        if config["right_types"] > config["categories"]:
            wrong.append(f"right_types={config['right_types']}: there are {config['categories']} categories")
    if name == "gaussian" and config["spectrum"]:
        if "dimensions" in given and len(config["spectrum"]) != config["dimensions"]:
            wrong.append(f"spectrum: {config['dimensions']} variances are wanted, there are {len(config['spectrum'])}")
        config["dimensions"] = len(config["spectrum"])
        if min(config["spectrum"]) <= 0:
            wrong.append("spectrum: variances are positive")
    if name == "gaussian":
        wrong += _how_to_draw(config)
    if name == "regression" and "covariates" not in given and regime not in ("replace", "accumulate"):
        config["covariates"] = "fresh"
    if name == "regression" and config["samples"] <= config["dimensions"]:
        wrong.append(f"samples={config['samples']}: least squares in {config['dimensions']} dimensions needs more rows")
    if name == "ngram" and config["categories"] ** config["order"] > 2**22:
        wrong.append(
            f"order={config['order']}: a table of {config['categories']}^{config['order']} entries is too large"
        )
    return wrong


def _how_to_draw(config: dict[str, Any]) -> list[str]:
    """Settles draw=auto: statistics where there are many rows of several dimensions."""
    regime, d = config["regime"], config["dimensions"]
    needs_rows = regime not in ("replace", "fresh", "anchor", "accumulate") or config["truncation"]
    fewest = min(config["schedule"], default=config["samples"])
    share = round(config["fraction"] * fewest) if regime in ("fresh", "anchor") else fewest
    fewest = min(share, (fewest - share) or fewest)
    if config["draw"] == "auto":
        config["draw"] = "statistics" if d > 1 and fewest >= 4 * d and not needs_rows else "rows"
    elif config["draw"] == "statistics" and needs_rows:
        return [f"draw=statistics: regime={regime} or truncation needs the rows themselves; use draw=rows"]
    elif config["draw"] == "statistics" and fewest <= d:
        return [f"draw=statistics: more rows of each kind than dimensions={d} are wanted, there are {fewest}"]
    return []
