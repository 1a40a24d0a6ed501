"""Figures for a paper, as SVG and PNG, drawn with matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recursive_jax.errors import InputError

COLOURS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8a62a8", "#c99a2e", "#4aa3a2", "#a8577e", "#6b6b6b")
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


def curves(panels: Sequence[tuple[str, Mapping[str, Mapping[str, Sequence[float]]]]], columns: int = 3) -> Any:
    """One panel for each (title, {line: {"x", "y", "low", "high", "null_lo", "null_hi", "expected"}}): the line, its
    interval as a band, its null as a grey one, what theory expects dashed. A title's second line says the unit."""
    rows = -(-len(panels) // columns)
    figure, axes = _canvas(rows, columns, (3.1 * columns, 2.4 * rows))
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        axis.set_title(title, fontsize=8 if "\n" in title else 9, loc="left")
        for i, (name, line) in enumerate(lines.items()):
            x, y = np.asarray(line["x"]), np.asarray(line["y"], float)
            colour = COLOURS[i % len(COLOURS)]
            if line.get("null_lo") is not None:
                low, high = (np.asarray(line[k], float) for k in ("null_lo", "null_hi"))
                axis.fill_between(x, low, high, color="#888888", alpha=0.25, linewidth=0)
            if line.get("low") is not None:
                low, high = (np.asarray(line[k], float) for k in ("low", "high"))
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            marker = "o-" if len(x) <= 30 else "-"
            axis.plot(x, y, marker, color=colour, markersize=3, linewidth=1.4, label=name)
            if line.get("expected") is not None:
                axis.plot(x, np.asarray(line["expected"], float), "--", color="black", linewidth=0.9, alpha=0.8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("round", fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if panels and len(panels[0][1]) > 1:
        lines = axes.flat[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=min(5, len(panels[0][1])), fontsize=8)
    return figure


def stacked(panels: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]], label: str) -> Any:
    """One panel for each regime, (rounds, {part: values}): parts on top of each other, one scale for all."""
    figure, axes = _canvas(1, max(1, len(panels)), (2.8 * max(1, len(panels)), 2.8))
    top = max((np.sum(list(parts.values()), axis=0).max() for _, parts in panels.values()), default=1.0)
    for axis, (name, (x, parts)) in zip(axes.flat, panels.items(), strict=False):
        axis.stackplot(x, *(np.maximum(v, 0) for v in parts.values()), labels=list(parts), colors=COLOURS)
        axis.set(title=name, ylim=(0, top * 1.05), xlabel="round")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes.flat[0].set_ylabel(label)
    parts = axes.flat[0].get_legend_handles_labels()
    figure.legend(*parts, loc="outside lower center", ncols=len(parts[0]), fontsize=8)
    return figure


def heatmap(panels: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], label: str) -> Any:
    """One panel for each regime, (rounds, [round, decile] shares)."""
    figure, axes = _canvas(1, max(1, len(panels)), (2.8 * max(1, len(panels)), 2.6))
    image = None
    for axis, (name, (x, values)) in zip(axes.flat, panels.items(), strict=False):
        grid = np.asarray(values, float)
        image = axis.imshow(grid, aspect="auto", cmap="Reds", vmin=0, vmax=1, origin="lower")
        axis.set(title=name, xlabel="frequency decile (10: rarest)", xticks=range(grid.shape[1]))
        axis.set_xticklabels(range(1, grid.shape[1] + 1))
        axis.set_yticks(range(len(x)), labels=[f"{k:g}" for k in x])
        axis.grid(False)
    axes.flat[0].set_ylabel("round")
    if image is not None:
        figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return figure


def histograms(panels: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], edges: Sequence[float]) -> Any:
    """One panel for each regime: the histogram of every round, on a logarithmic axis of perplexity."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = _canvas(1, max(1, len(panels)), (2.8 * max(1, len(panels)), 2.6))
    middle = np.exp((np.asarray(edges[1:]) + np.asarray(edges[:-1])) / 2)
    for axis, (name, (rounds, rows)) in zip(axes.flat, panels.items(), strict=False):
        for i, (k, row) in enumerate(zip(rounds, rows, strict=True)):
            shade = 0.25 + 0.75 * i / max(1, len(rows) - 1)
            axis.plot(middle, row, color=COLOURS[0], alpha=shade, linewidth=1.2, label=f"round {k:g}")
        axis.set(title=name, xscale="log", xlabel="perplexity under the round-0 model")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes.flat[0].set_ylabel("share of rows")
    axes.flat[0].legend(fontsize=6)
    return figure
