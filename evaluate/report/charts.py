"""Charts as SVG text: lines over a number, and figures with their intervals.

They draw text and axes in the page's text colour, so they follow its dark mode. Positions are in SVG units,
pixels at full width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup

from satdifuser.evaluate.report.colours import palette

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44
LEGEND_ROW, CHARACTER = 18, 6.6
DASHES = ["", "7 4", "2 3", "9 3 2 3"]  # told apart without colour too
BAR_ROW, BAR_LEFT = 24, 150


@dataclass(frozen=True)
class Line:
    """A line's name, its points (x, y), and how far each reaches down and up, where that is known."""

    name: str
    points: Sequence[tuple[float, float]]
    spans: Sequence[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: its words, its round numbers, the positions of its ends."""

    words: str
    ticks: Sequence[float]
    ends: tuple[float, float]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a number lies."""
        low, high, here = (self._scaled(v) for v in (self.ticks[0], self.ticks[-1], value))
        return self.ends[0] + (self.ends[1] - self.ends[0]) * (here - low) / ((high - low) or 1.0)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value


def line_chart(
    lines: Sequence[Line], title: str, x_words: str, y_words: str, logarithmic: bool = False
) -> Markup:
    """Draw lines over a whole number, such as epochs or labelled tiles.

    Args:
        lines: A point that is not finite leaves a gap out.
        title: What the chart shows, for screen readers.
        x_words: Text below the x axis.
        y_words: Text beside the y axis.
        logarithmic: Whether each doubling of x is a step of the same width.

    Returns:
        One `<svg>` element; each point has a tooltip, the legend lies below the chart.
    """
    xs = [x for line in lines for x, y in line.points if math.isfinite(y)]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    ys += [end for line in lines for span in line.spans for end in span if math.isfinite(end)]
    x_ticks = sorted(set(xs)) or [1.0, 2.0] if logarithmic else round_ticks(xs, whole=True)
    x_axis = Axis(x_words, x_ticks, (LEFT + 8, WIDTH - RIGHT - 8), logarithmic)
    y_axis = Axis(y_words, round_ticks(ys, whole=False), (HEIGHT - BOTTOM, TOP))
    parts = [*x_parts(x_axis), *y_parts(y_axis)]
    for row, line in enumerate(lines):
        parts += line_parts(line, x_axis, y_axis, style(row, len(lines)))
        parts += legend_parts(line.name, HEIGHT + LEGEND_ROW * row, style(row, len(lines)))
    return svg(WIDTH, HEIGHT + LEGEND_ROW * len(lines), title, parts)


def label_chart(lines: Sequence[Line], split: str, metric: str) -> Markup:
    """Draw a metric of a split over the number of labelled tiles."""
    title = f"{split} {metric} by number of labelled tiles"
    return line_chart(lines, title, "labelled training tiles", f"{split} {metric}", logarithmic=True)


def interval_chart(bars: Sequence[tuple[str, float, float, float]], title: str, x_words: str) -> Markup:
    """Draw figures with their intervals below each other.

    Args:
        bars: Name, value and both ends of each; ends that are not finite are left out.
        title: What the chart shows, for screen readers.
        x_words: Text below the axis.
    """
    left = min(BAR_LEFT + 60.0, 12 + CHARACTER * max((len(name) for name, *_ in bars), default=0))
    bottom = 8 + BAR_ROW * len(bars)
    known = [v for _, *numbers in bars for v in numbers if math.isfinite(v)]
    axis = Axis(x_words, round_ticks(known, whole=False), (left, WIDTH - RIGHT - 8))
    parts = []
    for tick in axis.ticks:
        x = axis.place(tick)
        parts.append(rule(x, x, 4, bottom))
        parts.append(text(x, bottom + 16, f"{tick:.6g}", anchor="middle"))
    parts.append(text((left + WIDTH - RIGHT) / 2, bottom + 34, x_words, anchor="middle"))
    for row, (name, value, low, high) in enumerate(bars):
        parts += bar_parts(name, (value, low, high), 8 + BAR_ROW * (row + 0.5), axis)
    return svg(WIDTH, bottom + 42, title, parts)


def bar_parts(name: str, numbers: tuple[float, float, float], y: float, axis: Axis) -> list[str]:
    """One figure: a dot, and a line from one end of its interval to the other."""
    value, low, high = numbers
    shown = name if len(name) * CHARACTER < BAR_LEFT + 50 else f"{name[:28]}…"
    parts = [text(axis.ends[0] - 8, y + 4, shown, anchor="end")]
    if not math.isfinite(value):
        return parts
    words = f"{name}: {value:.4g}"
    if math.isfinite(low) and math.isfinite(high):
        words += f" ({low:.4g} to {high:.4g})"
        span = f'x1="{axis.place(low):.1f}" x2="{axis.place(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line {span} stroke="currentColor" stroke-width="3" stroke-opacity="0.4"/>')
    parts.append(dot(axis.place(value), y, words, "rgb(0,114,178)", 5))
    return parts


