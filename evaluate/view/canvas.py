"""Where the layers of a page lie: on one grid of pixels on the ground, or on a sheet of tiles without places.

Letters of shapes: H and W pixels of a tile, h and w pixels of the canvas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.warp import reproject

from satdifuser.errors import StoreError
from satdifuser.evaluate.maps.area import Raster
from satdifuser.evaluate.maps.store_features import find_raster
from satdifuser.store.reader import FeatureStore, Indices

SHEET_TILES = 400  # of a store whose tiles have no place on one grid
GAP = 2  # px between them
Picture = NDArray[np.uint8]  # (h, w, 4) red, green, blue, and 255 where there is anything


@dataclass(frozen=True)
class Canvas:
    """A grid of pixels for a page, perhaps coarser than what is drawn on it."""

    size: tuple[int, int]  # (h, w) px
    ground: Raster | None = None  # of this very size; None for a sheet

    def bring(self, picture: Picture, ground: Raster, smooth: bool) -> Picture:
        """Lay a picture of some ground on this canvas; one of the same ground stays as it is.

        Raises:
            StoreError: this canvas is a sheet of tiles, which have no place.
        """
        if self.ground is None:
            raise StoreError(
                "tiles without places on one grid cannot be laid beside a raster; name them alone"
            )
        if ground == self.ground:
            return picture
        laid = np.zeros((4, *self.size), np.uint8)
        reproject(
            np.moveaxis(picture, -1, 0),
            laid,
            src_transform=Affine(*ground.transform),
            src_crs=ground.crs_wkt,
            dst_transform=Affine(*self.ground.transform),
            dst_crs=self.ground.crs_wkt,
            resampling=Resampling.bilinear if smooth else Resampling.nearest,
        )
        found: Picture = np.moveaxis(laid, 0, -1)
        found[found[..., 3] < 255] = 0  # half of a pixel without data
        return found


def shrink(raster: Raster, largest: int) -> Raster:
    """The same ground in at most so many pixels a side."""
    scale = max(1.0, max(raster.size) / largest)
    height, width = (max(1, round(side / scale)) for side in raster.size)
    a, b, c, d, e, f = raster.transform
    down, across = raster.size[0] / height, raster.size[1] / width
    return Raster((height, width), raster.crs_wkt, (a * across, b * down, c, d * across, e * down, f))


@dataclass(frozen=True)
class Sheet:
    """Where the tiles of a store are put."""

    rows: Indices  # those that are shown
    places: NDArray[np.int64]  # (N, 2) row and column in px at which each begins
    tile: tuple[int, int]  # (H, W) px
    size: tuple[int, int]  # px of all
    canvas: Canvas

    def paint(self, pictures: Iterable[NDArray[Any]], smooth: bool) -> Picture:
        """Put a picture (any size, 4) of each tile in its place; what is transparent covers nothing."""
        painted = np.zeros((*self.canvas.size, 4), np.uint8)
        scale = np.array(self.canvas.size) / self.size
        method = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
        for place, picture in zip(self.places, pictures, strict=True):
            top, left = np.rint(place * scale).astype(int)
            bottom, right = np.maximum(np.rint((place + self.tile) * scale).astype(int), (top + 1, left + 1))
            small = np.asarray(Image.fromarray(picture).resize((right - left, bottom - top), method))
            here = painted[top:bottom, left:right]
            small = small[: here.shape[0], : here.shape[1]]
            there = small[..., 3] == 255
            here[there] = small[there]
        return painted


def lay_out(store: FeatureStore, rows: Indices, largest: int) -> Sheet:
    """Find the places of tiles: on the ground where they have some on one grid, else side by side.

    Args:
        store: The store.
        rows: The tiles; of those without places only some are shown.
        largest: Pixels a side of the canvas at most.
    """
    tile = store.attributes.tile_size
    try:
        raster, places = find_raster(store, rows)
    except StoreError:
        return _side_by_side(rows, tile, largest)
    ground = shrink(raster, largest)
    return Sheet(rows, places, tile, raster.size, Canvas(ground.size, ground))


def _side_by_side(rows: Indices, tile: tuple[int, int], largest: int) -> Sheet:
    count = min(len(rows), SHEET_TILES)
    shown = rows[np.linspace(0, len(rows) - 1, count).round().astype(np.intp)]
    columns = int(np.ceil(np.sqrt(count * tile[0] / tile[1])))
    step = np.array(tile) + GAP
    places = np.stack(np.divmod(np.arange(count), columns), axis=1) * step
    height, width = (places.max(axis=0) + tile).tolist()
    ground = shrink(Raster((height, width), "", (1, 0, 0, 0, -1, 0)), largest)
    return Sheet(shown, places, tile, (height, width), Canvas(ground.size))
