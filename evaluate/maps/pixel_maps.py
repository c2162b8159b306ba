"""Maps of classes: the logits of tiles, blended, as a GeoTIFF that is written row of tiles by row of tiles.

Memory holds one row of tiles at most, whatever the height of the map. What is done is kept beside the output
(`StripFile`), so an interrupted run goes on there, with the same values.

Letters of shapes: K classes, H and W pixels of a tile, h and w pixels of a part of the map.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from satdifuser.errors import MapError
from satdifuser.evaluate.maps.area import Area
from satdifuser.evaluate.maps.blend import Blender, Piece, TileLogits
from satdifuser.evaluate.maps.map_file import BLOCK, NODATA, STEPS, MapFile, write_map
from satdifuser.evaluate.maps.origin import Origin
from satdifuser.evaluate.maps.stac import write_item
from satdifuser.evaluate.maps.strip_file import StripFile
from satdifuser.fuse.predictor import Predictor
from satdifuser.store.lock import StoreLock
from satdifuser.store.reader import Stored
from satdifuser.store.tile_grid import TileGrid

Batch = tuple[Sequence[int], NDArray[np.bool_], Stored]
"""Columns of the grid, ascending; where their tiles hold data (B, H, W); their features as stored."""


class TileFeatures(Protocol):
    """Where the features of a raster's tiles come from: a scene and a backbone, or a store."""

    grid: TileGrid

    def row(self, row: int, columns: Sequence[int]) -> Iterator[Batch]:
        """Yield those tiles of a row and of some columns that hold data, from left to right."""
        ...


@dataclass(frozen=True)
class MapOptions:
    """What a map holds beside the classes."""

    confidence: bool = False  # how far the probability of the class is ahead of the next one's
    probabilities: bool = False  # of each class

    def bands(self, classes: Sequence[str]) -> list[str]:
        """Descriptions of the map's bands."""
        probabilities = [f"probability: {name}" for name in classes] if self.probabilities else []
        return ["class", *(["confidence"] if self.confidence else []), *probabilities]


def write_pixel_map(
    predictor: Predictor,
    features: TileFeatures,
    area: Area,
    out: Path,
    options: MapOptions,
    identity: Mapping[str, Any],
    origin: Origin,
) -> Path:
    """Write the map of an area, or go on where an earlier call stopped.

    Args:
        predictor: A run for segmentation.
        features: Of the tiles that touch the area.
        area: What is mapped.
        out: The GeoTIFF; it appears when it is complete, and a STAC Item beside it.
        options: Further bands.
        identity: All that shapes the features; what an earlier call with another one left is deleted.
        origin: What it is made with.

    Raises:
        MapError: it cannot be written; finished rows are kept. Or it would hold no data.
        StoreError: somebody else writes to it.
    """
    grid, bands = features.grid, options.bands(predictor.classes)
    empty = MapError(
        f"{out}: not written, for no pixel of what is asked for holds data; choose another --window or "
        "--aoi, or check the scene and source.nodata"
    )
    if not (grid.tops and grid.lefts):
        raise empty
    rows = rows_of_strips(grid, area.window)
    sizes = [(stop - start) * len(bands) * area.window[3] for start, stop in rows]
    identity = {**identity, "window": area.window, "bands": bands, "polygons": polygons_text(area)}
    with StoreLock(out):
        strips = StripFile(out, identity, sizes)
        try:
            blender = Blender(grid, len(predictor.classes))
            with progress(grid, strips.done) as bar:
                for row in range(max(0, strips.done - 1), len(rows)):
                    strip = _blend_strip(predictor, features, blender, row, rows[row], area, options, bar)
                    if row >= strips.done:  # the row before is done again for what it shares with this one
                        strips.append(strip.transpose(1, 0, 2).tobytes())
        finally:
            strips.close()
        size, crs = (area.window[2], area.window[3]), area.raster.crs_wkt
        if not holds_data(strips.path, (size[0], len(bands), size[1])):
            strips.discard()
            raise empty
        map_file = MapFile(size, crs, area.transform, predictor.classes, bands, origin.tags)
        write_item(out, map_file, origin)
        write_map(strips.path, out, map_file)  # last: where it is, all is done
        strips.discard()
    return out


def holds_data(rows: Path, shape: tuple[int, int, int]) -> bool:
    """Whether any pixel of finished rows, (H, bands, W) uint8 in a file, has a class."""
    classes = np.memmap(rows, np.uint8, "r", shape=shape)[:, 0]
    return any((classes[row : row + BLOCK] != NODATA).any() for row in range(0, shape[0], BLOCK))


