"""Source `pairs`: images with index masks of the same size, cut to tiles.

The splits file has the columns image, mask and split, and each image is cut to a grid; or x, y, w, h as well,
and each line is one window. ``classes.json`` names the classes and the ids that stand for them in masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import ImageError, SettingsError, SourceError
from satdifuser.extract.settings import PairsSettings
from satdifuser.extract.sources.chips import check_inside, cut_grid, list_chips, read_chip
from satdifuser.extract.sources.files import Header, offering_skip, read_header, read_pixels
from satdifuser.extract.sources.grid import Window, pad_with, parse_size
from satdifuser.extract.sources.splits import (
    Row,
    check_listed,
    find_splits_file,
    make_id,
    read_rows,
    splits_of_rows,
)
from satdifuser.extract.sources.tile import Task, Tile, TileRecord
from satdifuser.labels.classes import IGNORE, read_classes
from satdifuser.labels.splits import Split

WINDOW_COLUMNS = {"x", "y", "w", "h"}


@dataclass(frozen=True)
class Pair:
    """One line of the splits file: an image with its mask, and the window it names, if any."""

    image: Path
    mask: Path
    split: Split
    window: Window | None
    listed: str  # the line, for messages


class PairsSource:
    """Images with index masks.

    Raises:
        SettingsError: splits file or class list are missing.
        SourceError: they are wrong.
    """

    def __init__(self, settings: PairsSettings) -> None:
        self.settings = settings
        self.tile_size = parse_size(settings.tile_size)
        self.class_list = read_classes(settings.classes or settings.root / "classes.json")
        self.pairs, self.splits = list_pairs(settings)
        self.classes = self.class_list.names
        self.task: Task | None = "segmentation"
        self.ignore_value = IGNORE
        self.left_out = 0
        self.thread_safe = True

    def records(self) -> list[TileRecord]:
        """List all tiles, line by line of the splits file and row by row of each image's grid.

        Raises:
            ImageError: an image or mask cannot be opened, or they do not fit each other or the tile (with
                ``on_error: skip`` the pair stays listed, so that it is counted and named when it is read).
        """
        self.left_out = 0
        with offering_skip(self.settings):
            return [record for pair in self.pairs for record in self.records_of(pair)]

    def records_of(self, pair: Pair) -> list[TileRecord]:
        """List the tiles of one pair; one that cannot be used but may be skipped stays in as one tile."""
        if self.settings.on_error == "fail":  # first: paths may be seen from another folder than was meant
            check_listed(pair.listed, image=str(pair.image), mask=str(pair.mask))
        image = TileRecord(
            tile_id=make_id(pair.image, self.settings.root).removeprefix("images/"),
            path=str(pair.image),
            split=pair.split,
            size=self.tile_size,
            mask_path=str(pair.mask),
            listed=pair.listed,
        )
        try:
            return self.chips_of(image, pair.window)
        except ImageError:
            if self.settings.on_error == "fail":
                raise
            window = pair.window or (0, 0, *self.tile_size)
            return [replace(image, tile_id=f"{image.tile_id}/{window[0]}_{window[1]}", window=window)]

    def chips_of(self, image: TileRecord, window: Window | None) -> list[TileRecord]:
        """List the chips of an image: the one of a given window, or a grid."""
        path, header = Path(image.path), check_pair(image)
        if window:
            check_inside(path, window, header.size)
        cuts = [window] if window else cut_grid(path, header.size, self.tile_size, 0, self.settings.pad)
        chips = list_chips(image, header, cuts)
        kept = [chip for chip in chips if chip.valid_share >= self.settings.min_valid]
        self.left_out += len(chips) - len(kept)
        return kept

    def read(self, record: TileRecord) -> Tile:
        """Read one tile with its mask of class indices; padding and pixels without data are ignored.

        Raises:
            ImageError: image or mask cannot be read, they differ in size, or the mask holds unknown values.
        """
        with offering_skip(self.settings):
            check_pair(record)
            (image, valid), header = read_chip(record)
            mask = pad_with(self.read_mask(Path(record.mask_path), record.window), record.size, IGNORE)
        mask[~valid] = IGNORE
        return Tile(record=record, image=image, valid=valid, mask=mask, band_names=header.band_names)

    def read_mask(self, path: Path, window: Window | None) -> NDArray[np.uint8]:
        """Read a window of a mask as class indices."""
        bands, _ = read_pixels(path, window)
        if len(bands) != 1:
            raise ImageError(
                f"{path}: mask has {len(bands)} bands, expected one band of class ids; "
                "convert its colours to the ids of classes.json"
            )
        return self.class_list.indices(bands[0], path)


def check_pair(record: TileRecord) -> Header:
    """Return the image's header if image and mask are there and of the same size, else raise ImageError."""
    check_listed(record.listed, image=record.path, mask=record.mask_path)
    header, seen = read_header(Path(record.path)), read_header(Path(record.mask_path)).size
    if header.size != seen:
        raise ImageError(
            f"{record.mask_path}: mask is {seen[0]}x{seen[1]} px (height x width), but its image "
            f"{record.path} is {header.size[0]}x{header.size[1]} px; make both the same size "
            "or remove the pair"
        )
    return header


def list_pairs(settings: PairsSettings) -> tuple[list[Pair], tuple[Split, ...]]:
    """Return the lines of the splits file, and the splits that must hold a tile."""
    path = find_splits_file(settings)
    if path is None:
        raise SettingsError(
            f"source.splits: {settings.root} has no splits.csv; name a CSV file with the columns "
            "image, mask, split, or image, mask, x, y, w, h, split"
        )
    rows = read_rows(path, ["image", "mask"], settings.split_column)
    tile = parse_size(settings.tile_size)
    pairs = [
        Pair(row.path("image"), row.path("mask"), row.split, window_of(row, tile), row.where) for row in rows
    ]
    return pairs, splits_of_rows(rows)


def window_of(row: Row, tile: tuple[int, int]) -> Window | None:
    """Return the window a line names, or None where the file has no such columns.

    Raises:
        SourceError: the window has another size than a tile.
    """
    if not row.values.keys() >= WINDOW_COLUMNS:
        return None
    left, top, width, height = (row.number(column) for column in "xywh")
    if (height, width) != tile:
        raise SourceError(
            f"{row.where}: window is {height}x{width} px (height x width), but source.tile_size is "
            f"{tile[0]}x{tile[1]} px; set source.tile_size to the windows' size"
        )
    return top, left, height, width
