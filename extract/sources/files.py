"""Image files: headers, pixels and validity, and one kind of error for all ways they cannot be read.

JPEG and PNG go through Pillow, TIFF through rasterio. Shapes: B bands, H and W pixels.

A pixel is invalid where the file's own mask says so (alpha, internal mask, or the file's nodata value in
all bands), where all bands hold the nodata value of the settings, or where any band is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import MaskFlags

from satdifuser.errors import ImageError
from satdifuser.extract.settings import ImageSettings
from satdifuser.extract.sources.grid import Window
from satdifuser.store.georeference import Georeference, georeference_of, open_raster
from satdifuser.store.location import TIFF_SUFFIXES, is_tiff

SUFFIXES = (".jpg", ".jpeg", ".png", *TIFF_SUFFIXES)
# The first one found counts; those of GDAL's IMAGERY domain, of Sentinel-2 and of Landsat are among them
# (https://gdal.org/user/raster_data_model.html#imagery-domain-remote-sensing)
DATE_TAGS = (
    *("acquisitiondate", "acquisitiondatetime", "datetime", "product_start_time", "date_acquired"),
    "tifftag_datetime",
)
CLOUD_TAGS = ("cloudcover", "cloud_cover", "cloud_coverage_assessment")  # in percent

Pixels = tuple[NDArray[np.generic], NDArray[np.bool_]]  # image (B, H, W) as stored, valid (H, W)


@dataclass(frozen=True)
class Header:
    """What a file says of its image before a pixel is read."""

    size: tuple[int, int]  # (H, W) px
    band_names: tuple[str, ...]  # "" where unknown
    georeference: Georeference | None = None
    date: str = ""  # ISO 8601
    cloud_cover: float | None = None  # 0 to 1


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what libraries raise on a missing, damaged or truncated file into an ImageError that names it."""
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


@contextmanager
def offering_skip(settings: ImageSettings) -> Iterator[None]:
    """Let the ImageError of one tile say how to go on without it, unless such tiles are left out already."""
    try:
        yield
    except ImageError as error:
        if settings.on_error == "skip":
            raise
        raise ImageError(f"{error}; source.on_error: skip leaves such tiles out") from error


def read_header(path: Path) -> Header:
    """Read size, band names, georeference and date, without decoding pixels.

    Raises:
        ImageError: the file is missing or no image.
    """
    if is_tiff(path):
        with open_raster(path) as dataset:
            names = tuple(name or "" for name in dataset.descriptions)
            tags = dataset.tags(ns="IMAGERY") | dataset.tags()
            place, cloud_cover = georeference_of(dataset), parse_cloud_cover(tags)
            return Header(dataset.shape, names, place, parse_date(tags), cloud_cover)
    with reading(path), Image.open(path) as image:
        return Header((image.height, image.width), image.getbands())


def read_pixels(path: Path, window: Window | None = None, nodata: float | None = None) -> Pixels:
    """Read an image, or one window of it.

    Args:
        path: A JPEG, PNG or TIFF.
        window: (row, col, height, width) px inside the image; None for all of it.
        nodata: A value that marks pixels without data where all bands hold it, besides the file's own.

    Returns:
        Image (B, H, W) in the file's dtype and scale, and valid (H, W).

    Raises:
        ImageError: the file is missing, damaged or truncated.
    """
    if is_tiff(path):
        with open_raster(path) as dataset:
            window = window or (0, 0, *dataset.shape)
            return dataset.read(window=raster_window(window)), valid_pixels(dataset, window, nodata)
    with reading(path):
        image, valid = decode(path, path.stat().st_mtime_ns)
    row, col, height, width = window or (0, 0, *valid.shape)
    part = slice(row, row + height), slice(col, col + width)
    return image[:, *part].copy(), valid[part].copy()


def count_valid(path: Path, windows: Sequence[Window], nodata: float | None = None) -> list[int]:
    """Count the valid pixels of each window, reading one window at a time; JPEG and PNG count as all valid.

    Raises:
        ImageError: the file is missing, damaged or truncated.
    """
    if not is_tiff(path):
        return [height * width for _, _, height, width in windows]
    with open_raster(path) as dataset:
        return [int(valid_pixels(dataset, window, nodata).sum()) for window in windows]


@lru_cache(maxsize=8)  # an image and its mask for each thread: consecutive tiles are cut from the same two
def decode(path: Path, modified_ns: int) -> Pixels:
    """Decode a whole JPEG or PNG; the time of change keeps the cache honest."""
    with Image.open(path) as image:
        image.load()
        bands = np.asarray(image)
        alpha = "A" in image.getbands()
    bands = np.moveaxis(bands.reshape(*bands.shape[:2], -1), -1, 0)
    valid = bands[-1] > 0 if alpha else np.ones(bands.shape[1:], bool)
    return bands, valid


def raster_window(window: Window) -> Any:
    """Return a window in rasterio's form."""
    row, col, height, width = window
    return rasterio.windows.Window(col, row, width, height)


def valid_pixels(dataset: Any, window: Window, nodata: float | None = None) -> NDArray[np.bool_]:
    """Return which pixels of a window hold data, by the rule of this module: (H, W)."""
    area = raster_window(window)
    valid: NDArray[np.bool_] = np.ones(window[2:], bool)
    if any(MaskFlags.all_valid not in flags for flags in dataset.mask_flag_enums):
        valid &= dataset.dataset_mask(window=area) > 0
    if nodata is not None or any(np.dtype(dtype).kind == "f" for dtype in dataset.dtypes):
        bands = dataset.read(window=area)
        valid &= ~np.isnan(bands).any(axis=0)
        valid &= ~(bands == nodata).all(axis=0)
    return valid


def parse_date(tags: dict[str, str]) -> str:
    """Return the acquisition date among a raster's tags as ISO 8601, or "" where there is none."""
    by_name = {name.lower(): value.strip() for name, value in tags.items()}
    for value in (by_name[name] for name in DATE_TAGS if name in by_name):
        for parse in (datetime.fromisoformat, parse_tiff_date):
            try:
                return parse(value).isoformat()
            except ValueError:
                continue
    return ""


def parse_cloud_cover(tags: dict[str, str]) -> float | None:
    """Return the share of an image under clouds among a raster's tags, None where they do not say."""
    by_name = {name.lower(): value.strip() for name, value in tags.items()}
    for value in (by_name[name] for name in CLOUD_TAGS if name in by_name):
        try:
            percent = float(value)
        except ValueError:
            continue
        if 0 <= percent <= 100:  # -1 and 999 stand for unknown
            return percent / 100
    return None


def parse_tiff_date(text: str) -> datetime:
    """Read the form TIFF prescribes: 2019:04:16 10:00:31."""
    return datetime.strptime(text, "%Y:%m:%d %H:%M:%S")
