"""Source `folder`: images in one folder per class, each image one tile.

Layouts: ``root/CLASS/image`` or ``root/images/CLASS/image``; images straight in that folder have no labels.
Splits come from a CSV file (path, label, split) or are drawn by class; class order from ``classes.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from satdifuser.errors import ImageError, SourceError
from satdifuser.extract.settings import FolderSettings
from satdifuser.extract.sources.files import SUFFIXES, Header, offering_skip, read_header, read_pixels
from satdifuser.extract.sources.grid import pad_edge, pad_with, parse_size
from satdifuser.extract.sources.splits import (
    check_listed,
    find_splits_file,
    make_id,
    read_rows,
    splits_of_rows,
)
from satdifuser.extract.sources.tile import Task, Tile, TileRecord
from satdifuser.labels.classes import IGNORE, ClassList, named, read_classes
from satdifuser.labels.splits import Split, draw_splits, splits_of_shares


@dataclass(frozen=True)
class Entry:
    """One image of the folder: where it is, its class name ("" for none) and its split."""

    path: Path
    label: str
    split: Split
    listed: str = ""  # line of the splits file, for messages


class FolderSource:
    """Images in one folder per class.

    Raises:
        SettingsError: the splits file is missing.
        SourceError: there are no images, or splits file, class list and folders contradict each other.
    """

    def __init__(self, settings: FolderSettings) -> None:
        self.settings = settings
        self.entries, self.splits = list_entries(settings)
        class_list = list_classes(settings.root, self.entries)
        self.indices = {
            e.label: class_list.index(e.label, e.listed or str(e.path)) for e in self.entries if e.label
        }
        self.classes = class_list.names if self.indices else ()
        self.task: Task | None = "classification" if self.indices else None
        self.ignore_value = IGNORE
        self.left_out = 0
        self.thread_safe = True

    def records(self) -> list[TileRecord]:
        """List one tile per image, in the order of the splits file or of the paths.

        Raises:
            ImageError: an image cannot be opened or has another size than a tile (with ``on_error: skip``
                it stays listed, so that it is counted and named when it is read).
            SourceError: none of the images can be opened.
        """
        with offering_skip(self.settings):
            headers = [self.header(entry) for entry in self.entries]
            size = self.tile_size(headers)
            found = zip(self.entries, headers, strict=True)
            return [self.record(entry, header, size) for entry, header in found]

    def header(self, entry: Entry) -> Header | ImageError:
        """Read a header, or return what is wrong with an image that is to be skipped."""
        try:
            check_listed(entry.listed, path=str(entry.path))
            return read_header(entry.path)
        except ImageError as error:
            if self.settings.on_error == "fail":
                raise
            return error

    def tile_size(self, headers: list[Header | ImageError]) -> tuple[int, int]:
        """Return (H, W) px of all tiles: the setting, or the size of the first readable image."""
        sizes = [header.size for header in headers if isinstance(header, Header)]
        if not sizes:
            raise SourceError(
                f"source: none of the {len(headers)} images can be read; the first: {headers[0]}"
            )
        return parse_size(self.settings.tile_size) if self.settings.tile_size else sizes[0]

    def record(self, entry: Entry, found: Header | ImageError, size: tuple[int, int]) -> TileRecord:
        """Describe the tile of one image, as if it fitted where it is to be skipped."""
        header = found if isinstance(found, Header) else Header(size, ())
        if self.settings.on_error == "fail":
            self.check_size(entry.path, header.size, size)
        height, width = header.size
        return TileRecord(
            tile_id=make_id(entry.path, self.settings.root),
            path=str(entry.path),
            split=entry.split,
            size=size,
            label=self.indices.get(entry.label),
            listed=entry.listed,
            georeference=header.georeference,
            date=header.date,
            cloud_cover=header.cloud_cover,
            valid_share=min(height * width / (size[0] * size[1]), 1.0),
            padded=(height, width) != size,
        )

    def check_size(self, path: Path, seen: tuple[int, int], size: tuple[int, int]) -> None:
        """Raise ImageError unless an image is as large as a tile, or may be padded to it."""
        fits = seen[0] <= size[0] and seen[1] <= size[1]
        if seen == size or (fits and self.settings.pad):
            return
        origin = "source.tile_size" if self.settings.tile_size else "the first image"
        remedy = (
            "set source.pad: true"
            if fits
            else "set source.tile_size to the largest size and source.pad: true"
        )
        raise ImageError(
            f"{path}: image is {seen[0]}x{seen[1]} px (height x width), expected {size[0]}x{size[1]} px "
            f"as {origin} says; to pad smaller images {remedy}"
        )

    def read(self, record: TileRecord) -> Tile:
        """Read one image, padded at the bottom and right if it is smaller than a tile.

        Raises:
            ImageError: the image cannot be read or has another size than the tile.
        """
        path = Path(record.path)
        with offering_skip(self.settings):
            check_listed(record.listed, path=record.path)
            image, valid = read_pixels(path)
            self.check_size(path, valid.shape, record.size)
        return Tile(
            record=record,
            image=pad_edge(image, record.size),
            valid=pad_with(valid, record.size, False),
            band_names=read_header(path).band_names,
        )


def list_entries(settings: FolderSettings) -> tuple[list[Entry], tuple[Split, ...]]:
    """Return the images with label and split, and the splits that must hold a tile."""
    splits_file = find_splits_file(settings)
    if splits_file:
        rows = read_rows(splits_file, ["path", "label"], settings.split_column)
        entries = [Entry(row.path("path"), row.values["label"], row.split, row.where) for row in rows]
        return entries, splits_of_rows(rows)
    found = list_images(settings.root)
    if not any(found.values()):
        return [Entry(path, "", "none") for path in found], ()
    ids = {path: make_id(path, settings.root) for path in found}
    names = sorted(set(found.values()))
    drawn = draw_splits(list(ids.values()), [names.index(label) for label in found.values()], settings.split)
    entries = [Entry(path, label, drawn[ids[path]]) for path, label in found.items()]
    return entries, splits_of_shares(settings.split)


def list_images(root: Path) -> dict[Path, str]:
    """Return all images below ``root/images``, or else ``root``, by path, with the class folder's name.

    Raises:
        SourceError: there are none, or they lie both in class folders and beside them.
    """
    base = root / "images" if (root / "images").is_dir() else root
    relative = sorted(
        path.relative_to(base).as_posix()
        for path in base.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    found = {base / name: name.split("/")[0] if "/" in name else "" for name in relative}
    if not found:
        raise SourceError(
            f"source.root: no images in {base} or below; expected files that end in {', '.join(SUFFIXES)}"
        )
    stray = [path for path, label in found.items() if not label]
    if stray and len(stray) < len(found):
        raise SourceError(
            f"{stray[0]} lies beside class folders, not in one; move it into its class folder "
            "or list the images of the data set in a splits.csv"
        )
    return found


def list_classes(root: Path, entries: list[Entry]) -> ClassList:
    """Return the classes of ``root/classes.json`` in its order, or else the labels' names in order."""
    path = root / "classes.json"
    return read_classes(path) if path.is_file() else named({entry.label for entry in entries})
