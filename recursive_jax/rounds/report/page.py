"""The report: one self-contained HTML file. It works offline, prints, and follows the reader's light or dark theme."""

from __future__ import annotations

import html
import importlib.resources
import json
import math
from typing import Any

import numpy as np
from etils import epath

from recursive_jax.collapse.likelihood import merged_bins
from recursive_jax.data.dataset import Dataset
from recursive_jax.rounds import storage
from recursive_jax.rounds.lineage import evaluations, manifests, resolve
from recursive_jax.rounds.report import charts
from recursive_jax.rounds.report.series import Arm, arms_of, change
from recursive_jax.rounds.report.task import task_section
from recursive_jax.rounds.report.verdicts import attribution_section, verdict_section

PARTS = (("kl_syn", "syntax"), ("kl_sem", "semantics"), ("kl_fact", "facts"), ("kl_dist", "distribution"))
PANELS = (
    ("ce_real", "Held-out real text", "cross-entropy, nats per token; lower is better"),
    ("ppl_gen", "Generated text, judged by the round-0 model", "perplexity"),
    ("valid", "Valid sentences", "right form, agreement and facts; share of generated sentences"),
    ("distinct_2", "Distinct bigrams", "share of generated bigrams that differ, at a fixed token count"),
    ("entropy_2gram", "Bigram entropy", "nats, at a fixed token count"),
    ("tail_mass_lost", "Tail mass lost", "share of the truth's mass on types no longer produced"),
    ("repetition_2", "Repetition", "share of repeated bigrams within a row"),
    ("length_mean", "Length", "tokens per generated row"),
)


def write_report(run: Any) -> epath.Path:
    """Writes RUN/report.html from what is committed in the run folder (also while it is still running)."""
    run = epath.Path(run)
    stored = manifests(run)
    record = storage.read_json(run / "run.json", "the run record")
    samples = _samples(run, stored, record["config"].get("evaluate", {}).get("show", 4))
    verdicts = "" if record["config"].get("recipe") == "finetune" else verdict_section(run)
    page = render(record, evaluations(run), stored, samples, verdicts)
    storage.write_atomic(run / "report.html", page.encode())
    return run / "report.html"


def render(record: dict, records: list[dict], stored: list[dict], samples: dict, verdicts: str = "") -> str:
    config = record["config"]
    arms = arms_of(records, list(config.get("arms", {})))
    base = next((r["metrics"] for r in records if r["round"] == 0), {})
    body = [_header(record, arms, records)]
    if arms and config.get("recipe") == "finetune":
        body.append(task_section(arms[0]))
    elif arms:
        headline = "kl_total" if "kl_total" in base else "ce_real"
        body += [_cards(arms, headline), _curves(arms, base, headline)]
        if "kl_total" in base:
            body += [_split(arms), attribution_section(arms)]
        body.append(verdicts)
        body += [_tails(arms), _histograms(arms, base), _samples_table(arms, samples)]
    body += [_ledger(stored), _lineage(stored), _settings(record)]
    css = importlib.resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    title = html.escape(str(config.get("name", "run")))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title} · recursive_jax</title><style>{css}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _header(record: dict, arms: list[Arm], records: list[dict]) -> str:
    config = record["config"]
    if config.get("recipe") == "finetune":
        how = (
            "an adapter of rank {rank} on the frozen base".format(**config["lora"])
            if config.get("lora")
            else "all weights"
        )
        return (
            f"<h1>{html.escape(str(config.get('name', 'run')))}</h1><p class=soft>{html.escape(str(config['base']))} fine-tuned on "
            f"{html.escape(str(config['task']['path']))}: {how}, {config['train']['steps']} steps, seed {record.get('seed')}, on "
            f"{html.escape(record.get('devices', ''))}. Round 0 is the model as it came, round 1 the trained one.</p>"
        )
    rounds = max((r["round"] for r in records), default=0)
    replicates = max((r["replicate"] for r in records), default=0) + 1
    chains = f"{len(arms)} regime{'s' if len(arms) != 1 else ''}"
    runs = f", {replicates} replicates each" if replicates > 1 else ""
    budget = config.get("rounds", {}).get("tokens")
    tokens = f", {budget:,} tokens a round" if budget else ""
    return (
        f"<h1>{html.escape(str(config.get('name', 'run')))}</h1><p class=soft>{chains}{runs}, {rounds} rounds{tokens}, "
        f"seed {record.get('seed')}, on {html.escape(record.get('devices', ''))}. Round 0 is the teacher, trained on real data; every later "
        "student learns from what the round before it wrote.</p>"
    )


