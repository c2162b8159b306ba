"""Generated land cover: small scenes as Sentinel-2 would see them at 10 m a pixel, with dense masks.

Kinds of scene come in groups that share their colours (fields, buildings, water in farmland) and differ in
texture, shape, orientation, scale or arrangement only, so that colour statistics cannot tell them apart.
Lengths are in px. Shapes: H and W pixels of the scene.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

from satdifuser.extract.sources.canvas import (
    BARE,
    BUILT,
    CROP,
    GRASS,
    ROAD,
    TREES,
    WATER,
    Canvas,
    Floats,
    Ints,
    cells,
    combine,
    paint_parcels,
    paint_trees,
    polygons,
    rectangles,
)

CANOPY = np.array([42.0, 68, 66])
ROOFS = np.array([[205.0, 202, 205], [150, 112, 104], [122, 124, 130], [88, 92, 100]])
ASPHALT = np.array([128.0, 126, 128])
HAZE = np.array([120.0, 132, 150])
DEEP, TURBID = np.array([[34.0, 56, 82], [84, 122, 116]])


def farmland(canvas: Canvas) -> None:
    """Paint mixed parcels of either shape: what lies around rivers, lakes and highways."""
    if canvas.rng.random() < 0.5:
        parcels = rectangles(canvas, 9, 24)
    else:
        parcels, _ = polygons(canvas, 20)
    paint_parcels(canvas, parcels, [CROP, GRASS, GRASS, BARE])
    paint_trees(canvas, canvas.noise(4) > 1.3, CANOPY)
    if canvas.rng.random() < 0.6:
        paint_lane(canvas)
    if canvas.rng.random() < 0.6:
        canvas.fill(canvas.noise(4) > canvas.rng.uniform(1.5, 2.0), WATER, water_colour(canvas))


def paint_lane(canvas: Canvas) -> None:
    """Paint a narrow crooked road."""
    _, across = canvas.axes()
    middle = canvas.rng.uniform(-0.4, 0.4) * min(canvas.size) + 3 * canvas.noise(9)
    canvas.fill(np.abs(across - middle) < 0.8, ROAD, ASPHALT * canvas.rng.uniform(0.8, 1.2))


def annual_crop(canvas: Canvas) -> None:
    """Paint rectangular fields with row lines, parted by tracks."""
    paint_parcels(canvas, rectangles(canvas, 9, 24), [CROP, CROP, CROP, BARE])


def orchard(canvas: Canvas) -> None:
    """Paint rectangular fields planted with a regular grid of dark trees."""
    angle = canvas.rng.uniform(0, np.pi)
    parcels = rectangles(canvas, 12, 28, angle)
    paint_parcels(canvas, parcels, [GRASS, BARE])
    along, across = canvas.axes(angle)
    pitch = canvas.rng.uniform(3.0, 4.2)
    dots = np.cos(2 * np.pi * along / pitch) + np.cos(2 * np.pi * across / pitch)
    planted = canvas.rng.random(parcels.max() + 1)[parcels] < 0.85
    canvas.fill((dots > 0.5) & planted, TREES, canvas.colour * (1 - 0.3 * canvas.relief))


def pasture(canvas: Canvas) -> None:
    """Paint smooth irregular meadows between hedges."""
    parcels, border = polygons(canvas, 18)
    paint_parcels(canvas, parcels, [GRASS])
    paint_trees(canvas, (border < 0.8) & (canvas.noise(3) > -0.6), canvas.colour * (1 - 0.35 * canvas.relief))


def forest(canvas: Canvas) -> None:
    """Paint closed woods with a few clearings."""
    parcels, _ = polygons(canvas, 24)
    paint_parcels(canvas, parcels, [GRASS])
    paint_trees(canvas, canvas.noise(5) < 1.8, gaussian_filter(canvas.colour, (4, 4, 0)))


def town(canvas: Canvas, block: float, street: float, covers: list[int]) -> tuple[Floats, Floats]:
    """Paint open ground crossed by a grid of streets; return its axes (H, W) px."""
    along, across = canvas.axes()
    paint_parcels(canvas, rectangles(canvas, 8, 20), covers)
    paved = canvas.rng.uniform(0.2, 0.7)
    canvas.colour += paved * (ASPHALT * 0.8 - canvas.colour)
    streets = (along % (1.7 * block) < street) | (across % block < street)
    canvas.fill(streets, ROAD, ASPHALT * canvas.rng.uniform(0.75, 1.0))
    return along, across


def roof_colours(canvas: Canvas, roofs: Ints) -> Floats:
    """Draw one roof colour for each number: (H, W, RGB)."""
    count = int(roofs.max()) + 1
    kind = canvas.rng.choice(len(ROOFS), count, p=canvas.rng.dirichlet([2, 2, 2, 1]))
    colour = ROOFS[kind] * canvas.rng.uniform(0.8, 1.15, (count, 1))
    contrast = canvas.rng.uniform(0.4, 1.1)
    blended: Floats = contrast * colour[roofs] + (1 - contrast) * canvas.colour.mean(axis=(0, 1))
    return blended


def residential(canvas: Canvas) -> None:
    """Paint many small houses along a dense grid of streets."""
    block = canvas.rng.uniform(8, 12)
    along, across = town(canvas, block, 1.3, [GRASS])
    pitch_along, pitch_across = canvas.rng.uniform(2.8, 3.6), block / 3
    houses = combine(along // pitch_along, across // pitch_across)
    built = (along % pitch_along < 1.9) & (across % pitch_across < 2.0) & (canvas.cover != ROAD)
    kept = canvas.rng.random(houses.max() + 1)[houses] < 0.85
    canvas.fill(built & kept, BUILT, roof_colours(canvas, houses))


def industrial(canvas: Canvas) -> None:
    """Paint a few large halls between yards and wide roads."""
    along, across = town(canvas, canvas.rng.uniform(26, 40), 2.2, [GRASS, BARE])
    halls = combine(cells(canvas.rng, along, 7, 18), cells(canvas.rng, across, 6, 14))
    gap = maximum_filter(halls, 3) != minimum_filter(halls, 3)
    kept = canvas.rng.random(halls.max() + 1)[halls] < 0.6
    canvas.fill(kept & ~gap & (canvas.cover != ROAD), BUILT, roof_colours(canvas, halls))


def highway(canvas: Canvas) -> None:
    """Paint farmland with a straight wide road, and a junction with a bent one."""
    farmland(canvas)
    colour = ASPHALT * canvas.rng.uniform(0.8, 1.2)
    along, across = canvas.axes()
    across = across + canvas.rng.uniform(-0.25, 0.25) * min(canvas.size)
    canvas.fill(np.abs(across) < canvas.rng.uniform(1.2, 2.0), ROAD, colour)
    radius = canvas.rng.uniform(0.2, 0.6) * min(canvas.size)
    side = canvas.rng.choice([-1, 1])
    ramp = np.abs(np.hypot(along - canvas.rng.uniform(-15, 15), across - side * radius) - radius) < 0.9
    canvas.fill(ramp, ROAD, colour)


def water_colour(canvas: Canvas) -> Floats:
    """Draw a water colour (RGB), from deep blue to turbid green."""
    colour: Floats = DEEP + canvas.rng.uniform(0, 1) * (TURBID - DEEP)
    return colour


def river(canvas: Canvas) -> None:
    """Paint farmland with a winding band of water from edge to edge."""
    farmland(canvas)
    along, across = canvas.axes()
    bend = canvas.rng.uniform(2, 9) * np.sin(
        along / canvas.rng.uniform(7, 14) + canvas.rng.uniform(0, 2 * np.pi)
    )
    width = canvas.rng.uniform(5, 15)
    middle = bend + canvas.rng.uniform(-0.2, 0.2) * min(canvas.size)
    canvas.fill(np.abs(across - middle) < width / 2, WATER, water_colour(canvas))


def lake(canvas: Canvas) -> None:
    """Paint farmland with compact water bodies, as much water as a river's band would hold."""
    farmland(canvas)
    area = canvas.rng.uniform(5, 15) * min(canvas.size)
    along, across = canvas.axes()
    stretch = canvas.rng.uniform(1, 1.6)
    offset = canvas.rng.uniform(-0.2, 0.2, 2) * min(canvas.size)
    distance = np.hypot((along - offset[0]) / stretch, (across - offset[1]) * stretch)
    canvas.fill(distance + 2.0 * canvas.noise(5) < np.sqrt(area / np.pi), WATER, water_colour(canvas))


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    painter.__name__: painter
    for painter in (annual_crop, orchard, pasture, forest, residential, industrial, highway, river, lake)
}


