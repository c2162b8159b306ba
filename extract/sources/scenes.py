"""Source `scenes`: georeferenced rasters cut into a grid of tiles, with an optional label raster.

Scenes are read tile by tile, never whole, also when their valid pixels are counted. Which pixels are valid is
the rule of `files`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import ImageError, SettingsError, SourceError
from satdifuser.extract.settings import ScenesSettings
from satdifuser.extract.sources.chips import cut_grid, list_chips, read_chip
from satdifuser.extract.sources.classes import IGNORE, ClassList, read_classes
from satdifuser.extract.sources.files import TIFF_SUFFIXES, Header, is_tiff, offering_skip, read_header
from satdifuser.extract.sources.grid import parse_size
from satdifuser.extract.sources.labels import check_overlap, find_labels, warp_labels
from satdifuser.extract.sources.splits import draw_splits, splits_of_shares
from satdifuser.extract.sources.tile import Georeference, Task, Tile, TileRecord
from satdifuser.store.place import crosses_antimeridian


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
        self.class_list = read_label_classes(settings)
        self.classes = self.class_list.names if self.class_list else ()
        self.task: Task | None = "segmentation" if self.class_list else None
        self.ignore_value = IGNORE
        self.splits = splits_of_shares(settings.split) if self.class_list else ()
        self.left_out = 0

    def records(self) -> list[TileRecord]:
        """List the tiles of all scenes, scene by scene and row by row, with a seeded random split.

        Raises:
            SettingsError: the label raster is missing.
            SourceError: a scene has no label raster of its own in the folder of labels, either of them has no
                CRS or transform, they do not overlap, or the scene holds no valid pixel at all.
            ImageError: a scene cannot be read, or is smaller than a tile (with ``on_error: skip`` it stays
                listed as one tile, so that it is counted and named when it is read).
        """
        self.left_out = 0
        with offering_skip(self.settings):
            chips = [record for scene in self.scenes for record in self.records_of(scene)]
        drawn = draw_splits([chip.tile_id for chip in chips], [0] * len(chips), self.settings.split)
        return [replace(chip, split=drawn[chip.tile_id]) for chip in chips]

    def records_of(self, scene: Path) -> list[TileRecord]:
        """List the tiles of one scene; one that cannot be used but may be skipped stays in as one tile."""
        labels = find_labels(self.settings.labels, scene) if self.settings.labels else None
        image = TileRecord(scene.stem, str(scene), "none", self.tile_size, mask_path=str(labels or ""))
        try:
            header = read_header(scene)
            cuts = cut_grid(scene, header.size, self.tile_size, self.settings.overlap, self.settings.pad)
        except ImageError:
            if self.settings.on_error == "fail":
                raise
            return [replace(image, tile_id=f"{scene.stem}/0_0", window=(0, 0, *self.tile_size))]
        grid = check_placed(scene, header)
        if labels:
            check_overlap(labels, scene, grid, header.size)
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
        """Warp the labels to a tile, ignored where the tile holds no data; None where there are no labels."""
        if not self.class_list or not record.georeference:
            return None
        mask = warp_labels(Path(record.mask_path), self.class_list, record.georeference, record.size)
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


def read_label_classes(settings: ScenesSettings) -> ClassList | None:
    """Return the classes of the label raster, None where there is none."""
    if not settings.labels:
        return None
    if not settings.classes:
        raise SettingsError(
            f"source.classes: missing, but source.labels is {settings.labels}; name a JSON file "
            'with {"classes": [{"id": 0, "name": "..."}, ...]} for the values of the label raster'
        )
    return read_classes(settings.classes)


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
    if crosses_antimeridian(place.crs, place.transform, header.size):
        raise SourceError(
            f"{scene}: reaches across the antimeridian (180 degrees east or west) or around a pole, where "
            "longitudes leap; cut it there into two scenes, e.g. by `gdal_translate -projwin`"
        )
    return place
