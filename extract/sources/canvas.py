"""A canvas for generated land cover: coordinates, noise, parcels and the textures of each cover.

Lengths are in px. Shapes: H and W pixels of the scene, N parcels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree

COVERS = ("crop", "trees", "grass", "built", "road", "water", "bare")
CROP, TREES, GRASS, BUILT, ROAD, WATER, BARE = range(len(COVERS))

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

# Colours are 8-bit RGB, picked by eye from Sentinel-2 true colour.
LUSH, DRY, SOIL = np.array([[52.0, 88, 74], [168, 142, 118], [112, 96, 94]])


class Canvas:
    """A scene while it is painted: one colour and one cover for each pixel.

    Args:
        rng: Source of all randomness of the scene.
        size: (H, W) px.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng = rng
        self.size = size
        rows, cols = np.indices(size, dtype=np.float64)
        self.y, self.x = rows - size[0] / 2, cols - size[1] / 2
        self.cover = np.full(size, GRASS, np.uint8)  # (H, W)
        self.colour = np.zeros((*size, 3))  # (H, W, RGB)
        self.wetness = rng.uniform(0, 1)  # how far this scene's vegetation is from dry to lush
        self.variety = rng.uniform(0.05, 0.35)  # how much its parcels differ in colour
        self.relief = rng.uniform(0.4, 1.6)  # how strong its textures are

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

    def field_colours(self, count: int) -> Floats:
        """Draw colours (N, RGB) between lush, dry and soil, the same for all kinds of vegetation."""
        lush = np.clip(self.rng.normal(self.wetness, self.variety, (count, 1)), 0, 1)
        soil = np.clip(self.rng.normal(0.4, self.variety, (count, 1)), 0, 1)
        colours: Floats = lush * LUSH + (1 - lush) * ((1 - soil) * DRY + soil * SOIL)
        return colours

    def fill(self, where: Bools, cover: int, colour: Floats) -> None:
        """Paint pixels with a cover and a colour (RGB), or one colour per pixel (H, W, RGB)."""
        self.cover[where] = cover
        self.colour[where] = np.broadcast_to(colour, self.colour.shape)[where]

    def shade(self, texture: Floats) -> None:
        """Brighten or darken all pixels by shares (H, W) of their colour, as strong as the scene's relief."""
        self.colour *= 1 + self.relief * texture[..., None]


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


def polygons(canvas: Canvas, spacing: float) -> tuple[Ints, Floats]:
    """Number irregular parcels (H, W) around random points; also how near (px) pixels are to a border."""
    count = max(int(canvas.x.size / spacing**2), 2)
    points = canvas.rng.uniform(-0.6, 0.6, (count, 2)) * canvas.size
    wobble = 2.5 * canvas.noise(6)
    pixels = np.stack([canvas.y + wobble, canvas.x - wobble], axis=-1)
    distance, nearest = map(np.asarray, KDTree(points).query(pixels, k=2))  # both (H, W, 2)
    return nearest[..., 0], (distance[..., 1] - distance[..., 0]) / 2


def paint_parcels(canvas: Canvas, parcels: Ints, covers: list[int]) -> None:
    """Give each parcel a cover, a colour and its cover's texture: crop rows, smooth grass, rough soil."""
    count = int(parcels.max()) + 1
    canvas.cover[:] = canvas.rng.choice(covers, count)[parcels]
    canvas.colour[:] = canvas.field_colours(count)[parcels]
    canvas.shade(0.05 * canvas.noise(5))
    angle = canvas.rng.uniform(0, np.pi, count)[parcels]
    period = canvas.rng.uniform(2.6, 4.5, count)[parcels]
    rows = np.sin(2 * np.pi / period * (canvas.x * np.cos(angle) + canvas.y * np.sin(angle)))
    canvas.shade(np.where(canvas.cover == CROP, 0.11 * rows, 0.0))
    canvas.shade(np.where(canvas.cover == BARE, 0.06 * canvas.noise(0.7), 0.0))


def paint_trees(canvas: Canvas, where: Bools, colour: Floats) -> None:
    """Paint woods: crowns lit from one side, with their shadows."""
    crowns = canvas.noise(canvas.rng.uniform(0.8, 1.3))
    lit = crowns - np.roll(crowns, (1, 1), axis=(0, 1))
    canvas.fill(where, TREES, colour * (1 + canvas.relief * 0.11 * lit)[..., None])
