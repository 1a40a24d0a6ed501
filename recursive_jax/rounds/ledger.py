"""The ledger: one row for each round of a run, of what was proposed, what became of it, and what it cost."""

from __future__ import annotations

from typing import Any

from etils import epath

from recursive_jax import storage
from recursive_jax.csv_text import csv_text
from recursive_jax.rounds.lineage import evaluations, manifests, resolve
from recursive_jax.rounds.progress import failures

#: Columns that every ledger has, in this order; those of reasons and rules stand behind `parsed` and `kept`.
COLUMNS = (
    *("arm", "replicate", "round", "proposed", "parsed", "kept", "duplicates", "contaminated"),
    *("real_tokens", "synthetic_tokens", "target", "target_p_adjusted", "promoted", "retention"),
    *("tokens_written", "tokens_trained", "input_tokens", "output_tokens", "cost", "seconds"),
)
OF_GATE = ("target", "target_p_adjusted", "promoted", "retention")


def ledger(run: Any) -> list[dict[str, Any]]:
    """A row for each (arm, replicate, round) that has results; None where a round has nothing of the kind. `failed` and
    `dropped` are dicts: reason -> rows, rule -> rows."""
    stored = manifests(run)
    gates = {(r["arm"], r["replicate"], r["round"]): r["metrics"] for r in evaluations(run) if r["name"] == "gate"}
    groups: dict[tuple[str, int, int], list[dict]] = {}
    for m in stored:
        groups.setdefault((m["arm"], m["replicate"], m["round"]), []).append(m)
    return [_row(key, group, stored, gates.get(key, {})) for key, group in groups.items()]


def _row(key: tuple[str, int, int], group: list[dict], stored: list[dict], gate: dict) -> dict[str, Any]:
    of = lambda *verbs: [m for m in group if m["verb"] in verbs]
    made = [m for m in of("generate") if m["name"] != "samples"]  # samples are looked at, not learnt from
    read = of("read")
    failed: dict[str, int] = {}
    dropped: dict[str, int] = {}
    last = read or made  # what could not be read stands in the reading, what could not be written in it too
    for m in last:
        for reason, n in failures(m["counts"]).items():
            failed[reason] = failed.get(reason, 0) + n
    for m in of("select"):
        for rule, n in m["counts"].get("dropped", {}).items():
            dropped[rule] = dropped.get(rule, 0) + n
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= dict(zip(("arm", "replicate", "round"), key, strict=True))
    if made:
        row["proposed"] = sum(m["counts"]["rows"] for m in made)
        row["parsed"] = sum(m["counts"]["rows"] for m in last) - sum(failed.values())
        row["tokens_written"] = sum(m["counts"].get("output_tokens", m["counts"]["tokens"]) for m in made)
    if of("select"):
        row["kept"] = of("select")[-1]["counts"]["rows"]
        for name in ("duplicates", "contaminated"):
            row[name] = sum(m["counts"].get(name, 0) for m in of("select"))
    trained = of("train")
    for m in trained:
        learnt = resolve(stored, (m.get("origins", {}).get("data") or [m["inputs"].get("data", "")])[0], m)
        counts = {} if learnt is None else learnt["counts"]
        if "real_tokens" in counts and (counts["tokens"] or not counts["rows"]):  # a remote model's rows have none
            row["real_tokens"] = (row["real_tokens"] or 0) + counts["real_tokens"]
            row["synthetic_tokens"] = (row["synthetic_tokens"] or 0) + counts["tokens"] - counts["real_tokens"]
    if trained:
        row["tokens_trained"] = sum(m["counts"].get("tokens", 0) for m in trained)
    if any("cost" in m["counts"] for m in made):
        for name in ("input_tokens", "output_tokens", "cost"):
            row[name] = sum(m["counts"].get(name, 0) for m in made)
    row |= {name: gate[name] for name in OF_GATE if name in gate}
    row["seconds"] = round(sum(m["seconds"] for m in group), 1)
    return {**row, "failed": failed, "dropped": dropped}


def ledger_csv(rows: list[dict[str, Any]]) -> str:
    """The ledger as CSV: a column for each reason (`failed: ...`) and for each rule (`dropped: ...`)."""
    reasons = list(dict.fromkeys(reason for row in rows for reason in row["failed"]))
    rules = list(dict.fromkeys(rule for row in rows for rule in row["dropped"]))
    at, behind = COLUMNS.index("parsed") + 1, COLUMNS.index("kept") + 1
    head = [*COLUMNS[:at], *(f"failed: {r}" for r in reasons), "kept", *(f"dropped: {r}" for r in rules)]
    head += COLUMNS[behind:]
    plain = lambda value: "" if value is None else value
    cells = [
        [
            *(plain(row[c]) for c in COLUMNS[:at]),
            *(row["failed"].get(r, 0) for r in reasons),
            plain(row["kept"]),
            *(row["dropped"].get(r, 0) for r in rules),
            *(plain(row[c]) for c in COLUMNS[behind:]),
        ]
        for row in rows
    ]
    return csv_text([head, *cells])


def write_ledger(run: Any) -> epath.Path:
    """Writes RUN/ledger.csv from what is committed."""
    path = epath.Path(run) / "ledger.csv"
    storage.write_atomic(path, ledger_csv(ledger(run)).encode())
    return path


def told(value: Any) -> str:
    """A cell for people."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def reasons_of(row: dict[str, Any], name: str) -> str:
    """`failed` or `dropped` of a row in words, the most frequent first."""
    found = sorted(row[name].items(), key=lambda item: -item[1])
    return ", ".join(f"{n:,} {why}" for why, n in found if n)
