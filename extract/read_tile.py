"""Reads one tile: its picture for the backbone, and what the store keeps beside the features.

That is colours, digest, preview and target. Nothing here needs the backbone: other processes read, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from satdifuser.errors import ImageError
from satdifuser.extract.changes import file_state
from satdifuser.extract.images import Prepared, colour_statistics, preview, to_rgb
from satdifuser.extract.settings import ImageSettings
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.store.digest import DigestAlgorithm
from satdifuser.store.writer import TileRow

LABEL_TYPES = {"classification": np.int32, "multilabel": np.uint8}


@dataclass(frozen=True)
class Preparation:
    """How tiles are prepared."""

    images: ImageSettings
    previews: bool  # whether the store keeps small pictures
    image_size: tuple[int, int]  # (H, W) px at which the backbone sees tiles
    digest_algorithm: DigestAlgorithm  # of the store


@dataclass(frozen=True)
class ReadTile:
    """A tile as it comes from its source."""

    row: TileRow
    picture: Prepared | None  # at the size at which the backbone sees it; None where it is skipped


def read_tiles(
    preparation: Preparation, source: Source, records: Sequence[TileRecord]
) -> list[ReadTile | Exception]:
    """Read some tiles; an error stands in the place of one that cannot be used."""
    return [_read(preparation, source, record) for record in records]


def _read(preparation: Preparation, source: Source, record: TileRecord) -> ReadTile | Exception:
    try:
        row, prepared = read_row(preparation, source, record)
        return ReadTile(row, None if prepared is None else prepared.at(preparation.image_size))
    except Exception as error:  # raised when its turn comes
        return error


def read_row(preparation: Preparation, source: Source, record: TileRecord) -> tuple[TileRow, Prepared | None]:
    """Read one tile: what the store keeps of it, and its picture, or None where it is skipped.

    Raises:
        ImageError: it cannot be used, and ``on_error`` is not skip.
    """
    state = file_state(record)  # before the read
    row = TileRow(record.tile_id, record.split, record.path, file_state=state, partitions=record.partitions)
    try:
        tile = source.read(record)
        prepared = to_rgb(tile, preparation.images)
    except ImageError as error:
        if preparation.images.on_error == "fail":
            raise
        return replace(row, skip_reason=str(error)), None
    target: Any = tile.mask
    if record.label is not None and source.task in LABEL_TYPES:
        target = np.array(record.label, LABEL_TYPES[source.task])
    row = replace(
        row,
        date=record.date,
        image_digest=prepared.digest(preparation.digest_algorithm),
        valid_share=float(tile.valid.mean()),
        padded=record.padded,
        cloud_cover=math.nan if record.cloud_cover is None else record.cloud_cover,
        colour=colour_statistics(prepared.rgb),
        target=target,
        valid=tile.valid,
        preview=preview(prepared.rgb) if preparation.previews else None,
        **_place(record),
    )
    return row, prepared


def _place(record: TileRecord) -> dict[str, Any]:
    place = record.georeference
    if place is None:
        return {}
    return {"crs": place.crs, "transform": place.transform, "bounds": place.bounds(*record.size)}
