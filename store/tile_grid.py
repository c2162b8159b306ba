"""Tiles in rows and columns over a raster: which pixels each row and column of tiles settles.

Distances are in pixels of the raster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import SettingsError, StoreError

MOST_EMPTY = 1000  # as much ground as that of all tiles, which a grid through them may span
Window = tuple[int, int, int, int]  # (row, col, height, width)


@dataclass(frozen=True)
class TileGrid:
    """Tiles at every pair of a row in ``tops`` and a column in ``lefts``; some may hold nothing.

    Raises:
        SettingsError: neighbours share more than half of their pixels.
    """

    tops: Sequence[int]  # ascending
    lefts: Sequence[int]
    tile: tuple[int, int]  # (H, W)

    def __post_init__(self) -> None:
        for what, overlap, side in zip(("rows", "columns"), self.overlap, self.tile, strict=True):
            if 2 * overlap > side:
                raise SettingsError(
                    f"neighbouring tiles share {overlap} of {side} {what}, expected at most half of them; "
                    "choose a smaller overlap"
                )

    @cached_property
    def step(self) -> tuple[int, int]:
        """Rows and columns from one tile to the next; those of a tile where there is no next."""
        starts = zip((self.tops, self.lefts), self.tile, strict=True)
        down, across = (s[1] - s[0] if len(s) > 1 else side for s, side in starts)
        return down, across

    @property
    def overlap(self) -> tuple[int, int]:
        """Rows and columns that neighbours share, 0 where they leave a gap."""
        return max(0, self.tile[0] - self.step[0]), max(0, self.tile[1] - self.step[1])

    @property
    def width(self) -> int:
        """Columns from the first tile's left to the last one's right."""
        return self.lefts[-1] + self.tile[1] - self.lefts[0]

    def rows(self, index: int) -> tuple[int, int]:
        """The rows of pixels that a row of tiles is the last to add to: from, to (not included)."""
        return self.tops[index], self._end(self.tops, index, self.tile[0])

    def columns(self, index: int) -> tuple[int, int]:
        """The columns of pixels that a column of tiles is the last to add to."""
        return self.lefts[index], self._end(self.lefts, index, self.tile[1])

    @staticmethod
    def _end(starts: Sequence[int], index: int, side: int) -> int:
        return starts[index + 1] if index + 1 < len(starts) else starts[-1] + side

    def touching(self, window: Window) -> TileGrid:
        """The rows and columns of tiles that share a pixel with a window inside the grid."""
        row, col, height, width = window
        tops = [top for top in self.tops if top < row + height and top + self.tile[0] > row]
        lefts = [left for left in self.lefts if left < col + width and left + self.tile[1] > col]
        return TileGrid(tops, lefts, self.tile)


def regular_grid(places: NDArray[np.int64], tile: tuple[int, int]) -> TileGrid:
    """The grid through tiles that each begin at a row and column (N, 2); cells between them may be empty.

    Raises:
        StoreError: they are strewn, so that a grid through them would be all but empty or too fine.
    """
    starts = [_regular_starts(column.tolist()) for column in places.T]
    extent = [s[-1] - s[0] + side for s, side in zip(starts, tile, strict=True)]
    endless = math.prod(extent) > MOST_EMPTY * len(places) * math.prod(tile)
    if endless or any(len(s) > 1 and 2 * s.step < side for s, side in zip(starts, tile, strict=True)):
        raise StoreError(
            f"the {len(places)} tiles of {tile[0]} x {tile[1]} px lie on no regular grid, and make no one "
            "map; choose those of one scene with --tiles 'NAME/*'"
        )
    return TileGrid(starts[0], starts[1], tile)


def _regular_starts(found: Sequence[int]) -> range:
    """The evenly spaced starts that hold all those found."""
    distinct = sorted(set(found))
    step = math.gcd(*(start - distinct[0] for start in distinct)) or 1
    return range(distinct[0], distinct[-1] + 1, step)
