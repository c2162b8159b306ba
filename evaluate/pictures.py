"""Pictures and charts of the report, as text that stands inside a web page: PNG data URIs and SVG.

The first colours of `palette` are Okabe and Ito's ("Color Universal Design", 2008), told apart by
colour-blind readers; further ones are picked to be far from all others, also in the eyes of a deuteranope
(simulation: Machado et al., "A Physiologically-based Model for Simulation of Color Vision Deficiency",
2009). Charts draw text and axes in the page's text colour, so they follow its dark mode.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from satdifuser.errors import ImageError

OKABE_ITO = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233)]
OKABE_ITO += [(240, 228, 66)]
DEUTERANOPE = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
IGNORED = (128, 128, 128)
PALE, DEEP = np.array([235, 243, 251]), np.array([8, 48, 107])  # ends of the heat map's colours

# line chart, in SVG units (pixels at full width)
WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44
# heat map
CELL, CHARACTER = 40, 6.6


def png_data_uri(rgb: NDArray[np.uint8], scale: int = 1) -> str:
    """Encode a picture as a PNG data URI.

    Args:
        rgb: (H, W, 3) uint8.
        scale: Whole factor of enlargement; pixels stay sharp squares.

    Raises:
        ImageError: The array is not a picture of that shape and type.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ImageError(f"a picture must be (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(rgb.repeat(scale, axis=0).repeat(scale, axis=1)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def palette(n: int) -> NDArray[np.uint8]:
    """Choose n colours that are easy to tell apart, also for colour-blind readers.

    Args:
        n: Number of colours; the first ones do not depend on it.

    Returns:
        (n, 3) uint8.
    """
    chosen = list(OKABE_ITO[:n])
    steps = np.arange(0, 256, 51)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    taken = np.array([*OKABE_ITO, IGNORED, (0, 0, 0), (255, 255, 255)])
    nearest = colour_distance(candidates, taken).min(axis=1)
    while len(chosen) < n:
        best = candidates[nearest.argmax()]
        chosen.append(tuple(best.tolist()))
        nearest = np.minimum(nearest, colour_distance(candidates, best[None])[:, 0])
    return np.array(chosen, np.uint8).reshape(-1, 3)


def colour_distance(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """(A, 3) and (B, 3) colours -> (A, B) distances, the smaller of normal and deuteranope sight."""
    apart = (first[:, None] - second[None]).astype(np.float64)
    sights = [np.linalg.norm(apart, axis=-1), np.linalg.norm(apart @ DEUTERANOPE.T, axis=-1)]
    distance: NDArray[np.float64] = np.minimum(*sights)
    return distance


def colour_mask(
    mask: NDArray[np.integer[Any]], colours: NDArray[np.uint8], ignore_value: int | None = None
) -> NDArray[np.uint8]:
    """Paint a mask of class numbers.

    Args:
        mask: (H, W) class numbers.
        colours: (C, 3) uint8, one colour per class.
        ignore_value: Number of places without a label; they become grey.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: The mask holds a number without a colour.
    """
    ignored = np.zeros(mask.shape, bool) if ignore_value is None else mask == ignore_value
    strange = mask[~ignored & ((mask < 0) | (mask >= len(colours)))]
    if strange.size:
        raise ImageError(f"the mask holds the class {strange[0]}, but there are {len(colours)} classes")
    picture = colours[np.where(ignored, 0, mask)]
    picture[ignored] = IGNORED
    return picture


def line_chart_svg(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]], title: str, x_label: str, y_label: str
) -> str:
    """Draw lines over a whole-numbered x, such as epochs; a point that is not finite leaves a gap out.

    Args:
        series: Name and points (x, y) of each line.
        title: What the chart shows, for screen readers.
        x_label: Text below the x axis.
        y_label: Text beside the y axis.

    Returns:
        One `<svg>` element; each point has a tooltip, the legend lies below the chart.
    """
    lines = [(name, [p for p in points if math.isfinite(p[1])]) for name, points in series]
    xs = ticks([x for _, points in lines for x, _ in points], whole=True)
    ys = ticks([y for _, points in lines for _, y in points], whole=False)
    height = HEIGHT + 18 * len(lines)
    parts = [*axis_parts(xs, ys), *axis_labels(x_label, y_label)]
    for row, ((name, points), colour) in enumerate(zip(lines, palette(len(lines)), strict=True)):
        stroke = f"rgb({','.join(map(str, colour))})"
        parts += line_parts(name, [(across(x, xs), up(y, ys), x, y) for x, y in points], stroke)
        legend_y = HEIGHT + 18 * row
        parts.append(f'<rect x="{LEFT}" y="{legend_y}" width="18" height="4" fill="{stroke}"/>')
        parts.append(text(LEFT + 24, legend_y + 6, name))
    return svg(WIDTH, height, title, parts)


