"""A generated scene with labels, to try the way from a scene to a map.

    python tools/make_scene.py FOLDER [--size 768] [--seed 0] [--labels 6] [--points 600]

Writes three files to FOLDER:

    scene.tif       red, green and blue, uint8, EPSG:32632, 10 m a pixel: zones of four land uses between wavy
                    borders, which differ in what stands on the ground and hardly in colour
    labels.gpkg     polygons inside of some zones, as one would draw them (column class)
    reference.gpkg  points drawn at random over all that has no label, to assess a map by (column class)

Memory holds one zone at a time, so a scene may be of any size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.windows import Window

from satdifuser.extract.sources.landcover import paint
from satdifuser.extract.sources.synthetic import CRS, ORIGIN, PIXEL
from satdifuser.store.georeference import Georeference

CLASSES = ("fields", "forest", "orchard", "strip_fields")
ZONE = 128  # px from one zone to the next
WAVE = 12  # px by which borders swing
PLACE = Georeference(CRS, (PIXEL, 0, ORIGIN[0], 0, -PIXEL, ORIGIN[1]))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=768, help="px a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", type=int, default=6, help="zones of each class that get a polygon")
    parser.add_argument("--points", type=int, default=600, help="of the reference; fewer those on labels")
    args = parser.parse_args(words)
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    zones = draw_zones(rng, -(-args.size // ZONE) + 1)
    write_scene(args.folder / "scene.tif", args.size, zones, args.seed)
    polygons, classes = draw_polygons(rng, args.size, zones, args.labels)
    write_shapes(args.folder / "labels.gpkg", polygons, classes)
    write_shapes(args.folder / "reference.gpkg", *draw_points(rng, args.size, zones, args.points, polygons))


def draw_zones(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """The class of each zone (side, side), all classes about equally often."""
    return rng.permutation(np.arange(side * side) % len(CLASSES)).reshape(side, side).astype(np.uint8)


def zone_of(rows: NDArray[Any], columns: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of the zone that pixels lie in."""
    down = rows + WAVE * (1 + np.sin(columns / 23))
    across = columns + WAVE * (1 + np.sin(rows / 19))
    return (down // ZONE).astype(np.int64), (across // ZONE).astype(np.int64)


def write_scene(path: Path, size: int, zones: NDArray[np.uint8], seed: int) -> None:
    """Paint zone after zone into a GeoTIFF; not compressed, since borders are written twice."""
    profile = {"width": size, "height": size, "count": 3, "dtype": "uint8"}
    profile |= {"crs": PLACE.crs, "transform": PLACE.transform}
    layout = {"tiled": True, "blockxsize": ZONE, "blockysize": ZONE, "bigtiff": "if_safer"}
    with rasterio.open(path, "w+", driver="GTiff", photometric="rgb", **profile, **layout) as dataset:
        for zone in np.ndindex(zones.shape):
            top, left = (max(0, number * ZONE - 2 * WAVE) for number in zone)
            bottom, right = (min(size, (number + 1) * ZONE) for number in zone)
            if top >= size or left >= size:
                continue
            kind, rng = CLASSES[zones[zone]], np.random.default_rng((seed, *zone))
            image, _ = paint(kind, rng, (bottom - top, right - left))
            window = Window(left, top, right - left, bottom - top)
            pixels = dataset.read(window=window)
            inside = np.equal(zone_of(*np.mgrid[top:bottom, left:right]), np.reshape(zone, (2, 1, 1))).all(0)
            pixels[:, inside] = image[:, inside]
            dataset.write(pixels, window=window)


def draw_polygons(
    rng: np.random.Generator, size: int, zones: NDArray[np.uint8], each: int
) -> tuple[list[shapely.Geometry], list[str]]:
    """Rectangles inside of some zones of each class, away from the borders."""
    shapes, classes = [], []
    whole = size // ZONE
    for number, name in enumerate(CLASSES):
        for row, column in rng.permutation(np.argwhere(zones[:whole, :whole] == number))[:each].tolist():
            top, left = row * ZONE, column * ZONE
            bottom, right = (start + ZONE - 2 * WAVE for start in (top, left))
            shapes.append(shapely.box(*PLACE.at(bottom, left), *PLACE.at(top, right)))
            classes.append(name)
    return shapes, classes


def draw_points(
    rng: np.random.Generator,
    size: int,
    zones: NDArray[np.uint8],
    count: int,
    labelled: Sequence[shapely.Geometry],
) -> tuple[list[shapely.Geometry], list[str]]:
    """Centres of random pixels outside of what is labelled, with their classes."""
    rows, columns = rng.integers(0, size, (2, count))
    pixels = zip(rows.tolist(), columns.tolist(), strict=True)
    points = shapely.points([PLACE.at(row + 0.5, column + 0.5) for row, column in pixels])
    free = ~shapely.intersects(points, shapely.union_all(labelled))
    return points[free].tolist(), [CLASSES[number] for number in zones[zone_of(rows, columns)][free]]


def write_shapes(path: Path, shapes: Sequence[shapely.Geometry], classes: Sequence[str]) -> None:
    """Write shapes and their classes as a GeoPackage."""
    pyogrio.raw.write(
        path,
        geometry=shapely.to_wkb(np.array(shapes, dtype=object)),
        field_data=[np.array(classes, dtype=object)],
        fields=["class"],
        geometry_type=shapes[0].geom_type,
        crs=CRS,
        driver="GPKG",
    )


if __name__ == "__main__":
    main()
