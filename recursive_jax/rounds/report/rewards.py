"""The part of a report that trainings on rewards have: curves, answers over time, signs that the reward is gamed."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from recursive_jax.data.dataset import Dataset
from recursive_jax.generate.request import own_types
from recursive_jax.rounds.lineage import stored_rows
from recursive_jax.rounds.report import charts

READ = 30  # writings of a training that are read
POINTS = 200  # of a curve
#: What is drawn of a training's log: name there -> (title, note).
LOGGED = {
    "reward": ("Reward", "the mean of a step's answers"),
    "kl": ("Divergence from the reference", "nats a token"),
    "entropy": ("Entropy", "nats a token"),
    "completions/mean_length": ("Length of the answers", "tokens"),
    "completions/clipped_ratio": ("Answers cut at their limit", "share"),
    "frac_reward_zero_std": ("Groups that teach nothing", "share whose rewards are all equal"),
    "clip_ratio": ("Tokens that are clipped", "share whose gradient the ratio's bounds cut off"),
    "sampling/logp_difference": ("Policy and the rows it learns from", "mean distance of their log-probabilities"),
    "beta": ("Weight of the divergence", "adapted to its target"),
}
#: And of the rows themselves: name -> (title, note).
WRITTEN = {
    "reward": ("Reward", "the mean of the answers"),
    "length": ("Length of the answers", "tokens"),
    "distinct": ("Different answers to one prompt", "share of a group's answers that differ"),
    "length_reward": ("Reward goes with length", "correlation over the answers; 0: no, 1: longer is better"),
}


@dataclasses.dataclass(frozen=True)
class Course:
    """A training, or the rounds of an arm: what was logged of its steps and what it wrote, in order."""

    name: str
    logged: list[dict]
    written: list[tuple[float, Dataset]]

    def measured(self) -> dict[str, list[tuple[float, float]]]:
        """name of WRITTEN -> [(when, value)]."""
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in WRITTEN}
        for when, rows in self.written:
            reward = np.array([math.nan if s is None else s for s in rows.column("score")], float)
            length = np.array([len(t) for t in rows.tokens()], float)
            known = ~np.isnan(reward)
            groups: dict[str, list[str]] = {}
            for parents, text in zip(rows.column("parents"), rows.column("text"), strict=True):
                groups.setdefault((parents or [""])[0], []).append(text)
            several = [len(set(texts)) / len(texts) for texts in groups.values() if len(texts) > 1]
            spread = known.sum() > 2 and reward[known].std() > 0 and length[known].std() > 0
            values = {
                "reward": reward[known].mean() if known.any() else math.nan,
                "length": length.mean() if len(length) else math.nan,
                "distinct": float(np.mean(several)) if several else math.nan,
                "length_reward": np.corrcoef(length[known], reward[known])[0, 1] if spread else math.nan,
            }
            for name, value in values.items():
                if math.isfinite(value):
                    found[name].append((when, float(value)))
        return found


def courses(run: epath.Path, stored: Sequence[dict]) -> list[Course]:
    """Of trainings on rollouts, and of rounds whose rows have advantages. stored: the run's manifests."""
    found, rounds = [], {}
    for m in stored:
        folder = run / m["path"]
        arm = "" if m["arm"] == "main" or not m["round"] else f"{m['arm']} "
        if m["verb"] == "train":
            files = sorted(n for n in m["files"] if n.startswith("rollouts/"))
            if files and "score" not in pq.read_schema(str(folder / files[0])).names:
                continue  # a student's texts, which nobody rewarded
            logged = _log(folder / "train.jsonl")
            if files or any("clip_ratio" in line for line in logged):
                chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, min(READ, len(files)))})
                rows = [(float(i), Dataset.read([str(folder / files[i])])) for i in chosen]
                found.append(Course(f"{arm}{m['name']} {m['round']}", logged, rows))
        elif m["verb"] == "data" and any(n.startswith("rows-") for n in m["files"]):
            first = min(n for n in m["files"] if n.startswith("rows-"))
            if {"advantage", "score"} <= set(pq.read_schema(str(folder / first)).names):
                rounds.setdefault(f"{arm}{m['name']}", []).append((float(m["round"]), stored_rows(run, m)))
    return found + [Course(name, [], written) for name, written in rounds.items()]


