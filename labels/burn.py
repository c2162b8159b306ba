"""Puts polygons and points onto the pixels of a tile, in the tile's own CRS.

What lies near the tile is cut out first, and long edges get further vertices, so that an edge that is
straight in the CRS of the file becomes the curve that it is in the CRS of the tile.
Legend: S shapes, H and W pixels of the tile.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform, transform_bounds

from satdifuser.labels.classes import IGNORE
from satdifuser.store.georeference import OPENING, Georeference

MARGIN = 0.05  # of a tile's size, cut out beyond its edges
PIECES, PIECE_PIXELS = 16, 64  # an edge is cut before it is projected: so many a tile, or one for so many px

Overlaps = Literal["ignore", "first", "last"]


@dataclass(frozen=True)
class Burnt:
    """The labels of a tile."""

    mask: NDArray[np.uint8]  # (H, W) class indices, `IGNORE` where there is none
    conflicts: int  # pixels that shapes of different classes claim
    shapes: NDArray[np.intp]  # those that lie on the tile, ascending


class PlacedShapes:
    """Shapes with their classes, of which any tile can be asked for its labels.

    Args:
        geometry: (S,) polygons and points of shapely, in the order in which they count.
        classes: (S,) index of the class of each.
        crs: Of their coordinates.
        all_touched: Whether a polygon labels all pixels that it touches, or those whose centre it covers.
        overlaps: Which of several classes a pixel gets: none, that of the first shape, or of the last.
    """

    def __init__(
        self,
        geometry: NDArray[Any],
        classes: NDArray[np.uint8],
        crs: str,
        all_touched: bool,
        overlaps: Overlaps,
    ) -> None:
        self._geometry, self._classes = geometry, classes
        self._crs = CRS.from_user_input(crs)
        self._all_touched, self._overlaps = all_touched, overlaps
        self._tree = shapely.STRtree(geometry)

    def burn(self, place: Georeference, size: tuple[int, int]) -> Burnt:
        """Label the pixels of a tile of (H, W) px."""
        region = surroundings(place, size, self._crs)
        near = np.unique(self._tree.query(region, predicate="intersects"))
        mask = np.full(size, IGNORE, np.uint8)
        if not len(near):
            return Burnt(mask, 0, near)
        shapes, owner = cut_out(self._geometry[near], region, self._crs, place, size)
        classes = self._classes[near[owner]]
        claims = np.zeros(size, np.int64)
        for index in np.unique(classes):
            claimed = self._rasterize(shapes[classes == index], [1] * len(shapes), place, size, 0) == 1
            mask[claimed] = index
            claims += claimed
        contested = claims > 1
        if contested.any():
            mask[contested] = self._resolve(shapes, classes, place, size)[contested]
        tile = shapely.Polygon(place.corners(*size))
        points = shapely.get_dimensions(shapes) == 0  # one on the border labels a pixel
        there = shapely.intersects(shapes, tile) & (points | ~shapely.touches(shapes, tile))
        return Burnt(mask, int(contested.sum()), near[np.unique(owner[there])])

    def _resolve(
        self, shapes: Any, classes: NDArray[np.uint8], place: Georeference, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """(H, W) classes by the rule for overlaps."""
        if self._overlaps == "ignore":
            return np.full(size, IGNORE, np.uint8)
        order = slice(None, None, 1 if self._overlaps == "last" else -1)  # a later one paints over an earlier
        return self._rasterize(shapes[order], classes[order].tolist(), place, size, IGNORE)

    def _rasterize(
        self, shapes: Any, values: list[int], place: Georeference, size: tuple[int, int], fill: int
    ) -> NDArray[np.uint8]:
        with OPENING, warnings.catch_warnings():  # rasterio opens a raster in memory, which has no place yet
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            burnt: NDArray[np.uint8] = rasterize(
                zip(shapes, values, strict=False),
                out_shape=size,
                transform=Affine(*place.transform),
                fill=fill,
                all_touched=self._all_touched,
                dtype="uint8",
            )
        return burnt


def surroundings(place: Georeference, size: tuple[int, int], crs: CRS) -> Any:
    """A polygon around a grid of (H, W) px in another CRS; empty where that CRS does not reach."""
    left, bottom, right, top = transform_bounds(place.crs, crs, *place.bounds(*size), densify_pts=21)
    if not np.isfinite([left, bottom, right, top]).all():
        return shapely.Polygon()
    turned = right < left  # across the antimeridian
    parts = [(left, 180.0), (-180.0, right)] if turned else [(left, right)]
    boxes = []
    for west, east in parts:
        margin = MARGIN * max(east - west, top - bottom)
        boxes.append(shapely.box(west - margin, bottom - margin, east + margin, top + margin))
    return shapely.union_all(boxes)


def cut_out(
    geometry: NDArray[Any], region: Any, crs: CRS, place: Georeference, size: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """What of some shapes lies near a grid, in its CRS.

    Args:
        geometry: (S,) shapes.
        region: What `surroundings` returns.
        crs: Of shapes and region.
        place: Of the grid.
        size: (H, W) px.

    Returns:
        The parts, and which shape each is of.
    """
    other = CRS.from_user_input(place.crs)
    if crs == other:
        return geometry, np.arange(len(geometry))
    left, bottom, right, top = shapely.bounds(region)
    parts, owner = shapely.get_parts(shapely.intersection(geometry, region), return_index=True)
    wide = shapely.get_dimensions(parts) == shapely.get_dimensions(geometry)[owner]  # no mere touch
    pieces = max(PIECES, max(size) // PIECE_PIXELS)
    fine = shapely.segmentize(parts[wide], max(right - left, top - bottom) / pieces)

    def project(points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack(transform(crs, other, points[:, 0], points[:, 1]))

    return np.asarray(shapely.transform(fine, project)), owner[wide]
