"""A made-up scene, files of polygons and points, and a store of its tiles written without any backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import rasterio
import shapely
from affine import Affine
from made_up import store_attributes
from rasterio.warp import transform

from satdifuser.store.encoding import encode
from satdifuser.store.georeference import Georeference
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo
from satdifuser.store.writer import TileRow

CRS, LEFT, TOP, PIXEL = "EPSG:32632", 500000, 5000000, 10
SIDE = 8  # px of a tile
DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".shp": "ESRI Shapefile"}
LAYER = LayerInfo(name="up.0.attn1", channels=2, stride=2, height=4, width=4)


def box(row: float, col: float, height: float, width: float) -> Any:
    """A rectangle of pixels of the scene, as a polygon in its CRS."""
    left, top = LEFT + col * PIXEL, TOP - row * PIXEL
    return shapely.box(left, top - height * PIXEL, left + width * PIXEL, top)


def point(row: float, col: float) -> Any:
    """The centre of a pixel of the scene."""
    return shapely.Point(LEFT + (col + 0.5) * PIXEL, TOP - (row + 0.5) * PIXEL)


def write_vectors(
    path: Path,
    shapes: Sequence[Any],
    classes: Sequence[Any],
    crs: str | None = CRS,
    column: str = "class",
    drawn_in: str = CRS,
    **more: Any,
) -> Path:
    """Write shapes, drawn in the scene's CRS, with their classes in any CRS."""
    if crs not in (None, drawn_in):
        shapes = [
            shape and shapely.transform(shape, lambda xy: np.column_stack(transform(drawn_in, crs, *xy.T)))
            for shape in shapes
        ]
    numbers = all(isinstance(value, int | float) for value in classes)
    values = np.array(classes, None if numbers else object)
    pyogrio.raw.write(
        path,
        geometry=np.array([None if shape is None else shapely.to_wkb(shape) for shape in shapes], object),
        field_data=[values],
        fields=[column],
        geometry_type=more.pop("geometry_type", "Unknown"),
        crs=crs,
        driver=DRIVERS[path.suffix],
        **more,
    )
    return path


def write_scene(path: Path, pixels: np.ndarray, **profile: Any) -> Path:
    """Write (B, H, W) pixels where the scene lies."""
    bands, height, width = pixels.shape
    given = {"crs": CRS, "transform": Affine(PIXEL, 0, LEFT, 0, -PIXEL, TOP), "count": bands}
    shape = {"height": height, "width": width, "dtype": pixels.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", **(given | shape | profile)) as dataset:
        dataset.write(pixels)
    return path


def scene_store(
    path: Path, rows: int = 4, columns: int = 4, step: int = SIDE, **changes: Any
) -> FeatureStore:
    """A store of a grid of tiles, ``s/ROW_COL``, of a scene that begins at (LEFT, TOP)."""
    offsets = [(row * step, col * step) for row in range(rows) for col in range(columns)]
    fields: dict[str, Any] = {
        "task": None,
        "classes": [],
        "tiles": len(offsets),
        "tile_size": (SIDE, SIDE),
        "tiles_per_shard": 6,
        "timesteps": [21],
        "layers": [LAYER],
        "encoding": "float32",
        "previews": True,
        "valid": True,
        "colour_statistics": ["mean"],
        "settings": {"source": {"kind": "scenes"}},
    }
    a = store_attributes(**fields | changes)
    with open_or_create(path, a, overwrite=False) as writer:
        for shard in range(a.shards):
            tiles = range(*a.shard_range(shard))
            maps = [np.random.default_rng(t).standard_normal((1, 1, 1, 2, 4, 4), np.float32) for t in tiles]
            batches = [{"stride_02": encode(one, "float32")} for one in maps]
            writer.write_shard(shard, [scene_row(*offsets[t]) for t in tiles], batches, {})
    return FeatureStore(path)


def scene_row(row: int, col: int, **changes: Any) -> TileRow:
    """What the store keeps of a tile."""
    place = Georeference(CRS, (PIXEL, 0, LEFT, 0, -PIXEL, TOP)).shifted(row, col)
    fields: Mapping[str, Any] = {
        "crs": CRS,
        "transform": place.transform,
        "bounds": place.bounds(SIDE, SIDE),
        "valid_share": 1.0,
        "valid": np.ones((SIDE, SIDE), bool),
        "colour": np.zeros(1, np.float32),
        "preview": np.zeros((SIDE, SIDE, 3), np.uint8),
    }
    return TileRow(
        f"s/{row}_{col}", ("train", "val", "test")[(row + col) // SIDE % 3], **{**fields, **changes}
    )
