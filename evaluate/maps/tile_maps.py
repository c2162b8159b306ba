"""Classes of whole tiles: of a scene's tiles as they are made, or of those that a store holds.

Letters of shapes: N tiles, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from satdifuser.errors import StoreError
from satdifuser.evaluate.maps.area import Area, Raster
from satdifuser.evaluate.maps.pixel_maps import TileFeatures, polygons_text, progress
from satdifuser.evaluate.maps.store_features import TILES_PER_READ, NetworkInputs, find_raster
from satdifuser.evaluate.maps.strip_file import StripFile
from satdifuser.evaluate.maps.tile_results import Ground, TileResults
from satdifuser.fuse.predictor import Predictor
from satdifuser.store.reader import FeatureStore, Indices
from satdifuser.store.tile_grid import TileGrid


def predict_scene_tiles(
    predictor: Predictor,
    features: TileFeatures,
    area: Area,
    strips: StripFile,
    name: Callable[[int, int], str],
) -> TileResults:
    """Predict the tiles of a scene that touch an area, or go on after the rows that are done.

    Args:
        predictor: A run of whole tiles.
        features: Of the tiles.
        area: What is mapped.
        strips: Keeps a strip (columns, K) float32 for each row of tiles, NaN where there is no data.
        name: Gives a tile's id by its row and column in px.
    """
    grid, shape = features.grid, (len(features.grid.lefts), len(predictor.classes))
    with progress(grid, strips.done) as bar:
        for row in range(strips.done, len(grid.tops)):
            found = np.full(shape, np.nan, np.float32)
            wanted = np.flatnonzero(area.touches([grid.tops[row]] * shape[0], grid.lefts, grid.tile))
            for tiles, _, stored in features.row(row, wanted.tolist()) if len(wanted) else ():
                found[list(tiles)] = predictor.probabilities(predictor.logits(stored))
            strips.append(found.tobytes())
            bar.update(shape[0])
    whole = np.fromfile(strips.path, np.float32).reshape(len(grid.tops), *shape)
    rows, columns = np.nonzero(~np.isnan(whole[..., 0]))
    places = np.stack([np.asarray(grid.tops)[rows], np.asarray(grid.lefts)[columns]], axis=1)
    ids = [name(*place) for place in places.tolist()]
    ground = Ground(area.raster, places.astype(np.int64), grid.tile, grid)
    return TileResults(predictor.task, predictor.classes, ids, whole[rows, columns], ground)


def strip_bytes(grid: TileGrid, classes: int) -> list[int]:
    """Sizes of the strips of `predict_scene_tiles`."""
    return [4 * len(grid.lefts) * classes] * len(grid.tops)


def strip_identity(identity: Mapping[str, Any], area: Area) -> dict[str, Any]:
    """All that shapes the strips of `predict_scene_tiles`."""
    return {**identity, "window": area.window, "polygons": polygons_text(area)}


def predict_store_tiles(
    predictor: Predictor, inputs: NetworkInputs, rows: Indices, ground: Ground | None
) -> TileResults:
    """Predict some tiles of a store.

    Args:
        predictor: A run of whole tiles.
        inputs: What it reads of the store.
        rows: The tiles.
        ground: Where they lie; None for a table without places.
    """
    found: list[NDArray[np.float32]] = []
    with tqdm(total=len(rows), unit="tile", desc="predict", disable=None) as bar:
        for start in range(0, len(rows), TILES_PER_READ):
            part = rows[start : start + TILES_PER_READ]
            found.append(predictor.probabilities(predictor.logits(inputs.stored(part))))
            bar.update(len(part))
    ids = [str(name) for name in inputs.store.table("tiles/tile_id")[rows]]
    return TileResults(predictor.task, predictor.classes, ids, np.concatenate(found), ground)


def find_ground(
    store: FeatureStore, rows: Indices, required: bool, raster: Raster | None = None
) -> Ground | None:
    """Where tiles lie; None where they are of no one raster and that is not required.

    Args:
        store: The store.
        rows: The tiles.
        required: Whether it must be known.
        raster: What they are parts of, where that is known.

    Raises:
        StoreError: they are not, though that is required.
    """
    try:
        return Ground(*find_raster(store, rows, raster), store.attributes.tile_size)
    except StoreError:
        if required:
            raise
        return None
