"""What a page shows of rasters: the classes of a map, its confidence, or the colours of a scene."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling

from satdifuser.errors import ImageError, SettingsError, SourceError
from satdifuser.evaluate.maps.area import Raster
from satdifuser.evaluate.maps.map_file import CLASSES_TAG, NODATA, STEPS
from satdifuser.evaluate.report.colours import palette
from satdifuser.evaluate.view.canvas import Picture, shrink
from satdifuser.evaluate.view.layers import Layer, legend
from satdifuser.store.georeference import georeference_of, open_raster

PERCENTILES = 2, 98  # of a scene's values, which become black and white
PALE, DEEP = np.array([253, 231, 200]), np.array([60, 9, 90])  # of confidence, from none to all


def raster_layers(path: Path, bands: list[int | str] | None, largest: int) -> tuple[Raster, list[Layer]]:
    """The layers of a map or a scene, and their ground.

    Args:
        path: A GeoTIFF.
        bands: Red, green and blue of a scene, by number from 1 or description; None for its first three.
        largest: Pixels a side at most.

    Raises:
        ImageError: it cannot be read, or lacks a band.
        SourceError: it has no CRS or transform.
    """
    with open_raster(path) as dataset:
        place = georeference_of(dataset)
        if place is None:
            raise SourceError(f"{path}: no CRS or transform, so nothing can be laid on it; georeference it")
        ground = shrink(Raster(dataset.shape, dataset.crs.to_wkt(), place.transform), largest)
        if CLASSES_TAG in dataset.tags():
            return ground, map_layers(dataset, ground)
        return ground, [scene_layer(path, dataset, ground, bands)]


def map_layers(dataset: Any, ground: Raster) -> list[Layer]:
    """The classes of a map, and its confidence where it has some."""
    names = [str(name) for name in json.loads(dataset.tags()[CLASSES_TAG])]
    colours = palette(len(names))
    values = dataset.read(1, out_shape=ground.size, resampling=Resampling.nearest)
    there = values < len(names)
    painted = _rgba(colours[np.where(there, values, 0)], there)
    note = dataset.tags().get("SATDIFUSER_MODEL", "")
    found = [Layer("prediction", painted, False, legend(names, colours), note)]
    if "confidence" in dataset.descriptions:
        band = dataset.descriptions.index("confidence") + 1
        values = dataset.read(band, out_shape=ground.size, resampling=Resampling.nearest)
        shares = (values / STEPS)[..., None]
        there, ends = values != NODATA, {"unsure": _colour(PALE), "sure": _colour(DEEP)}
        found.append(Layer("confidence", _rgba(PALE + (DEEP - PALE) * shares, there), False, ends))
    return found


def scene_layer(path: Path, dataset: Any, ground: Raster, bands: list[int | str] | None) -> Layer:
    """A scene's colours, each band stretched between two percentiles."""
    chosen = [_band(path, dataset, band) for band in bands or list(range(1, min(dataset.count, 3) + 1))]
    pixels = dataset.read(chosen, out_shape=(len(chosen), *ground.size), resampling=Resampling.average)
    there = dataset.dataset_mask(out_shape=ground.size, resampling=Resampling.nearest) > 0
    there &= np.isfinite(pixels).all(axis=0)
    values = pixels.astype(np.float64)
    if there.any():
        low, high = np.percentile(values[:, there], PERCENTILES, axis=1)[..., None, None]
        values = (values - low) / np.maximum(high - low, 1e-12)
    stretched = np.moveaxis(np.nan_to_num(values).clip(0, 1) * 255, 0, -1)
    return Layer("scene", _rgba(np.broadcast_to(stretched, (*ground.size, 3)), there), True)


def _band(path: Path, dataset: Any, band: int | str) -> int:
    if isinstance(band, str) and band in dataset.descriptions:
        return int(dataset.descriptions.index(band)) + 1
    if isinstance(band, int) and 1 <= band <= dataset.count:
        return band
    named = [name for name in dataset.descriptions if name]
    held = f"{dataset.count} bands" + (f" ({', '.join(named)})" if named else "")
    raise ImageError(f"{path}: no band {band!r} of --bands; it has {held}")


def parse_bands(text: str) -> list[int | str]:
    """Read ``4,3,2`` or ``B04,B03,B02``.

    Raises:
        SettingsError: they are not three.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(parts):
        raise SettingsError(f"--bands {text}: expected red, green and blue, e.g. 4,3,2 or B04,B03,B02")
    return [int(part) if part.isdecimal() else part for part in parts]


def _rgba(colours: NDArray[Any], there: NDArray[np.bool_]) -> Picture:
    alpha = np.where(there, 255, 0)[..., None]
    return np.concatenate([np.where(alpha > 0, colours, 0), alpha], axis=-1).round().astype(np.uint8)


def _colour(values: NDArray[Any]) -> tuple[int, int, int]:
    red, green, blue = values.tolist()
    return int(red), int(green), int(blue)
