"""Figures for a paper, as SVG and PNG, drawn with matplotlib (the extra `plots`)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recursive_jax.errors import InputError

#: Those of the report on paper (`rounds/report/style.css`): of arms, and of parts of a whole.
COLOURS = ("#c0392b", "#2166ac", "#8a6d00", "#7b4fa6", "#1b7f5c", "#a8487c", "#4d6b85", "#8c5a2b")
PARTS = ("#2f5d8a", "#d98a3d", "#5f9e6e", "#b8a9c9")
WIDE = 46  # characters of a panel's subtitle that fit a line
STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "recursive_jax",
}


def available() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _canvas(rows: int, columns: int, size: tuple[float, float]):
    if not available():
        raise InputError("figures need matplotlib: pip install 'recursive-jax[plots]'")
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """name.svg and name.png (200 dots an inch)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=200)
    return paths


def curves(
    panels: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], columns: int = 3, across: str = "round"
) -> Any:
    """One panel for each (title, {line: {"x", "y", "low", "high", "null_lo", "null_hi", "expected", "colour",
    "reference"}}): the line, its interval as a band, its null as a grey one, what theory expects dashed, a reference
    (name, value) dotted. colour: of `COLOURS`, by default the line's place. What follows the title's first line is set
    below it in small."""
    columns = min(columns, max(1, len(panels)))
    rows = -(-len(panels) // columns)
    figure, axes = _canvas(rows, columns, (3.1 * columns, 2.55 * rows + 0.3))
    names: dict[str, Any] = {}
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        first, _, rest = title.partition("\n")
        small = textwrap.fill(rest, WIDE)
        pad = 4 + 9 * (small.count("\n") + bool(small))
        axis.set_title(textwrap.fill(first, WIDE * 3 // 4), fontsize=9, loc="left", pad=pad)
        axis.text(0, 1.02, small, transform=axis.transAxes, fontsize=6.5, color="#555555", va="bottom")
        for i, (name, line) in enumerate(lines.items()):
            names.setdefault(name, _line(axis, name, line, COLOURS[line.get("colour", i) % len(COLOURS)]))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel(across, fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if len(names) > 1:
        figure.legend(names.values(), names, loc="outside lower center", ncols=min(5, len(names)), fontsize=8)
    return figure


def _line(axis: Any, name: str, line: Mapping[str, Any], colour: str) -> Any:
    x, y = np.asarray(line["x"]), np.asarray(line["y"], float)
    if line.get("null_lo") is not None:
        low, high = (np.asarray(line[k], float) for k in ("null_lo", "null_hi"))
        axis.fill_between(line.get("null_x", x), low, high, color="#888888", alpha=0.25, linewidth=0)
    if line.get("low") is not None:
        low, high = (np.asarray(line[k], float) for k in ("low", "high"))
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    (drawn,) = axis.plot(x, y, "o-" if len(x) <= 30 else "-", color=colour, markersize=3, linewidth=1.4, label=name)
    if line.get("expected") is not None:
        axis.plot(x, np.asarray(line["expected"], float), "--", color="black", linewidth=0.9, alpha=0.8)
    if line.get("reference") is not None:
        said, value = line["reference"]
        axis.axhline(value, linestyle=":", color="#444444", linewidth=0.9)
        axis.text(0.02, value, said, transform=axis.get_yaxis_transform(), fontsize=6.5, va="bottom", color="#444444")
    return drawn


def stacked(panels: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]], label: str) -> Any:
    """One panel for each regime, (rounds, {part: values}): parts on top of each other, one scale for all."""
    figure, axes = _canvas(1, max(1, len(panels)), (2.8 * max(1, len(panels)), 2.8))
    top = max((np.sum(list(parts.values()), axis=0).max() for _, parts in panels.values()), default=1.0)
    for axis, (name, (x, parts)) in zip(axes.flat, panels.items(), strict=False):
        axis.stackplot(x, *(np.maximum(v, 0) for v in parts.values()), labels=list(parts), colors=PARTS)
        axis.set(title=name, ylim=(0, top * 1.05), xlabel="round")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes.flat[0].set_ylabel(label)
    parts = axes.flat[0].get_legend_handles_labels()
    figure.legend(*parts, loc="outside lower center", ncols=len(parts[0]), fontsize=8)
    return figure


def heatmap(panels: Mapping[str, tuple[Sequence[str], Sequence[Sequence[float]]]], label: str) -> Any:
    """One panel for each regime, (names of the rows, [row, decile] shares), the first row on top, one scale for all."""
    tall = max((len(rows) for rows, _ in panels.values()), default=1)
    figure, axes = _canvas(1, max(1, len(panels)), (2.8 * max(1, len(panels)), 1.3 + 0.22 * tall))
    top = max((float(np.max(values)) for _, values in panels.values() if len(values)), default=1.0) or 1.0
    image = None
    for axis, (name, (rows, values)) in zip(axes.flat, panels.items(), strict=False):
        grid = np.asarray(values, float)
        image = axis.imshow(grid, aspect="auto", cmap="Reds", vmin=0, vmax=top, origin="upper")
        axis.set(title=name, xlabel="frequency decile (10: rarest)", xticks=range(grid.shape[1]))
        axis.set_xticklabels(range(1, grid.shape[1] + 1))
        axis.set_yticks(range(len(rows)), labels=rows)
        axis.grid(False)
    if image is not None:
        figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return figure


def ridges(
    panels: Mapping[str, tuple[Sequence[int], Sequence[Sequence[float]]]],
    edges: Sequence[float],
    colours: Sequence[int],
) -> Any:
    """One panel for each regime: the histogram of every round over the one before it, the first on top, on one
    logarithmic axis of perplexity and one scale of shares."""
    from matplotlib.ticker import LogLocator, NullFormatter

    most = max((len(rounds) for rounds, _ in panels.values()), default=1)
    figure, axes = _canvas(1, max(1, len(panels)), (2.8 * max(1, len(panels)), 1.2 + 0.38 * most))
    middle = np.exp((np.asarray(edges[1:]) + np.asarray(edges[:-1])) / 2)
    top = max((float(np.max(rows)) for _, rows in panels.values() if len(rows)), default=1.0) or 1.0
    for axis, (name, (rounds, rows)), colour in zip(axes.flat, panels.items(), colours, strict=False):
        for i, row in enumerate(rows):
            base = float(len(rows) - 1 - i)
            height = base + 1.8 * np.asarray(row) / top
            axis.fill_between(middle, base, height, color=COLOURS[colour % 8], alpha=0.55, linewidth=0, zorder=i + 1)
            axis.plot(middle, height, color="white", linewidth=0.8, zorder=i + 1)
        axis.set(title=name, xscale="log", xlim=(np.exp(edges[0]), np.exp(edges[-1])))
        axis.set_xlabel("perplexity of a row under the round-0 model", fontsize=7.5)
        axis.set_yticks(range(len(rows) - 1, -1, -1), labels=[str(k) for k in rounds])
        axis.grid(False, axis="y")
        decades = (edges[-1] - edges[0]) / np.log(10)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=8))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes.flat[0].set_ylabel("round")
    return figure
