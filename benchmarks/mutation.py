"""How many small faults the tests notice: single-line mutants of the code, each run against the default suite.

    python benchmarks/mutation.py --work /tmp/mutation --count 120      a sample of all mutants
    python benchmarks/mutation.py --work /tmp/mutation --named          those of mutants.json, each with its tests

The suite runs once under `coverage`, which says for each line what tests reach it. A mutant meets these, the quickest
first; where none does, those that reach its file; with `--whole` then the whole default suite. What happened to each is
a line of `mutants.jsonl` in the work folder, as it is known, so that a round that was stopped goes on.

The operators are those of mutation testing (DeMillo, Lipton and Sayward 1978, doi:10.1109/C-M.1978.218136): relations,
arithmetic, logic and constants, statements and keyword arguments left out, reductions exchanged. Needs `[dev]`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("objectives", "train", "data", "generate", "curate", "rounds", "collapse")
RELATIONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
}
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//"}
EXCHANGED = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "minimum": "maximum",
    "maximum": "minimum",
    "sum": "mean",
    "mean": "sum",
    "argmax": "argmin",
    "argmin": "argmax",
    "zeros": "ones",
    "ones": "zeros",
    "exp": "log",
    "log": "exp",
    "cos": "sin",
    "sin": "cos",
}
# fmt: on
QUIET = {"say", "print", "warn", "info", "explain"}  # what a user reads is tested where it matters, not word by word
QUICK_S = 50  # seconds of tests that reach the line, and of those that reach the file


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    column: int
    kind: str
    before: str
    after: str

    @property
    def key(self) -> str:
        return f"{self.path}:{self.line}:{self.column}:{self.kind}:{self.after}"


def mutants_of(path: Path, root: Path) -> Iterator[tuple[Mutant, str]]:
    """Every mutant of a file, with the source that it makes."""
    source = path.read_text()
    starts = [0]
    for text in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    raw = source.encode()

    def at(line: int, column: int) -> int:
        return starts[line - 1] + column

    def span(node: ast.AST) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def replace(node: ast.AST, begin: int, end: int, text: str, kind: str) -> Iterator[tuple[Mutant, str]]:
        mutated = raw[:begin] + text.encode() + raw[end:]
        try:
            compile(mutated, str(path), "exec")
        except SyntaxError:
            return
        mutant = Mutant(str(path.relative_to(root)), node.lineno, node.col_offset, kind, raw[begin:end].decode(), text)
        yield mutant, mutated.decode()

    def visit(node: ast.AST) -> Iterator[tuple[Mutant, str]]:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
            return
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in QUIET:
            return
        skip: set[ast.AST] = set()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skip = {node.args, *node.decorator_list, *([node.returns] if node.returns else [])}
            for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
                yield from visit(default)
        elif isinstance(node, ast.ClassDef):
            skip = set(node.decorator_list)
        elif isinstance(node, ast.AnnAssign):
            skip = {node.annotation}
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in RELATIONS:
            begin, end = span(node.left)[1], span(node.comparators[0])[0]
            closing = raw[begin:end].count(b")"), raw[begin:end].count(b"(")
            text = ")" * closing[0] + f" {RELATIONS[type(node.ops[0])]} " + "(" * closing[1]
            yield from replace(node, begin, end, text, "relation")
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not isinstance(node.left, ast.JoinedStr):
            begin, end = span(node.left)[1], span(node.right)[0]
            closing = raw[begin:end].count(b")"), raw[begin:end].count(b"(")
            text = ")" * closing[0] + f" {ARITHMETIC[type(node.op)]} " + "(" * closing[1]
            yield from replace(node, begin, end, text, "arithmetic")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            begin, _ = span(node)
            yield from replace(node, begin, span(node.operand)[0], "", "sign")
        elif isinstance(node, ast.BoolOp):
            begin, end = span(node.values[0])[1], span(node.values[1])[0]
            word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from replace(node, begin, end, raw[begin:end].decode().replace(word, other, 1), "logic")
        elif isinstance(node, ast.Constant):
            value = node.value
            if isinstance(value, bool):
                yield from replace(node, *span(node), str(not value), "constant")
            elif isinstance(value, int | float) and not isinstance(value, complex):
                other = value * 2 or 1.0 if isinstance(value, float) or value > 9 else value + 1
                yield from replace(node, *span(node), str(other), "constant")
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            begin, end = span(node.test)
            yield from replace(node.test, begin, end, f"(not ({raw[begin:end].decode()}))", "condition")
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in EXCHANGED:
                end = span(node.func)[1]
                yield from replace(node, end - len(name), end, EXCHANGED[name], "reduction")
            for keyword in node.keywords:
                if keyword.arg:
                    begin, end = span(keyword)
                    rest = raw[end:]
                    if rest.lstrip().startswith(b","):
                        end += rest.index(b",") + 1
                    yield from replace(keyword, begin, end, "", "argument left out")
        elif isinstance(node, ast.Expr | ast.AugAssign) and not isinstance(
            getattr(node, "value", None), ast.Constant | ast.Yield | ast.YieldFrom
        ):
            yield from replace(node, *span(node), "pass", "statement left out")
        for child in ast.iter_child_nodes(node):
            if child not in skip:
                yield from visit(child)

    yield from visit(ast.parse(source))


def sample(count: int, seed: int, root: Path = ROOT) -> list[tuple[Mutant, str]]:
    """As many mutants of every room (a room with few gives what it has), spread over its files and operators, in an
    order that the seed gives."""
    draw = random.Random(seed)
    by_room: dict[str, list[tuple[Mutant, str]]] = {}
    for room in ROOMS:
        strata = defaultdict(list)
        for path in sorted((root / "recursive_jax" / room).rglob("*.py")):
            for mutant, text in mutants_of(path, root):
                strata[mutant.path, mutant.kind].append((mutant, text))
        cells = [draw.sample(cell, len(cell)) for _, cell in sorted(strata.items())]
        draw.shuffle(cells)
        by_room[room] = [cell[turn] for turn in range(max(map(len, cells))) for cell in cells if turn < len(cell)]
    turns = [by_room[room][turn] for turn in range(count) for room in ROOMS if turn < len(by_room[room])]
    return turns[:count]


def environment(work: Path) -> dict[str, str]:
    """The copy comes before an installed package, in the processes that tests start too."""
    return {**os.environ, "PYTHONPATH": str(work), "COVERAGE_RCFILE": str(work / ".coveragerc")}


def run_pytest(work: Path, arguments: list[str], timeout: float) -> tuple[str, str]:
    """`noticed` (a test failed), `survived`, or `timeout`; with the name of what failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=timeout, env=environment(work))
    except subprocess.TimeoutExpired:
        return "timeout", ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 4:
        raise SystemExit(f"pytest does not find its tests: {done.stdout[-500:]}{done.stderr[-500:]}")
    return ("survived", "") if done.returncode == 0 else ("noticed", failed[0][:200] if failed else done.stdout[-200:])


