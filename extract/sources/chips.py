"""Chips: tiles that are windows of larger images, listed and read one at a time.

What `pairs` and `scenes` share. A chip at the bottom or right edge is clipped to its image and padded to the
tile's size by repeating the edge pixels; `Tile.valid` is False there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from satdifuser.errors import ImageError
from satdifuser.extract.sources.files import Header, Pixels, count_valid, read_header, read_pixels
from satdifuser.extract.sources.grid import Window, pad_edge, pad_with, shift, windows
from satdifuser.extract.sources.tile import TileRecord


def cut_grid(
    path: Path, size: tuple[int, int], tile: tuple[int, int], overlap: int, pad: bool
) -> list[Window]:
    """Cut an image into the windows of a grid.

    Args:
        path: The image, for the message.
        size: (H, W) px of the image.
        tile: (H, W) px of a tile.
        overlap: Pixels shared by neighbouring tiles.
        pad: Whether an image smaller than a tile may be padded to one.

    Raises:
        ImageError: the image is smaller than a tile and may not be padded.
    """
    if not pad:
        check_inside(path, (0, 0, *tile), size)
    return list(windows(size, tile, overlap))


def check_inside(path: Path, window: Window, size: tuple[int, int]) -> None:
    """Raise ImageError unless a window lies within an image of ``size`` (H, W)."""
    row, col, height, width = window
    if row + height > size[0] or col + width > size[1]:
        raise ImageError(
            f"{path}: a tile of {height}x{width} px at row {row}, column {col} reaches beyond the image of "
            f"{size[0]}x{size[1]} px; lower source.tile_size, correct the window in the splits file, "
            "or set source.pad: true to pad images smaller than a tile"
        )


def list_chips(
    image: TileRecord, header: Header, cuts: Sequence[Window], nodata: float | None = None
) -> list[TileRecord]:
    """List the chips of one image, with the share of valid pixels of each.

    Args:
        image: What the chips have in common: the stem of their ids, paths, split and size.
        header: Header of the image.
        cuts: Window of each chip, clipped to the image.
        nodata: See `read_pixels`.

    Returns:
        Records with ids ``STEM/ROW_COL``, in the order of ``cuts``.
    """
    counts = count_valid(Path(image.path), cuts, nodata)
    return [
        replace(
            image,
            tile_id=f"{image.tile_id}/{cut[0]}_{cut[1]}",
            window=cut,
            georeference=shift(header.georeference, cut[0], cut[1]),
            date=header.date,
            cloud_cover=header.cloud_cover,
            valid_share=count / (image.size[0] * image.size[1]),
            padded=cut[2:] != image.size,
        )
        for cut, count in zip(cuts, counts, strict=True)
    ]


def read_chip(record: TileRecord, nodata: float | None = None) -> tuple[Pixels, Header]:
    """Read the pixels of a chip, padded to the tile's size, with the header of its image.

    Raises:
        ImageError: the image cannot be read, or is smaller than the chip's window.
    """
    path, window = Path(record.path), record.window or (0, 0, *record.size)
    header = read_header(path)
    check_inside(path, window, header.size)
    image, valid = read_pixels(path, window, nodata)
    return (pad_edge(image, record.size), pad_with(valid, record.size, False)), header
