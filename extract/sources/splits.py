"""Splits of tiles: read from a CSV file, or drawn with a seed; and the checks of a finished list."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from satdifuser.errors import ImageError, SettingsError, SourceError, suggest
from satdifuser.extract.settings import FolderSettings, PairsSettings
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.labels.splits import USED_SPLITS, Split

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Row:
    """One line of a splits file."""

    values: dict[str, str]
    split: Split
    file: Path
    line: int

    @property
    def where(self) -> str:
        """Name the line for messages."""
        return f"{self.file}, line {self.line}"

    def path(self, column: str) -> Path:
        """Return the file a column names, relative to the splits file."""
        return self.file.parent / self.values[column]

    def number(self, column: str) -> int:
        """Return a whole number that is not negative."""
        value = self.values[column]
        if not value.isdecimal():
            raise SourceError(f"{self.where}: {column} is {value!r}, expected a whole number of px")
        return int(value)


def find_splits_file(settings: FolderSettings | PairsSettings) -> Path | None:
    """Return the splits file that is named in the settings, or ``splits.csv`` in the root, or nothing.

    Raises:
        SettingsError: the named file is missing.
    """
    default = settings.root / "splits.csv"
    if settings.splits is None:
        return default if default.is_file() else None
    if not settings.splits.is_file():
        raise SettingsError(
            f"source.splits: {settings.splits} is not a file; expected a CSV file, "
            "its path seen from the working folder"
        )
    return settings.splits


def read_rows(path: Path, columns: Sequence[str], split_column: str) -> list[Row]:
    """Read a splits file.

    Args:
        path: CSV with a header line.
        columns: Columns that must be there; others are kept too.
        split_column: Column that holds train, val, test or none.

    Raises:
        SourceError: a column, a value or all lines are missing, or a split is unknown.
    """
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        found = list(reader.fieldnames or [])
        for column in [*columns, split_column]:
            if column not in found:
                raise SourceError(
                    f"{path}: column {column!r} is missing; it has {', '.join(found) or 'no columns'}"
                    f"{suggest(column, found)}"
                )
        rows = [parse_row(values, split_column, columns, path, reader.line_num) for values in reader]
    if not rows:
        raise SourceError(f"{path}: no line below the header; list the images of the data set")
    return rows


def parse_row(
    values: dict[str, str], split_column: str, columns: Sequence[str], path: Path, line: int
) -> Row:
    """Check one line of a splits file and give it its split."""
    for column in columns:
        if not values[column]:
            raise SourceError(f"{path}, line {line}: {column} is empty; fill it in or remove the line")
    for split in SPLITS:
        if values[split_column] == split:
            return Row(values, split, path, line)
    raise SourceError(
        f"{path}, line {line}: {split_column} is {values[split_column]!r}, expected {', '.join(SPLITS)}"
    )


def check_listed(where: str, **files: str) -> None:
    """Raise ImageError unless the files that a line of a splits file names are there.

    Args:
        where: The line, as `Row.where` names it; "" where no splits file lists the files.
        files: Path of a file by the column that names it.
    """
    for column, path in files.items():
        if where and not Path(path).is_file():
            raise ImageError(
                f"{where}, column {column!r}: {path} is not a file; correct its path, "
                "seen from the splits file's folder, or remove the line"
            )


def make_id(path: Path, root: Path) -> str:
    """Return a tile's id: its path below the root, without suffix, with forward slashes.

    Raises:
        SourceError: the path lies outside the root.
    """
    relative = Path(os.path.relpath(path, root))
    if relative.parts[0] == os.pardir:
        raise SourceError(f"{path} lies outside source.root {root}; name a root that holds all images")
    return relative.with_suffix("").as_posix()


def splits_of_rows(rows: Iterable[Row]) -> tuple[Split, ...]:
    """Return the splits a splits file must fill: all three, or none of them where no tile is assigned."""
    return USED_SPLITS if any(row.split != "none" for row in rows) else ()


def check_records(records: Sequence[TileRecord], source: Source) -> None:
    """Check a list of tiles as a whole.

    Raises:
        SourceError: there are no tiles, two share an id, or a split that was asked for is empty.
    """
    if not records:
        raise SourceError(
            f"source: no tiles, {source.left_out} left out for too little valid data; "
            "lower source.min_valid, or source.tile_size where images are smaller than a tile"
        )
    seen: dict[str, TileRecord] = {}
    for record in records:
        twin = seen.setdefault(record.tile_id, record)
        if twin is not record:
            raise SourceError(
                f"tile id {record.tile_id!r} appears twice, in {twin.where} and {record.where}; "
                "rename one, or list it once"
            )
    check_splits(records, source.splits)


def check_splits(records: Sequence[TileRecord], asked: Sequence[Split]) -> None:
    """Raise SourceError if a split that was asked for has no tile."""
    counts = {split: sum(record.split == split for record in records) for split in SPLITS}
    empty = [split for split in asked if not counts[split]]
    if empty:
        found = ", ".join(f"{split} {count}" for split, count in counts.items())
        raise SourceError(
            f"source: no tile in split {', '.join(empty)} (found: {found}); assign tiles to it in the "
            "splits file or raise its share, or give all tiles the split none if nothing is to be fitted"
        )
