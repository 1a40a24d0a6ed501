"""The report of a run of any recipe."""

from __future__ import annotations

from typing import Any

from etils import epath

from recursive_jax.errors import InputError
from recursive_jax.recipes import find_recipe
from recursive_jax.rounds import storage
from recursive_jax.rounds.report import plain_layout, write_report


def report_run(run: Any) -> epath.Path:
    """Writes RUN/report.html as its recipe lays it out; a run of no recipe (of Python's `Run`), or of one that cannot
    be imported here, in the plain form."""
    file = epath.Path(run) / "run.json"
    if not file.exists():
        raise InputError(f"{run} is not a run folder: there is no run.json in it")
    name = storage.read_json(file, "the run record").get("config", {}).get("recipe")
    try:
        layout = find_recipe(name).layout
    except InputError:
        layout = plain_layout
    return write_report(run, layout)
