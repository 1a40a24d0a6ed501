"""Reading a run folder back: its evaluations, its chain of results, and the ancestors of a row."""

from __future__ import annotations

import re
from typing import Any

from etils import epath

from recursive_jax import storage
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.rounds.durable import FORMAT, committed


def read_record(run: Any) -> dict:
    """RUN/run.json. Raises InputError where there is none, it is damaged, or of another version."""
    file = epath.Path(run) / "run.json"
    if not file.exists():
        raise InputError(f"{run} is not a run folder: there is no run.json in it")
    remedy = "start the run again with its config, which writes it anew; every result says itself what it is of"
    found = storage.plain_json(file, "the run record", remedy)
    made = found.get("format") if isinstance(found, dict) else None
    if isinstance(found, dict) and "checksum" in found:
        storage.opened(found, "the run record", file, remedy)  # a digit of the format may be what is damaged
    if isinstance(made, int) and made != FORMAT:
        raise InputError(
            f"{run} was made by another version of recursive_jax (run folder format {made}, this one writes {FORMAT}): "
            "finish it with that version, or give a new --workdir"
        )
    return storage.opened(found, "the run record", file, remedy)


def manifests(run: Any) -> list[dict]:
    """All committed results in the order arm (as in the config), replicate, round, time; `path` relative to the run."""
    run = epath.Path(run)
    arms = list(read_record(run).get("config", {}).get("arms", {}))
    found = [
        {**manifest, "path": str(folder.relative_to(run)), "time": manifest.get("finished", 0)}
        for folder, manifest in committed(run)
    ]
    rank = {arm: i + 1 for i, arm in enumerate(arms)}
    found.sort(
        key=lambda m: (
            0 if m["path"].startswith("rounds/") else rank.get(m["arm"], 0),
            m["replicate"],
            m["round"],
            m["time"],
            m["name"],
        )
    )
    return found


def resolve(stored: list[dict], mark: str, near: dict) -> dict | None:
    """The result with a fingerprint. Equal inputs give equal fingerprints in several chains: the one in the chain of
    `near` is meant, else the shared or first one."""
    found = [m for m in stored if m["fingerprint"] == mark]
    same = [m for m in found if (m["arm"], m["replicate"]) == (near["arm"], near["replicate"])]
    return (same or found or [None])[0]


def inputs_of(manifest: dict) -> list[str]:
    """Fingerprints of the stored results that a result was made from: of a view or a selection, those behind it."""
    behind = manifest.get("origins", {})
    return [f for name, mark in manifest["inputs"].items() for f in behind.get(name, [mark])]


def evaluations(run: Any) -> list[dict]:
    """The metrics records of a run. A shared round 0 stands under the arm `main`."""
    run = epath.Path(run)
    return [
        storage.read_json(run / m["path"] / "metrics.json", "the evaluation")
        for m in manifests(run)
        if m["verb"] == "evaluate"
    ]


def stored_rows(run: Any, manifest: dict, parts: int | None = None) -> Dataset:
    """The rows of a result of rows, checked; of its first `parts` files. Raises InputError naming a damaged one."""
    folder = epath.Path(run) / manifest["path"]
    names = sorted(n for n in manifest["files"] if n.startswith("rows-"))[:parts]
    storage.verify(folder, {n: manifest["files"][n] for n in names})
    return Dataset.read([str(folder / n) for n in names])


def ancestors(run: Any, row_id: str) -> list[dict]:
    """From a row back to the real data: the row, the model that wrote it, that model's data, and so on.

    Each step is {"what": "row" | "model" | "data", "path": ..., ...}. Raises InputError for an unknown row.
    """
    run = epath.Path(run)
    stored = manifests(run)
    step, near = _find_row(run, stored, row_id)
    chain = [step]
    model = resolve(stored, step["model"], near)
    while model is not None:
        chain.append(
            {"what": "model", "path": model["path"], "fingerprint": model["fingerprint"], "round": model["round"]}
        )
        behind = model.get("origins", {}).get("data") or [model["inputs"].get("data", "")]
        data = resolve(stored, behind[0], near)
        if data is None:
            break
        sources = [s for s in (resolve(stored, f, near) for f in inputs_of(data)) if s is not None]
        chain.append(
            {
                "what": "data",
                "path": data["path"],
                "rows": data["counts"].get("rows"),
                "synthetic_rows": data["counts"].get("synthetic_rows"),
                "from": [s["path"] for s in sources],
            }
        )
        newest = max(sources, key=lambda s: s["round"], default=None)
        model = None if newest is None else resolve(stored, newest["inputs"].get("model", ""), near)
    return chain


def _find_row(run: epath.Path, stored: list[dict], row_id: str) -> tuple[dict, dict]:
    """The row, and the manifest of the result it is in."""
    for manifest in stored:
        if manifest["verb"] != "generate" or not re.search(rf"(^|/){re.escape(manifest['name'])}/", row_id):
            continue
        found = stored_rows(run, manifest).where(id=row_id)
        if len(found):
            row = found[0]
            return {
                "what": "row",
                "id": row_id,
                "path": manifest["path"],
                "parents": row["parents"],
                "model": row["model"],
                "text": row["text"],
                "round": row["round"],
            }, manifest
    raise InputError(f"{run} has no generated row with id {row_id!r}")