def _cards(arms: list[Arm], metric: str) -> str:
    what = "KL to the truth, nats per token" if metric == "kl_total" else "held-out cross-entropy, nats per token"
    cards = []
    for arm in arms:
        c = change(arm, metric)
        if c is None:
            continue
        slope = (
            f"{c.slope:+.4f} ± {charts.number(c.slope_stderr)} a round after the first"
            if math.isfinite(c.slope_stderr)
            else ""
        )
        cards.append(
            f'<div class=arm style="--accent:var(--c{arm.colour})"><h3>{html.escape(arm.name)}</h3>'
            f"<b>{c.first:.3f} → {c.last:.3f}</b><div class=soft>{what}, round 0 to {c.rounds}</div>"
            f"<div class=verdict>{c.verdict}</div><div class=soft>{slope}</div></div>"
        )
    return (
        f"<div class=arms>{''.join(cards)}</div><p class=soft>“Keeps losing” means that the loss still grows from round to round, by a slope "
        "more than four standard errors above zero. The step from round 0 to round 1 is what one generation of synthetic data costs; the "
        "slope after it is what recursion adds.</p>"
    )


def _figure(title: str, note: str, svg: str) -> str:
    return f"<figure><figcaption><strong>{html.escape(title)}</strong>{html.escape(note)}</figcaption>{svg}</figure>"


def _curves(arms: list[Arm], base: dict, headline: str) -> str:
    panels = list(PANELS)
    if headline == "kl_total":
        panels.insert(0, ("kl_total", "KL to the truth", "exact, nats per token; lower is better"))
    figures = []
    for metric, title, note in panels:
        series = [a.series(metric) for a in arms if len(a.numbers(metric)) > 1]
        if not series:
            continue
        reference = None
        if metric == "ce_real" and "kl_total" in base:
            reference = ("best possible", base["ce_real"] - base["kl_total"])
        if metric == "tail_mass_lost" and "tail_mass_lost_null" in base:
            reference = ("by chance", base["tail_mass_lost_null"])
        figures.append(_figure(title, note, charts.lines(series, title, reference=reference)))
    bands = "Bands are one standard error: over replicates where there are several, else of the evaluation itself."
    return (
        f"<h2>What changed from round to round</h2><p class=soft>{bands}</p><div class=grid2>{''.join(figures)}</div>"
    )


def _split(arms: list[Arm]) -> str:
    top = max(a.mean("kl_total", k) for a in arms for k in a.numbers("kl_total"))
    figures = []
    for arm in arms:
        ks = arm.numbers("kl_total")
        parts = [(name, [arm.mean(key, k) for k in ks]) for key, name in PARTS]
        figures.append(_figure(arm.name, "", charts.stacked(parts, ks, f"KL split, {arm.name}", top)))
    key = "".join(f'<span class=key style="background:var(--p{i})"></span>{name}' for i, (_, name) in enumerate(PARTS))
    return (
        "<h2>Where the loss is</h2><p class=soft>The exact KL per token is the sum of four parts: mass on tokens of the wrong form, on tokens that "
        "break agreement or selection, on false facts, and the wrong distribution over what is true.</p>"
        f"<p>{key}</p><div class=grid3>{''.join(figures)}</div>"
    )


def _tails(arms: list[Arm]) -> str:
    figures = []
    for arm in arms:
        rows, names = [], []
        for k in sorted(arm.rounds):
            columns = [m["tail_lost_deciles"] for m in arm.rounds[k] if "tail_lost_deciles" in m]
            if columns:
                rows.append([sum(c) / len(c) for c in zip(*columns, strict=True)])
                names.append(f"round {k}")
        null = next((m["tail_lost_deciles_null"] for m in arm.rounds.get(0, []) if "tail_lost_deciles_null" in m), None)
        if null:
            rows, names = [null, *rows], ["by chance", *names]
        if rows:
            tip = "{row}: {value} of the types in decile {column} did not occur"
            columns = [str(i + 1) for i in range(len(rows[0]))]
            figures.append(_figure(arm.name, "", charts.heatmap(rows, names, columns, f"Tail, {arm.name}", tip)))
    note = "Percent of token types that do not occur in the samples, by how frequent they are in the truth; by chance: what as many independent draws from the truth would miss."
    return f"<h2>The tail</h2><p class=soft>{note}</p><div class=grid3>{''.join(figures)}</div>" if figures else ""


def _histograms(arms: list[Arm], base: dict) -> str:
    edges = base.get("ppl_hist_edges")
    if not edges:
        return ""
    means = {}  # of the replicates
    for arm in arms:
        for k in sorted(arm.rounds):
            if found := [m["ppl_hist_under_gen0"] for m in arm.rounds[k] if "ppl_hist_under_gen0" in m]:
                means[arm.name, k] = np.mean(found, axis=0)
    shown, edges = merged_bins(list(means.values()), edges)
    figures = []
    for arm in arms:
        own = [(k, h) for (name, k), h in zip(means, shown, strict=True) if name == arm.name]
        names, label = [f"round {k}" for k, _ in own], f"Perplexity histogram, {arm.name}"
        figures.append(_figure(arm.name, "", charts.ridges([h for _, h in own], edges, names, arm.colour, label)))
    note = (
        "How probable each round's rows look to the round-0 model. Mass moving left is text that grows more ordinary; a tail growing on the "
        "right is text the original would never write (The Curse of Recursion, figure 1)."
    )
    return f"<h2>Perplexity of what is written</h2><p class=soft>{note}</p><div class=grid3>{''.join(figures)}</div>"