def photograph(canvas: Canvas) -> NDArray[np.uint8]:
    """Return what a sensor makes of a scene: (RGB, H, W).

    Light, thin cloud, haze, colour cast, contrast, blur and noise are drawn anew for each scene.
    """
    rng = canvas.rng
    light = (
        rng.uniform(0.65, 1.25)
        * rng.normal(1, 0.07, 3)
        * (1 + rng.uniform(0, 0.12) * canvas.noise(14))[..., None]
    )
    haze = rng.uniform(0, 0.35)
    image = (1 - haze) * canvas.colour * light + haze * HAZE
    image = 255 * np.clip(image / 255, 0, 1) ** rng.uniform(0.75, 1.35)
    sigma = rng.uniform(0.35, 0.8)
    image = gaussian_filter(image, (sigma, sigma, 0)) + rng.normal(0, rng.uniform(0.8, 6), image.shape)
    return np.moveaxis(np.clip(np.rint(image), 0, 255).astype(np.uint8), -1, 0)


def paint(
    kind: str, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Generate a scene.

    Args:
        kind: A key of `PAINTERS`.
        rng: Source of all randomness: the same generator state gives the same bits.
        size: (H, W) px.

    Returns:
        Image (RGB, H, W) and mask (H, W) of indices into `canvas.COVERS`.
    """
    canvas = Canvas(rng, size)
    PAINTERS[kind](canvas)
    return photograph(canvas), canvas.cover
