"""Where tiles lie on the ground: centres, pixel sizes, outlines in longitude and latitude."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rasterio.crs import CRS
from rasterio.warp import transform

from satdifuser.store.georeference import Georeference
from satdifuser.store.reader import FeatureStore

EARTH_RADIUS = 6_371_007.0  # m, of the sphere with the area of the earth
SAMPLED_TILES = 64
EDGE_POINTS = 20  # along each edge of a raster, whose edges may be curves in longitude and latitude


def centre(place: Georeference, size: tuple[int, int]) -> tuple[float, float]:
    """Longitude and latitude in degrees of the centre of a (H, W) px grid."""
    return to_degrees(place.crs, [place.at(size[0] / 2, size[1] / 2)])[0]


def to_degrees(crs: str, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Longitudes and latitudes of points in a CRS."""
    xs, ys = zip(*points, strict=True)
    longitudes, latitudes = transform(CRS.from_string(crs), CRS.from_epsg(4326), xs, ys)
    return list(zip(map(float, longitudes), map(float, latitudes), strict=True))


def ground_distance(place: Georeference, size: tuple[int, int]) -> float:
    """Metres on the ground per pixel in the middle of a (H, W) px grid: the square root of a pixel's area.

    It is measured on a plane of equal area at that place, for the units of a CRS may be degrees, feet, or
    metres that are none (Web Mercator's are twice too long at 60 degrees north).
    """
    longitude, latitude = centre(place, size)
    row, col = size[0] / 2 - 0.5, size[1] / 2 - 0.5
    points = [place.at(row + down, col + right) for down, right in ((0, 0), (0, 1), (1, 1), (1, 0))]
    plane = CRS.from_string(f"+proj=laea +lat_0={latitude} +lon_0={longitude} +datum=WGS84 +units=m")
    xs, ys = transform(CRS.from_string(place.crs), plane, *zip(*points, strict=True))
    pairs = zip(range(4), (1, 2, 3, 0), strict=True)
    return math.sqrt(abs(sum(xs[i] * ys[j] - xs[j] * ys[i] for i, j in pairs)) / 2)


def typical_pixel_size(store: FeatureStore) -> float | None:
    """The median of the pixel sizes in metres of a store's tiles; None where none has a place."""
    rows = np.flatnonzero(store.table("tiles/crs") != "")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_TILES)).astype(int)]
    places = zip(store.gather("tiles/crs", rows), store.gather("tiles/transform", rows), strict=True)
    size = store.attributes.tile_size
    found = [ground_distance(Georeference(str(crs), tuple(values.tolist())), size) for crs, values in places]
    return round(float(np.median(found)), 6) if found else None


def outline(place: Georeference, size: tuple[int, int]) -> list[tuple[float, float]]:
    """The edge of a (H, W) px grid in longitude and latitude: a closed ring of points, counterclockwise."""
    height, width = size
    steps = [step / EDGE_POINTS for step in range(EDGE_POINTS)]
    left, bottom = [(s * height, 0.0) for s in steps], [(height, s * width) for s in steps]
    right, top = [((1 - s) * height, width) for s in steps], [(0.0, (1 - s) * width) for s in steps]
    ring = to_degrees(place.crs, [place.at(*point) for point in (*left, *bottom, *right, *top)])
    return [*ring, ring[0]]


def crosses_antimeridian(place: Georeference, size: tuple[int, int]) -> bool:
    """Whether a (H, W) px grid reaches beyond 180 degrees east or west, or around a pole."""
    longitudes = [longitude for longitude, _ in outline(place, size)]
    beyond = max(map(abs, longitudes)) > 180 + 1e-9
    return beyond or bool(np.abs(np.diff(longitudes)).max() > 180)
