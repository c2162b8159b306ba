"""Which part of a raster is mapped: all of it, a window, or what lies inside polygons.

Letters of shapes: h and w pixels of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import Affine

from satdifuser.errors import SettingsError
from satdifuser.labels.burn import cut_out, surroundings
from satdifuser.store.georeference import Georeference
from satdifuser.store.tile_grid import Window

Polygons = NDArray[Any]  # of shapely geometries
Numbers = Any  # a float64 number or an array of them
Transform = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f) as rasterio orders it: x = a*column + b*row + c, y = d*column + e*row + f."""
ROWS_AT_ONCE = 1024  # of a window that are looked through for a pixel


@dataclass(frozen=True)
class Raster:
    """The grid of pixels of a scene, or of the tiles of a store."""

    size: tuple[int, int]  # (H, W) px
    crs_wkt: str
    transform: Transform

    def at(self, rows: Numbers, columns: Numbers) -> tuple[Numbers, Numbers]:
        """Coordinates x and y in the CRS of places in px."""
        a, b, c, d, e, f = self.transform
        return a * columns + b * rows + c, d * columns + e * rows + f

    def pixels(self, xs: Numbers, ys: Numbers) -> tuple[Numbers, Numbers]:
        """Rows and columns in px of coordinates in the CRS."""
        a, b, c, d, e, f = self.transform
        determinant = a * e - b * d
        return (a * (ys - f) - d * (xs - c)) / determinant, (e * (xs - c) - b * (ys - f)) / determinant

    def part(self, row: float, column: float, step: tuple[int, int] = (1, 1)) -> Transform:
        """The transform of a raster whose origin is at a place in px, and whose pixels are so many px."""
        a, b, _, d, e, _ = self.transform
        x, y = self.at(np.float64(row), np.float64(column))
        return a * step[1], b * step[0], float(x), d * step[1], e * step[0], float(y)


@dataclass(frozen=True)
class Area:
    """A window of a raster, and which of its pixels count: those whose centre is inside a polygon."""

    raster: Raster
    window: Window
    polygons: Polygons | None = None  # in the raster's CRS; None: all pixels count

    @property
    def transform(self) -> Transform:
        """Of the window."""
        return self.raster.part(self.window[0], self.window[1])

    def inside(self, rows: tuple[int, int]) -> NDArray[np.bool_]:
        """Which pixels of these rows of the raster (from, to) count: (h, w), w columns of the window."""
        shape = (rows[1] - rows[0], self.window[3])
        if self.polygons is None or not shape[0]:
            return np.ones(shape, np.bool_)
        here = Affine(*self.raster.part(rows[0], self.window[1]))
        burnt = rasterize(self.polygons.tolist(), shape, transform=here, dtype="uint8")
        return np.asarray(burnt, np.bool_)

    def touches(self, tops: Sequence[int], lefts: Sequence[int], tile: tuple[int, int]) -> NDArray[np.bool_]:
        """Which tiles of (H, W) px, at rows and columns of the raster, share ground with the area."""
        row, column, height, width = self.window
        top, left = np.asarray(tops), np.asarray(lefts)
        down = (top < row + height) & (top + tile[0] > row)
        met: NDArray[np.bool_] = down & (left < column + width) & (left + tile[1] > column)
        if self.polygons is None:
            return met
        polygons = tile_polygons(self.raster, tops, lefts, tile)
        near = shapely.STRtree(self.polygons).query(polygons, "intersects")[0]
        return met & np.isin(np.arange(len(top)), near)


def tile_polygons(
    raster: Raster, tops: Sequence[int], lefts: Sequence[int], tile: tuple[int, int]
) -> Polygons:
    """The ground of tiles of (H, W) px as polygons."""
    corners = np.array([(0, 0), (tile[0], 0), (tile[0], tile[1]), (0, tile[1])])  # counterclockwise
    rows = np.asarray(tops)[:, None] + corners[:, 0]
    columns = np.asarray(lefts)[:, None] + corners[:, 1]
    return np.asarray(shapely.polygons(np.stack(raster.at(rows, columns), axis=-1)))


def whole(raster: Raster) -> Area:
    """All of a raster."""
    return Area(raster, (0, 0, *raster.size))


def window_area(raster: Raster, window: Window) -> Area:
    """A window of a raster.

    Raises:
        SettingsError: it reaches beyond the raster, or is empty.
    """
    row, col, height, width = window
    inside = row >= 0 and col >= 0 and row + height <= raster.size[0] and col + width <= raster.size[1]
    if min(height, width) < 1 or not inside:
        raise SettingsError(
            f"--window {row},{col},{height},{width}: expected row, column, height and width in px inside the "
            f"raster of {raster.size[0]} x {raster.size[1]} px (height x width)"
        )
    return Area(raster, window)


def polygon_area(raster: Raster, polygons: Polygons, crs: str, name: str) -> Area:
    """What lies inside polygons, with the smallest window around it.

    Args:
        raster: Where they are laid.
        polygons: Shapely polygons.
        crs: Their CRS.
        name: Their file, for messages.

    Raises:
        SettingsError: none of them shares ground with the raster, or they cover the centre of no pixel.
    """
    place = Georeference(raster.crs_wkt, raster.transform)
    own = CRS.from_user_input(crs)
    placed, _ = cut_out(polygons, surroundings(place, raster.size, own), own, place, raster.size)
    pixels = shapely.transform(placed, lambda points: np.stack(raster.pixels(*points.T), axis=-1))
    shared = shapely.intersection(pixels, shapely.box(0, 0, *raster.size))
    near = shapely.area(shared) > 0
    if not near.any():
        reach, lies = _told(shapely.total_bounds(polygons)), _told(place.bounds(*raster.size))
        raise SettingsError(
            f"{name}: none of its {len(polygons)} polygons lies on the raster: in {crs} they reach over "
            f"({reach}) (left, bottom, right, top), and it over ({lies}) in its own CRS; draw them on the "
            "scene, or correct their CRS"
        )
    first_row, first_col, last_row, last_col = shapely.total_bounds(shared[near])
    low, high = np.floor((first_row, first_col)).astype(int), np.ceil((last_row, last_col)).astype(int)
    area = Area(raster, (*low.tolist(), *(high - low).tolist()), placed[near])
    if not any(area.inside(rows).any() for rows in _stretches(low[0], high[0])):
        raise SettingsError(f"{name}: its polygons cover the centre of no pixel; draw larger ones")
    return area


def _told(bounds: Sequence[float]) -> str:
    return ", ".join(f"{value:.8g}" for value in bounds)


def _stretches(first: int, last: int) -> Iterator[tuple[int, int]]:
    for row in range(first, last, ROWS_AT_ONCE):
        yield row, min(row + ROWS_AT_ONCE, last)
