"""The report of rounds under regimes: what each one lost, where, and what it writes."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np

from recursive_jax.collapse.likelihood import merged_bins
from recursive_jax.collapse.metrics import panels
from recursive_jax.rounds.report import charts
from recursive_jax.rounds.report.page import Layout, View, curves
from recursive_jax.rounds.report.series import Arm, change
from recursive_jax.rounds.report.verdicts import attribution_section, verdict_section

PARTS = (("kl_syn", "syntax"), ("kl_sem", "semantics"), ("kl_fact", "facts"), ("kl_dist", "distribution"))


def header(view: View) -> str:
    rounds = max((r["round"] for r in view.records), default=0)
    replicates = max((r["replicate"] for r in view.records), default=0) + 1
    chains = f"{len(view.arms)} regime{'s' if len(view.arms) != 1 else ''}"
    runs = f", {replicates} replicates each" if replicates > 1 else ""
    budget = view.config.get("rounds", {}).get("token_budget")
    tokens = f", {budget:,} tokens a round" if budget else ""
    return (
        f"{chains}{runs}, {rounds} rounds{tokens}. Round 0 is the teacher, trained on real data; every later student "
        "learns from "
        "what the round before it wrote."
    )


def sections(view: View) -> list[str]:
    arms, base = view.arms, view.base
    if not arms:
        return []
    body = [
        _cards(arms, "kl_total" if "kl_total" in base else "ce_real"),
        curves(view, panels(view.metrics)),
    ]
    if "kl_total" in base:
        if "kl_syn" in base:  # a bound on the likelihood of whole rows has no parts
            body.append(_split(arms))
        body.append(attribution_section(arms))
    body.append(verdict_section(view.profiles))
    shown = view.config.get("evaluate", {}).get("show", 4)
    return [*body, _tails(arms), _histograms(arms, base), _samples_table(arms, view.samples(shown))]


regimes_layout = Layout(header, sections, compares=True)


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
        f"<div class=arms>{''.join(cards)}</div><p class=soft>“Keeps losing” means that the loss still grows from "
        "round to round, by a slope "
        "more than four standard errors above zero. The step from round 0 to round 1 is what one generation of "
        "synthetic data costs; the "
        "slope after it is what recursion adds.</p>"
    )


def _split(arms: list[Arm]) -> str:
    top = max(a.mean("kl_total", k) for a in arms for k in a.numbers("kl_total"))
    figures = []
    for arm in arms:
        ks = arm.numbers("kl_total")
        parts = [(name, [arm.mean(key, k) for k in ks]) for key, name in PARTS]
        figures.append(charts.figure(arm.name, "", charts.stacked(parts, ks, f"KL split, {arm.name}", top)))
    key = "".join(f'<span class=key style="background:var(--p{i})"></span>{name}' for i, (_, name) in enumerate(PARTS))
    return (
        "<h2>Where the loss is</h2><p class=soft>The exact KL per token is the sum of four parts: mass on tokens of "
        "the wrong form, on tokens that "
        "break agreement or selection, on false facts, and the wrong distribution over what is true.</p>"
        f"<p>{key}</p><div class=grid3>{''.join(figures)}</div>"
    )


def tail_deciles(arms: list[Arm]) -> dict[str, tuple[list[str], list[list[float]]]]:
    """arm -> (names of the rows, shares of types lost by decile): what chance loses, then the rounds."""
    found = {}
    for arm in arms:
        rows, names = [], []
        for k in sorted(arm.rounds):
            columns = [m["tail_lost_deciles"] for m in arm.rounds[k] if "tail_lost_deciles" in m]
            if columns:
                rows.append([sum(c) / len(c) for c in zip(*columns, strict=True)])
                names.append(f"round {k}")
        null = next((m["tail_lost_deciles_null"] for m in arm.rounds.get(0, []) if "tail_lost_deciles_null" in m), None)
        if null and rows:
            rows, names = [null, *rows], ["by chance", *names]
        if rows:
            found[arm.name] = names, rows
    return found


def _tails(arms: list[Arm]) -> str:
    tip = "{row}: {value} of the types in decile {column} did not occur"
    figures = []
    for name, (names, rows) in tail_deciles(arms).items():
        columns = [str(i + 1) for i in range(len(rows[0]))]
        figures.append(charts.figure(name, "", charts.heatmap(rows, names, columns, f"Tail, {name}", tip)))
    note = (
        "Percent of token types that do not occur in the samples, by how frequent they are in the truth; by chance: "
        "what as many independent draws from the truth would miss."
    )
    return f"<h2>The tail</h2><p class=soft>{note}</p><div class=grid3>{''.join(figures)}</div>" if figures else ""


def perplexity_histograms(arms: list[Arm], base: dict) -> tuple[dict[str, tuple[list[int], list[Any]]], Any] | None:
    """(arm -> (rounds, shares of rows: means over replicates), edges), of the bins that any of them uses."""
    edges, means = base.get("ppl_hist_edges"), {}
    for arm in arms if edges else []:
        for k in sorted(arm.rounds):
            if found := [m["ppl_hist_under_gen0"] for m in arm.rounds[k] if "ppl_hist_under_gen0" in m]:
                means[arm.name, k] = np.mean(found, axis=0)
    if not means:
        return None
    shown, edges = merged_bins(list(means.values()), edges)
    by_arm: dict[str, tuple[list[int], list[Any]]] = {}
    for (name, k), shares in zip(means, shown, strict=True):
        rounds, rows = by_arm.setdefault(name, ([], []))
        rounds.append(k)
        rows.append(shares)
    return by_arm, edges


def _histograms(arms: list[Arm], base: dict) -> str:
    found = perplexity_histograms(arms, base)
    if found is None:
        return ""
    by_arm, edges = found
    figures = []
    for arm in (a for a in arms if a.name in by_arm):
        rounds, rows = by_arm[arm.name]
        names, label = [f"round {k}" for k in rounds], f"Perplexity histogram, {arm.name}"
        figures.append(charts.figure(arm.name, "", charts.ridges(rows, edges, names, arm.colour, label)))
    note = (
        "How probable each round's rows look to the round-0 model. Mass moving left is text that grows more ordinary; "
        "a tail growing on the "
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
        "<h2>What is written, side by side</h2><p class=soft>The first samples of each round, unselected: the same "
        "requests with the same random "
        "numbers in every regime.</p><div "
        f"class=scroll><table><tr><th>round</th>{heads}</tr>{''.join(lines)}</table></div>"
    )
