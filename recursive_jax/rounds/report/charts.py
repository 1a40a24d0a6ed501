"""Small SVG charts as strings. Colours are CSS variables (`--c0`, `--c1`, ...), so one figure serves light, dark and
print; every mark carries a `<title>`, which browsers show as a tooltip."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

MARKS = 10  # of an axis, at most


@dataclasses.dataclass(frozen=True)
class Series:
    """name, colour index, points; low and high bound the band or error bar where they are given."""

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    tips: Sequence[str] | None = None


def number(value: float) -> str:
    """Three significant digits, no noise."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.1e}"


def figure(title: str, note: str, svg: str) -> str:
    return f"<figure><figcaption><strong>{html.escape(title)}</strong>{html.escape(note)}</figcaption>{svg}</figure>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if raw <= m * power * 1.0001)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _text(x: float, y: float, text: str, cls: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{cls}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, body: list[str], label: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}">{"".join(body)}</svg>'


class Axes:
    """Maps data to pixels and draws the frame."""

    def __init__(self, xs, ys, width=380, height=230, left=46, right=86, top=10, bottom=30, zero=False):
        self.width, self.height, self.left, self.right, self.top, self.bottom = width, height, left, right, top, bottom
        low, high = min(ys), max(ys)
        low = min(low, 0.0) if zero else low
        if high - low < 1e-12:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        self.yticks = ticks(low, high)
        step = self.yticks[1] - self.yticks[0]
        self.decimals = next((d for d in range(7) if abs(round(step, d) - step) < 1e-3 * step), 7)
        self.x0, self.x1 = min(xs), max(max(xs), min(xs) + 1e-9)
        self.y0, self.y1 = self.yticks[0], self.yticks[-1]

    def px(self, x: float) -> float:
        return self.left + (x - self.x0) / (self.x1 - self.x0) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        return self.height - self.bottom - (y - self.y0) / (self.y1 - self.y0) * (self.height - self.top - self.bottom)

    def frame(self, xlabel: str, xticks: Sequence[float]) -> list[str]:
        out = []
        for y in self.yticks:
            out.append(
                f'<line class="grid" x1="{self.left}" x2="{self.width - self.right}" y1="{self.py(y):.1f}" '
                f'y2="{self.py(y):.1f}"/>'
            )
            out.append(_text(self.left - 6, self.py(y) + 3.5, f"{y:,.{self.decimals}f}", "tick", "end"))
        step = max(1, math.ceil(len(xticks) / 8))
        for x in list(xticks)[::step]:
            out.append(_text(self.px(x), self.height - self.bottom + 15, number(x), "tick", "middle"))
        out.append(_text((self.left + self.width - self.right) / 2, self.height - 2, xlabel, "axis", "middle"))
        return out


