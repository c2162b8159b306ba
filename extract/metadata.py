"""Where and when an image was taken, as DiffusionSat reads it: seven numbers per tile.

Longitude, latitude, ground sampling distance, cloud cover, year, month and day, each scaled to 0 … 1000 as in
DiffusionSat's training (Khanna et al., ICLR 2024, arXiv 2312.03606). Its training replaced single fields by 0
after this scaling; so does a tile that lacks a field.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime

import torch
from torch import Tensor

from satdifuser.errors import SourceError
from satdifuser.extract.sources.tile import TileRecord
from satdifuser.store.place import centre, ground_distance

FIRST_YEAR, LAST_YEAR = 1980, 2100


@dataclass(frozen=True)
class Metadata:
    """What is known of a tile; None where it is not."""

    longitude: float | None = None  # degrees east, -180 to 180
    latitude: float | None = None  # degrees north, -90 to 90
    gsd: float | None = None  # metres per pixel as the backbone sees the tile
    cloud_cover: float | None = None  # 0 to 1
    year: float | None = None  # 1980 to 2100
    month: float | None = None  # 1 to 12
    day: float | None = None  # 1 to 31


FIELDS = tuple(field.name for field in fields(Metadata))
LIMITS = ((-180, 180), (-90, 90), (0, math.inf), (0, 1), (FIRST_YEAR, LAST_YEAR), (1, 12), (1, 31))
ORIGINS = (-180, -90, 0, 0, FIRST_YEAR, 0, 0)
SPANS = (360, 180, 1, 1, LAST_YEAR - FIRST_YEAR, 12, 31)


def normalise(metadata: Metadata, where: str = "metadata") -> Tensor:
    """Scale the fields as DiffusionSat's training did.

    Args:
        metadata: The fields; None for one that is dropped.
        where: Whose they are, for the message.

    Returns:
        (7,) float32; 0 for a dropped field.

    Raises:
        SourceError: a value outside its range.
    """
    values = []
    for name, value, (low, high), origin, span in zip(
        FIELDS, astuple(metadata), LIMITS, ORIGINS, SPANS, strict=True
    ):
        if value is not None and not low <= value <= high:
            raise SourceError(
                f"{where}: {name} is {value:g}, expected {low} to {high}; correct the file's georeference or "
                "date, or set backbone.metadata: false"
            )
        values.append(0.0 if value is None else (value - origin) / span * 1000)
    return torch.tensor(values, dtype=torch.float32)


def missing_fields(metadata: Metadata) -> list[str]:
    """Names of the fields that are not known."""
    return [name for name, value in zip(FIELDS, astuple(metadata), strict=True) if value is None]


def collect_metadata(records: Sequence[TileRecord], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Each tile's metadata by its id, (7,) float32 as `normalise` makes it; see `tile_metadata`."""
    return {r.tile_id: normalise(tile_metadata(r, image_size), f"tile {r.tile_id}") for r in records}


def count_missing(records: Sequence[TileRecord], image_size: tuple[int, int]) -> dict[str, int]:
    """How many tiles lack each field, for those that any tile lacks."""
    lacking = Counter(name for r in records for name in missing_fields(tile_metadata(r, image_size)))
    return {name: lacking[name] for name in FIELDS if lacking[name]}


def tile_metadata(record: TileRecord, image_size: tuple[int, int]) -> Metadata:
    """Collect what a tile's georeference, date and cloud cover tell.

    Args:
        record: The tile.
        image_size: (H, W) px at which the backbone sees it.
    """
    longitude = latitude = gsd = None
    if record.georeference is not None:
        longitude, latitude = centre(record.georeference, record.size)
        shrunk = min(record.size) / min(
            image_size
        )  # file pixels per pixel seen, as in DiffusionSat's training
        gsd = ground_distance(record.georeference, record.size) * shrunk
    taken = datetime.fromisoformat(record.date) if record.date else None
    date = (taken.year, taken.month, taken.day) if taken else (None, None, None)
    return Metadata(longitude, latitude, gsd, record.cloud_cover, *date)
