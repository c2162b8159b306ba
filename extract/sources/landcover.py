"""Generated land cover: small scenes as Sentinel-2 would see them at 10 m a pixel, with dense masks.

All kinds of scene share their ground, their two tones, and light, haze and noise; they differ in the shape
and the arrangement of what is on the ground, so that statistics of colour say little about them.
Lengths are in px. Shapes: H and W pixels of the scene.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from satdifuser.extract.sources.canvas import (
    BUILT,
    CROP,
    ROAD,
    TREES,
    WATER,
    Canvas,
    Floats,
    cells,
    combine,
    discs,
    grid_points,
    polygons,
    rectangles,
    scattered_points,
    some,
)

PITCH = 5, 9  # px between rows of crop and between trees, drawn for each scene
SHARE = 0.35, 0.6  # of the ground that crops take, drawn for each scene
CROWN = 0.32, 0.42  # radius of a tree, in pitches
HAZE = np.array([120.0, 132, 150])
DEEP, TURBID = np.array([[34.0, 56, 82], [84, 122, 116]])


def fields(canvas: Canvas) -> None:
    """Paint rectangular fields."""
    canvas.darken(some(canvas, rectangles(canvas, 7, 16), *SHARE), CROP)


def strip_fields(canvas: Canvas) -> None:
    """Paint narrow parallel strips of crop."""
    across = canvas.axes()[1] / canvas.rng.uniform(*PITCH)
    canvas.darken(across % 1 < canvas.rng.uniform(*SHARE), CROP)


def pivot_fields(canvas: Canvas) -> None:
    """Paint round fields, as irrigation from a pivot makes them."""
    pitch = canvas.rng.uniform(12, 22)
    points = grid_points(canvas, pitch)
    kept = canvas.rng.random(len(points)) < 0.85
    canvas.darken(discs(canvas, points[kept], pitch * canvas.rng.uniform(0.4, 0.47)), CROP)


def pasture(canvas: Canvas) -> None:
    """Paint fields of irregular shape."""
    canvas.darken(some(canvas, polygons(canvas, 13), *SHARE), CROP)


def orchard(canvas: Canvas) -> None:
    """Paint trees on a regular grid."""
    pitch = canvas.rng.uniform(*PITCH)
    canvas.darken(discs(canvas, grid_points(canvas, pitch), pitch * canvas.rng.uniform(*CROWN)), TREES)


def savanna(canvas: Canvas) -> None:
    """Paint scattered trees."""
    pitch = canvas.rng.uniform(*PITCH)
    canvas.darken(discs(canvas, scattered_points(canvas, pitch), pitch * canvas.rng.uniform(*CROWN)), TREES)


def forest(canvas: Canvas) -> None:
    """Paint woods with clearings."""
    canvas.darken(canvas.noise(canvas.rng.uniform(1.5, 3)) > canvas.rng.uniform(-0.4, 0.4), TREES)


def town(canvas: Canvas) -> None:
    """Paint houses, lighter or darker than the ground, in blocks between streets."""
    angle = canvas.rng.uniform(0, np.pi)
    along, across = canvas.axes(angle)
    block = canvas.rng.uniform(9, 15)
    canvas.darken((along % (1.6 * block) < 1.7) | (across % block < 1.7), ROAD)
    houses = combine(cells(canvas.rng, along, 3, 7), cells(canvas.rng, across, 3, 6))
    tone = 1 + canvas.contrast * canvas.rng.uniform(-1, 1, houses.max() + 1)[houses]
    built = some(canvas, houses, 0.4, 0.7) & (canvas.cover != ROAD)
    canvas.fill(built, BUILT, canvas.colour * tone[..., None])


def open_country(canvas: Canvas) -> None:
    """Paint what lies around water: fields, pasture or savanna."""
    (fields, pasture, savanna)[canvas.rng.integers(3)](canvas)


def water_colour(canvas: Canvas) -> Floats:
    """Draw a water colour (RGB), from deep blue to turbid green."""
    colour: Floats = DEEP + canvas.rng.uniform(0, 1) * (TURBID - DEEP)
    return colour


def river(canvas: Canvas) -> None:
    """Paint a winding band of water from edge to edge."""
    open_country(canvas)
    along, across = canvas.axes()
    phase = along / canvas.rng.uniform(7, 14) + canvas.rng.uniform(0, 2 * np.pi)
    middle = canvas.rng.uniform(4, 10) * np.sin(phase) + canvas.rng.uniform(-0.15, 0.15) * min(canvas.size)
    canvas.fill(np.abs(across - middle) < canvas.rng.uniform(3.5, 6.5), WATER, water_colour(canvas))


def lake(canvas: Canvas) -> None:
    """Paint a compact body of water, as much of it as a river's band would hold."""
    open_country(canvas)
    area = canvas.rng.uniform(7, 13) * min(canvas.size)
    along, across = canvas.axes()
    stretch = canvas.rng.uniform(1, 1.6)
    offset = canvas.rng.uniform(-0.2, 0.2, 2) * min(canvas.size)
    distance = np.hypot((along - offset[0]) / stretch, (across - offset[1]) * stretch)
    canvas.fill(distance + 2.0 * canvas.noise(5) < np.sqrt(area / np.pi), WATER, water_colour(canvas))


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    painter.__name__: painter
    for painter in (
        fields,
        strip_fields,
        pivot_fields,
        pasture,
        orchard,
        savanna,
        forest,
        town,
        river,
        lake,
    )
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
