"""Features of a store's tiles where these lie on one grid, so that a map can be made of them.

No backbone is needed. Letters of shapes: B tiles, H and W pixels of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS

from satdifuser.errors import StoreError
from satdifuser.evaluate.maps.area import Raster
from satdifuser.fuse.predictor import Predictor
from satdifuser.store.reader import FeatureStore, Indices, Stored
from satdifuser.store.schema import group_layers
from satdifuser.store.tile_grid import regular_grid

TILES_PER_READ = 16
OFF_GRID = 0.02  # px by which a tile may miss the grid: coordinates are rounded in many files


def choose_tiles(store: FeatureStore, pattern: str = "*") -> Indices:
    """Rows of the tiles that have features and an id that matches a pattern.

    Raises:
        StoreError: there is none.
    """
    rows = store.select()
    names = store.table("tiles/tile_id")[rows]
    chosen: Indices = rows[[fnmatchcase(str(name), pattern) for name in names]]
    if not len(chosen):
        raise StoreError(
            f"{store.path}: no tile's id matches --tiles {pattern!r}; the first of {len(rows)} is {names[0]}"
        )
    return chosen


class NetworkInputs:
    """What a network reads of a store: its timesteps and layers, by the names that their groups have alone.

    Args:
        store: A complete store.
        predictor: The network.

    Raises:
        RunError: the store's features are not those that the network was fitted on.
        SettingsError: the store lacks a timestep or layer.
    """

    def __init__(self, store: FeatureStore, predictor: Predictor) -> None:
        predictor.require_features(store.attributes.feature_identity, str(store.path))
        names = [layer.name for layer in predictor.layers]
        self.store = store
        self._selection = store.selection(predictor.run.info["timesteps"], names)
        table, own = store.attributes.layers, group_layers(predictor.layers)
        shapes = {predictor.layers[held[0]].group_key: name for name, held in own.items()}
        self._names = {g: shapes[table[store.groups[g][0]].group_key] for g in self._selection.layers}

    def stored(self, rows: Indices) -> Stored:
        """Feature arrays of some rows, as they are kept."""
        found = self.store.stored(rows, self._selection)
        return {self._names[group]: arrays for group, arrays in found.items()}


class StoreFeatures:
    """The features of tiles of a store that lie on one grid.

    Args:
        inputs: What is read of the store.
        rows: The tiles.
        raster: What the tiles are parts of; None for just the ground that they cover.

    Raises:
        StoreError: a tile has no place, or they lie on no common grid.
    """

    def __init__(self, inputs: NetworkInputs, rows: Indices, raster: Raster | None = None) -> None:
        self.inputs, self.store = inputs, inputs.store
        store = inputs.store
        self.raster, places = find_raster(store, rows, raster)
        self.grid = regular_grid(places, store.attributes.tile_size)
        self._row_of = {
            (int(top), int(left)): int(row) for (top, left), row in zip(places, rows, strict=True)
        }

    def row(self, row: int, columns: Sequence[int]) -> Iterator[tuple[list[int], NDArray[np.bool_], Stored]]:
        """Yield those tiles of a row and of some columns that are held, from left to right."""
        top, lefts = self.grid.tops[row], self.grid.lefts
        held = [column for column in columns if (top, lefts[column]) in self._row_of]
        for start in range(0, len(held), TILES_PER_READ):
            part = held[start : start + TILES_PER_READ]
            rows = np.array([self._row_of[top, lefts[column]] for column in part])
            yield part, self.store.valid(rows), self.inputs.stored(rows)

    def covered(self) -> Raster:
        """The raster up to the last row and column with data: tiles may be padded beyond it."""
        tops, lefts = self.grid.tops, self.grid.lefts
        lowest = [self._row_of[tops[-1], left] for left in lefts if (tops[-1], left) in self._row_of]
        rightmost = [self._row_of[top, lefts[-1]] for top in tops if (top, lefts[-1]) in self._row_of]
        height = tops[-1] + last_true(self.store.valid(np.array(lowest)), axis=1)
        width = lefts[-1] + last_true(self.store.valid(np.array(rightmost)), axis=2)
        return replace(self.raster, size=(height, width))


def last_true(valid: NDArray[np.bool_], axis: int) -> int:
    """One past the last place along an axis where any is true; all of it where none is."""
    found = np.nonzero(valid)[axis]
    return int(found.max()) + 1 if len(found) else valid.shape[axis]


def find_raster(
    store: FeatureStore, rows: Indices, raster: Raster | None = None
) -> tuple[Raster, NDArray[np.int64]]:
    """The raster that tiles are parts of, and the row and column (B, 2) at which each begins.

    Args:
        store: The store.
        rows: The tiles.
        raster: Where it is known.

    Raises:
        StoreError: a tile has no place, or they differ in CRS, pixel size or rotation, or miss the grid.
    """
    names = set(store.gather("tiles/crs", rows).tolist())
    transforms = store.gather("tiles/transform", rows)
    if "" in names:
        raise StoreError(
            f"{store.path}: not all tiles have a place on the ground, so they make no map; classes of tiles "
            "can be a table: -o NAME.csv or NAME.parquet"
        )
    if len(names) > 1 or not np.allclose(transforms[:, [0, 1, 3, 4]], transforms[0, [0, 1, 3, 4]], rtol=1e-9):
        raise StoreError(
            f"{store.path}: its tiles differ in CRS, pixel size or rotation, and make no one map; choose "
            "those of one scene with --tiles 'NAME/*'"
        )
    a, b, c, d, e, f = transforms[0].tolist() if raster is None else raster.transform
    own = Raster(store.attributes.tile_size, CRS.from_string(str(names.pop())).to_wkt(), (a, b, c, d, e, f))
    places = np.stack(own.pixels(transforms[:, 2], transforms[:, 5]), axis=-1)
    whole = np.rint(places).astype(np.int64)
    if np.abs(places - whole).max() > OFF_GRID:
        raise StoreError(
            f"{store.path}: its tiles do not lie on one grid of pixels, and make no one map; choose those of "
            "one scene with --tiles 'NAME/*'"
        )
    if raster is not None:
        return raster, whole
    low = whole.min(axis=0)
    height, width = (whole - low).max(axis=0) + store.attributes.tile_size
    return replace(own, size=(int(height), int(width)), transform=own.part(*low.tolist())), whole - low
