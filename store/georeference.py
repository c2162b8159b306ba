"""Where rasters and tiles lie on the ground, and rasters opened with one kind of error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from satdifuser.errors import ImageError, SatDiFuserError

OPENING = Lock()  # warnings are silenced for the whole process, so by one thread at a time


@dataclass(frozen=True)
class Georeference:
    """Where a tile lies: CRS as text (``EPSG:32633`` or WKT) and affine transform, pixel to CRS units.

    ``transform`` is (a, b, c, d, e, f) as rasterio orders it: x = a*col + b*row + c, y = d*col + e*row + f.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]

    def bounds(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return (left, bottom, right, top) in CRS units of a (height, width) px grid, rotated or not."""
        xs, ys = zip(*self.corners(height, width), strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def corners(self, height: int, width: int) -> list[tuple[float, float]]:
        """Return the four corners (x, y) of a (height, width) px grid, going round it."""
        return [self.at(*corner) for corner in ((0, 0), (0, width), (height, width), (height, 0))]

    def at(self, row: float, col: float) -> tuple[float, float]:
        """Return (x, y) in CRS units of a place in px."""
        a, b, c, d, e, f = self.transform
        return a * col + b * row + c, d * col + e * row + f

    def shifted(self, row: int, col: int) -> Georeference:
        """Return the same grid with its origin at pixel (row, col)."""
        a, b, _, d, e, _ = self.transform
        x, y = self.at(row, col)
        return Georeference(self.crs, (a, b, x, d, e, y))


@contextmanager
def without_place_warnings() -> Iterator[None]:
    """Silence what rasterio says of rasters without a georeference, its own in memory among them."""
    with OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@contextmanager
def open_raster(path: Path) -> Iterator[Any]:
    """Open a raster with rasterio; a plain TIFF without georeference is as welcome as any.

    Raises:
        ImageError: the file is missing, or cannot be read while it is open.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        with without_place_warnings():
            dataset = rasterio.open(path)
        with dataset:
            yield dataset
    except SatDiFuserError:
        raise
    except (OSError, ValueError, RasterioError) as error:
        raise ImageError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error


def georeference_of(dataset: Any) -> Georeference | None:
    """Return CRS and transform of an open raster, or None where either is missing."""
    if dataset.crs is None or dataset.transform.is_identity:
        return None
    return Georeference(dataset.crs.to_string(), tuple(dataset.transform)[:6])
