"""Reading a run folder back: its evaluations, its chain of results, and the ancestors of a row."""

from __future__ import annotations

import re
from typing import Any

from etils import epath

from recursive_jax.errors import InputError
from recursive_jax.rounds import storage


def manifests(run: Any) -> list[dict]:
    """All committed results in the order arm (as in the config), replicate, round, time; `path` relative to the run."""
    run = epath.Path(run)
    record = run / "run.json"
    if not record.exists():
        raise InputError(f"{run} is not a run folder: there is no run.json in it")
    arms = list(storage.read_json(record, "the run record").get("config", {}).get("arms", {}))
    found = []
    for pattern in ("rounds/*/*/manifest.json", "*/rounds/*/*/manifest.json", "*/replicate-*/rounds/*/*/manifest.json"):
        for file in run.glob(pattern):
            manifest = storage.read_json(file, "the manifest")
            folder = file.parent
            found.append({**manifest, "path": str(folder.relative_to(run)), "time": file.stat().mtime})
    rank = {arm: i + 1 for i, arm in enumerate(arms)}
    found.sort(key=lambda m: (0 if m["path"].startswith("rounds/") else rank.get(m["arm"], 0), m["replicate"], m["round"], m["time"], m["name"]))
    return found


def evaluations(run: Any) -> list[dict]:
    """The metrics records of a run. A shared round 0 stands under the arm `main`."""
    run = epath.Path(run)
    return [
        storage.read_json(run / m["path"] / "metrics.json", "the evaluation") for m in manifests(run) if m["verb"] == "evaluate"
    ]


def ancestors(run: Any, row_id: str) -> list[dict]:
    """From a row back to the real data: the row, the model that wrote it, that model's data, and so on.

    Each step is {"what": "row" | "model" | "data", "path": ..., ...}. Raises InputError for an unknown row.
    """
    run = epath.Path(run)
    known = {m["fingerprint"]: m for m in manifests(run)}
    step = _find_row(run, list(known.values()), row_id)
    chain = [step]
    mark = step["model"]
    while mark in known:
        model = known[mark]
        chain.append({"what": "model", "path": model["path"], "fingerprint": mark, "round": model["round"]})
        data = known.get(model["inputs"].get("data", ""))
        if data is None:
            break
        sources = [known[f] for f in data["inputs"].values() if f in known]
        chain.append({
            "what": "data", "path": data["path"], "rows": data["counts"].get("rows"),
            "synthetic_rows": data["counts"].get("synthetic_rows"), "from": [s["path"] for s in sources],
        })
        newest = max(sources, key=lambda s: s["round"], default=None)
        mark = newest["inputs"].get("model", "") if newest is not None else ""
    return chain


def _find_row(run: epath.Path, stored: list[dict], row_id: str) -> dict:
    from recursive_jax.data.dataset import Dataset

    for manifest in stored:
        if manifest["verb"] != "generate" or not re.search(rf"(^|/){re.escape(manifest['name'])}/", row_id):
            continue
        for file in sorted((run / manifest["path"]).glob("rows-*.parquet")):
            found = Dataset.read([str(file)]).where(id=row_id)
            if len(found):
                row = found[0]
                return {"what": "row", "id": row_id, "path": manifest["path"], "parents": row["parents"], "model": row["model"], "text": row["text"], "round": row["round"]}
    raise InputError(f"{run} has no generated row with id {row_id!r}")
