"""recursive-jax report: the page of a run, and its figures."""

from __future__ import annotations

import argparse

HELP = "write report.html again from what is stored (also while the run goes on)"
EXAMPLE = "recursive-jax report runs/quickstart\n  recursive-jax report runs/quickstart --figures paper/figures"


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="DIR")
    p.add_argument("--figures", metavar="FOLDER", help="write the figures too (SVG, PNG) and the numbers (CSV, JSONL)")


def run(args: argparse.Namespace) -> int:
    from recursive_jax.recipes.reporting import report_run

    print(report_run(args.run))
    if args.figures:
        from recursive_jax.rounds.report.export import export_report

        for path in export_report(args.run, args.figures):
            print(path)
    return 0
