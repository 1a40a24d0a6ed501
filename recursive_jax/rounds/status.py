"""A run folder as text: the chain of results and the headline metrics per round."""

from __future__ import annotations

import itertools
from typing import Any

from etils import epath

from recursive_jax.collapse.metrics import headlines, metric
from recursive_jax.config import difference
from recursive_jax.rounds.durable import read_copies
from recursive_jax.rounds.ledger import ledger, reasons_of, told
from recursive_jax.rounds.lineage import evaluations, inputs_of, manifests, read_record, resolve
from recursive_jax.rounds.progress import summary


def status_text(run: Any, short: bool = False) -> str:
    """short: only the metrics table."""
    run = epath.Path(run)
    stored = manifests(run)
    record = read_record(run)
    records = evaluations(run)
    lines = [] if short else [*_chain(run, stored, record), "", *_ledger(run)]
    return "\n".join(lines + _table(records, record.get("config", {}).get("evaluate", {}).get("token_budget")))


def _chain(run: epath.Path, stored: list[dict], record: dict) -> list[str]:
    seconds = sum(m["seconds"] for m in stored)
    lines = [f"{run}: {len(stored)} results in {seconds:,.0f} s, seed {record.get('seed')}, {record.get('devices')}"]
    known = record.get("environments", [])
    for m in stored:
        inputs = dict.fromkeys(s["path"] for s in (resolve(stored, f, m) for f in inputs_of(m)) if s is not None)
        arrow = f"  <- {', '.join(inputs)}" if inputs else ""
        under = [known.index(e) + 1 for e in m.get("environments", []) if e in known]
        marked = f"  [environment {', '.join(map(str, under))}]" if len(known) > 1 and under else ""
        lines.append(f"  {m['path']:<38} {summary(m):<46} {m['seconds']:>7.1f} s{arrow}{marked}")
    for pending in sorted(
        [
            *run.glob("rounds/*/*/pending.json"),
            *run.glob("*/rounds/*/*/pending.json"),
            *run.glob("*/*/rounds/*/*/pending.json"),
        ]
    ):
        if not (pending.parent / "manifest.json").exists():
            lines.append(f"  {pending.parent.relative_to(run)!s:<38} not finished; the same command goes on with it")
    for path, copy in read_copies(run).items():
        folder = run / path
        if "manifest" in copy and folder.is_dir() and not list(folder.glob("[mp]*n*.json")):
            lines.append(f"  {path:<38} its manifest.json is missing; the same command restores it")
    for number, (before, now) in enumerate(itertools.pairwise(known), start=2):
        lines.append(f"  environment {number}: {'; '.join(difference(before, now))}; bits may differ from there on")
    return lines


def _ledger(run: epath.Path) -> list[str]:
    """What became of each round's rows, where any were selected, read, graded or paid for."""
    rows = [
        r for r in ledger(run) if r["round"] and any(r[c] is not None for c in ("kept", "target", "retention", "cost"))
    ]
    rows = rows or [r for r in ledger(run) if r["round"] and r["failed"]]
    lines = []
    for row in rows:
        words = [f"{told(row[c])} {c}" for c in ("proposed", "parsed", "kept", "duplicates", "contaminated") if row[c]]
        for c in ("target", "retention"):
            words += [f"{c} {told(row[c])}"] if row[c] is not None else []
        if row["promoted"] is not None:
            words.append("promoted" if row["promoted"] else "not promoted")
            words[-1] += f" (p {told(row['target_p_adjusted'])})" if row["target_p_adjusted"] is not None else ""
        words += [f"${row['cost']:.4f}"] if row["cost"] else []
        arm = "" if row["arm"] == "main" else f"{row['arm']} "
        arm += f"{row['replicate']} " if row["replicate"] else ""
        lines.append(f"{arm}round {row['round']}: {', '.join(words)}")
        for name in ("failed", "dropped"):
            lines += [f"    {name}: {reasons_of(row, name)}"] if reasons_of(row, name) else []
    return [*lines, ""] if lines else []


def _table(records: list[dict], budget: int | None) -> list[str]:
    if not records:
        return ["no evaluation yet"]
    shown = headlines({k for r in records for k, v in r["metrics"].items() if isinstance(v, (int, float))})
    several = any(r["replicate"] for r in records)
    told = [(_label(r), r) for r in records if any(r["metrics"].get(m) is not None for m in shown)]
    width = max([13, *(len(label) for label, _ in told)]) + 1
    head = f"{'regime':<{width}}{'round':>6}" + (f"{'replicate':>10}" if several else "")
    lines = [head + "".join(f"{m:>16}" for m in shown)]
    for label, r in told:
        values = [r["metrics"].get(m) for m in shown]
        cells = "".join(f"{x:>16.4f}" if x is not None else f"{'':>16}" for x in values)
        lines.append(f"{label:<{width}}{r['round']:>6}" + (f"{r['replicate']:>10}" if several else "") + cells)
    if (counted := [m for m in shown if metric(m).counted]) and budget:
        lines.append(f"{', '.join(counted)}: at {budget:,} tokens; the report's are means over smaller groups")
    return lines


def _label(record: dict) -> str:
    """The arm, before the first round that, and of an evaluation with a name of its own its name."""
    arm = record["arm"] if record["round"] else "before" if record["arm"] == "main" else f"{record['arm']}, before"
    return arm if record["name"] in ("evaluation", "held-out", "gate") else f"{arm}: {record['name']}"


def ancestors_text(chain: list[dict]) -> str:
    lines = []
    for depth, step in enumerate(chain):
        indent = "  " * depth
        if step["what"] == "row":
            lines.append(f"{step['id']}  (round {step['round']}): {step['text'][:200]}")
            if step["parents"]:
                lines.append(f"{indent}  prompted by {', '.join(step['parents'])}")
        elif step["what"] == "model":
            lines.append(f"{indent}written by the model {step['path']} (round {step['round']}, {step['fingerprint']})")
        else:
            share = f", {step['synthetic_rows']:,} of them synthetic" if step.get("synthetic_rows") is not None else ""
            origin = f", drawn from {', '.join(step['from'])}" if step["from"] else ""
            lines.append(f"{indent}trained on {step['path']}: {step['rows']:,} rows{share}{origin}")
    return "\n".join(lines)