def reach(work: Path, cores: str) -> tuple[dict[tuple[str, int], set[str]], dict[str, float], set[str]]:
    """What tests reach each line, how long each takes, and which fail as it is."""
    data, report = work / ".coverage", work / "junit.xml"
    if not report.exists():
        (work / ".coveragerc").write_text("[run]\nsource = recursive_jax\n")
        flags = ["--cov=recursive_jax", "--cov-context=test", "--cov-report=", f"--junitxml={report}", "-n", cores]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *flags], cwd=work, env=environment(work))
    import coverage

    lines: dict[tuple[str, int], set[str]] = defaultdict(set)
    read = coverage.CoverageData(str(data))
    try:
        read.read()
        for name in read.measured_files():
            relative = str(Path(name).relative_to(work))
            for line, contexts in read.contexts_by_lineno(name).items():
                lines[relative, line] |= {context.rpartition("|")[0] for context in contexts if context}
    except sqlite3.DatabaseError as error:
        raise SystemExit(f"{data}: {error}") from None
    seconds, failed = defaultdict(float), set()
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname").replace(".", "/") + ".py::" + case.get("name")
        seconds[name] += float(case.get("time"))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
    for name in sorted(failed):
        print(f"left out, as it fails before any mutant: {name}", flush=True)
    return lines, seconds, failed


