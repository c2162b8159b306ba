"""Cutting images into a grid of tiles: offsets, clipped windows, padding and shifted georeferences.

A window is (row, col, height, width) in px of the file, clipped to the file. Sizes are (H, W) px.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from satdifuser.extract.settings import Size
from satdifuser.store.georeference import Georeference

Window = tuple[int, int, int, int]
Scalar = TypeVar("Scalar", bound=np.generic)


def parse_size(size: Size) -> tuple[int, int]:
    """Return (H, W) px of a size setting: one number means a square."""
    return (size, size) if isinstance(size, int) else size


def offsets(length: int, tile: int, overlap: int = 0) -> range:
    """Return where tiles start along an axis so that they cover it, each adding at least one pixel.

    Args:
        length: Pixels along the axis.
        tile: Pixels of a tile along the axis.
        overlap: Pixels shared by neighbours, less than ``tile``.
    """
    return range(0, max(length - overlap, 1), tile - overlap)


def windows(size: tuple[int, int], tile: tuple[int, int], overlap: int = 0) -> Iterator[Window]:
    """Yield the clipped windows of a grid over an image of ``size``, row by row."""
    height, width = size
    for row in offsets(height, tile[0], overlap):
        for col in offsets(width, tile[1], overlap):
            yield row, col, min(tile[0], height - row), min(tile[1], width - col)


def pad_edge(array: NDArray[Scalar], size: tuple[int, int]) -> NDArray[Scalar]:
    """Grow the last two axes to ``size`` at the bottom and right by repeating the edge pixels."""
    height, width = array.shape[-2:]
    grow = [(0, 0)] * (array.ndim - 2) + [(0, size[0] - height), (0, size[1] - width)]
    return np.pad(array, grow, mode="edge")


def pad_with(array: NDArray[Scalar], size: tuple[int, int], value: int) -> NDArray[Scalar]:
    """Grow a 2-d array to ``size`` at the bottom and right with one value."""
    height, width = array.shape
    return np.pad(array, [(0, size[0] - height), (0, size[1] - width)], constant_values=value)


def shift(georeference: Georeference | None, row: int, col: int) -> Georeference | None:
    """Move a georeference's origin to pixel (row, col) of its grid, if there is one."""
    return georeference and georeference.shifted(row, col)
