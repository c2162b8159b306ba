"""Source `python`: samples of a torch data set, or of anything alike, that the user's own code makes.

There is no header to look at: what a tile is can only be told by reading its sample. Listing therefore reads
the first sample, and all of them where labels are needed and the data set does not hold them in a list.
Georeference and date are not taken from samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from satdifuser.errors import ImageError, SettingsError, SourceError
from satdifuser.extract.settings import PythonSettings
from satdifuser.extract.sources.files import offering_skip
from satdifuser.extract.sources.python_sample import Sample, parse_label, parse_sample
from satdifuser.extract.sources.python_target import Dataset, explain, open_datasets
from satdifuser.extract.sources.tile import Label, Task, Tile, TileRecord
from satdifuser.labels.classes import IGNORE, MAX_CLASSES, ClassList
from satdifuser.labels.splits import USED_SPLITS, Split, draw_splits, splits_of_shares

LABEL_LISTS = ("targets", "labels")  # what data sets call the labels of all their samples


@dataclass(frozen=True)
class Place:
    """Where a sample is found."""

    dataset: Dataset
    index: int
    split: Split | None  # None: yet to be drawn
    name: str  # for messages

    def sample(self) -> Sample:
        """Read the sample.

        Raises:
            ImageError: the data set raises, or returns something of an unknown form.
        """
        try:
            raw = self.dataset[self.index]
        except Exception as error:
            raise ImageError(f"{self.name}: reading it raised {explain(error)}") from error
        return parse_sample(raw, self.name)


class PythonSource:
    """A data set of the user's own.

    Raises:
        SettingsError: the target cannot be used, or has masks and names no classes.
        SourceError: no sample can be read, or classes contradict each other.
        ImageError: a sample that must be read to list the tiles cannot be used (with ``on_error: skip`` its
            tile stays listed, so that it is counted and named when it is read).
    """

    def __init__(self, settings: PythonSettings) -> None:
        self.settings = settings
        self.datasets = open_datasets(settings)
        self.places = find_places(settings.target, self.datasets)
        self.ignore_value = IGNORE
        self.left_out = 0
        self.thread_safe = False
        with offering_skip(settings):
            first = self.first_sample()
            self.task: Task | None = first.task
            self.size = first.size
            declared = self.declared_classes()
            self.most_classes = len(declared) or (
                len(first.label) if isinstance(first.label, tuple) else MAX_CLASSES
            )
            self.labels = self.read_labels()
        self.class_list = self.list_classes(declared or numbered(self.labels.values()))
        self.classes = self.class_list.names
        self.drawn = {} if settings.splits else self.draw()
        self.splits = self.asked_splits()

    def first_sample(self) -> Sample:
        """Return the first sample that can be read: it says what all are like."""
        errors = []
        for place in self.places.values():
            try:
                return place.sample()
            except ImageError as error:
                if self.settings.on_error == "fail":
                    raise
                errors.append(error)
        raise SourceError(f"source: none of the {len(errors)} samples can be read; the first: {errors[0]}")

    def declared_classes(self) -> tuple[str, ...]:
        """Return the class names of the settings, or else of the data sets; nothing where neither has any."""
        if self.settings.classes:
            return tuple(self.settings.classes)
        (first, names), *others = [(key, texts(held, "classes")) for key, held in self.datasets.items()]
        for split, found in others:
            if found != names:
                raise SourceError(
                    f"source.target: {self.settings.target}: its splits have different classes: {first} "
                    f"({', '.join(names)}), {split} ({', '.join(found)}), so that equal labels may mean "
                    "different things; mend the target, or name what all labels mean in source.classes"
                )
        return names

    def read_labels(self) -> dict[str, Label]:
        """Return the labels by tile id: those the data sets list, and for the others those of each sample."""
        if self.task not in ("classification", "multilabel"):
            return {}
        listed = {key: self.listed_labels(dataset) for key, dataset in self.datasets.items()}
        known = {make_id(key, i): label for key, labels in listed.items() for i, label in enumerate(labels)}
        unknown = [tile_id for tile_id in self.places if tile_id not in known]
        bar = tqdm(unknown, desc="read labels", unit="sample", leave=False, disable=None)
        return known | {tile_id: self.try_label(tile_id) for tile_id in bar}

    def listed_labels(self, dataset: Dataset) -> list[Label]:
        """Return the labels a data set holds beside its samples, or nothing where not all fit the task."""
        for name in LABEL_LISTS:
            values: Any = getattr(dataset, name, None)
            is_list = isinstance(values, Collection) and not isinstance(values, Mapping)
            if not is_list or len(values) != len(dataset):
                continue
            try:
                labels = [parse_label(value, name) for value in values]
            except ImageError:
                continue
            if all(map(self.fits, labels)):
                return [*labels]
        return []

    def fits(self, label: Label) -> bool:
        """Tell whether a label is of the task's form and of a known class."""
        if self.task == "multilabel":
            return isinstance(label, tuple) and len(label) == self.most_classes
        if self.task == "classification":
            return isinstance(label, int) and label < self.most_classes
        return label is None

    def try_label(self, tile_id: str) -> Label:
        """Read a sample for its label; None where it cannot be used and such tiles are skipped."""
        try:
            return self.sample(tile_id).label
        except ImageError:
            if self.settings.on_error == "fail":
                raise
            return None

    def sample(self, tile_id: str) -> Sample:
        """Read a sample and check that it is like the first.

        Raises:
            ImageError: it cannot be read, or is of another size or task, or of an unknown class.
        """
        place = self.places[tile_id]
        sample = place.sample()
        if sample.size != self.size:
            raise ImageError(
                f"{place.name}: its image is {sample.size[0]}x{sample.size[1]} px (height x width), expected "
                f"{self.size[0]}x{self.size[1]} px as in the first sample; let the target resize, crop or pad"
            )
        if sample.task != self.task:
            raise ImageError(
                f"{place.name}: its target is for {sample.task or 'nothing'}, that of the first sample for "
                f"{self.task or 'nothing'}; let the target return one kind of samples"
            )
        if not self.fits(sample.label):
            seen = f"{len(sample.label)} numbers" if isinstance(sample.label, tuple) else sample.label
            raise ImageError(
                f"{place.name}: its label is {seen}, but there are {self.most_classes} classes; correct "
                "it, or name all classes in source.classes"
            )
        return sample

    def list_classes(self, names: tuple[str, ...]) -> ClassList:
        """Give the classes their values in masks, or labels: from 0, in their order."""
        if self.task is None:
            return ClassList((), ())
        origin = "source.classes" if self.settings.classes else f"source.target {self.settings.target}"
        if self.task != "segmentation":
            return ClassList(names, tuple(range(len(names))), origin=origin)
        if not names:
            raise SettingsError(
                f"source.classes: {self.settings.target} yields masks and has no list 'classes' of names; "
                "name the classes of the values 0, 1, 2 …"
            )
        values = [value for value in range(len(names)) if value != self.settings.ignore_index]
        named = tuple(names[value] for value in values)
        return ClassList(named, tuple(values), self.settings.ignore_index, origin)

    def draw(self) -> dict[str, Split]:
        """Draw the splits of a data set that comes without, by class; none where it has no targets."""
        if self.task is None:
            return dict.fromkeys(self.places, "none")
        labels = [self.labels.get(tile_id) for tile_id in self.places]
        strata = [label if isinstance(label, int) else 0 for label in labels]
        return draw_splits(list(self.places), strata, self.settings.split)

    def asked_splits(self) -> tuple[Split, ...]:
        """Return the splits that must hold a tile."""
        if self.settings.splits:
            return tuple(split for split in USED_SPLITS if split in self.settings.splits)
        return splits_of_shares(self.settings.split) if self.task else ()

    def records(self) -> list[TileRecord]:
        """List one tile per sample, split by split."""
        return [
            TileRecord(
                tile_id=tile_id,
                path="",
                split=place.split or self.drawn[tile_id],
                size=self.size,
                label=self.labels.get(tile_id),
            )
            for tile_id, place in self.places.items()
        ]

    def read(self, record: TileRecord) -> Tile:
        """Read one sample, with its mask of class indices if that is the task.

        Raises:
            ImageError: it cannot be read, is unlike the first, or its target is not the one that was listed.
        """
        place = self.places[record.tile_id]
        with offering_skip(self.settings):
            sample = self.sample(record.tile_id)
            if sample.label != record.label:
                raise ImageError(
                    f"{place.name}: its label is {sample.label}, but {record.label} was listed; let the data "
                    f"set return the same at each reading, and the same as its {' or '.join(LABEL_LISTS)}"
                )
            mask = None if sample.mask is None else self.class_list.indices(sample.mask, place.name)
        valid = np.isfinite(sample.image).all(axis=0)
        if mask is not None:
            mask[~valid] = IGNORE
        bands = texts(place.dataset, "bands")
        return Tile(record, sample.image, valid, mask, bands if len(bands) == len(sample.image) else ())


