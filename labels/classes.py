"""Class lists: the names behind labels, and the values that stand for them in masks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import ImageError, SettingsError, SourceError, suggest

IGNORE = 255  # value of `Tile.mask` that counts for nothing, whatever the files use
MAX_CLASSES = IGNORE
MAX_NAMED = 12  # class names in a message


@dataclass(frozen=True)
class ClassList:
    """Class names by index, with the value that marks each in mask files."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    ignore_id: int = IGNORE
    origin: str = "the class folders"  # where the list comes from, for messages

    def __post_init__(self) -> None:
        for what, values in [("name", self.names), ("id", self.ids)]:
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                raise SourceError(f"{self.origin}: class {what} {twice[0]} appears twice; make each unique")
        if len(self.names) > MAX_CLASSES:
            raise SourceError(f"{self.origin}: {len(self.names)} classes, expected at most {MAX_CLASSES}")
        if self.ignore_id in self.ids:
            raise SourceError(
                f"{self.origin}: {self.ignore_id} is both a class id and the ignored value; "
                "set ignore_index to a value no class uses"
            )

    def index(self, name: str, where: str) -> int:
        """Return the index of a class name.

        Raises:
            SourceError: the name, found at ``where``, is not in the list.
        """
        if name not in self.names:
            allowed = ", ".join(self.names[:MAX_NAMED]) + (", …" if len(self.names) > MAX_NAMED else "")
            raise SourceError(
                f"{where}: label {name!r} is not among the {len(self.names)} classes of {self.origin} "
                f"({allowed}){suggest(name, self.names)}; correct the label or add the class"
            )
        return self.names.index(name)

    def indices(self, values: NDArray[np.generic], path: Path | str) -> NDArray[np.uint8]:
        """Turn the values of a mask file into class indices, ignored ones into `IGNORE`.

        Args:
            values: (H, W) of any numeric dtype, as stored.
            path: The mask file, or what stands for it, for the message.

        Raises:
            ImageError: a value is neither a class id nor the ignored value.
        """
        known = {value: index for index, value in enumerate(self.ids)} | {self.ignore_id: IGNORE}
        present, inverse = np.unique(values, return_inverse=True)
        unknown = [value for value in present.tolist() if value not in known]
        if unknown:
            raise ImageError(
                f"{path}: mask holds {', '.join(map(str, unknown[:8]))}; allowed are the class ids "
                f"{', '.join(map(str, self.ids))} and {self.ignore_id} for ignored pixels ({self.origin})"
            )
        table = np.array([known[value] for value in present.tolist()], np.uint8)
        return table[inverse].reshape(values.shape)


def read_classes(path: Path) -> ClassList:
    """Read a class list: {"classes": [names] or [{"id", "name"}], "ignore_index": value}.

    Raises:
        SettingsError: the file is missing.
        SourceError: it is of another form.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: no such class list; name one in source.classes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content["classes"], list):
            raise TypeError("classes is no list")
        names, ids = zip(*map(parse_class, range(len(content["classes"])), content["classes"]), strict=True)
        return ClassList(names, ids, int(content.get("ignore_index", IGNORE)), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: not a class list ({type(error).__name__}: {error}); "
            'expected {"classes": ["name", ...]} or {"classes": [{"id": 0, "name": "..."}, ...]}'
        ) from error


def parse_class(position: int, entry: Any) -> tuple[str, int]:
    """Return (name, id) of one entry: a bare name takes its position as id."""
    return (entry, position) if isinstance(entry, str) else (str(entry["name"]), int(entry["id"]))


def named(names: Iterable[str]) -> ClassList:
    """Make a class list of names, in alphabetical order."""
    ordered = tuple(sorted(names))
    return ClassList(ordered, tuple(range(len(ordered))))
