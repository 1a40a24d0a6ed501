"""Rows for other tools: Parquet that `datasets.load_dataset` opens, with a card that says where they come from."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from etils import epath

from recursive_jax import __version__
from recursive_jax.data.dataset import SCHEMA, Dataset
from recursive_jax.data.files import read_rows
from recursive_jax.errors import InputError
from recursive_jax.rounds.lineage import inputs_of, manifests, read_record, resolve, stored_rows

PART = 100_000  # rows of a file
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
WHAT = {
    "id": "names the row",
    "parents": "ids of the rows it was made from",
    "operation": "what made it",
    "model": "fingerprint of the params that wrote it; empty: no model did",
    "round": "of the run",
    "seed": "of the run",
    "synthetic": "whether a model wrote it",
    "status": "`ok`, `length` (cut at the limit), or what failed",
    "prompt": "token ids that the model read",
    "tokens": "token ids that it wrote",
    "logprobs": "of these, in nats",
    "text": "the tokens as text",
}


def export_rows(
    source: str, out: str, result: str | None = None, license: str = "other", paper: str = "", name: str | None = None
) -> tuple[str, Dataset]:
    """Writes rows of a run (or of a Parquet, JSONL or CSV file) to the new folder `out`: data/*.parquet and README.md.

    result: the result of the run that holds them, as `status` names it; none: the last one that was trained on, else
    the last rows there are. license: an identifier of the hub's. paper: what the card cites. Returns (what was
    written, the rows). Raises InputError for an `out` that exists, a source that is none, and an unknown result."""
    if os.path.exists(out):
        raise InputError(f"{out} is there already: give a new folder")
    if Path(source).is_file():
        data, about, chosen = _of_file(source), [f"- file: {Path(source).name}"], Path(source).name
    else:
        stored = manifests(source)
        manifest = _chosen(source, stored, result)
        data, chosen = stored_rows(source, manifest), manifest["path"]
        about = _run_lines(source, stored, manifest)
    folder = Path(out)
    temporary = folder.with_name(f"{folder.name}.tmp")
    (temporary / "data").mkdir(parents=True, exist_ok=True)
    parts = max(1, -(-len(data) // PART))
    for n in range(parts):
        path = temporary / "data" / f"train-{n:05d}-of-{parts:05d}.parquet"
        pq.write_table(data.table.slice(n * PART, PART), path, compression="zstd")
    (temporary / "README.md").write_text(_card(name or folder.name, data, about, license, paper), encoding="utf-8")
    os.replace(temporary, folder)
    return chosen, data


def _of_file(path: str) -> Dataset:
    if path.endswith(".parquet"):
        return Dataset.read([path])
    return Dataset.from_rows([row for _, row in read_rows(path)])


def _chosen(run: str, stored: list[dict], result: str | None) -> dict:
    rows = [m for m in stored if any(f.startswith("rows-") for f in m["files"])]
    if not rows:
        raise InputError(f"{run} has no rows yet")
    if result is not None:
        found = [m for m in rows if m["path"] == result.strip("/")] or [m for m in rows if m["name"] == result][-1:]
        if not found:
            raise InputError(f"{run} has no rows called {result!r}; there are: {', '.join(m['path'] for m in rows)}")
        return found[0]
    trained = {mark for m in stored if m["verb"] == "train" for mark in inputs_of(m)}
    return ([m for m in rows if m["fingerprint"] in trained] or rows)[-1]


def _run_lines(run: str, stored: list[dict], manifest: dict) -> list[str]:
    """The card's lines on the run: its recipe, its sources, the results behind the rows, the models that wrote."""
    record = read_record(run)
    config = record.get("config", {})
    lines = [f"- recipe: `{config.get('recipe', 'of its own')}`, seed {record.get('seed')}"]
    source = (config.get("data") or {}).get("path") or (config.get("task") or {}).get("path")
    source = source or ("the embedded language" if "data" in config else None)
    lines += [f"- source: {source}"] if source else []
    base = config.get("base")
    lines += [f"- base model: {base}"] if base else []
    lines += ["", "### Lineage", "", "| result | made by | rows | dropped |", "|---|---|---|---|"]
    waiting, seen = [manifest], []
    while waiting:
        one = waiting.pop(0)
        if one["path"] in (m["path"] for m in seen):
            continue
        seen.append(one)
        marks = [*inputs_of(one), one["inputs"].get("model", "")]
        waiting += [m for m in (resolve(stored, mark, one) for mark in marks) if m is not None]
    for one in seen:
        counts = one["counts"]
        gone = "; ".join(f"{rule}: {n:,}" for rule, n in counts.get("dropped", {}).items())
        rows = f"{counts['rows']:,}" if isinstance(counts.get("rows"), int) else ""
        lines.append(f"| {one['path']} | {one['verb']} | {rows} | {gone} |")
    return lines


def _card(name: str, data: Dataset, about: list[str], license: str, paper: str) -> str:
    table = data.table
    has = lambda column: column in table.column_names
    synthetic = sum(map(bool, data.column("synthetic"))) if has("synthetic") else 0
    status = Counter(data.column("status")) if has("status") else Counter()
    size = next((label for most, label in SIZES if len(data) < most), "n>10M")
    header = {
        "license": license,
        "size_categories": [size],
        "tags": ["recursive_jax", *(["synthetic"] if synthetic else [])],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    kinds = f"{synthetic:,} written by a model, {len(data) - synthetic:,} not" if has("synthetic") else "of a file"
    lines += [f"{len(data):,} rows: {kinds}.", ""]
    if status:
        lines += ["By status: " + ", ".join(f"{s} {n:,}" for s, n in status.most_common()) + ".", ""]
    writers = [m for m, _ in Counter(data.column("model") if has("model") else []).most_common() if m]
    if writers:
        lines += [f"Written by the params {', '.join(f'`{m}`' for m in writers[:8])}.", ""]
    lines += ["## Where they come from", "", f"- made with recursive_jax {__version__}", *about, ""]
    lines += ["## Columns", "", "| column | type | |", "|---|---|---|"]
    lines += [
        f"| {f.name} | {f.type} | {WHAT.get(f.name, '') if f.name in SCHEMA.names else ''} |" for f in table.schema
    ]
    if paper:
        lines += ["", "## Papers", "", *(f"- {one.strip()}" for one in paper.split(";"))]
    return "\n".join([*lines, ""])


def source_is_run(source: str) -> bool:
    """Whether a source is a run folder."""
    return (epath.Path(source) / "run.json").exists()


def recipe_name(source: str) -> Any:
    """The recipe of a run; None for a file."""
    return read_record(source).get("config", {}).get("recipe") if source_is_run(source) else None
