"""Takes features out of a store, for those who want them in a table or in a GIS.

Pooled features become GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0/), one row per tile; one layer
at one timestep becomes a GeoTIFF, where the tiles lie on a grid. Both are written piece by piece.
Legend: B tiles of a shard, T timesteps, L layers of a group, C channels.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform as reproject
from rasterio.windows import Window
from tqdm import tqdm

from satdifuser.errors import SettingsError, StoreError
from satdifuser.store.files import PARTIAL_SUFFIX, make_folder
from satdifuser.store.reader import FeatureStore, Indices
from satdifuser.store.tile_grid import MOST_EMPTY

CORNERS = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))  # of a tile, in tile widths and heights
OFF_GRID = 1e-3  # feature pixels by which a tile may miss the grid: coordinates are rounded in many files
LONGITUDE_LATITUDE = "OGC:CRS84"


def export_pooled(
    store: FeatureStore,
    out: Path,
    timesteps: Sequence[int] | None = None,
    layers: str | Sequence[str] = "*",
    splits: Sequence[str] = (),
) -> int:
    """Write pooled features as GeoParquet: a row per tile, a vector column per timestep and layer.

    Footprints are in the tiles' CRS if they have one in common, else in longitude and latitude; without any
    the file is plain Parquet.

    Args:
        store: A complete store.
        out: The file.
        timesteps: Only these; None for all.
        layers: Only those that match one of these names or patterns.
        splits: Only tiles of these splits; none for all.

    Returns:
        Rows written.
    """
    store.require_complete()
    steps = store.selection(timesteps, layers).steps
    positions = store.layer_positions(layers)
    rows = store.select_splits(splits) if splits else store.select()
    crs = _common_crs(store, rows)
    tables = (
        pa.table(_tile_columns(store, part, crs) | _vector_columns(store, part, steps, positions))
        for part in tqdm(_by_shard(store, rows), desc="export", unit="shard", disable=None)
    )
    first = next(tables)
    schema = first.schema.with_metadata({"geo": json.dumps(_geo(crs))} if crs else {})
    with _written_whole(out) as partial, pq.ParquetWriter(partial, schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table.cast(schema))
    return len(rows)


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A file beside `out` that takes its place at the end, and not before."""
    make_folder(out.parent)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        yield partial
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _by_shard(store: FeatureStore, rows: Indices) -> list[Indices]:
    cuts = np.flatnonzero(np.diff(rows // store.attributes.tiles_per_shard)) + 1
    return np.split(rows, cuts)


def _tile_columns(store: FeatureStore, rows: Indices, crs: str) -> dict[str, Any]:
    a, tiles = store.attributes, store.tiles.loc[rows]
    columns: dict[str, Any] = {"tile_id": pa.array(tiles.tile_id.tolist(), pa.string())}
    columns["split"] = pa.array(tiles.split.tolist(), pa.string())
    if a.task == "classification":
        columns["label"] = pa.array([a.classes[i] if i >= 0 else None for i in tiles.label], pa.string())
    if a.task == "multilabel":
        columns["labels"] = pa.array(tiles.labels.tolist(), pa.string())
    for name in ("date", "path"):
        columns[name] = pa.array(tiles[name].tolist(), pa.string())
    columns["valid_share"] = pa.array(tiles.valid_share.to_numpy(), pa.float32())
    if crs:
        columns["geometry"] = pa.array(_footprints(store, rows, crs), pa.binary())
    return columns


def _vector_columns(
    store: FeatureStore, rows: Indices, steps: Sequence[int], positions: Sequence[tuple[str, int, str]]
) -> dict[str, Any]:
    pooled = {group: store.pooled_group(group, rows) for group, _, _ in positions}
    columns = {}
    for step in steps:
        for group, position, layer in positions:
            vectors = np.ascontiguousarray(pooled[group][:, step, position])  # (B, C)
            values = pa.array(vectors.reshape(-1), pa.float32())
            name = f"t{store.attributes.timesteps[step]}/{layer}"
            columns[name] = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    return columns


def _common_crs(store: FeatureStore, rows: Indices) -> str:
    """The one CRS of all tiles; longitude and latitude for several; "" where none has any."""
    found = set(store.gather("tiles/crs", rows).tolist()) - {""}
    return str(found.pop()) if len(found) == 1 else LONGITUDE_LATITUDE if found else ""


def _geo(crs: str) -> dict[str, Any]:
    """What GeoParquet keeps of the geometry column; no CRS there means longitude and latitude."""
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"]}
    if crs != LONGITUDE_LATITUDE:
        column["crs"] = CRS.from_user_input(crs).to_dict(projjson=True)
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}


def _footprints(store: FeatureStore, rows: Indices, crs: str) -> list[bytes | None]:
    height, width = store.attributes.tile_size
    places = zip(store.gather("tiles/crs", rows), store.gather("tiles/transform", rows), strict=True)
    found: list[bytes | None] = []
    for own, transform in places:
        if not own:
            found.append(None)
            continue
        a, b, c, d, e, f = transform
        corners = [(x * width, y * height) for x, y in CORNERS]
        points = [(a * x + b * y + c, d * x + e * y + f) for x, y in corners]
        if own != crs:
            points = list(zip(*reproject(own, "OGC:CRS84", *zip(*points, strict=True)), strict=True))
        found.append(_polygon(points))
    return found


def _polygon(points: Sequence[tuple[float, float]]) -> bytes:
    """A polygon of one ring as well-known binary, little-endian."""
    flat = [coordinate for point in points for coordinate in point]
    return struct.pack(f"<BIII{len(flat)}d", 1, 3, 1, len(points), *flat)


# --- one layer as a raster


@dataclass(frozen=True)
class Grid:
    """Where tiles lie in a mosaic of feature pixels."""

    crs: str
    transform: Affine  # feature pixel to CRS units
    size: tuple[int, int]  # (H, W) feature pixels
    places: NDArray[np.int64]  # (B, 2) row and column of each tile's first feature pixel


def export_layer(store: FeatureStore, out: Path, timestep: int, layer: str) -> Path:
    """Write the features of one layer at one timestep as a GeoTIFF, a band per channel.

    Where tiles overlap the later one counts; where there is none, NaN.

    Raises:
        StoreError: the tiles have no places, or lie on no common grid.
        SettingsError: the store does not hold this timestep, or not this one layer.
    """
    store.require_complete()
    matching = store.layer_positions(layer)
    if len(matching) > 1:
        names = ", ".join(name for _, _, name in matching[:3])
        raise SettingsError(
            f"--layers: {layer!r} matches {len(matching)} layers ({names} …); a GeoTIFF takes one"
        )
    ((group, position, name),) = matching
    selection = store.selection([timestep], [name])
    info = store.attributes.layers[store.groups[group][position]]
    rows = store.select()
    grid = _find_grid(store, rows, info.height, info.width)
    profile = {
        "driver": "GTiff",
        "dtype": "float32",
        "count": info.channels,
        "nodata": np.nan,
        "height": grid.size[0],
        "width": grid.size[1],
        "crs": grid.crs,
        "transform": grid.transform,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "BIGTIFF": "IF_SAFER",
    }
    with _written_whole(out) as partial, rasterio.open(partial, "w", **profile) as raster:
        raster.descriptions = [f"channel {channel}" for channel in range(info.channels)]
        raster.update_tags(
            store_id=store.attributes.store_id,
            content_digest=store.content_digest(),
            layer=name,
            timestep=timestep,
        )
        for index, row in enumerate(tqdm(rows, desc="export", unit="tile", disable=None)):
            maps = store.decode(store.stored(np.array([row]), selection))[group][0, 0, 0]
            first, left = grid.places[index].tolist()
            raster.write(maps, window=Window(left, first, info.width, info.height))
    return out


def _find_grid(store: FeatureStore, rows: Indices, height: int, width: int) -> Grid:
    names = set(store.gather("tiles/crs", rows).tolist())
    transforms = store.gather("tiles/transform", rows)
    if "" in names:
        raise StoreError(f"{store.path}: not all tiles have a place on the ground; export .parquet instead")
    if len(names) > 1 or not np.allclose(transforms[:, [0, 1, 3, 4]], transforms[0, [0, 1, 3, 4]], rtol=1e-9):
        raise StoreError(
            f"{store.path}: its tiles differ in CRS, pixel size or rotation, and make no one raster; export "
            ".parquet instead, or first `satdifuser store copy --tiles` those of one scene"
        )
    tile_height, tile_width = store.attributes.tile_size
    a, b, c, d, e, f = transforms[0]
    pixel = np.array([[a, b], [d, e]]) * (
        tile_width / width,
        tile_height / height,
    )  # of features, in CRS units
    origins = ((transforms[:, [2, 5]] - (c, f)) @ np.linalg.inv(pixel).T)[:, ::-1]  # (B, 2) row, column
    places = np.rint(origins)
    if np.abs(origins - places).max() > OFF_GRID:
        raise StoreError(
            f"{store.path}: its tiles do not lie on one grid of feature pixels (stride {tile_width // width} "
            "px); export a finer layer, or .parquet"
        )
    low = places.min(axis=0)
    size = (places.max(axis=0) - low + (height, width)).astype(int)
    if size.prod() > MOST_EMPTY * len(rows) * height * width:
        raise StoreError(
            f"{store.path}: its {len(rows)} tiles are strewn over {size[0]} x {size[1]} feature pixels, so "
            "that a raster of them would be all but empty; export .parquet instead, or first `satdifuser "
            "store copy --tiles` those of one scene"
        )
    x, y = pixel @ low[::-1] + (c, f)
    shifted = Affine(*pixel[0], x, *pixel[1], y)
    return Grid(str(names.pop()), shifted, (int(size[0]), int(size[1])), (places - low).astype(np.int64))