def section(run: epath.Path, stored: Sequence[dict]) -> str:
    """HTML; nothing where no training learnt from rewards."""
    shown = courses(run, stored)
    if not shown:
        return ""
    figures = []
    for name, (title, note) in LOGGED.items():
        series = []
        for colour, course in enumerate(shown):
            points = [(line["step"], line[name]) for line in course.logged if isinstance(line.get(name), (int, float))]
            points = points[:: max(1, -(-len(points) // POINTS))]
            if len(points) > 1:
                series.append(charts.Series(course.name, colour % 8, *zip(*points, strict=True)))
        if any(value for s in series for value in s.y):
            figures.append(charts.figure(title, note, charts.lines(series, title, xlabel="step", dots=False)))
    told = {course.name: course.measured() for course in shown if course.written}
    logged = {name for course in shown for line in course.logged for name in line}
    for name, (title, note) in WRITTEN.items():
        if {"length": "completions/mean_length"}.get(name, name) in logged:
            continue
        series = [
            charts.Series(course.name, colour % 8, *zip(*told[course.name][name], strict=True))
            for colour, course in enumerate(shown)
            if len(told.get(course.name, {}).get(name, [])) > 1
        ]
        if series:
            when = "writing" if any(c.logged and c.written for c in shown) else "round"
            figures.append(charts.figure(title, note, charts.lines(series, title, xlabel=when, dots=when == "round")))
    signs = [sign for name, measured in told.items() for sign in gaming(name, measured)]
    judged = [f"<li class=out>{html.escape(s)}</li>" for s in signs]
    if told and not judged:
        judged = ["<li>No sign that the reward is gamed: length does not run with it, answers stay different.</li>"]
    return (
        f"<h2>Learning from rewards</h2><ul>{''.join(judged)}</ul><div class=grid2>{''.join(figures)}</div>"
        + "".join(_answers(course) for course in shown if len(course.written) > 1)
    )


def gaming(name: str, measured: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Signs that a reward is gamed, each a sentence with its numbers: the last quarter of the writings against the
    first."""
    quarter = lambda points, last: np.mean([y for _, y in (points[-max(1, len(points) // 4) :] if last else
                                                           points[: max(1, len(points) // 4)])])  # fmt: skip
    first, last = (
        {what: quarter(points, late) for what, points in measured.items() if len(points) > 1} for late in (False, True)
    )
    found = []
    longer = last.get("length", 0) > 1.2 * first.get("length", math.inf)
    if longer and last.get("length_reward", 0) > 0.3:
        found.append(
            f"{name}: answers grow ({first['length']:.1f} to {last['length']:.1f} tokens) and longer ones are rewarded "
            f"(correlation {last['length_reward']:.2f}). Look whether they are better, or only longer."
        )
    if last.get("distinct", 1) < 0.5 * first.get("distinct", 0):
        found.append(
            f"{name}: answers to one prompt grow alike ({first['distinct']:.0%} of a group differ at first, "
            f"{last['distinct']:.0%} at last). More beta or entropy_coef keeps others."
        )
    return found


def _answers(course: Course, prompts: int = 4) -> str:
    """The same prompts' first answers over time, side by side; where no prompt comes twice, the first answers."""
    seen: dict[str, list[tuple[float, str, float | None, str]]] = {}
    for when, rows in course.written:
        question = asked_of(rows)
        columns = (rows.column(n) for n in ("parents", "text", "score", "id"))
        for n, (parents, text, score, id_) in enumerate(zip(*columns, strict=True)):
            of_prompt = seen.setdefault((parents or [id_])[0], [])
            if not of_prompt or of_prompt[-1][0] != when:
                of_prompt.append((when, text, score, question[n]))
    ordered = sorted((s for s in seen.values() if len(s) > 1), key=lambda s: s[0][0] - s[-1][0])[:prompts]
    if not ordered:
        times = [course.written[i][0] for i in _ends(len(course.written))]
        firsts = [[s[0] for s in seen.values() if s[0][0] == when][:prompts] for when in times]
        ordered = [list(row) for row in zip(*firsts, strict=False)]
    lines = []
    for answers in ordered:
        cells = []
        for when, text, score, asked in (answers[i] for i in _ends(len(answers))):
            graded = "no reward" if score is None else f"reward {charts.number(score)}"
            below = html.escape(f"{asked[:80]} · {when:g} · {graded}")
            body = html.escape(text[:400]) or "(empty)"
            cells.append(f"<td class=text><div>{body}</div><span class=soft>{below}</span></td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<h3>Answers of {html.escape(course.name)} over time</h3><p class=soft>The first answer to a prompt, early, "
        "midway and late; below it what was asked, when it was written, and its reward.</p>"
        f"<div class=scroll><table>{''.join(lines)}</table></div>"
    )


def _ends(count: int) -> list[int]:
    return sorted({0, (count - 1) // 2, count - 1})


def asked_of(rows: Dataset) -> list[str]:
    """What was asked: the column `asked`, else the first text column that the rows took from their problem, else the
    problem's id."""
    if rows.has("asked"):
        return [str(x) for x in rows.column("asked")]
    own = [n for n, kind in own_types(rows).items() if pa.types.is_large_string(kind) or pa.types.is_string(kind)]
    own = [n for n in own if not n.startswith(("score", "source_"))]
    return [str(x) for x in rows.column(own[0])] if own else [(p or [""])[0] for p in rows.column("parents")]


def _log(file: epath.Path) -> list[dict]:
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn by a kill
    return [line for line in found if isinstance(line, dict) and "step" in line]