def numbered(labels: Iterable[Label]) -> tuple[str, ...]:
    """Name the classes of labels by their numbers: 0 up to the highest."""
    counts = (len(label) if isinstance(label, tuple) else label + 1 for label in labels if label is not None)
    return tuple(map(str, range(max(counts, default=0))))


def find_places(target: str, datasets: Mapping[Split | None, Dataset]) -> dict[str, Place]:
    """Number the samples of each split: places by tile id."""
    return {
        make_id(split, index): Place(dataset, index, split, name_sample(target, split, index))
        for split, dataset in datasets.items()
        for index in range(len(dataset))
    }


def make_id(split: Split | None, index: int) -> str:
    """Return a tile's id: ``SPLIT/INDEX``, or ``INDEX`` where the split is drawn and so no part of it."""
    return f"{split}/{index:06d}" if split else f"{index:06d}"


def name_sample(target: str, split: Split | None, index: int) -> str:
    """Name a sample in messages."""
    return f"source.target {target}, sample {index}{f' of {split}' if split else ''}"


def texts(dataset: Dataset, name: str) -> tuple[str, ...]:
    """Return an attribute that is a list of texts; nothing where it is not."""
    found = getattr(dataset, name, None)
    named = isinstance(found, list | tuple) and all(isinstance(text, str) for text in found)
    return tuple(found) if named and found else ()
