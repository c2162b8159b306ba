"""Label rasters: class ids on any grid and CRS, warped to the grid of a tile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.warp import Resampling, reproject

from satdifuser.errors import SourceError
from satdifuser.extract.sources.classes import ClassList
from satdifuser.extract.sources.files import TIFF_SUFFIXES, georeference_of, open_raster
from satdifuser.extract.sources.tile import Georeference

OUTSIDE = -(2**31)  # marks pixels the label raster does not cover; no class has this id


def find_labels(labels: Path, scene: Path) -> Path:
    """Return the label raster of a scene: ``labels`` itself, or the file of the scene's stem in that folder.

    Raises:
        SourceError: there is none.
    """
    choices = [labels] if not labels.is_dir() else [labels / f"{scene.stem}{end}" for end in TIFF_SUFFIXES]
    for path in choices:
        if path.is_file():
            return path
    raise SourceError(
        f"source.labels: no label raster for {scene}; expected {' or '.join(map(str, choices))}, "
        "or remove source.labels"
    )


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
        SourceError: the raster has no CRS or transform.
        ImageError: it cannot be read, or holds unknown values.
    """
    warped = np.full(size, OUTSIDE, np.int32)
    with open_raster(path) as dataset:
        placed = georeference_of(dataset) is not None
        if placed:
            reproject(
                rasterio.band(dataset, 1),
                warped,
                src_nodata=dataset.nodata,
                dst_nodata=OUTSIDE,
                dst_crs=grid.crs,
                dst_transform=rasterio.Affine(*grid.transform),
                resampling=Resampling.nearest,
            )
    if not placed:
        raise SourceError(
            f"{path}: label raster has no CRS or transform; georeference it to place its labels"
        )
    warped[warped == OUTSIDE] = class_list.ignore_id
    return class_list.indices(warped, path)
