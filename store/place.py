"""Where tiles lie on the ground: centres, pixel sizes, and whether bounds reach across the antimeridian."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rasterio.crs import CRS
from rasterio.warp import transform as reproject

from satdifuser.store.reader import FeatureStore

METRES_PER_DEGREE = 111_195.0  # along a meridian of a sphere of 6,371 km
SAMPLED_TILES = 64
EDGE_POINTS = 21  # along each edge of a raster, whose edges may be curves in longitude and latitude
Transform = Sequence[float]  # (a, b, c, d, e, f): x = a*col + b*row + c, y = d*col + e*row + f


def centre(crs: str, transform: Transform, size: tuple[int, int]) -> tuple[float, float]:
    """Longitude and latitude in degrees of the centre of a (H, W) px grid."""
    a, b, c, d, e, f = transform
    row, col = size[0] / 2, size[1] / 2
    (longitude,), (latitude,) = to_degrees(crs, [a * col + b * row + c], [d * col + e * row + f])
    return longitude, latitude


def to_degrees(crs: str, xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Longitudes and latitudes of points in a CRS."""
    longitudes, latitudes = reproject(CRS.from_string(crs), CRS.from_epsg(4326), list(xs), list(ys))
    return list(map(float, longitudes)), list(map(float, latitudes))


def ground_distance(crs: str, transform: Transform, latitude: float) -> float:
    """Metres per pixel: the square root of a pixel's area."""
    a, b, _, d, e, _ = transform
    area = abs(a * e - b * d)
    found = CRS.from_string(crs)
    if found.is_geographic:
        return math.sqrt(area * math.cos(math.radians(latitude))) * METRES_PER_DEGREE
    return math.sqrt(area) * float(found.linear_units_factor[1])


def pixel_size(crs: str, transform: Transform, size: tuple[int, int]) -> float:
    """Metres per pixel at the centre of a (H, W) px grid."""
    return ground_distance(crs, transform, centre(crs, transform, size)[1])


def typical_pixel_size(store: FeatureStore) -> float | None:
    """The median of the pixel sizes in metres of a store's tiles; None where none has a place."""
    rows = np.flatnonzero(store.table("tiles/crs") != "")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_TILES)).astype(int)]
    places = zip(store.gather("tiles/crs", rows), store.gather("tiles/transform", rows), strict=True)
    size = store.attributes.tile_size
    found = [pixel_size(str(crs), transform.tolist(), size) for crs, transform in places]
    return round(float(np.median(found)), 6) if found else None


def outline(crs: str, transform: Transform, size: tuple[int, int]) -> list[tuple[float, float]]:
    """The edge of a (H, W) px grid in longitude and latitude: a closed ring of points, counterclockwise."""
    a, b, c, d, e, f = transform
    steps = np.linspace(0, 1, EDGE_POINTS)[:-1]
    rows = np.concatenate([0 * steps, steps, 0 * steps + 1, 1 - steps]) * size[0]
    cols = np.concatenate([1 - steps, 0 * steps, steps, 0 * steps + 1]) * size[1]
    xs, ys = (a * cols + b * rows + c).tolist(), (d * cols + e * rows + f).tolist()
    points = list(zip(*to_degrees(crs, xs, ys), strict=True))
    return [*points, points[0]]


def crosses_antimeridian(crs: str, transform: Transform, size: tuple[int, int]) -> bool:
    """Whether a (H, W) px grid reaches beyond 180 degrees east or west, or around a pole."""
    longitudes = [longitude for longitude, _ in outline(crs, transform, size)]
    beyond = max(map(abs, longitudes)) > 180 + 1e-9
    return beyond or bool(np.abs(np.diff(longitudes)).max() > 180)
