"""A file of labels, vector or raster, that gives the labels of any tile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import LabelError, SettingsError, suggest
from satdifuser.labels.burn import PlacedShapes
from satdifuser.labels.classes import IGNORE, MAX_CLASSES, MAX_NAMED, ClassList, read_classes
from satdifuser.labels.rasters import show, warp_labels
from satdifuser.labels.settings import VectorSettings
from satdifuser.labels.vectors import (
    VECTOR_SUFFIXES,
    class_names,
    count_unknown,
    is_vector,
    read_shapes,
    sorted_names,
)
from satdifuser.store.georeference import Georeference, georeference_of, open_raster
from satdifuser.store.location import TIFF_SUFFIXES, is_tiff

LABEL_SUFFIXES = (*TIFF_SUFFIXES, *VECTOR_SUFFIXES)


@dataclass
class Tally:
    """What was met while tiles got their labels."""

    features: set[int] = field(default_factory=set)  # numbers of those that lie on a tile
    conflicts: int = 0  # pixels that several classes claim


class LabelFile(Protocol):
    """Labels of any tile."""

    path: Path
    classes: tuple[str, ...]

    def mask(
        self, place: Georeference, size: tuple[int, int], tally: Tally | None = None
    ) -> NDArray[np.uint8]:
        """Class indices of a tile of (H, W) px, `IGNORE` where nothing is labelled."""
        ...

    def notes(self, tally: Tally) -> list[str]:
        """What people should know of the file, and of the tiles that were tallied."""
        ...

    def where(self) -> str:
        """Where it lies, for messages."""
        ...


def open_labels(
    path: Path, settings: VectorSettings, classes: Path | None = None, known: Sequence[str] | None = None
) -> LabelFile:
    """Open a file of labels.

    Args:
        path: Vector or raster.
        settings: How polygons and points become labels.
        classes: A class list; needed for a raster unless the classes are known.
        known: The classes that labels must be of, in their order; None: those of the class list, or for
            vectors those that occur.

    Raises:
        SettingsError: file, layer, column or class list are missing.
        LabelError: the file cannot be read or placed, or names unknown classes.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such file of labels, its path seen from the working folder")
    class_list = read_classes(classes) if classes else None
    if is_vector(path):
        return VectorLabels(path, settings, class_list, known)
    if is_tiff(path):
        return RasterLabels(path, class_list, known)
    raise SettingsError(
        f"{path}: got the ending {path.suffix!r}, expected labels in a file that ends in "
        f"{', '.join(LABEL_SUFFIXES)}"
    )


class VectorLabels:
    """Labels from polygons and points.

    Raises:
        SettingsError: file, layer or column are missing.
        LabelError: the file cannot be read or placed, or names unknown classes.
    """

    def __init__(
        self,
        path: Path,
        settings: VectorSettings,
        class_list: ClassList | None = None,
        known: Sequence[str] | None = None,
    ) -> None:
        self.path, self._settings = path, settings
        refuse = settings.invalid == "refuse"
        self.shapes = read_shapes(path, settings.column, settings.layer, refuse)
        ids = dict(zip(class_list.ids, class_list.names, strict=True)) if class_list else {}
        names = class_names(self.shapes, settings.column, ids)
        if class_list:
            names = [None if name == str(class_list.ignore_id) else name for name in names]
        self.classes = tuple(known or (class_list.names if class_list else sorted_names(names)))
        self.left_out = self._unknown(names)
        self._placed = self._place(names)

    def _unknown(self, names: Sequence[str | None]) -> Counter[str]:
        """Features whose class is not in the list, by class."""
        if not self.classes or len(self.classes) > MAX_CLASSES:
            found = f"{len(self.classes)} classes in column {self._settings.column!r}"
            raise LabelError(
                f"{self.path}: {found}, expected 1 to {MAX_CLASSES}; name the column that holds the class in "
                "label.column, or source.vectors.column of scenes"
            )
        unknown = count_unknown(names, self.classes)
        if unknown and self._settings.unknown == "refuse":
            first = next(iter(unknown))
            listed = ", ".join(f"{name!r} ({count})" for name, count in unknown.most_common(MAX_NAMED))
            allowed = ", ".join(self.classes[:MAX_NAMED]) + (", …" if len(self.classes) > MAX_NAMED else "")
            raise LabelError(
                f"{self.path}: column {self._settings.column!r} holds the class {listed}, which is not among "
                f"the {len(self.classes)} known ones ({allowed}){suggest(first, self.classes)}; correct it, "
                "add it to the class list, or set `unknown` to ignore"
            )
        return unknown

    def _place(self, names: Sequence[str | None]) -> PlacedShapes:
        index = {name: i for i, name in enumerate(self.classes)}
        classes = np.array([index.get(name or "", IGNORE) for name in names], np.uint8)[self.shapes.feature]
        used = classes != IGNORE
        self._feature = self.shapes.feature[used]
        self.unnamed = sum(name is None for name in names)
        all_touched = self._settings.touch == "all"
        return PlacedShapes(
            self.shapes.geometry[used], classes[used], self.shapes.crs, all_touched, self._settings.overlaps
        )

    def mask(
        self, place: Georeference, size: tuple[int, int], tally: Tally | None = None
    ) -> NDArray[np.uint8]:
        """Class indices of a tile of (H, W) px, `IGNORE` where nothing is labelled."""
        burnt = self._placed.burn(place, size)
        if tally is not None:
            tally.features.update(self._feature[burnt.shapes].tolist())
            tally.conflicts += burnt.conflicts
        return burnt.mask

    def notes(self, tally: Tally) -> list[str]:
        """What was met, repaired, left out and contested."""
        rule = {
            "ignore": "ignored",
            "first": "given to the first in the file",
            "last": "given to the last in the file",
        }[self._settings.overlaps]
        counted = {
            "polygons that were not valid: repaired": self.shapes.repaired,
            "features without a geometry: left out": self.shapes.empty,
            "features without a class: left out": self.unnamed,
            f"features of unknown classes ({', '.join(self.left_out)}): left out": self.left_out.total(),
            f"pixels that several classes claim: {rule}": tally.conflicts,
        }
        told = [f"{self.path}: {len(tally.features)} of {self.shapes.features} features lie on tiles"]
        return told + [f"{self.path}: {count} {what}" for what, count in counted.items() if count]

    def where(self) -> str:
        """Where the shapes lie."""
        return f"in its own {self.shapes.crs} it lies at {show(self.shapes.bounds)}"


