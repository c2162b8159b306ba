"""Sources of tiles: where images, targets and splits come from. `open_source` is the way in."""

from __future__ import annotations

from satdifuser.errors import SettingsError
from satdifuser.extract.settings import (
    FolderSettings,
    GeobenchSettings,
    PairsSettings,
    PythonSettings,
    ScenesSettings,
    SourceSettings,
    SyntheticSettings,
)
from satdifuser.extract.sources.folder import FolderSource
from satdifuser.extract.sources.geobench import GeobenchSource
from satdifuser.extract.sources.pairs import PairsSource
from satdifuser.extract.sources.python_source import PythonSource
from satdifuser.extract.sources.scenes import ScenesSource
from satdifuser.extract.sources.splits import check_records
from satdifuser.extract.sources.synthetic import SyntheticSource
from satdifuser.extract.sources.tile import Source, Tile, TileRecord
from satdifuser.store.georeference import Georeference

__all__ = ["Georeference", "Source", "Tile", "TileRecord", "list_tiles", "open_source"]


def open_source(settings: SourceSettings) -> Source:
    """Open the source that the settings describe.

    Raises:
        SettingsError: settings contradict each other, or root, splits file, class list or target are missing.
        SourceError: there are no images, or splits file, class list and folders are wrong.
    """
    if isinstance(settings, SyntheticSettings):
        return SyntheticSource(settings)
    if isinstance(settings, GeobenchSettings):
        return GeobenchSource(settings)
    if isinstance(settings, PythonSettings):
        return PythonSource(settings)
    check_root(settings)
    match settings:
        case FolderSettings():
            return FolderSource(settings)
        case PairsSettings():
            return PairsSource(settings)
        case ScenesSettings():
            return ScenesSource(settings)


def check_root(settings: FolderSettings | PairsSettings | ScenesSettings) -> None:
    """Raise SettingsError unless the root is there: a folder, or for scenes a file."""
    if settings.root.is_dir() or (settings.kind == "scenes" and settings.root.is_file()):
        return
    expected = "a GeoTIFF or a folder of them" if settings.kind == "scenes" else "a folder"
    raise SettingsError(
        f"source.root: {settings.root} is missing or of another kind; expected {expected}, "
        "its path seen from the working folder"
    )


def list_tiles(source: Source) -> list[TileRecord]:
    """List all tiles of a source and check the list as a whole.

    Returns:
        Records in the source's stable order.

    Raises:
        SettingsError: the label raster is missing.
        SourceError: there are no tiles, two share an id, a split that was asked for is empty, a scene or its
            label raster is not placed, or they do not overlap.
        ImageError: an image cannot be opened or does not fit, unless such tiles are skipped.
    """
    records = list(source.records())
    check_records(records, source)
    return records
