"""Collapse metrics beside their public implementations, in turn in one process: seconds, and whether the values agree.

python benchmarks/metrics.py [--blocks 36000]      # needs nltk and scikit-learn, the extra `parity`
pip install --no-deps mauve-text faiss-cpu vendi-score prdc powerlaw mpmath      # for the other rows; left out without
them"""

import argparse
import importlib
import time

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from sklearn.neighbors import NearestNeighbors

from recursive_jax import lab
from recursive_jax.collapse import embeddings
from recursive_jax.collapse.divergence import zipf_exponent
from recursive_jax.collapse.mauve import mauve
from recursive_jax.collapse.selfbleu import self_bleu

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--blocks", type=int, default=36_000, help="rows of 64 tokens for self-BLEU")
parser.add_argument("--hypotheses", type=int, default=3, help="of them scored by NLTK, for each of --pairs")
parser.add_argument("--pairs", type=int, default=5)
args = parser.parse_args()


def beside(name, ours, theirs, scale=1.0):
    """Runs both --pairs times, in turn. scale: how much more work theirs would have been."""
    ours()  # compiles
    times = []
    for _ in range(args.pairs):
        begin = time.perf_counter()
        mine = ours()
        middle = time.perf_counter()
        other = theirs()
        times.append((middle - begin, (time.perf_counter() - middle) * scale))
    a, b = np.median(times, axis=0)
    off = float(np.abs(np.asarray(mine) - np.asarray(other)).max())
    ratio = np.median([y / x for x, y in times])
    print(f"{name:<46}{a:>10.3f} s{b:>14.3f} s{ratio:>12.1f}x   largest difference {off:.1e}", flush=True)


def package(name):
    """A public implementation, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: left out", flush=True)
        return None


rng = np.random.default_rng(0)
p = np.arange(1, 20_001) ** -1.0
rows = list(rng.choice(20_000, (args.blocks, 64), p=p / p.sum()))
lists, method = [r.tolist() for r in rows], SmoothingFunction().method1
print(f"{'metric':<46}{'ours':>12}{'theirs':>16}{'ratio':>13}")


def nltk_some():
    return [
        sentence_bleu(lists[:i] + lists[i + 1 :], lists[i], smoothing_function=method) for i in range(args.hypotheses)
    ]


beside(
    f"self-BLEU-4, {args.blocks:,} rows of 64 (NLTK by share)",
    lambda: self_bleu(rows)[: args.hypotheses],
    nltk_some,
    scale=args.blocks / args.hypotheses,
)

real, fake = rng.normal(size=(4000, 64)), rng.normal(0.1, 0.9, size=(4000, 64))


def sklearn_coverage():
    radius = lambda z: NearestNeighbors(n_neighbors=6).fit(z).kneighbors(z)[0][:, -1]
    real_radius, fake_radius = radius(real), radius(fake)
    away = np.sqrt(np.maximum((fake**2).sum(1)[:, None] + (real**2).sum(1)[None] - 2 * fake @ real.T, 0))
    inside = away < real_radius
    recall = (away < fake_radius[:, None]).any(0).mean()
    return [inside.any(1).mean(), recall, inside.sum() / 5 / len(fake), inside.any(0).mean()]


beside(
    "precision, recall, density, coverage, 4,000 x 64",
    lambda: list(embeddings.coverage(fake, real).values()),
    sklearn_coverage,
)


if prdc := package("prdc"):
    beside(
        "the same by the package prdc",
        lambda: list(embeddings.coverage(fake, real).values()),
        lambda: [prdc.compute_prdc(real, fake, nearest_k=5)[k] for k in ("precision", "recall", "density", "coverage")],
    )


def plain_vendi():
    unit = real / np.linalg.norm(real, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    values = values[values > 1e-12]
    return np.exp(-(values * np.log(values)).sum())


beside("Vendi score, 4,000 x 64 (theirs: the N x N matrix)", lambda: embeddings.vendi(real), plain_vendi)
if vendi_score := package("vendi_score"):
    from vendi_score import vendi as theirs

    beside("the same by the package vendi-score", lambda: embeddings.vendi(real), lambda: theirs.score_dual(real))
if package("mauve"):
    from mauve import compute_mauve

    spread = rng.normal(size=(2000, 64)) * np.arange(1, 65) ** -0.5
    narrow = rng.normal(0.05, 0.8, size=(2000, 64)) * np.arange(1, 65) ** -0.5
    beside(
        "MAUVE, 2,000 x 64 (k-means differ by their draws)",
        lambda: mauve(narrow, spread),
        lambda: compute_mauve(p_features=spread, q_features=narrow, verbose=False).mauve,
    )
if powerlaw := package("powerlaw"):
    ranks = rng.choice(2_000, 40_000, p=(w := np.arange(1, 2_001) ** -1.2) / w.sum()) + 1
    counts = np.sort(np.bincount(ranks, minlength=2_001)[1:])[::-1]
    by_rank = np.repeat(np.arange(1, len(counts) + 1), counts)
    beside(
        "Zipf exponent by maximum likelihood, 40,000 tokens",
        lambda: zipf_exponent(counts),
        lambda: (
            powerlaw.Fit(by_rank, discrete=True, xmin=1, xmax=int((counts > 0).sum()), verbose=False).power_law.alpha
        ),
    )


def published_loop(d=1, n=100, rounds=100, seeds=100):
    """Collapse or Thrive's Gaussian cell as its script has it: a loop over seeds and rounds of fit and sample."""
    variances = []
    for seed in range(seeds):
        rng, mean, cov = np.random.default_rng(seed), np.zeros(d), np.eye(d)
        for _ in range(rounds):
            x = rng.multivariate_normal(mean, cov, n)
            mean, cov = x.mean(0), np.cov(x.T, bias=True).reshape(d, d)
        variances.append(np.trace(cov) / d)
    return np.mean(variances)


for d, n in ((1, 100), (10, 100), (100, 1000)):
    cell = dict(dimensions=d, samples=n, rounds=100, replicates=100, statistics=["variance"])
    beside(
        f"Gaussian chain, d = {d}, n = {n}, 100 rounds x 100",
        lambda cell=cell: lab("gaussian", **cell).mean["variance"][-1],
        lambda d=d, n=n: published_loop(d, n),
    )