def rows_of_strips(grid: TileGrid, window: Sequence[int]) -> list[tuple[int, int]]:
    """The rows of pixels (from, to) that each row of tiles completes; all of a window together."""
    ends = [clip(grid.rows(row), window)[1] for row in range(len(grid.tops) - 1)]
    borders = [window[0], *ends, window[0] + window[2]]  # beside the tiles, too: they may leave gaps
    return list(itertools.pairwise(borders))


def clip(rows: tuple[int, int], window: Sequence[int]) -> tuple[int, int]:
    """The part of some rows (from, to) that lies in a window."""
    start = min(max(rows[0], window[0]), window[0] + window[2])
    return start, max(start, min(rows[1], window[0] + window[2]))


def polygons_text(area: Area) -> list[str] | None:
    """The polygons of an area, to tell them from others."""
    return None if area.polygons is None else [polygon.wkb_hex for polygon in area.polygons]


def progress(grid: TileGrid, rows_done: int) -> tqdm[NoReturn]:
    """A bar over the tiles of a grid."""
    each = len(grid.lefts)
    return tqdm(
        total=len(grid.tops) * each, initial=rows_done * each, unit="tile", desc="predict", disable=None
    )


def _blend_strip(
    predictor: Predictor,
    features: TileFeatures,
    blender: Blender,
    row: int,
    rows: tuple[int, int],
    area: Area,
    options: MapOptions,
    bar: tqdm[NoReturn],
) -> NDArray[np.uint8]:
    """Blend one row of tiles; its finished rows in the area, (bands, h, w)."""
    (_, left, _, width), first = area.window, features.grid.rows(row)[0]
    start, stop = clip(features.grid.rows(row), (rows[0], left, rows[1] - rows[0], width))
    shape = (len(options.bands(predictor.classes)), rows[1] - rows[0], width)
    strip = np.full(shape, NODATA, np.uint8)
    tiles = tile_logits(predictor, features, row, area, bar)
    for piece in blender.blend_row(row, tiles):
        columns = slice(max(piece.left, left), min(piece.left + piece.seen.shape[1], left + width))
        if columns.start < columns.stop and start < stop:
            part = piece.crop(slice(start - first, stop - first), columns)
            own = slice(start - rows[0], stop - rows[0]), slice(columns.start - left, columns.stop - left)
            strip[:, *own] = encode_bands(predictor, part, options)
    strip[:, ~area.inside(rows)] = NODATA
    return strip


def tile_logits(
    predictor: Predictor, features: TileFeatures, row: int, area: Area, bar: tqdm[NoReturn]
) -> Iterator[TileLogits | None]:
    """The logits of all tiles of a row, None where there is no data or nothing to map."""
    grid = features.grid
    wanted = np.flatnonzero(area.touches([grid.tops[row]] * len(grid.lefts), grid.lefts, grid.tile))
    expected = 0
    for columns, valid, stored in features.row(row, wanted.tolist()) if len(wanted) else ():
        found = predictor.logits(stored, grid.tile)
        for column, logits, there in zip(columns, found, valid, strict=True):
            yield from [None] * (column - expected)
            yield logits, there
            bar.update(column + 1 - expected)
            expected = column + 1
    yield from [None] * (len(grid.lefts) - expected)
    bar.update(len(grid.lefts) - expected)


def encode_bands(predictor: Predictor, piece: Piece, options: MapOptions) -> NDArray[np.uint8]:
    """What the map holds of a piece: (bands, h, w) uint8."""
    bands = [piece.logits.argmax(axis=0).astype(np.uint8)[None]]
    if options.confidence or options.probabilities:
        probabilities = predictor.probabilities(piece.logits[None])[0]
        if options.confidence:
            bands.append(in_steps(margin(probabilities)[None]))
        if options.probabilities:
            bands.append(in_steps(probabilities))
    encoded = np.concatenate(bands)
    encoded[:, ~piece.seen] = NODATA
    return encoded


def margin(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far the highest of probabilities (K, …) is ahead of the next one."""
    if len(probabilities) == 1:
        return np.asarray(probabilities[0])
    top = np.partition(probabilities, -2, axis=0)
    return np.asarray(top[-1] - top[-2])


def in_steps(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Probabilities as whole numbers of 1/250."""
    return np.rint(probabilities * STEPS).astype(np.uint8)
