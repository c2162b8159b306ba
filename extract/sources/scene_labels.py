"""Labels of scenes: a raster on any grid, or polygons and points, one file for all scenes or one for each."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import LabelError, SettingsError, SourceError
from satdifuser.extract.settings import ScenesSettings
from satdifuser.extract.sources.tile import TileRecord
from satdifuser.labels.classes import IGNORE, ClassList, read_classes
from satdifuser.labels.label_file import LABEL_SUFFIXES, Tally, VectorLabels, explain_miss
from satdifuser.labels.rasters import check_overlap, warp_labels
from satdifuser.labels.vectors import is_vector
from satdifuser.store.georeference import Georeference


class SceneLabels:
    """The labels that the settings of a source of scenes name.

    Raises:
        SettingsError: labels or class list are missing.
        SourceError: the class list is wrong.
        LabelError: polygons or points cannot be read or placed, or name unknown classes.
    """

    def __init__(self, path: Path, settings: ScenesSettings) -> None:
        self.path, self._settings = path, settings
        self._vectors: dict[Path, VectorLabels] = {}  # those that were opened
        self._class_list = read_classes(settings.classes) if settings.classes else None
        if self._class_list is None:
            self._class_list = self._found_classes()
        self.classes = self._class_list.names

    def _found_classes(self) -> ClassList:
        if not (self.path.is_file() and is_vector(self.path)):
            raise SettingsError(
                f"source.classes: missing, but source.labels is {self.path}; name a JSON file "
                'with {"classes": [{"id": 0, "name": "..."}, ...]} for the values of the labels'
            )
        names = self._vector(self.path).classes
        return ClassList(names, tuple(range(len(names))), origin=str(self.path))

    def _vector(self, path: Path) -> VectorLabels:
        if path not in self._vectors:
            self._vectors[path] = VectorLabels(path, self._settings.vectors, self._class_list)
        return self._vectors[path]

    def find(self, scene: Path) -> Path:
        """Return the labels of a scene: the one file for all, or that of its stem in the folder of labels.

        Raises:
            SettingsError: there is no such file or folder.
            SourceError: the folder has none for this scene.
        """
        if self.path.is_file():
            return self.path
        if not self.path.is_dir():
            raise SettingsError(
                f"source.labels: {self.path} is missing; expected a label raster, a file of polygons or "
                "points, or a folder of them, its path seen from the working folder"
            )
        choices = [self.path / f"{scene.stem}{end}" for end in LABEL_SUFFIXES]
        for path in choices:
            if path.is_file():
                return path
        raise SourceError(
            f"source.labels: no labels for {scene}; expected {' or '.join(map(str, choices))}, "
            "or remove source.labels"
        )

    def check_overlap(self, scene: Path, grid: Georeference, size: tuple[int, int]) -> None:
        """Refuse a raster that lies elsewhere than its scene; polygons may lie on some scenes only."""
        path = self.find(scene)
        if not is_vector(path):
            check_overlap(path, scene, grid, size)

    def labelled(self, chips: Sequence[TileRecord]) -> set[str]:
        """Ids of the tiles to learn and test on: all under a raster, else those that a shape labels.

        What people should know of the shapes goes to stderr.

        Raises:
            LabelError: a file labels none of its tiles.
        """
        by_file: dict[Path, list[TileRecord]] = defaultdict(list)
        for chip in chips:
            by_file[Path(chip.mask_path)].append(chip)
        chosen: set[str] = set()
        for path, own in by_file.items():
            chosen |= self._under_shapes(path, own) if is_vector(path) else {chip.tile_id for chip in own}
        return chosen

    def _under_shapes(self, path: Path, chips: Sequence[TileRecord]) -> set[str]:
        file, tally, chosen = self._vector(path), Tally(), set()
        for chip in chips:
            if chip.georeference and (file.mask(chip.georeference, chip.size, tally) != IGNORE).any():
                chosen.add(chip.tile_id)
        if not chosen:
            places = [chip.georeference for chip in chips]
            raise LabelError(explain_miss(file, tally, places, chips[0].size))
        told = [*file.notes(tally), f"{path}: {len(chosen)} of {len(chips)} tiles are labelled"]
        print("\n".join(told), file=sys.stderr)
        return chosen

    def mask(self, record: TileRecord, place: Georeference) -> NDArray[np.uint8]:
        """(H, W) class indices of a tile, `IGNORE` where it has no label.

        Raises:
            ImageError: a raster cannot be read, or holds unknown values.
        """
        path = Path(record.mask_path)
        if is_vector(path):
            return self._vector(path).mask(place, record.size)
        if self._class_list is None:
            raise SettingsError("source.classes: missing; name the class list of the label raster")
        return warp_labels(path, self._class_list, place, record.size)