class RasterLabels:
    """Labels from a raster of class ids.

    Raises:
        SettingsError: the class list is missing.
        LabelError: the raster has no place, or classes that are not known.
    """

    def __init__(
        self, path: Path, class_list: ClassList | None = None, known: Sequence[str] | None = None
    ) -> None:
        if class_list is None and known is None:
            raise SettingsError(
                f"{path}: a label raster needs a class list; name a JSON file with "
                '{"classes": [{"id": 0, "name": "..."}, ...]} for its values in label.classes, or '
                "source.classes of scenes"
            )
        self.path = path
        self._list = class_list or ClassList(
            tuple(known or ()), tuple(range(len(known or ()))), origin="the run"
        )
        self.classes = tuple(known or self._list.names)
        strange = [name for name in self._list.names if name not in self.classes]
        if strange:
            raise LabelError(
                f"{self._list.origin}: names the class {strange[0]!r}, which is not among the known ones "
                f"({', '.join(self.classes[:MAX_NAMED])}){suggest(strange[0], self.classes)}; correct it"
            )
        with open_raster(path) as dataset:
            place, self._size = georeference_of(dataset), dataset.shape
        if place is None:
            raise LabelError(
                f"{path}: label raster has no CRS or transform; georeference it to place its labels"
            )
        self._place = place

    def mask(
        self, place: Georeference, size: tuple[int, int], tally: Tally | None = None
    ) -> NDArray[np.uint8]:
        """Class indices of a tile of (H, W) px, `IGNORE` where nothing is labelled."""
        table = np.full(IGNORE + 1, IGNORE, np.uint8)
        table[: len(self._list.names)] = [self.classes.index(name) for name in self._list.names]
        return table[warp_labels(self.path, self._list, place, size)]

    def notes(self, tally: Tally) -> list[str]:
        """Nothing is repaired in a raster."""
        return []

    def where(self) -> str:
        """Where the raster lies."""
        return f"in its own {self._place.crs} it lies at {show(self._place.bounds(*self._size))}"


def explain_miss(
    file: LabelFile, tally: Tally, places: Sequence[Georeference | None], size: tuple[int, int]
) -> str:
    """Say why a file labelled nothing.

    Args:
        file: The labels.
        tally: Of all tiles.
        places: Where these lie.
        size: (H, W) px of each.
    """
    told = f"{file.path}: labels nothing here: "
    placed = [place for place in places if place is not None]
    if not placed:
        return told + "the tiles have no place on the ground; their labels can only come with the images"
    if tally.features:
        return told + (
            f"{len(tally.features)} of its features lie at tiles, but cover the centre of no pixel with "
            "data; set `touch` to all to label the pixels that they touch"
        )
    crs = placed[0].crs
    bounds = np.array([place.bounds(*size) for place in placed if place.crs == crs])
    seen = show((*bounds[:, :2].min(axis=0).tolist(), *bounds[:, 2:].max(axis=0).tolist()))
    return told + (
        f"{file.where()}, what it should label in {crs} at {seen} (left, bottom, right, top); name the "
        "labels of this place, or correct their CRS"
    )
