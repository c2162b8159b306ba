"""Turns a tile's raw values into what the backbone sees, by declared rules, and describes its colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from satdifuser.errors import ImageError, SettingsError, suggest
from satdifuser.extract.settings import ImageSettings, Size
from satdifuser.extract.sources.tile import Tile
from satdifuser.store.digest import DigestAlgorithm, digest_of

Floats = NDArray[np.float32]
PERCENTILES = (5, 25, 50, 75, 95)
ROUNDING = 1e-6  # by which float32 may leave [0, 1] without a value being clipped
COLOUR_STATISTICS = [
    f"{band}_{name}"
    for band in ("red", "green", "blue")
    for name in ("mean", "std", *(f"p{p}" for p in PERCENTILES), "gradient_mean", "gradient_std")
]


@dataclass(frozen=True)
class Prepared:
    """A tile as RGB in [0, 1], and how its raw values of those three bands came to fit."""

    rgb: Floats  # (3, H, W)
    raw_range: tuple[float, float]  # lowest and highest value with data
    clipped_share: float  # of the values with data
    brightest: float  # of RGB

    def digest(self, algorithm: DigestAlgorithm) -> str:
        """Digest of the picture's bytes."""
        return digest_of(self.rgb.tobytes(), algorithm)

    def at(self, size: tuple[int, int]) -> Prepared:
        """The same tile with its picture, and so its digest, at another size (H, W) px, see `resize`."""
        return replace(self, rgb=resize(torch.from_numpy(self.rgb)[None], size)[0].numpy())


def to_rgb(tile: Tile, settings: ImageSettings) -> Prepared:
    """Choose three bands of a tile and scale them, see `scale_to_rgb`.

    Raises:
        ImageError: as there, or the scale saturates every pixel.
    """
    prepared = scale_to_rgb(tile, settings)
    scale, (lowest, highest) = settings.scale or 1 / 255, prepared.raw_range
    if lowest * scale + settings.offset > 1:
        raise ImageError(
            f"tile {tile.record.tile_id}: value * {scale:g} + {settings.offset:g} is above 1 everywhere "
            f"(values {lowest:g} to {highest:g}); expected source.scale to bring values into [0, 1], e.g. "
            "1/10000"
        )
    return prepared


def scale_to_rgb(tile: Tile, settings: ImageSettings) -> Prepared:
    """Choose three bands and scale them: value * scale + offset, clipped to [0, 1].

    Pixels without data take the mean colour of those with data, so that a border does not look like an
    object.

    Args:
        tile: A tile as its source read it.
        settings: Its bands, scale and offset.

    Returns:
        The picture (3, H, W) float32 in [0, 1], with raw range and share clipped.

    Raises:
        ImageError: wrong number of bands, no pixel with data, or an undeclared scale.
    """
    positions = band_positions(tile, settings.bands)
    with np.errstate(over="ignore"):  # a no-data value may lie beyond float32
        raw = tile.image[positions].astype(np.float32)
    valid = tile.valid & np.isfinite(raw).all(axis=0)
    if not valid.any():
        raise ImageError(f"tile {tile.record.tile_id}: no pixel holds data")
    where: Any = ... if valid.all() else valid  # most tiles are whole: nothing is copied for them
    held = raw[:, where]
    raw_range = float(held.min()), float(held.max())
    scale = _scale(tile, settings, f"values {raw_range[0]:g} to {raw_range[1]:g}")
    with np.errstate(over="ignore"):
        scaled = raw * np.float32(scale) + np.float32(settings.offset)
    clipped = np.abs(scaled[:, where] - 0.5) > 0.5 + ROUNDING
    rgb: Floats = np.clip(scaled, 0, 1)
    if where is valid:
        rgb[:, ~valid] = rgb[:, valid].mean(axis=1, keepdims=True)
    return Prepared(rgb, raw_range, float(clipped.mean()), float(rgb.max()))


