"""The report's numbers and figures as files for a paper."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from recursive_jax.collapse import figures
from recursive_jax.collapse.likelihood import merged_bins
from recursive_jax.collapse.metrics import panels as panel_metrics
from recursive_jax.csv_text import csv_text
from recursive_jax.errors import InputError
from recursive_jax.rounds.lineage import evaluations, manifests, read_record
from recursive_jax.rounds.profile import run_profiles
from recursive_jax.rounds.report.regimes import PARTS
from recursive_jax.rounds.report.series import Arm, arms_of


def export_report(run: Any, folder: str | Path) -> list[Path]:
    """Writes into `folder`: records.jsonl (one line for each evaluation), metrics.csv (mean and standard error by
    regime and round), profile-ARM.jsonl and .csv (verdicts with nulls), and, as SVG and PNG: curves, kl-split,
    tail-deciles, histograms. Returns the paths. Raises InputError for a run without evaluations, or without
    matplotlib."""
    run, folder = epath.Path(run), Path(folder)
    record, records = read_record(run), evaluations(run)
    if not records:
        raise InputError(f"{run} has no evaluation yet: there is nothing to draw")
    arms = arms_of(records, list(record["config"].get("arms", {})))
    folder.mkdir(parents=True, exist_ok=True)
    written = [_records(run, record, records, folder), _means(arms, folder)]
    for arm, profile in run_profiles(run).items():
        for suffix, text in ((".jsonl", profile.jsonl()), (".csv", profile.csv())):
            path = folder / f"profile-{arm}{suffix}"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    for name, figure in _figures(arms).items():
        written += figures.save(figure, folder, name)
    return written


def _records(run: epath.Path, record: dict, records: list[dict], folder: Path) -> Path:
    """One line for each evaluation, with what it was made from."""
    stored = {(m["arm"], m["round"], m["replicate"], m["name"]): m for m in manifests(run)}
    path = folder / "records.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for r in records:
            at = (r["arm"], r["round"], r["replicate"])
            rows = stored.get((*at, "training"), {}).get("counts", {})
            tokens, real = rows.get("tokens"), rows.get("real_tokens")
            line = {
                "run_id": record["config"].get("name"),
                "mode": r["arm"],
                "generation": r["round"],
                "seed": record.get("seed"),
                "replicate": r["replicate"],
                "config_hash": stored.get((*at, r["name"]), {}).get("fingerprint"),
                "parent_hash": r["model"],
                "tokens": tokens,
                "n_real": real,
                "n_synth": None if tokens is None or real is None else tokens - real,
                **r["metrics"],
            }
            out.write(json.dumps(line) + "\n")
    return path


def _means(arms: list[Arm], folder: Path) -> Path:
    path = folder / "metrics.csv"
    rows: list[list[Any]] = [["arm", "round", "metric", "mean", "stderr", "replicates"]]
    for arm in arms:
        for k in sorted(arm.rounds):
            for metric in sorted({m for record in arm.rounds[k] for m in record}):
                if values := arm.values(metric, k):
                    rows.append([arm.name, k, metric, arm.mean(metric, k), arm.stderr(metric, k), len(values)])
    path.write_text(csv_text(rows), encoding="utf-8")
    return path


def _figures(arms: list[Arm]) -> dict[str, Any]:
    panels = []
    known = {k for a in arms for r in a.rounds.values() for m in r for k, v in m.items() if isinstance(v, (int, float))}
    for m in panel_metrics(known):
        title, note, lines = m.title, m.note or m.unit, {}
        for arm in arms:
            s = arm.series(m.name)
            if s.x:
                lines[arm.name] = {"x": s.x, "y": s.y, "low": s.low, "high": s.high}
        if lines:
            panels.append((f"{title}\n{re.split('[;,] ', note)[0] if len(note) > 50 else note}", lines))
    found = {"curves": figures.curves(panels)}
    if any(a.numbers("kl_total") for a in arms):
        split = {
            a.name: (ks, {name: [a.mean(key, k) for k in ks] for key, name in PARTS})
            for a in arms
            if (ks := a.numbers("kl_total"))
        }
        found["kl-split"] = figures.stacked(split, "KL, nats per token")
    tails = {a.name: _lists(a, "tail_lost_deciles") for a in arms}
    if any(values for _, values in tails.values()):
        found["tail-deciles"] = figures.heatmap(tails, "share of types lost")
    drift = {a.name: _lists(a, "ppl_hist_under_gen0") for a in arms}
    if all_rows := [row for _, rows in drift.values() for row in rows]:
        edges = next(m["ppl_hist_edges"] for r in arms[0].rounds.values() for m in r if "ppl_hist_edges" in m)
        shown, edges = merged_bins(all_rows, edges)
        parts = np.split(shown, np.cumsum([len(rows) for _, rows in drift.values()])[:-1])
        drift = {name: (ks, part) for (name, (ks, _)), part in zip(drift.items(), parts, strict=True)}
        found["histograms"] = figures.histograms(drift, edges)
    return found


def _lists(arm: Arm, metric: str) -> tuple[list[int], list[list[float]]]:
    """(rounds, the metric's list of the first replicate) where there is one."""
    found = [(k, arm.rounds[k][0][metric]) for k in sorted(arm.rounds) if metric in arm.rounds[k][0]]
    return [k for k, _ in found], [values for _, values in found]
