"""Source `scenes`: georeferenced rasters cut into a grid of tiles, with labels or without.

Scenes are read tile by tile, never whole, also when their valid pixels are counted. Which pixels are valid is
the rule of `files`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import ImageError, SettingsError, SourceError
from satdifuser.extract.settings import ScenesSettings
from satdifuser.extract.sources.chips import cut_grid, list_chips, read_chip
from satdifuser.extract.sources.files import Header, offering_skip, read_header
from satdifuser.extract.sources.grid import parse_size
from satdifuser.extract.sources.scene_labels import SceneLabels
from satdifuser.extract.sources.tile import Task, Tile, TileRecord
from satdifuser.labels.classes import IGNORE
from satdifuser.labels.spatial import draw_partitions, leak_warning, splits_asked
from satdifuser.labels.splits import Split
from satdifuser.store.georeference import Georeference
from satdifuser.store.location import TIFF_SUFFIXES, is_tiff
from satdifuser.store.place import crosses_antimeridian
from satdifuser.store.schema import DEFAULT_PARTITION


class ScenesSource:
    """A GeoTIFF or a folder of them, cut into tiles.

    Raises:
        SettingsError: the overlap is as large as a tile, or the class list of labels is missing.
        SourceError: there are no scenes, or the class list is wrong.
    """

    def __init__(self, settings: ScenesSettings) -> None:
        self.settings = settings
        self.tile_size = parse_size(settings.tile_size)
        if settings.overlap >= min(self.tile_size):
            raise SettingsError(
                f"source.overlap: {settings.overlap} px, expected less than source.tile_size "
                f"({min(self.tile_size)} px)"
            )
        self.scenes = list_scenes(settings.root)
        self.labels = SceneLabels(settings.labels, settings) if settings.labels else None
        self.classes = self.labels.classes if self.labels else ()
        self.task: Task | None = "segmentation" if self.labels else None
        self.ignore_value = IGNORE
        self.splits = splits_asked(settings.split) if self.labels else ()
        self.left_out = 0
        self.thread_safe = True

    def records(self) -> list[TileRecord]:
        """List the tiles of all scenes, scene by scene and row by row, with splits drawn among them.

        Tiles that no polygon or point labels are in no split. What people should know of these goes to
        stderr, and a warning where tiles of a random split overlap.

        Raises:
            SettingsError: the labels are missing.
            SourceError: a scene has no labels of its own in the folder of labels, either of them has no
                CRS or transform, they do not overlap, or the scene holds no valid pixel at all.
            LabelError: polygons and points label no tile, or a split of the ground stays empty.
            ImageError: a scene cannot be read, or is smaller than a tile (with ``on_error: skip`` it stays
                listed as one tile, so that it is counted and named when it is read).
        """
        self.left_out = 0
        with offering_skip(self.settings):
            chips = [record for scene in self.scenes for record in self.records_of(scene)]
        return self._draw(chips) if chips else []

    def _draw(self, chips: list[TileRecord]) -> list[TileRecord]:
        """Give tiles their splits; none to those without a label or a place."""
        split = self.settings.split
        labelled = self.labels.labelled(chips) if self.labels else {chip.tile_id for chip in chips}
        chosen = [c for c in chips if c.tile_id in labelled and (c.georeference or split.kind == "random")]
        ids, places = [chip.tile_id for chip in chosen], [chip.georeference for chip in chosen]
        drawn = draw_partitions(split, ids, places, self.tile_size)
        splits: dict[str, dict[str, Split]] = {tile: {} for tile in ids}
        for name, column in drawn.partitions.items():
            for tile, which in zip(ids, column.tolist(), strict=True):
                splits[tile][name] = which
        nowhere: dict[str, Split] = dict.fromkeys(drawn.partitions, "none")
        notes = list(drawn.notes)
        if self.labels and split.kind == "random":
            warning = leak_warning(next(iter(drawn.partitions.values())).tolist(), places, self.tile_size)
            notes += [warning] if warning else []
        for note in notes:
            print(note, file=sys.stderr)
        return [in_partitions(chip, splits.get(chip.tile_id, nowhere)) for chip in chips]

    def records_of(self, scene: Path) -> list[TileRecord]:
        """List the tiles of one scene; one that cannot be used but may be skipped stays in as one tile."""
        labels = self.labels.find(scene) if self.labels else None
        image = TileRecord(scene.stem, str(scene), "none", self.tile_size, mask_path=str(labels or ""))
        try:
            header = read_header(scene)
            cuts = cut_grid(scene, header.size, self.tile_size, self.settings.overlap, self.settings.pad)
        except ImageError:
            if self.settings.on_error == "fail":
                raise
            return [replace(image, tile_id=f"{scene.stem}/0_0", window=(0, 0, *self.tile_size))]
        header = told_header(header, self.settings)
        grid = check_placed(scene, header)
        if self.labels:
            self.labels.check_overlap(scene, grid, header.size)
        chips = list_chips(image, header, cuts, self.settings.nodata)
        if not any(chip.valid_share for chip in chips):
            raise SourceError(
                f"{scene}: no pixel holds data; check source.nodata and its own mask, or remove it"
            )
        kept = [chip for chip in chips if chip.valid_share >= self.settings.min_valid]
        self.left_out += len(chips) - len(kept)
        return kept

    def read(self, record: TileRecord) -> Tile:
        """Read one tile, all bands, with its labels if there are any.

        Raises:
            ImageError: scene or label raster cannot be read, or the latter holds unknown values.
        """
        with offering_skip(self.settings):
            (image, valid), header = read_chip(record, self.settings.nodata)
            mask = self.read_mask(record, valid)
        return Tile(record=record, image=image, valid=valid, mask=mask, band_names=header.band_names)

    def read_mask(self, record: TileRecord, valid: NDArray[np.bool_]) -> NDArray[np.uint8] | None:
        """The labels of a tile, ignored where it holds no data; None where there are no labels."""
        if not self.labels or not record.georeference:
            return None
        mask = self.labels.mask(record, record.georeference)
        mask[~valid] = IGNORE
        return mask


def list_scenes(root: Path) -> list[Path]:
    """Return the TIFF files of a folder by name, or the one file that is named.

    Raises:
        SourceError: the folder holds none.
    """
    scenes = sorted(filter(is_tiff, root.iterdir())) if root.is_dir() else [root]
    if not scenes:
        raise SourceError(
            f"source.root: no scenes in {root}; expected files that end in {', '.join(TIFF_SUFFIXES)}"
        )
    return scenes


def told_header(header: Header, settings: ScenesSettings) -> Header:
    """A header with what the settings say instead of its tags."""
    date, cloud_cover = settings.date, settings.cloud_cover
    return replace(
        header,
        date=header.date if date is None else date,
        cloud_cover=header.cloud_cover if cloud_cover is None else cloud_cover,
    )


def in_partitions(chip: TileRecord, splits: dict[str, Split]) -> TileRecord:
    """A tile with its split in each partition, the first for use; the only, default one needs no name."""
    first = next(iter(splits.values()))
    return replace(chip, split=first, partitions={} if list(splits) == [DEFAULT_PARTITION] else splits)


def check_placed(scene: Path, header: Header) -> Georeference:
    """Return CRS and transform of a scene.

    Raises:
        SourceError: it has none, or reaches across the antimeridian.
    """
    if header.georeference is None:
        raise SourceError(
            f"{scene}: no CRS or transform; georeference it, or use source.kind: folder for plain images"
        )
    place = header.georeference
    if crosses_antimeridian(place, header.size):
        raise SourceError(
            f"{scene}: reaches across the antimeridian (180 degrees east or west) or around a pole, where "
            "longitudes leap; cut it there into two scenes, e.g. by `gdal_translate -projwin`"
        )
    return place
