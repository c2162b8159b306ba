"""Where a store may be: in a local folder, in a .zip file, or at an address; a GeoTIFF is none.

And where commands may write what they make.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit

from satdifuser.errors import SettingsError

Location = Path | str  # a local folder or .zip file, or an address
TIFF_SUFFIXES = (".tif", ".tiff")
SCHEMES = ("s3", "gs", "http", "https")


def location(text: str) -> Location:
    """What a user's text stands for: an address as it is, else a path.

    Raises:
        SettingsError: it is an address of a kind that is not known.
    """
    if urlsplit(text).scheme in SCHEMES:
        return text.rstrip("/")
    if "://" in text:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise SettingsError(f"{text}: got an address of this kind, expected one of {known}, or a path")
    return Path(text)


def is_remote(place: Location) -> bool:
    """Whether a store there is read through the local cache."""
    return isinstance(place, str) or (is_zip(place) and place.is_file())


def is_tiff(place: Location) -> TypeGuard[Path]:
    """Whether a place is named as a GeoTIFF, which is a raster and no store."""
    return isinstance(place, Path) and place.suffix.lower() in TIFF_SUFFIXES


def is_zip(path: Path) -> bool:
    """Whether a path is named as a .zip file."""
    return path.suffix.lower() == ".zip"


def check_output(folder: Path, setting: str) -> None:
    """Refuse, before any work is done, a folder that cannot be made or written in.

    Raises:
        SettingsError: with what stands in the way.
    """
    places = (folder.absolute(), *folder.absolute().parents)
    nearest = next(place for place in places if os.access(place, os.F_OK))
    if not nearest.is_dir():
        raise SettingsError(
            f"{setting}: cannot write in {folder}: {nearest} is not a folder; choose another path"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SettingsError(
            f"{setting}: cannot write in {folder}: {nearest} is not writable; choose another path, or change "
            "its permissions"
        )


def check_absent(out: Path, overwrite: bool) -> None:
    """Refuse to replace a file unless it was asked for.

    Raises:
        SettingsError: there is one.
    """
    if out.exists() and not overwrite:
        raise SettingsError(f"-o: {out} is there; choose another name, or replace it with --overwrite")
