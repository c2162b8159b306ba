"""A canvas for generated land cover: coordinates, noise, parcels, dots, and two tones to paint them with.

Lengths are in px. Shapes: H and W pixels of the scene, N parcels or points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree

COVERS = ("crop", "trees", "grass", "built", "road", "water")
CROP, TREES, GRASS, BUILT, ROAD, WATER = range(len(COVERS))

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

# Colours are 8-bit RGB, picked by eye from Sentinel-2 true colour.
LUSH, DRY, SOIL = np.array([[52.0, 88, 74], [168, 142, 118], [112, 96, 94]])


class Canvas:
    """A scene while it is painted: one colour and one cover for each pixel, at first soft grassland.

    Args:
        rng: Source of all randomness of the scene.
        size: (H, W) px.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng = rng
        self.size = size
        rows, cols = np.indices(size, dtype=np.float64)
        self.y, self.x = rows - size[0] / 2, cols - size[1] / 2
        self.contrast = rng.uniform(0.2, 0.5)  # between the two tones of the scene
        self.cover = np.full(size, GRASS, np.uint8)  # (H, W)
        self.colour = self.grassland()  # (H, W, RGB)

    def grassland(self) -> Floats:
        """Draw parcels between lush, dry and bare soil: (H, W, RGB), the same for every kind of scene."""
        parcels = polygons(self, 22)
        count = parcels.max() + 1
        variety = self.rng.uniform(0.05, 0.35)
        lush = np.clip(self.rng.normal(self.rng.uniform(0, 1), variety, (count, 1)), 0, 1)
        soil = np.clip(self.rng.normal(0.4, variety, (count, 1)), 0, 1)
        colours = lush * LUSH + (1 - lush) * ((1 - soil) * DRY + soil * SOIL)
        shade = 1 + self.rng.uniform(0.02, 0.08) * self.noise(5)
        shaded: Floats = colours[parcels] * shade[..., None]
        return shaded

    def axes(self, angle: float | None = None) -> tuple[Floats, Floats]:
        """Return coordinates (H, W) px along and across a direction, random unless given."""
        angle = self.rng.uniform(0, np.pi) if angle is None else angle
        along = self.x * np.cos(angle) + self.y * np.sin(angle)
        return along, self.y * np.cos(angle) - self.x * np.sin(angle)

    def noise(self, sigma: float) -> Floats:
        """Return (H, W) noise, smooth over ``sigma`` px, of zero mean and unit deviation."""
        smooth = gaussian_filter(self.rng.standard_normal(self.size), sigma, mode="wrap")
        unit: Floats = (smooth - smooth.mean()) / (smooth.std() + 1e-9)
        return unit

    def fill(self, where: Bools, cover: int, colour: Floats) -> None:
        """Paint pixels with a cover and a colour (RGB), or one colour per pixel (H, W, RGB)."""
        self.cover[where] = cover
        self.colour[where] = np.broadcast_to(colour, self.colour.shape)[where]

    def darken(self, where: Bools, cover: int) -> None:
        """Give pixels a cover and the darker tone of what lies there."""
        self.fill(where, cover, self.colour * (1 - self.contrast))


def cells(rng: np.random.Generator, position: Floats, low: float, high: float) -> Ints:
    """Number the intervals of random length, ``low`` to ``high`` px, that positions (H, W) fall into."""
    start, stop = position.min() - high, position.max() + high
    cuts = start + np.cumsum(rng.uniform(low, high, int((stop - start) / low) + 1))
    return np.searchsorted(cuts, position)


def combine(first: NDArray[np.generic], second: NDArray[np.generic]) -> Ints:
    """Number the distinct pairs of two (H, W) arrays from 0."""
    rank = np.unique(second, return_inverse=True)[1].reshape(second.shape)
    both = np.unique(first, return_inverse=True)[1].reshape(first.shape) * (rank.max() + 1) + rank
    return np.unique(both, return_inverse=True)[1].reshape(both.shape)


def rectangles(canvas: Canvas, low: float, high: float, angle: float | None = None) -> Ints:
    """Number the rectangular parcels (H, W) of a landscape, in strips along a direction."""
    along, across = canvas.axes(angle)
    strip = cells(canvas.rng, across, low, high)
    shift = canvas.rng.uniform(0, high, strip.max() + 1)[strip]
    return combine(strip, cells(canvas.rng, along + shift, low, 1.6 * high))


def polygons(canvas: Canvas, spacing: float) -> Ints:
    """Number irregular parcels (H, W) around random points."""
    count = max(int(canvas.x.size / spacing**2), 2)
    points = canvas.rng.uniform(-0.6, 0.6, (count, 2)) * canvas.size
    wobble = 2.5 * canvas.noise(6)
    pixels = np.stack([canvas.y + wobble, canvas.x - wobble], axis=-1)
    return np.asarray(KDTree(points).query(pixels)[1], np.int64)


def some(canvas: Canvas, parcels: Ints, low: float, high: float) -> Bools:
    """Pick a share of numbered parcels, drawn between ``low`` and ``high``: (H, W)."""
    picked = canvas.rng.random(parcels.max() + 1) < canvas.rng.uniform(low, high)
    where: Bools = picked[parcels]
    return where


def grid_points(canvas: Canvas, pitch: float) -> Floats:
    """Lay points (N, 2: y, x) on a square grid in a random direction, some way beyond the scene."""
    reach = np.hypot(*canvas.size) / 2 + pitch
    ticks = np.arange(-reach, reach, pitch)
    grid = np.stack([axis.ravel() for axis in np.meshgrid(ticks, ticks)], axis=-1)
    angle = canvas.rng.uniform(0, np.pi / 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points: Floats = (grid + canvas.rng.uniform(0, pitch, 2)) @ turn
    return points


def scattered_points(canvas: Canvas, pitch: float) -> Floats:
    """Scatter points (N, 2: y, x) at random, as many as a grid of that pitch would hold."""
    count = max(int(canvas.x.size * 1.69 / pitch**2), 1)
    return canvas.rng.uniform(-0.65, 0.65, (count, 2)) * canvas.size


def discs(canvas: Canvas, points: Floats, radius: float) -> Bools:
    """Mark the pixels (H, W) within a radius of any point."""
    distance = KDTree(points).query(np.stack([canvas.y, canvas.x], axis=-1))[0]
    return np.asarray(distance) < radius
