"""The report of a run of any recipe."""

from __future__ import annotations

from typing import Any

from etils import epath

from recursive_jax.errors import InputError
from recursive_jax.recipes import find_recipe
from recursive_jax.rounds.lineage import read_record
from recursive_jax.rounds.report import plain_layout, write_report


def report_run(run: Any) -> epath.Path:
    """Writes RUN/report.html as its recipe lays it out; a run of no recipe (of Python's `Run`), or of one that cannot
    be imported here, in the plain form."""
    name = read_record(run).get("config", {}).get("recipe")
    try:
        layout = find_recipe(name).layout
    except InputError:
        layout = plain_layout
    return write_report(run, layout)
