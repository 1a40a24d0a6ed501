"""How long curation at scale takes, and whether it decides as the slow way does.

    python benchmarks/curation.py novel --rows 52000          against rouge_score on a sample
    python benchmarks/curation.py near --rows 1000000         rensa's signatures, datasketch's beside them on a sample
    python benchmarks/curation.py decontaminate --rows 1000000 --items gsm8k/test.jsonl

Texts are made up, with the lengths that Alpaca's instructions have (a median of ten words, from three to forty) or of
200 words, Zipf-distributed over 20,000 words; a third of the instructions are edits of earlier ones. One JSON line for
each measurement: seconds, rows, peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

WORDS = 20_000


def zipf(rng: np.random.Generator, count: int) -> np.ndarray:
    shares = 1 / np.arange(1, WORDS + 1)
    return rng.choice(WORDS, size=count, p=shares / shares.sum())


def instructions(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(2.35, 0.45, count), 3, 40).astype(int)
    drawn, made, at = zipf(rng, int(lengths.sum()) + 4 * count), [], 0
    for length in lengths:
        if made and rng.random() < 0.33:
            words = list(made[rng.integers(len(made))])
            for _ in range(rng.integers(1, 4)):
                words[rng.integers(len(words))], at = f"w{drawn[at]}", at + 1
        else:
            words, at = [f"w{n}" for n in drawn[at : at + length]], at + length
        made.append(words)
    return [" ".join(words) for words in made]


def documents(count: int, length: int = 200, seed: int = 0) -> pa.Array:
    """Every tenth is an earlier one with a word in fifty changed."""
    rng = np.random.default_rng(seed)
    names = np.array([f"w{n}" for n in range(WORDS)])
    parts, kept = [], None
    for begin in range(0, count, 10_000):
        size = min(10_000, count - begin)
        words = zipf(rng, size * length).reshape(size, length)
        again = np.flatnonzero(rng.random(size) < 0.1)
        if kept is not None:
            words[again] = kept[rng.integers(len(kept), size=len(again))]
            places = rng.integers(length, size=(len(again), length // 50))
            edited = words[again]
            np.put_along_axis(edited, places, zipf(rng, places.size).reshape(places.shape), 1)
            words[again] = edited
        kept = words[:2000].copy()
        parts.append(pa.array([" ".join(row) for row in names[words]], pa.large_string()))
    return pa.chunked_array(parts)


def dataset(texts):
    from recursive_jax.data.dataset import Dataset

    count = len(texts)
    column = texts if isinstance(texts, pa.ChunkedArray) else pa.array(texts, pa.large_string())
    ids = pa.array([f"row/{n}" for n in range(count)], pa.large_string())
    return Dataset(pa.table({"id": ids, "text": column}))


def said(name: str, begin: float, rows: int, **more) -> None:
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"name": name, "rows": rows, "seconds": round(seconds, 1), "peak_gb": round(peak, 2), **more}))


def novel(rows: int) -> None:
    from recursive_jax.curate.novel import Novel

    texts = instructions(rows)
    data = dataset(texts)
    begin = time.perf_counter()
    kept = np.array(Novel(0.7)(data))
    said("novel(0.7)", begin, rows, kept=int(kept.sum()))
    from rouge_score.rouge_scorer import RougeScorer

    sample = 400
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    begin, pool, wanted = time.perf_counter(), [], []
    for text in texts[:sample]:
        wanted.append(all(scorer.score(text, other)["rougeL"].fmeasure <= 0.7 for other in pool))
        pool += [text] if wanted[-1] else []
    pairs = sum(range(len(pool)))
    seconds = time.perf_counter() - begin
    whole = seconds / pairs * kept.sum() ** 2 / 2 / 3600
    said("rouge_score", begin, sample, equal=wanted == kept[:sample].tolist(), hours_for_all=round(whole, 1))


def near(rows: int) -> None:
    from recursive_jax.curate.near import NearDuplicates

    begin = time.perf_counter()
    data = dataset(documents(rows))
    said("texts", begin, rows)
    begin = time.perf_counter()
    kept = NearDuplicates(0.8)(data)
    said("unique(near=0.8)", begin, rows, dropped=int((~kept).sum()))
    from datasketch import MinHash, MinHashLSH

    sample = min(rows, 2000)
    texts = data.table["text"].slice(0, sample).to_pylist()
    begin, index = time.perf_counter(), MinHashLSH(threshold=0.8, num_perm=128)
    for n, text in enumerate(texts):
        words = text.split()
        signature = MinHash(num_perm=128)
        signature.update_batch([" ".join(words[i : i + 3]).encode() for i in range(len(words) - 2)])
        if not index.query(signature):
            index.insert(n, signature)
    minutes = (time.perf_counter() - begin) / sample * rows / 60
    said("datasketch", begin, sample, minutes_for_all=round(minutes, 1))


def decontaminate(rows: int, items: str) -> None:
    from recursive_jax.curate.decontaminate import Contaminated

    asked = [json.loads(line)["question"] for line in Path(items).read_text().splitlines()]
    rng = np.random.default_rng(1)
    texts = documents(rows).to_pylist()
    places = rng.choice(rows, min(len(asked), rows // 10), replace=False)
    for n, place in enumerate(places):  # whole, or its first two thirds, in the middle of a row
        item = asked[n] if n % 2 else " ".join(asked[n].split()[: max(8, 2 * len(asked[n].split()) // 3)])
        words = texts[place].split()
        texts[place] = " ".join([*words[:100], item, *words[100:]])
    data = dataset(texts)
    begin = time.perf_counter()
    item, _, _ = Contaminated(tuple(asked)).hits(data)
    found = set(np.flatnonzero(item >= 0).tolist())
    recall = len(found & set(places.tolist())) / len(places)
    said("decontaminate", begin, rows, items=len(asked), recall=recall, false=len(found - set(places.tolist())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["novel", "near", "decontaminate"])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--items", default="")
    args = parser.parse_args()
    if args.what == "decontaminate":
        decontaminate(args.rows, args.items)
    else:
        {"novel": novel, "near": near}[args.what](args.rows)


if __name__ == "__main__":
    main()