def style(row: int, lines: int) -> tuple[str, str]:
    """Colour and dashes of a line."""
    colour = ",".join(map(str, palette(lines)[row]))
    return f"rgb({colour})", DASHES[row % len(DASHES)]


def round_ticks(values: Sequence[float], whole: bool) -> list[float]:
    """Three to seven round numbers whose span holds all values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def x_parts(axis: Axis) -> list[str]:
    """Numbers and words of the x axis; numbers that would touch the one before are left out."""
    parts, free = [], -math.inf
    for value in axis.ticks:
        words, place = f"{value:g}", axis.place(value)
        half = CHARACTER * len(words) / 2
        if place - half > free:
            parts.append(text(place, HEIGHT - BOTTOM + 16, words, anchor="middle"))
            free = place + half + 4
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, axis.words, anchor="middle"))
    return parts


def y_parts(axis: Axis) -> list[str]:
    """Grid lines, numbers and words of the y axis."""
    parts = []
    for value in axis.ticks:
        height = axis.place(value)
        parts.append(rule(LEFT, WIDTH - RIGHT, height, height))
        parts.append(text(LEFT - 6, height + 4, f"{value:.6g}", anchor="end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    words = text(0, 0, axis.words, anchor="middle")
    return [*parts, f'<g transform="translate(12 {middle}) rotate(-90)">{words}</g>']


def line_parts(line: Line, x_axis: Axis, y_axis: Axis, look: tuple[str, str]) -> list[str]:
    """One line with a dot and a tooltip at each point, and how far each reaches."""
    colour, dashes = look
    drawn = [(x_axis.place(x), y_axis.place(y), x, y) for x, y in line.points if math.isfinite(y)]
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top, _, _ in drawn)
    parts = [f'<polyline points="{path}" fill="none" {stroke(colour, dashes)}/>']
    for (x, _), (low, high) in zip(line.points, line.spans, strict=False):
        if math.isfinite(low) and math.isfinite(high):
            at = x_axis.place(x)
            ends = f'x1="{at:.1f}" x2="{at:.1f}" y1="{y_axis.place(low):.1f}" y2="{y_axis.place(high):.1f}"'
            parts.append(f'<line {ends} stroke="{colour}" stroke-opacity="0.6"/>')
    parts += [dot(left, top, f"{line.name}: {y:.4g} at {x:g}", colour) for left, top, x, y in drawn]
    return parts


def legend_parts(name: str, y: float, look: tuple[str, str]) -> list[str]:
    """A sample of a line, and its name."""
    sample = f'<line x1="{LEFT}" x2="{LEFT + 24}" y1="{y + 2}" y2="{y + 2}" {stroke(*look)}/>'
    return [sample, text(LEFT + 30, y + 6, name)]


def stroke(colour: str, dashes: str) -> str:
    """How a line is drawn."""
    return f'stroke="{colour}" stroke-width="2"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def rule(x1: float, x2: float, y1: float, y2: float) -> str:
    """A faint line behind the figures."""
    place = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="currentColor" stroke-opacity="0.2"/>'


def dot(x: float, y: float, words: str, colour: str, radius: int = 3) -> str:
    """A point with a tooltip."""
    tooltip = f"<title>{escape(words)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">{tooltip}</circle>'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """One escaped SVG text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(words)}</text>'


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    """Frame the parts of a chart as one element that screen readers name."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" {size}'
    return Markup(f'{head} font-family="sans-serif" font-size="12">{"".join(parts)}</svg>')
