"""What every source of tiles yields: the one small protocol between images and extraction.

A source lists its tiles without reading a pixel (`TileRecord`), then reads them one at a time (`Tile`).
Shapes: B bands, H and W pixels of the tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from satdifuser.labels.splits import Split
from satdifuser.store.georeference import Georeference

Task = Literal["classification", "multilabel", "segmentation"]
Label = int | tuple[int, ...] | None  # class index; or 0 or 1 per class; None with masks and without labels


@dataclass(frozen=True)
class TileRecord:
    """What is known of a tile before a pixel is read."""

    tile_id: str
    path: str  # image file as the user would name it; "" where there is none
    split: Split
    size: tuple[int, int]  # (H, W) px of the tile as yielded, padding included
    label: Label = None
    window: tuple[int, int, int, int] | None = None  # (row, col, height, width) px in the file, clipped to it
    mask_path: str = ""
    listed: str = ""  # line of the splits file that names it, for messages; "" where none does
    georeference: Georeference | None = None
    date: str = ""  # ISO 8601, "" where unknown
    cloud_cover: float | None = None  # of its image, 0 to 1
    valid_share: float = 1.0  # share of the tile's pixels that hold data
    padded: bool = False
    partitions: Mapping[str, Split] = field(default_factory=dict, hash=False)  # by name, if there are several

    @property
    def where(self) -> str:
        """Name the image for messages, with the line of the splits file that lists it."""
        return f"{self.listed} ({self.path})" if self.listed else self.path


@dataclass(frozen=True)
class Tile:
    """One image patch: raw values as stored in the file, with what is known of it."""

    record: TileRecord
    image: NDArray[np.generic]  # (B, H, W), the file's own dtype and scale, bands not yet chosen
    valid: NDArray[np.bool_]  # (H, W), False where there is no data or padding
    mask: NDArray[np.uint8] | None = None  # (H, W) class indices, the source's ignore value elsewhere
    band_names: tuple[str, ...] = field(default=())  # descriptions of the B bands, "" where unknown
    band_aliases: Mapping[str, int] = field(default_factory=dict, hash=False)  # further names, by position


class Source(Protocol):
    """Where tiles come from."""

    task: Task | None  # None where there are no targets
    classes: tuple[str, ...]  # class names by index
    ignore_value: int  # value of `Tile.mask` that counts for nothing
    left_out: int  # candidate tiles left out for too little valid data
    splits: tuple[Split, ...]  # splits that were asked for, so each must hold a tile
    thread_safe: bool  # whether several threads may read at once

    def records(self) -> Sequence[TileRecord]:
        """List all tiles in a stable order, reading no pixels beyond validity masks."""
        ...

    def read(self, record: TileRecord) -> Tile:
        """Read one tile.

        Raises:
            ImageError: the image or mask cannot be read or does not fit.
        """
        ...