def band_positions(tile: Tile, bands: Sequence[int | str] | None) -> list[int]:
    """Positions of red, green and blue among the bands of a tile.

    Raises:
        ImageError: a band is not there, or none are named and the tile has not just three.
    """
    count, named = len(tile.image), [name for name in tile.band_names if name]
    held = f"it has {count} bands" + (f" ({', '.join(named)})" if named else "")
    if bands is None:
        if count == 3:
            return [0, 1, 2]
        path = tile.record.path
        convert = "convert it to RGB, or " if path.lower().endswith((".jpg", ".jpeg", ".png")) else ""
        raise ImageError(
            f"{_named(tile)}: {held}, expected 3; {convert}name red, green and blue with "
            "source.bands, by number from 1 or by description, e.g. [3, 2, 1]"
        )
    return [_band_position(tile, band, held) for band in bands]


def _band_position(tile: Tile, band: int | str, held: str) -> int:
    if isinstance(band, str):
        if band not in tile.band_names:
            if band in tile.band_aliases:
                return tile.band_aliases[band]
            hint = suggest(band, tile.band_names)
            raise ImageError(f"{_named(tile)}: no band {band!r} in source.bands; {held}{hint}")
        return tile.band_names.index(band)
    if band > len(tile.image):
        raise ImageError(f"{_named(tile)}: no band {band} in source.bands; {held}")
    return band - 1


def _named(tile: Tile) -> str:
    """A tile with its file, for messages."""
    file = f"{tile.record.path}, " if tile.record.path else ""
    return f"{file}tile {tile.record.tile_id}"


def _scale(tile: Tile, settings: ImageSettings, value_range: str) -> float:
    if settings.scale is not None:
        return settings.scale
    if tile.image.dtype == np.uint8:
        return 1 / 255
    raise ImageError(
        f"tile {tile.record.tile_id}: {tile.image.dtype} pixels without a declared scale ({value_range}); "
        "set source.scale so that value * scale + offset lies in [0, 1], e.g. 1/10000"
    )


def raw_means(tile: Tile) -> list[float]:
    """Mean raw value of every band over the pixels that hold data."""
    return [float(band[tile.valid].mean(dtype=np.float64)) for band in tile.image]


def colour_statistics(rgb: Floats) -> Floats:
    """Mean, spread, percentiles and gradient statistics per band: the baseline without any network.

    Args:
        rgb: (3, H, W) float32 in [0, 1].

    Returns:
        (27,) float32, named by COLOUR_STATISTICS.
    """
    rows, places = [], np.linspace(0, 100, rgb[0].size)
    for band in rgb:
        percentiles = np.interp(PERCENTILES, places, np.sort(band, axis=None)) + 0.0  # -0 counts as 0
        down, right = np.gradient(band)
        gradient = np.sqrt(down**2 + right**2)
        rows += [band.mean(), band.std(), *percentiles, gradient.mean(), gradient.std()]
    return np.array(rows, np.float32)


def preview(rgb: Floats) -> NDArray[np.uint8]:
    """(3, H, W) float32 in [0, 1] to (H, W, 3) uint8."""
    return np.rint(rgb.transpose(1, 2, 0) * 255).astype(np.uint8)


def resolve_image_size(size: str | Size, tile_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """The size in pixels at which the backbone sees a tile.

    Args:
        size: "auto" (the tile's own size rounded up to the stride), N, or (H, W).
        tile_size: (H, W) px of the tiles.
        stride: The backbone's coarsest stride, image pixels per feature pixel.

    Raises:
        SettingsError: a given size is not a multiple of the stride.
    """
    if size == "auto":
        height, width = (-(-side // stride) * stride for side in tile_size)
        return height, width
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if height % stride or width % stride:
        raise SettingsError(
            f"extract.image_size: got {height} x {width}, expected multiples of the backbone's "
            f"coarsest stride {stride}, e.g. {-(-height // stride) * stride} x {-(-width // stride) * stride}"
        )
    return height, width


def resize(rgb: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, 3, H, W) bilinearly with antialiasing, where the size differs."""
    if tuple(rgb.shape[-2:]) == size:
        return rgb
    return F.interpolate(rgb, size, mode="bilinear", antialias=True, align_corners=False)
