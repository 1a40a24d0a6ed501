"""The report: one self-contained HTML file. It works offline, prints, and follows the reader's light or dark theme.

What every run has is here: its curves, its ledger, its lineage, its settings. What stands between them a `Layout` says,
which comes with the recipe."""

from __future__ import annotations

import dataclasses
import functools
import html
import importlib.resources
import json
from collections.abc import Callable
from typing import Any

from etils import epath

from recursive_jax import storage
from recursive_jax.collapse.metrics import Metric, panels
from recursive_jax.collapse.profile import Profile
from recursive_jax.collapse.suite import TEXT
from recursive_jax.errors import InputError
from recursive_jax.rounds.ledger import ledger, reasons_of, told
from recursive_jax.rounds.lineage import evaluations, inputs_of, manifests, read_record, resolve, stored_rows
from recursive_jax.rounds.profile import run_profiles
from recursive_jax.rounds.progress import failures
from recursive_jax.rounds.report import charts, compare, lacking, rewards
from recursive_jax.rounds.report.series import Arm, arms_of, null_band


@dataclasses.dataclass(frozen=True)
class View:
    """What a report is made of. record: run.json; records: the evaluations; stored: the manifests."""

    run: epath.Path
    record: dict
    records: list[dict]
    stored: list[dict]
    arms: list[Arm]

    @classmethod
    def of(cls, run: Any) -> View:
        run = epath.Path(run)
        record, records = read_record(run), evaluations(run)
        arms = arms_of(records, list(record["config"].get("arms", {})))
        return cls(run, record, records, manifests(run), arms)

    @property
    def config(self) -> dict:
        return self.record["config"]

    @property
    def base(self) -> dict:
        """The metrics of round 0."""
        return next((r["metrics"] for r in self.records if r["round"] == 0), {})

    @property
    def metrics(self) -> set[str]:
        """Names of the numbers that any evaluation has."""
        return {k for r in self.records for k, v in r["metrics"].items() if isinstance(v, (int, float))}

    @functools.cached_property
    def profiles(self) -> dict[str, Profile]:
        """The collapse profile of each arm; none while there is no round to compare, or samples are too few."""
        try:
            return run_profiles(self.run)
        except InputError:
            return {}

    @property
    def references(self) -> dict[str, tuple[str, float]]:
        """metric -> (name, value) of a line across its chart."""
        found = {}
        if {"kl_total", "ce_real"} <= self.base.keys():
            found["ce_real"] = ("best possible", self.base["ce_real"] - self.base["kl_total"])
        if "tail_mass_lost_null" in self.base:
            found["tail_mass_lost"] = ("by chance", self.base["tail_mass_lost_null"])
        return found

    def samples(self, show: int) -> dict[tuple[str, int], list[str]]:
        """The first texts of each round's samples, by (arm, round), from replicate 0."""
        found: dict[tuple[str, int], list[str]] = {}
        for m in self.stored:
            if m["verb"] == "generate" and m["name"] == "samples" and m["replicate"] == 0 and show:
                table = stored_rows(self.run, m, 1).table.slice(0, show)
                found[m["arm"], m["round"]] = [t[:400] or "(empty)" for t in table["text"].to_pylist()]
        return found


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a recipe's report says. header: what the run is, one paragraph of HTML; sections: the parts between it and
    the ledger, HTML; compares: these hold the arms against each other."""

    header: Callable[[View], str]
    sections: Callable[[View], list[str]]
    compares: bool = False


def plain_header(view: View) -> str:
    rounds = max((r["round"] for r in view.records), default=0)
    return f"{html.escape(str(view.config.get('recipe', 'a run')))}, {_count(rounds, 'round')}."


def plain_sections(view: View) -> list[str]:
    return [curves(view, panels(view.metrics))] if view.arms else []


plain_layout = Layout(plain_header, plain_sections)


def write_report(run: Any, layout: Layout = plain_layout) -> epath.Path:
    """Writes RUN/report.html from what is committed in the run folder (also while it is still running)."""
    view = View.of(run)
    storage.write_atomic(view.run / "report.html", render(view, layout).encode())
    return view.run / "report.html"


def render(view: View, layout: Layout = plain_layout) -> str:
    name = view.config.get("name", "run")
    title = html.escape(str(name if name != "run" else view.run.name))
    seed, devices = (html.escape(str(view.record.get(key, ""))) for key in ("seed", "devices"))
    body = [f"<h1>{title}</h1><p class=soft>{layout.header(view)} Seed {seed}, on {devices}.</p>"]
    body += layout.sections(view)
    if len(view.arms) > 1 and not layout.compares:
        body.append(compare.section(view.run, view.stored))
    if view.config.get("profile"):
        body.append(lacking.section(view.run))
    body += [
        rewards.section(view.run, view.stored),
        _training(view),
        _rounds(view),
        _ledger(view.stored),
        _lineage(view.stored),
        _settings(view.record),
    ]
    css = importlib.resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title} · recursive_jax</title><style>{css}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' if n != 1 else ''}"


OF_GROUPS = frozenset(m.name for m in TEXT)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart of a metric over the rounds: the page and the figures for a paper draw the same. reference: (name,
    value) of a line across it; null: (rounds, low, high) of what chance does."""

    metric: Metric
    note: str
    series: list[charts.Series]
    reference: tuple[str, float] | None
    null: tuple[list[float], list[float], list[float]] | None


