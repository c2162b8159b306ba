"""Source `synthetic`: generated land-cover scenes, so that nothing must be downloaded to try the pipeline.

Each tile is a scene of its own (`landcover`), laid on one large grid; seed and tile number fix every bit.
"""

from __future__ import annotations

import numpy as np

from satdifuser.extract.settings import SyntheticSettings
from satdifuser.extract.sources.canvas import COVERS
from satdifuser.extract.sources.grid import parse_size
from satdifuser.extract.sources.landcover import PAINTERS, paint
from satdifuser.extract.sources.tile import Task, Tile, TileRecord
from satdifuser.labels.classes import IGNORE
from satdifuser.labels.splits import draw_splits, splits_of_shares
from satdifuser.store.georeference import Georeference

KINDS = tuple(PAINTERS)
CRS = "EPSG:32632"
ORIGIN = 400_000.0, 5_400_000.0  # (x, y) m of the grid's upper left corner
PIXEL = 10.0  # m
GRID_COLUMNS = 40  # tiles side by side


class SyntheticSource:
    """Generated scenes: a kind of scene to tell for each tile, or land cover to map."""

    def __init__(self, settings: SyntheticSettings) -> None:
        self.settings = settings
        self.tile_size = parse_size(settings.tile_size)
        self.task: Task | None = settings.task
        self.classes = KINDS if settings.task == "classification" else COVERS
        self.ignore_value = IGNORE
        self.left_out = 0
        self.thread_safe = True
        self.splits = splits_of_shares(settings.split)

    def records(self) -> list[TileRecord]:
        """List the tiles by number; kinds of scene take turns, and the split is drawn by kind."""
        numbers = range(self.settings.tiles)
        ids = [f"{number:06d}" for number in numbers]
        kinds = [number % len(KINDS) for number in numbers]
        drawn = draw_splits(ids, kinds, self.settings.split)
        return [
            TileRecord(
                tile_id=tile_id,
                path="",
                split=drawn[tile_id],
                size=self.tile_size,
                label=kind if self.task == "classification" else None,
                georeference=self.place(number),
            )
            for number, tile_id, kind in zip(numbers, ids, kinds, strict=True)
        ]

    def place(self, number: int) -> Georeference:
        """Return where a tile lies on the grid."""
        row, col = divmod(number, GRID_COLUMNS)
        height, width = self.tile_size
        left, top = ORIGIN[0] + col * width * PIXEL, ORIGIN[1] - row * height * PIXEL
        return Georeference(CRS, (PIXEL, 0.0, left, 0.0, -PIXEL, top))

    def read(self, record: TileRecord) -> Tile:
        """Generate one tile: uint8 RGB, with a mask of land cover if that is the task."""
        number = int(record.tile_id)
        rng = np.random.default_rng((self.settings.seed, number))
        image, cover = paint(KINDS[number % len(KINDS)], rng, record.size)
        return Tile(
            record=record,
            image=image,
            valid=np.ones(record.size, bool),
            mask=cover if self.task == "segmentation" else None,
            band_names=("R", "G", "B"),
        )
