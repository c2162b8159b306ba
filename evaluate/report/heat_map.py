"""Heat maps: tables whose cells are the deeper the larger their number is.

They are drawn as tables of the page, not as pictures, so that their numbers can be read, searched, copied and
heard. All that map timesteps and layers share one form: layers down, fine ones first, timesteps across.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from satdifuser.evaluate.report.colours import shade

SHORT = {"up_blocks.": "up ", "down_blocks.": "down ", "mid_block": "mid", "attentions.": "attn "}
SHORT |= {"resnets.": "resnet ", "transformer_blocks.": "block "}


@dataclass(frozen=True)
class Cell:
    """One number: its text, what it is in full, its colours (CSS), and whether it is the one chosen."""

    text: str
    tooltip: str
    background: str
    ink: str
    chosen: bool = False


@dataclass(frozen=True)
class HeatMap:
    """A table of shaded numbers.

    Args:
        corner: What rows and columns are, such as "layer / timestep".
        columns: Headings.
        rows: Heading, its full form, and the cells.
        ends: Texts of the palest and of the deepest shade.
    """

    kind: ClassVar[str] = "heat"
    corner: str
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    ends: tuple[str, str]


def heat_map(
    values: NDArray[np.floating[Any]],
    rows: Sequence[str],
    columns: Sequence[str],
    corner: str,
    form: Callable[[float], str],
    low: float | None = None,
    chosen: tuple[int, int] | None = None,
) -> HeatMap:
    """Shade a table of numbers.

    Args:
        values: (R, K); one that is not finite has a dash and no shade.
        rows: R names; those of U-Net layers are shortened.
        columns: K names.
        corner: What rows and columns are.
        form: Writes a number.
        low: The number of the palest shade; None for the smallest one.
        chosen: Row and column of the cell to mark.
    """
    finite = values[np.isfinite(values)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    least = least if low is None else low
    drawn = []
    for r, name in enumerate(rows):
        cells = [
            cell(float(values[r, k]), f"{name}, {column}", form, (least, most), (r, k) == chosen)
            for k, column in enumerate(columns)
        ]
        drawn.append((short_name(name), name, cells))
    return HeatMap(corner, list(columns), drawn, (form(least), form(most)))


def cell(
    value: float, place: str, form: Callable[[float], str], ends: tuple[float, float], chosen: bool
) -> Cell:
    """One number, shaded by where it lies between the ends."""
    if not math.isfinite(value):
        return Cell("–", f"{place}: no value", "transparent", "inherit")
    share = (value - ends[0]) / ((ends[1] - ends[0]) or 1.0)
    return Cell(form(value), f"{place}: {form(value)}", *shade(min(max(share, 0.0), 1.0)), chosen)


def short_name(layer: str) -> str:
    """A U-Net module path in fewer letters: ``up_blocks.1.resnets.0.conv2`` as ``up 1 resnet 0 conv2``."""
    name = layer.replace(".transformer_blocks.0.", ".")  # mostly the only one
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name.replace(".", " ") if name != layer else layer