def panels_of(view: View, shown: list[Metric]) -> list[Panel]:
    """The metrics that more than one round has. Statistics of samples are those of the profile, at its number of
    tokens, so that a name has one number on the page; without a profile those of the evaluations."""
    found = []
    for m in shown:
        measured = {a.name: p[m.name] for a in view.arms if (p := view.profiles.get(a.name)) and m.name in p.metrics}
        grouped = m.name in OF_GROUPS and len(measured) == len(view.arms)
        if grouped:
            tokens = next(iter(view.profiles.values())).settings.get("tokens", 0)
            note = f"{m.note}; mean over groups of {tokens:,} tokens"
            series = [s for a in view.arms if (s := a.profiled(m.name, measured[a.name])) is not None]
        else:
            budget = view.config.get("evaluate", {}).get("token_budget")
            note = f"{m.note}; at {budget:,} tokens" if m.counted and budget else m.note or m.unit
            series = [a.series(m.name) for a in view.arms if len(a.numbers(m.name)) > 1]
        if series:
            reference = None if grouped else view.references.get(m.name)
            found.append(Panel(m, note, series, reference, null_band(list(measured.values()))))
    return found


def curves(view: View, shown: list[Metric]) -> str:
    """A chart for each metric that more than one round has."""
    found = panels_of(view, shown)
    figures = [
        charts.figure(
            p.metric.title, p.note, charts.lines(p.series, p.metric.title, reference=p.reference, null=p.null)
        )
        for p in found
    ]
    if not figures:
        return ""
    bands = "Bands are one standard error: over replicates where there are several, else of the evaluation itself"
    bands += "; of groups, the 95% interval over them. " if any("groups" in p.note for p in found) else ". "
    if any(p.null for p in found):
        bands += "The grey band is where a number lies with 99% confidence if nothing but chance moves it."
    return (
        f"<h2>What changed from round to round</h2><p class=soft>{bands}</p><div class=grid2>{''.join(figures)}</div>"
    )


CURVES = 8  # trainings whose loss is drawn


def training_losses(view: View) -> list[tuple[str, list[tuple[int, float]]]]:
    """(name, [(step, loss)]) of the trainings that have a log; of many the first and the last ones."""
    logs = []
    for m in (m for m in view.stored if m["verb"] == "train"):
        points = losses(view.run / m["path"] / "train.jsonl")
        if len(points) > 1:
            arm = "" if m["round"] == 0 or m["arm"] == "main" else f"{m['arm']} "
            logs.append((f"{arm}{m['name']} {m['round']}", points))
    return logs if len(logs) <= CURVES else [logs[0], *logs[1 - CURVES :]]


def _training(view: View) -> str:
    shown = training_losses(view)
    if not shown:
        return ""
    series = [charts.Series(n, i, [x for x, _ in p], [y for _, y in p]) for i, (n, p) in enumerate(shown)]
    drawn = charts.lines(series, "Training loss", xlabel="step", dots=False)
    all_of = sum(m["verb"] == "train" for m in view.stored)
    left_out = f"; {len(shown)} of {all_of} trainings, the first and the last" if len(shown) < all_of else ""
    note = f"by step, as train.jsonl has it; a name and its round{left_out}"
    return f"<h2>Training</h2><div class=one>{charts.figure('Loss', note, drawn)}</div>"