def _samples_table(arms: list[Arm], samples: dict) -> str:
    rounds = sorted({k for _, k in samples})
    if not rounds:
        return ""
    heads = "".join(f'<th class=left style="color:var(--c{a.colour})">{html.escape(a.name)}</th>' for a in arms)
    lines = []
    for k in rounds:
        cells = []
        for arm in arms:
            texts = samples.get((arm.name, k)) or samples.get(("main", k), [])
            cells.append(f"<td class=text>{''.join(f'<div>{html.escape(t)}</div>' for t in texts)}</td>")
        lines.append(f"<tr><td>{k}</td>{''.join(cells)}</tr>")
    return (
        "<h2>What is written, side by side</h2><p class=soft>The first samples of each round, unselected: the same requests with the same random "
        f"numbers in every regime.</p><div class=scroll><table><tr><th>round</th>{heads}</tr>{''.join(lines)}</table></div>"
    )


def _ledger(stored: list[dict]) -> str:
    lines = []
    for m in stored:
        c = m["counts"]
        status = c.get("status", {})
        failed = sum(n for s, n in status.items() if s not in ("ok", "length"))
        rows = c.get("rows")
        share = f"{c['real_tokens'] / c['tokens']:.0%}" if c.get("tokens") and "real_tokens" in c else ""
        dropped = "; ".join(f"{r}: {n}" for r, n in c.get("dropped", {}).items()) or (
            f"failed: {failed}" if failed else ""
        )
        proposed = c.get("proposed", rows)
        cells = [
            m["arm"] if not m["path"].startswith("rounds/0000") else "shared",
            m["replicate"],
            m["round"],
            m["name"],
            m["verb"],
            "" if proposed is None else f"{proposed:,}",
            "" if rows is None else f"{rows:,}",
            dropped,
            share,
            f"{c['tokens']:,}" if "tokens" in c else "",
            f"{c['loss']:.4f}" if "loss" in c else "",
            f"{m['seconds']:.1f}",
        ]
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(x))}</td>" for x in cells) + "</tr>")
    heads = (
        "regime",
        "replicate",
        "round",
        "result",
        "verb",
        "proposed",
        "kept",
        "dropped by",
        "real",
        "tokens",
        "last loss",
        "seconds",
    )
    total = sum(m["seconds"] for m in stored)
    return (
        f"<h2>Ledger</h2><p class=soft>Every stored result: {len(stored)}, made in {total:,.0f} seconds.</p><details><summary>Show the {len(stored)} rows</summary>"
        f"<div class=scroll><table><tr>{''.join(f'<th>{h}</th>' for h in heads)}</tr>{''.join(lines)}</table></div></details>"
    )


def _lineage(stored: list[dict]) -> str:
    lines = []
    for m in stored:
        sources = [(resolve(stored, f, m), f) for f in m["inputs"].values()]
        inputs = ", ".join(str(f) if s is None else s["path"] for s, f in sources)
        lines.append(
            f"<tr><td>{html.escape(m['path'])}</td><td class=left>{m['fingerprint']}</td><td class=text>{html.escape(inputs)}</td></tr>"
        )
    return (
        "<h2>Lineage</h2><p class=soft>Each result names its inputs by fingerprint; equal inputs give equal fingerprints.</p>"
        "<details><summary>Show what was made from what</summary><div class=scroll><table><tr><th>result</th><th class=left>fingerprint</th>"
        f"<th class=left>made from</th></tr>{''.join(lines)}</table></div></details>"
    )


def _settings(record: dict) -> str:
    shown = {k: record[k] for k in ("seed", "devices", "processes", "versions", "config") if k in record}
    return f"<h2>Settings</h2><details><summary>Show the resolved config and versions</summary><pre>{html.escape(json.dumps(shown, indent=2))}</pre></details>"


def _samples(run: epath.Path, stored: list[dict], show: int) -> dict[tuple[str, int], list[str]]:
    """The first texts of each round's samples, by (arm, round), from replicate 0."""
    found: dict[tuple[str, int], list[str]] = {}
    for m in stored:
        if m["verb"] == "generate" and m["name"] == "samples" and m["replicate"] == 0 and show:
            files = sorted((run / m["path"]).glob("rows-*.parquet"))[:1]
            table = Dataset.read([str(f) for f in files]).table.slice(0, show)
            found[m["arm"], m["round"]] = [t[:400] or "(empty)" for t in table["text"].to_pylist()]
    return found
