"""Label rasters: class ids on any grid and CRS, warped to the grid of a tile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.warp import Resampling, reproject, transform_bounds

from satdifuser.errors import ImageError, SourceError
from satdifuser.labels.classes import ClassList
from satdifuser.store.georeference import (
    Georeference,
    georeference_of,
    open_raster,
    without_place_warnings,
)

OUTSIDE = -(2**31)  # marks pixels the label raster does not cover; no class has this id

Bounds = tuple[float, float, float, float]  # (left, bottom, right, top) in units of a CRS


def check_overlap(path: Path, scene: Path, grid: Georeference, size: tuple[int, int]) -> None:
    """Check that a label raster lies on its scene, at least in part; if unreadable, reading a tile says so.

    Args:
        path: The label raster.
        scene: The scene, for the message.
        grid: CRS and transform of the scene.
        size: (H, W) px of the scene.

    Raises:
        SourceError: the raster has no CRS or transform, or lies elsewhere.
    """
    try:
        with open_raster(path) as dataset:
            place, shape = georeference_of(dataset), dataset.shape
    except ImageError:
        return
    if place is None:
        raise SourceError(
            f"{path}: label raster has no CRS or transform; georeference it to place its labels"
        )
    seen, wanted = place.bounds(*shape), grid.bounds(*size)
    # The smaller of the two keeps its shape in the other's CRS; a world map would not.
    if not (meet(wanted, grid.crs, seen, place.crs) or meet(seen, place.crs, wanted, grid.crs)):
        raise SourceError(
            f"{path}: label raster does not overlap its scene {scene}: in the scene's {grid.crs} it lies at "
            f"{show(transform_bounds(place.crs, grid.crs, *seen))}, the scene at {show(wanted)} (left, "
            f"bottom, right, top); in its own {place.crs} the raster lies at {show(seen)}; name the labels "
            "of this scene in source.labels, or correct the raster's CRS and transform"
        )


def meet(first: Bounds, first_crs: str, second: Bounds, second_crs: str) -> bool:
    """Tell whether bounds, taken to the CRS of others, share an area with them."""
    left, bottom, right, top = transform_bounds(first_crs, second_crs, *first)
    turn = 360 if CRS.from_user_input(second_crs).is_geographic else 0
    right += turn if right < left else 0  # across the antimeridian
    return (
        bottom < second[3]
        and second[1] < top
        and any(left + shift < second[2] and second[0] < right + shift for shift in (-turn, 0, turn))
    )


def show(bounds: Bounds) -> str:
    """Write bounds for a message."""
    return f"({', '.join(f'{value:.8g}' for value in bounds)})"


def warp_labels(
    path: Path, class_list: ClassList, grid: Georeference, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Warp a label raster to a tile's grid by nearest neighbour, reading only the part under the tile.

    Args:
        path: Raster whose first band holds class ids; its nodata value counts as not labelled.
        class_list: Ids of the classes.
        grid: CRS and transform of the tile.
        size: (H, W) px of the tile.

    Returns:
        (H, W) class indices, `IGNORE` where the raster has no label.

    Raises:
        ImageError: the raster cannot be read, or holds unknown values.
    """
    warped = np.full(size, OUTSIDE, np.int32)
    with open_raster(path) as dataset, without_place_warnings():
        reproject(
            rasterio.band(dataset, 1),
            warped,
            src_nodata=dataset.nodata,
            dst_nodata=OUTSIDE,
            dst_crs=grid.crs,
            dst_transform=rasterio.Affine(*grid.transform),
            resampling=Resampling.nearest,
        )
    warped[warped == OUTSIDE] = class_list.ignore_id
    return class_list.indices(warped, path)
