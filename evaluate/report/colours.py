"""Colours of the page: classes, shades of numbers, and pictures as data that stand inside it.

The first colours of `palette` are Okabe and Ito's ("Color Universal Design", 2008), told apart by
colour-blind readers; further ones are picked to be far from all others, also in the eyes of a deuteranope
(simulation: Machado et al., "A Physiologically-based Model for Simulation of Color Vision Deficiency",
2009).

Shape letters: H and W pixels, C classes.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from satdifuser.errors import ImageError

OKABE_ITO = [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233)]
OKABE_ITO += [(240, 228, 66)]
DEUTERANOPE = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
IGNORED = (128, 128, 128)
PALE, DEEP = np.array([235, 243, 251]), np.array([8, 48, 107])  # ends of the shades
GLOW = np.array([255, 120, 0])  # what is laid over a tile
GLOW_SHARE = 0.85  # of it at the largest value
LARGEST_PX, SHARP_BELOW_PX = 256, 128
EQUAL_CONTRAST = 0.18  # luminance of a ground on which black and white are read as well (WCAG 2: 4.6 to 1)


@dataclass(frozen=True)
class Picture:
    """A picture inside the page; a `sharp` one is enlarged without smoothing, so that pixels stay squares."""

    uri: str
    alt: str
    label: str = ""
    sharp: bool = False


def photo(rgb: NDArray[np.uint8], alt: str, label: str = "") -> Picture:
    """A tile's (H, W, 3) uint8 image, as JPEG and no larger than a page needs."""
    check_picture(rgb)
    image = Image.fromarray(rgb)
    image.thumbnail((LARGEST_PX, LARGEST_PX), Image.Resampling.LANCZOS)
    return Picture(data_uri(image, "jpeg", quality=88, subsampling=0), alt, label, small(rgb))


def exact_picture(rgb: NDArray[np.uint8], alt: str, label: str = "") -> Picture:
    """A mask or a map as (H, W, 3) uint8, every pixel kept."""
    check_picture(rgb)
    return Picture(data_uri(Image.fromarray(rgb), "png", optimize=True), alt, label, small(rgb))


def small(rgb: NDArray[np.uint8]) -> bool:
    """Whether a picture is enlarged on the page."""
    return bool(max(rgb.shape[:2]) < SHARP_BELOW_PX)


def check_picture(rgb: NDArray[np.uint8]) -> None:
    """Refuse what is no picture.

    Raises:
        ImageError: The array is not (H, W, 3) uint8.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ImageError(f"a picture must be (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """Encode a picture as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def palette(n: int) -> NDArray[np.uint8]:
    """Choose n colours that are easy to tell apart, also for colour-blind readers.

    Args:
        n: Number of colours; the first ones do not depend on it.

    Returns:
        (n, 3) uint8.
    """
    chosen = list(OKABE_ITO[:n])
    steps = np.arange(0, 256, 51)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    taken = np.array([*OKABE_ITO, IGNORED, (0, 0, 0), (255, 255, 255)])
    nearest = colour_distance(candidates, taken).min(axis=1)
    while len(chosen) < n:
        best = candidates[nearest.argmax()]
        chosen.append(tuple(best.tolist()))
        nearest = np.minimum(nearest, colour_distance(candidates, best[None])[:, 0])
    return np.array(chosen, np.uint8).reshape(-1, 3)


def colour_distance(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """(A, 3) and (B, 3) colours -> (A, B) distances, the smaller of normal and deuteranope sight."""
    apart = (first[:, None] - second[None]).astype(np.float64)
    sights = [np.linalg.norm(apart, axis=-1), np.linalg.norm(apart @ DEUTERANOPE.T, axis=-1)]
    distance: NDArray[np.float64] = np.minimum(*sights)
    return distance


def colour_mask(
    mask: NDArray[np.integer[Any]], colours: NDArray[np.uint8], ignore_value: int | None = None
) -> NDArray[np.uint8]:
    """Paint a mask of class numbers.

    Args:
        mask: (H, W) class numbers.
        colours: (C, 3) uint8, one colour per class.
        ignore_value: Number of places without a label; they become grey.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: The mask holds a number without a colour.
    """
    ignored = np.zeros(mask.shape, bool) if ignore_value is None else mask == ignore_value
    strange = mask[~ignored & ((mask < 0) | (mask >= len(colours)))]
    if strange.size:
        raise ImageError(f"the mask holds the class {strange[0]}, but there are {len(colours)} classes")
    picture = colours[np.where(ignored, 0, mask)]
    picture[ignored] = IGNORED
    return picture


def glow_over(rgb: NDArray[np.uint8], shares: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Lay a map over a tile: orange where it is large, the tile in grey where it is 0.

    Args:
        rgb: (H, W, 3) uint8.
        shares: (h, w) values from 0 to 1, enlarged to the tile without smoothing.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = rgb.shape[:2]
    rows = np.arange(height) * shares.shape[0] // height
    columns = np.arange(width) * shares.shape[1] // width
    strength = GLOW_SHARE * shares[rows][:, columns, None]
    grey = rgb.mean(axis=2, keepdims=True)
    mixed: NDArray[np.uint8] = (grey * (1 - strength) + GLOW * strength).astype(np.uint8)
    return mixed


def shade(share: float) -> tuple[str, str]:
    """Background of a number from 0 (pale) to 1 (deep), and the ink that is read best on it, as CSS."""
    colour = (PALE + (DEEP - PALE) * share).astype(int)
    ink = "#000000" if luminance(colour) > EQUAL_CONTRAST else "#ffffff"
    return f"rgb({','.join(map(str, colour))})", ink


def luminance(colour: NDArray[Any]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    part = colour / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