def lines(
    series: Sequence[Series],
    label: str,
    *,
    xlabel: str = "round",
    reference: tuple[str, float] | None = None,
    null: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None,
    zero: bool = False,
    dots: bool = True,
) -> str:
    """Curves with bands or error bars, each labelled at its end; a dashed line for a reference value, a grey band (x,
    low, high) for what chance does."""
    ys = [v for s in series for column in (s.y, s.low or (), s.high or ()) for v in column if math.isfinite(v)]
    ys += [reference[1]] if reference else []
    ys += [*null[1], *null[2]] if null else []
    axes = Axes([x for s in series for x in s.x], ys or [0, 1], zero=zero)
    xs = sorted({x for s in series for x in s.x})
    if len(xs) > MARKS:  # steps: round numbers, not every n-th of those that there are
        xs = [x for x in ticks(xs[0], xs[-1], MARKS - 3) if xs[0] <= x <= xs[-1]]
    body = axes.frame(xlabel, xs)
    if null:
        upper = [(axes.px(x), axes.py(v)) for x, v in zip(null[0], null[2], strict=True)]
        lower = [(axes.px(x), axes.py(v)) for x, v in zip(null[0], null[1], strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in upper + lower[::-1])
        tip = f"by chance: {number(null[1][-1])} to {number(null[2][-1])}"
        body.append(f'<polygon points="{path}" class="null"><title>{html.escape(tip)}</title></polygon>')
    if reference:
        y = axes.py(reference[1])
        body.append(
            f'<line class="reference" x1="{axes.left}" x2="{axes.width - axes.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        body.append(_text(axes.left + 4, y - 4, reference[0], "tick"))
    ends = []
    for s in series:
        colour = f"var(--c{s.colour})"
        points = [(axes.px(x), axes.py(y)) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
        if s.low and s.high:
            upper = [(axes.px(x), axes.py(v)) for x, v in zip(s.x, s.high, strict=True)]
            lower = [(axes.px(x), axes.py(v)) for x, v in zip(s.x, s.low, strict=True)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in upper + lower[::-1])
            body.append(f'<polygon points="{path}" fill="{colour}" class="band"/>')
        body.append(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" stroke="{colour}" class="line"/>'
        )
        for i, (x, y) in enumerate(points if dots else []):
            tip = s.tips[i] if s.tips else f"{s.name}, {xlabel} {number(s.x[i])}: {number(s.y[i])}"
            body.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{html.escape(tip)}</title></circle>'
            )
        if points:
            ends.append([points[-1][1], s])
    body += _end_labels(ends, axes)
    return _svg(axes.width, axes.height, body, label)


def _end_labels(ends: list, axes: Axes) -> list[str]:
    """Names at the right end of the curves, pushed apart where they would overlap."""
    ends.sort(key=lambda e: e[0])
    for i in range(1, len(ends)):
        ends[i][0] = max(ends[i][0], ends[i - 1][0] + 13)
    overflow = ends[-1][0] - (axes.height - axes.bottom + 4) if ends else 0
    shift = max(0.0, overflow)
    return [
        f'<text x="{axes.width - axes.right + 8}" y="{y + 3.5 - shift:.1f}" class="end" '
        f'fill="var(--c{s.colour})">{html.escape(s.name)}</text>'
        for y, s in ends
    ]


def stacked(parts: Sequence[tuple[str, Sequence[float]]], xs: Sequence[float], label: str, top: float) -> str:
    """Stacked areas, the first part at the bottom; `top` fixes the scale so that figures side by side compare."""
    axes = Axes(xs, [0.0, top], width=300, right=10, height=210, zero=True)
    body = axes.frame("round", xs)
    below = [0.0] * len(xs)
    for i, (name, values) in enumerate(parts):
        above = [b + max(v, 0.0) for b, v in zip(below, values, strict=True)]
        path = [f"{axes.px(x):.1f},{axes.py(y):.1f}" for x, y in zip(xs, above, strict=True)]
        path += [f"{axes.px(x):.1f},{axes.py(y):.1f}" for x, y in reversed(list(zip(xs, below, strict=True)))]
        tip = f"{name}: {number(values[0])} at round {number(xs[0])}, {number(values[-1])} at round {number(xs[-1])}"
        body.append(
            f'<polygon points="{" ".join(path)}" fill="var(--p{i})" '
            f'class="area"><title>{html.escape(tip)}</title></polygon>'
        )
        below = above
    return _svg(axes.width, axes.height, body, label)


def heatmap(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], label: str, tip: str
) -> str:
    """Shares in 0..1 as cells of one hue; rows top to bottom, columns left to right."""
    cell, left, top = 26, 56, 6
    width, height = left + cell * len(columns) + 6, top + cell * len(rows) + 34
    body = []
    for r, line in enumerate(values):
        body.append(_text(left - 6, top + cell * (r + 0.5) + 3.5, rows[r], "tick", "end"))
        for c, v in enumerate(line):
            title = html.escape(tip.format(row=rows[r], column=columns[c], value=f"{v:.1%}"))
            strength = round(100 * min(1.0, math.sqrt(max(v, 0.0))), 1)
            body.append(
                f'<rect x="{left + cell * c + 1}" y="{top + cell * r + 1}" width="{cell - 2}" height="{cell - 2}" '
                'rx="3" '
                f'style="fill:color-mix(in oklab,var(--heat) {strength}%,var(--cell))"><title>{title}</title></rect>'
            )
            if v >= 0.005:
                body.append(
                    _text(
                        left + cell * (c + 0.5),
                        top + cell * (r + 0.5) + 3.5,
                        f"{100 * v:.0f}",
                        "cell" + (" on" if v > 0.3 else ""),
                        "middle",
                    )
                )
    for c, name in enumerate(columns):
        body.append(_text(left + cell * (c + 0.5), height - 18, name, "tick", "middle"))
    body.append(
        _text(left + cell * len(columns) / 2, height - 4, "truth's frequency decile (10: rarest)", "axis", "middle")
    )
    return _svg(width, height, body, label)


def ridges(
    histograms: Sequence[Sequence[float]], edges: Sequence[float], names: Sequence[str], colour: int, label: str
) -> str:
    """One histogram per round, drawn over one another with a shift; x is log-perplexity, labelled as perplexity."""
    width, left, right, gap, tall = 300, 30, 10, 22, 46
    height = tall + gap * (len(histograms) - 1) + 38
    top = max((max(h) for h in histograms), default=1.0) or 1.0

    def px(v: float) -> float:
        return left + (v - edges[0]) / (edges[-1] - edges[0]) * (width - left - right)

    body = []
    for i, shares in enumerate(histograms):
        base = tall + gap * i
        points = [f"{px(edges[0]):.1f},{base}"]
        for j, share in enumerate(shares):
            points.append(f"{px((edges[j] + edges[j + 1]) / 2):.1f},{base - share / top * tall:.1f}")
        points.append(f"{px(edges[-1]):.1f},{base}")
        body.append(
            f'<polygon points="{" ".join(points)}" fill="var(--c{colour})" '
            f'class="ridge"><title>{html.escape(names[i])}</title></polygon>'
        )
        body.append(_text(left - 6, base, names[i].removeprefix("round "), "tick", "end"))
    low, high = math.exp(edges[0]), math.exp(edges[-1])
    marks = [m * 10**e for e in range(-1, 7) for m in (1, 2, 5) if low <= m * 10**e <= high]
    for mark in marks if len(marks) < 8 else marks[::2]:
        body.append(_text(px(math.log(mark)), height - 20, number(mark), "tick", "middle"))
    body.append(
        _text((left + width - right) / 2, height - 4, "perplexity of a row under the round-0 model", "axis", "middle")
    )
    return _svg(width, height, body, label)