def losses(log: epath.Path, most: int = 200) -> list[tuple[int, float]]:
    """(step, loss) of a training's log, thinned to `most` points."""
    found = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            record = json.loads(line)
            found.append((int(record["step"]), float(record["loss"])))
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
    return found[:: max(1, -(-len(found) // most))]


#: Columns of the rounds' table; one that no round has a value for is left out.
ROUNDS = {
    **{"proposed": "proposed", "parsed": "parsed", "failed": "failed by", "kept": "kept", "dropped": "dropped by"},
    **{"duplicates": "duplicates", "contaminated": "contaminated", "real_tokens": "real tokens learnt"},
    **{"synthetic_tokens": "synthetic", "target": "target", "target_p_adjusted": "p, corrected"},
    **{"promoted": "promoted", "retention": "retention", "tokens_written": "tokens written"},
    **{"output_tokens": "paid tokens", "cost": "dollars", "seconds": "seconds"},
}


def _rounds(view: View) -> str:
    """What became of each round's rows, as RUN/ledger.csv has it."""
    rows = [row for row in ledger(view.run) if row["round"]]
    if not rows:
        return ""
    cell = lambda row, c: reasons_of(row, c) if c in ("failed", "dropped") else told(row[c])
    shown = [c for c in ROUNDS if any(cell(row, c) for row in rows)]
    several = len({row["arm"] for row in rows}) > 1
    heads = [*(["regime"] if several else []), "round", *(ROUNDS[c] for c in shown)]
    lines = []
    for row in rows:
        name = [f"{row['arm']} {row['replicate'] or ''}".strip()] if several else []
        cells = [*name, row["round"], *(cell(row, c) for c in shown)]
        lines.append("<tr>" + "".join(f"<td>{html.escape(str(x))}</td>" for x in cells) + "</tr>")
    return (
        "<h2>Rounds</h2><p class=soft>What was proposed, what became of it, and what it cost; ledger.csv has the same."
        f"</p><div class=scroll><table><tr>{''.join(f'<th>{h}</th>' for h in heads)}</tr>{''.join(lines)}</table></div>"
    )


def _ledger(stored: list[dict]) -> str:
    lines = []
    for m in stored:
        c = m["counts"]
        rows = c.get("rows")
        share = f"{c['real_tokens'] / c['tokens']:.0%}" if c.get("tokens") and "real_tokens" in c else ""
        gone = c.get("dropped", {}) | failures(c)
        dropped = "; ".join(f"{r}: {n}" for r, n in gone.items())
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
        f"<h2>Ledger</h2><p class=soft>Every stored result: {len(stored)}, made in {total:,.0f} "
        f"seconds.</p><details><summary>Show the {len(stored)} rows</summary>"
        f"<div class=scroll><table><tr>{''.join(f'<th>{h}</th>' for h in heads)}</tr>{''.join(lines)}</table></div>"
        "</details>"
    )


def _lineage(stored: list[dict]) -> str:
    lines = []
    for m in stored:
        sources = [(resolve(stored, f, m), f) for f in inputs_of(m)]
        inputs = ", ".join(str(f) if s is None else s["path"] for s, f in sources)
        lines.append(
            f"<tr><td>{html.escape(m['path'])}</td><td class=left>{html.escape(str(m['fingerprint']))}</td><td "
            f"class=text>{html.escape(inputs)}</td></tr>"
        )
    return (
        "<h2>Lineage</h2><p class=soft>Each result names its inputs by fingerprint; equal inputs give equal "
        "fingerprints.</p>"
        "<details><summary>Show what was made from what</summary><div class=scroll><table><tr><th>result</th><th "
        "class=left>fingerprint</th>"
        f"<th class=left>made from</th></tr>{''.join(lines)}</table></div></details>"
    )


def _settings(record: dict) -> str:
    shown = {
        k: record[k] for k in ("seed", "devices", "processes", "versions", "environments", "config") if k in record
    }
    return (
        f"<h2>Settings</h2><details><summary>Show the resolved config and "
        f"versions</summary><pre>{html.escape(json.dumps(shown, indent=2))}</pre></details>"
    )
