"""The report's numbers and figures as files for a paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etils import epath

from recursive_jax.collapse import figures
from recursive_jax.collapse.metrics import panels as panel_metrics
from recursive_jax.csv_text import csv_text
from recursive_jax.errors import InputError
from recursive_jax.rounds.lineage import manifests
from recursive_jax.rounds.report.page import Panel, View, panels_of, training_losses
from recursive_jax.rounds.report.regimes import PARTS, perplexity_histograms, tail_deciles
from recursive_jax.rounds.report.series import Arm


def export_report(run: Any, folder: str | Path) -> list[Path]:
    """Writes into `folder`: records.jsonl (one line for each evaluation), metrics.csv (mean and standard error by
    regime and round), profile-ARM.jsonl and .csv (verdicts with nulls), and, as SVG and PNG, what the run has of:
    curves, training, kl-split, tail-deciles, histograms. Returns the paths. Raises InputError for a run without
    evaluations, or without matplotlib."""
    view, folder = View.of(run), Path(folder)
    if not view.records:
        raise InputError(f"{run} has no evaluation yet: there is nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    written = [_records(view.run, view.record, view.records, folder), _means(view.arms, folder)]
    for arm, profile in view.profiles.items():
        for suffix, text in ((".jsonl", profile.jsonl()), (".csv", profile.csv())):
            path = folder / f"profile-{arm}{suffix}"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    for name, figure in _figures(view).items():
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


def _figures(view: View) -> dict[str, Any]:
    arms, found = view.arms, {}
    panels = [(f"{p.metric.title}\n{p.note}", _lines(p)) for p in panels_of(view, panel_metrics(view.metrics))]
    if panels:
        found["curves"] = figures.curves(panels)
    if logs := training_losses(view):
        lines = {n: {"x": [x for x, _ in p], "y": [y for _, y in p]} for n, p in logs}
        found["training"] = figures.curves([("Training loss", lines)], across="step")
    if any(a.numbers("kl_total") for a in arms):
        split = {
            a.name: (ks, {name: [a.mean(key, k) for k in ks] for key, name in PARTS})
            for a in arms
            if (ks := a.numbers("kl_total"))
        }
        found["kl-split"] = figures.stacked(split, "KL, nats per token")
    if tails := tail_deciles(arms):
        found["tail-deciles"] = figures.heatmap(tails, "share of types lost")
    if histograms := perplexity_histograms(arms, view.base):
        rows, edges = histograms
        colours = [a.colour for a in arms if a.name in rows]
        found["histograms"] = figures.ridges(rows, edges, colours)
    return found


def _lines(panel: Panel) -> dict[str, dict[str, Any]]:
    lines: dict[str, dict[str, Any]] = {
        s.name: {"x": s.x, "y": s.y, "low": s.low, "high": s.high, "colour": s.colour} for s in panel.series
    }
    first = next(iter(lines.values()))
    if panel.null is not None:
        first |= dict(zip(("null_x", "null_lo", "null_hi"), panel.null, strict=True))
    if panel.reference is not None:
        first["reference"] = panel.reference
    return lines