def quickest(tests: set[str], seconds: dict[str, float]) -> list[str]:
    """As many as QUICK_S has room for."""
    chosen, total = [], 0.0
    for test in sorted(tests, key=lambda test: (seconds.get(test, 1.0), test)):
        total += seconds.get(test, 1.0)
        if total > QUICK_S:
            break
        chosen.append(test)
    return chosen


def named(work: Path) -> None:
    """Faults that the suite once did not notice, written down: each against the default tests of some files."""
    survived = []
    for one in json.loads((work / "benchmarks" / "mutants.json").read_text()):
        target = work / one["path"]
        original = target.read_text()
        try:
            target.write_text(original.replace(one["before"], one["after"], 1))
            state, by = run_pytest(work, ["-n", "0", *one["tests"]], 900) if one["before"] in original else ("gone", "")
        finally:
            target.write_text(original)
        survived += [one["why"]] if state in ("survived", "gone") else []
        print(f"{state:9s} {one['path']}: {one['why']}  {by[:90]}", flush=True)
    print(f"{len(survived)} not noticed: {'; '.join(survived) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder for a copy of the project and for the results"
    )
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--named", action="store_true", help="the mutants of mutants.json instead of a sample")
    parser.add_argument("--whole", action="store_true", help="show survivors to the whole suite too")
    parser.add_argument("--cores", default="2", help="processes of the whole suite")
    options = parser.parse_args()
    work, results = options.work / "project", options.work / "mutants.jsonl"
    if not work.exists():
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, work / name)
        if (ROOT.parent / "shared").exists():
            (options.work / "shared").symlink_to(ROOT.parent / "shared")
    if options.named:
        return named(work)
    lines, seconds, failed = reach(work, options.cores)
    known = {json.loads(line)["key"] for line in results.read_text().splitlines()} if results.exists() else set()
    for mutant, text in sample(options.count, options.seed, work):
        if mutant.key in known:
            continue
        target = work / mutant.path
        original, start = target.read_text(), time.perf_counter()
        near = lines.get((mutant.path, mutant.line), set())
        far = set().union(*(tests for (path, _), tests in lines.items() if path == mutant.path)) - near
        try:
            target.write_text(text)
            state, by = "survived", ""
            for tests in (near, far) if options.whole or not near else (near,):
                chosen = quickest(tests - failed, seconds)
                if chosen and state == "survived":
                    state, by = run_pytest(work, ["-n", "0", *chosen], 3 * QUICK_S + 60)
            if state == "survived" and options.whole:
                state, by = run_pytest(work, ["-n", options.cores, *(f"--deselect={name}" for name in failed)], 1500)
        finally:
            target.write_text(original)
        record = {
            "key": mutant.key,
            **asdict(mutant),
            "state": state,
            "by": by,
            "reached_by": len(near),
            "seconds": round(time.perf_counter() - start, 1),
        }
        with results.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(
            f"{state:9s} {mutant.path}:{mutant.line} {mutant.kind}: {mutant.before!r} -> {mutant.after!r}  {by[:90]}",
            flush=True,
        )
    records = [json.loads(line) for line in results.read_text().splitlines()]
    noticed = sum(record["state"] != "survived" for record in records)
    print(f"{noticed} of {len(records)} mutants noticed ({noticed / len(records):.0%})")


if __name__ == "__main__":
    main()
