"""Blends the logits of overlapping tiles into one map without seams, one row of tiles after the other.

A tile counts by a window that is 1 in its middle and falls off across the overlap as a squared sine, so that
the windows of neighbours add up to 1; where they do not, at the borders of a scene or of missing data, their
sum is divided out. Kept in memory is only what the next tile and the next row of tiles still add to.

Letters of shapes: K classes, H and W pixels of a tile, h and w pixels of what is settled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from satdifuser.store.tile_grid import TileGrid

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
TileLogits = tuple[Floats, Bools]  # logits (K, H, W), and where the tile holds data (H, W)


@dataclass(frozen=True)
class Piece:
    """A part of the map that no further tile adds to."""

    left: int  # px, in the grid's raster
    logits: Floats  # (K, h, w)
    seen: Bools  # (h, w) where any tile holds data

    def crop(self, rows: slice, columns: slice) -> Piece:
        """Some of its rows, and columns of the grid's raster."""
        here = slice(columns.start - self.left, columns.stop - self.left)
        return Piece(columns.start, self.logits[:, rows, here], self.seen[rows, here])


class Blender:
    """Takes the tiles of a grid row by row, from left to right, and gives back the settled parts.

    Args:
        grid: Where tiles lie.
        classes: Number K of classes.
    """

    def __init__(self, grid: TileGrid, classes: int) -> None:
        self.grid = grid
        down, across = (ramp(*pair) for pair in zip(grid.tile, grid.overlap, strict=True))
        self._window = np.outer(down, across).astype(np.float32)
        # K sums of weighted logits, and the sum of the weights, of the rows that the next row of tiles shares
        self._below = np.zeros((classes + 1, grid.overlap[0], grid.width), np.float32)

    def blend_row(self, row: int, tiles: Iterable[TileLogits | None]) -> Iterator[Piece]:
        """Add one row of tiles, None for those without data; yield what it settles, from left to right."""
        grid, height = self.grid, self.grid.tile[0]
        first, end = grid.rows(row)
        settled = end - first
        shared = np.zeros((len(self._below), height, 0), np.float32)  # with the next tile
        for column, tile in enumerate(tiles):
            left, right = grid.columns(column)
            sums = self._weighted(tile, settled, right - left)
            sums[:, :height, : shared.shape[2]] += shared
            shared = sums[:, :height, right - left :]
            sums = sums[:, :, : right - left]
            here = slice(left - grid.lefts[0], right - grid.lefts[0])
            sums[:, : grid.overlap[0]] += self._below[:, :, here]
            if settled < height:
                self._below[:, :, here] = sums[:, settled:height]
            yield _settle(left, sums[:, :settled])

    def _weighted(self, tile: TileLogits | None, rows: int, columns: int) -> Floats:
        """A tile's weighted logits and weights (K + 1, H, W), grown by zeros to so many rows and columns."""
        height, width = self.grid.tile
        sums = np.zeros((len(self._below), max(rows, height), max(columns, width)), np.float32)
        if tile is not None:
            logits, valid = tile
            weights = self._window * valid
            np.multiply(logits, weights, out=sums[:-1, :height, :width])
            sums[-1, :height, :width] = weights
        return sums


def _settle(left: int, sums: Floats) -> Piece:
    seen = sums[-1] > 0
    weights: Floats = np.where(seen, sums[-1], np.float32(1))
    return Piece(left, sums[:-1] / weights, seen)


def ramp(length: int, overlap: int) -> NDArray[np.float64]:
    """Weights along a side of a tile: a squared sine over the overlap at both ends, 1 between, never 0."""
    if not overlap:
        return np.ones(length)
    position = np.arange(length) + 0.5
    from_edge = np.minimum(position, length - position) / overlap
    return np.asarray(np.sin(np.pi / 2 * np.minimum(from_edge, 1)) ** 2)
