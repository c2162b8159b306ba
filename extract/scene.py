"""Features of a whole scene, tile by tile as they are used, none kept.

A row of tiles is read at once, whatever the blocks of the file, and only its three bands. Tiles have the ids,
so the noise, that a store of the same grid gives them. Letters of shapes: B tiles, H and W pixels of a tile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray

from satdifuser.extract.compute import Shard, Work, background_of, compute_batch
from satdifuser.extract.images import band_positions, scale_to_rgb
from satdifuser.extract.metadata import collect_metadata
from satdifuser.extract.read_tile import ReadTile
from satdifuser.extract.sources.files import Header, raster_window, valid_pixels
from satdifuser.extract.sources.grid import pad_edge, pad_with, shift
from satdifuser.extract.sources.tile import Tile, TileRecord
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.batches import read_ahead
from satdifuser.store.georeference import open_raster
from satdifuser.store.reader import Stored
from satdifuser.store.tile_grid import TileGrid
from satdifuser.store.writer import TileRow

PANEL = 4096  # columns whose validity is found at once, which takes all bands
CACHE_MB = 512  # of decoded blocks, else a share of all memory


@dataclass(frozen=True)
class SceneTile:
    """A tile ready for the backbone."""

    column: int  # in the grid
    record: TileRecord
    valid: NDArray[np.bool_]  # (H, W) where it holds data
    read: ReadTile


class SceneFeatures:
    """The features of the tiles of a scene.

    Args:
        work: What turns tiles into features.
        scene: The raster.
        header: Its header.
        grid: Where its tiles lie.
        nodata: See `satdifuser.extract.sources.files.read_pixels`.

    Raises:
        ImageError: the scene cannot be read, or lacks a band.
    """

    def __init__(
        self, work: Work, scene: Path, header: Header, grid: TileGrid, nodata: float | None = None
    ) -> None:
        self.work, self.scene, self.header, self.grid, self.nodata = work, scene, header, grid, nodata
        self.values = ValueRange(work.job.images)
        self._bands = find_bands(scene, header, work.job.images.bands)
        self._chosen = work.job.images.model_copy(update={"bands": None})

    def row(self, row: int, columns: Sequence[int]) -> Iterator[tuple[list[int], NDArray[np.bool_], Stored]]:
        """Yield those tiles of a row and of some columns that hold data, from left to right.

        Yields:
            Their columns; where they hold data (B, H, W); their features as a store keeps them.
        """
        under_way: deque[tuple[list[SceneTile], Shard]] = deque()
        with background_of(self.work) as background:
            for batch in read_ahead(self._batches(row, columns)):
                shard = Shard()
                compute_batch(self._work_for(batch), [tile.read for tile in batch], shard, background)
                under_way.append((batch, shard))
                # the network works on one while the backbone is at the next
                if len(under_way) > self.work.job.lanes:
                    yield _finished(*under_way.popleft())
            while under_way:
                yield _finished(*under_way.popleft())

    def _work_for(self, batch: Sequence[SceneTile]) -> Work:
        """What computes a batch, with its metadata where the backbone reads any."""
        if not self.work.job.backbone_settings.metadata:
            return self.work
        records = [tile.record for tile in batch]
        return replace(self.work, metadata=collect_metadata(records, self.work.image_size))

    def _batches(self, row: int, columns: Sequence[int]) -> Iterator[list[SceneTile]]:
        """The tiles of a row that hold data, as many at a time as go through the backbone together."""
        size, batch = self.work.batch_size, list[SceneTile]()
        for tile in self._tiles(row, columns):
            batch.append(tile)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _tiles(self, row: int, columns: Sequence[int]) -> Iterator[SceneTile]:
        grid, (height, width) = self.grid, self.header.size
        lefts = [grid.lefts[column] for column in columns]
        first, last = lefts[0], min(lefts[-1] + grid.tile[1], width)
        top, bottom = grid.tops[row], min(grid.tops[row] + grid.tile[0], height)
        pixels, valid = self._read_strip((top, first, bottom - top, last - first))
        for column, left in zip(columns, lefts, strict=True):
            part = slice(left - first, min(left + grid.tile[1], width) - first)
            there = pad_with(valid[:, part], grid.tile, False)
            if there.any():
                yield self._prepare(column, top, left, pad_edge(pixels[:, :, part], grid.tile), there)

    def _prepare(
        self, column: int, top: int, left: int, image: NDArray[Any], valid: NDArray[np.bool_]
    ) -> SceneTile:
        record = tile_record(self.scene, self.header, self.grid, top, left)
        prepared = scale_to_rgb(Tile(record, image, valid), self._chosen)
        self.values.add(prepared)
        read = ReadTile(TileRow(record.tile_id, "none"), prepared.at(self.work.image_size))
        return SceneTile(column, record, valid, read)

    def _read_strip(self, window: tuple[int, int, int, int]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Red, green and blue of a window as stored (3, h, w), and where they hold data (h, w)."""
        row, col, height, width = window
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), open_raster(self.scene) as dataset:
            pixels = dataset.read([band + 1 for band in self._bands], window=raster_window(window))
            panels = [
                valid_pixels(dataset, (row, left, height, min(PANEL, col + width - left)), self.nodata)
                for left in range(col, col + width, PANEL)
            ]
        return pixels, np.concatenate(panels, axis=1)


def tile_id(scene: Path, top: int, left: int) -> str:
    """The id of a tile, as the source `scenes` gives it."""
    return f"{scene.stem}/{top}_{left}"


def tile_record(scene: Path, header: Header, grid: TileGrid, top: int, left: int) -> TileRecord:
    """What is known of a tile of a scene before a pixel is read."""
    return TileRecord(
        tile_id=tile_id(scene, top, left),
        path=str(scene),
        split="none",
        size=grid.tile,
        georeference=shift(header.georeference, top, left),
        date=header.date,
        cloud_cover=header.cloud_cover,
    )


def _finished(batch: Sequence[SceneTile], shard: Shard) -> tuple[list[int], NDArray[np.bool_], Stored]:
    """Wait for the features of a batch, which may have been split."""
    parts = [part.result().encoded for part in shard.batches]
    stored = {
        group: {name: np.concatenate([part[group][name] for part in parts]) for name in arrays}
        for group, arrays in parts[0].items()
    }
    return [tile.column for tile in batch], np.stack([tile.valid for tile in batch]), stored


def find_bands(scene: Path, header: Header, bands: Sequence[int | str] | None) -> list[int]:
    """Positions of red, green and blue among a scene's bands.

    Raises:
        ImageError: a band is not there, or none are named and the scene has not just three.
    """
    record = TileRecord("0_0", str(scene), "none", header.size)
    no_pixels = np.empty((len(header.band_names), 0, 0), np.uint8)
    return band_positions(
        Tile(record, no_pixels, np.empty((0, 0), bool), band_names=header.band_names), bands
    )