def ticks(values: Sequence[float], whole: bool) -> list[float]:
    """Three to seven round numbers whose span holds all values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def across(x: float, xs: Sequence[float]) -> float:
    """Position of x on the chart."""
    return LEFT + (WIDTH - LEFT - RIGHT) * (x - xs[0]) / (xs[-1] - xs[0])


def up(y: float, ys: Sequence[float]) -> float:
    """Position of y on the chart; SVG counts from the top."""
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (y - ys[0]) / (ys[-1] - ys[0])


def axis_parts(xs: Sequence[float], ys: Sequence[float]) -> list[str]:
    """Grid lines and numbers of both axes."""
    parts = []
    for x in xs:
        parts.append(text(across(x, xs), HEIGHT - BOTTOM + 16, f"{x:g}", anchor="middle"))
    for y in ys:
        height = up(y, ys)
        line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"'
        parts.append(f'{line} stroke="currentColor" stroke-opacity="0.2"/>')
        parts.append(text(LEFT - 6, height + 4, f"{y:.6g}", anchor="end"))
    return parts


def axis_labels(x_label: str, y_label: str) -> list[str]:
    """The words beside both axes."""
    middle = (TOP + HEIGHT - BOTTOM) / 2
    beside = f'<g transform="translate(12 {middle}) rotate(-90)">{text(0, 0, y_label, anchor="middle")}</g>'
    return [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, anchor="middle"), beside]


def line_parts(name: str, points: Sequence[tuple[float, float, float, float]], stroke: str) -> list[str]:
    """One line with a dot and a tooltip at each (position x, position y, x, y)."""
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top, _, _ in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="2"/>']
    for left, top, x, y in points:
        tooltip = f"<title>{escape(name)}: {y:.4g} at {x:g}</title>"
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{stroke}">{tooltip}</circle>')
    return parts


def heat_map_svg(
    shades: NDArray[np.floating[Any]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    cells: Sequence[Sequence[str]],
) -> str:
    """Draw a table whose cells are the darker the larger their shade is.

    Args:
        shades: (R, K) values from 0 (pale) to the largest (deep); one that is not finite counts as 0.
        row_labels: R texts at the left.
        column_labels: K texts on top.
        title: What the picture shows, for screen readers.
        cells: R rows of K texts written in the cells.

    Returns:
        One `<svg>` element; each cell has a tooltip with its row, column and text.
    """
    finite = np.nan_to_num(shades)
    share = finite / (finite.max() or 1.0)
    left = 8 + CHARACTER * max(map(len, row_labels))
    top = 8 + CHARACTER * max(map(len, column_labels))
    parts = []
    for column, label in enumerate(column_labels):
        place = f"translate({left + CELL * (column + 0.5) + 4:.0f} {top - 4:.0f}) rotate(-90)"
        parts.append(f'<g transform="{place}">{text(0, 0, label)}</g>')
    for row, label in enumerate(row_labels):
        parts.append(text(left - 6, top + CELL * (row + 0.5) + 4, label, anchor="end"))
        for column, name in enumerate(column_labels):
            tooltip = f"{label} → {name}: {cells[row][column]}"
            corner = (left + CELL * column, top + CELL * row)
            parts.append(cell_part(corner, float(share[row, column]), cells[row][column], tooltip))
    width = left + CELL * len(column_labels) + 2
    return svg(width, top + CELL * len(row_labels) + 2, title, parts)


def cell_part(corner: tuple[float, float], share: float, label: str, tooltip: str) -> str:
    """One coloured square of a heat map with its text and tooltip."""
    x, y = corner
    red, green, blue = (PALE + (DEEP - PALE) * share).astype(int)
    ink = "#ffffff" if share > 0.5 else "#10151c"
    box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{CELL - 1}" height="{CELL - 1}" rx="3"'
    square = f'{box} fill="rgb({red},{green},{blue})"/>'
    words = text(x + CELL / 2, y + CELL / 2 + 4, label, anchor="middle", fill=ink)
    return f"<g><title>{escape(tooltip)}</title>{square}{words}</g>"


def text(x: float, y: float, words: str, anchor: str = "start", fill: str = "currentColor") -> str:
    """One escaped SVG text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """Frame the parts of a chart as one accessible element."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" {size}'
    return f'{head} font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
