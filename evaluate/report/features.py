"""Features as pictures: the three strongest directions of a layer's features become red, green and blue.

Principal components (Pearson, 1901) of all pixels of some tiles, so that the same colour means the same
feature in every tile; each component is stretched between its 2nd and 98th percentile.

Letters: B tiles, C channels, H and W pixels of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from satdifuser.evaluate.report.colours import exact_picture, photo
from satdifuser.evaluate.report.figure import Figure, Grid
from satdifuser.evaluate.report.heat_map import short_name
from satdifuser.evaluate.report.stores import preview, sample_rows
from satdifuser.store.reader import FeatureStore, Indices, Selection

SAMPLED_TILES, SHOWN_TILES = 32, 4
Input = tuple[int, str]
"""One (timestep, layer)."""


def pca_figure(store: FeatureStore, partition: str, inputs: Sequence[Input], command: str) -> Figure:
    """Some layers of some tiles of val in false colours, next to the tiles.

    Args:
        store: The store.
        partition: Which tiles are val.
        inputs: Timesteps and layers to show.
        command: That made the page.
    """
    rows = sample_rows(store, partition, SAMPLED_TILES)
    shown = np.linspace(0, len(rows) - 1, min(SHOWN_TILES, len(rows))).round().astype(int)
    columns, painted, tidy = ["tile"], [], []
    for timestep, layer in inputs:
        colours, shares = pca_colours(maps_of(store, rows, timestep, layer))
        columns.append(f"t {timestep}, {short_name(layer)}")
        painted.append(colours[shown])
        parts = dict(zip(("red", "green", "blue"), map(float, shares), strict=True))
        tidy.append({"timestep": timestep, "layer": layer, **parts})
    body = []
    for i, row in enumerate(rows[shown]):
        name = str(store.tiles.tile_id[row])
        maps = [
            exact_picture(p[i], f"{column}, of tile {name}")
            for column, p in zip(columns[1:], painted, strict=True)
        ]
        body.append((name, [photo(preview(store, row), f"Tile {name}"), *maps]))
    return Figure(
        "What layers see",
        Grid(columns, body),
        "Where two places have the same colour, the layer's features are alike there; where colours differ, "
        "the layer tells them apart. Colours mean the same down a column, and nothing from one column to the "
        f"next. They are the three strongest principal components over {len(rows)} tiles of val; what share "
        "of the variance each of them holds is told under 'Data and command'.",
        command,
        pd.DataFrame(tidy),
        str(store.path),
    )


def maps_of(store: FeatureStore, rows: Indices, timestep: int, layer: str) -> NDArray[np.float32]:
    """Feature maps (B, C, H, W) float32 of one timestep and layer."""
    a = store.attributes
    position = [held.name for held in a.layers].index(layer)
    group = next(name for name, held in store.groups.items() if position in held)
    here = Selection((a.timesteps.index(timestep),), {group: (store.groups[group].index(position),)})
    return store.decode(store.stored(rows, here))[group][:, 0, 0]


@dataclass(frozen=True)
class ColourAxes:
    """How feature maps become colours: up to three directions, and the ends of each."""

    mean: NDArray[np.float64]  # (C,)
    directions: NDArray[np.float64]  # (C, colours)
    low: NDArray[np.float64]  # (colours,) what becomes black …
    high: NDArray[np.float64]  # … and what becomes full
    shares: NDArray[np.float64]  # (3,) of the variance; 0 for colours left over


def axes_of(maps: NDArray[np.floating[Any]]) -> ColourAxes:
    """The three strongest principal components of feature maps (B, C, H, W)."""
    pixels = _pixels(maps)
    mean = pixels.mean(axis=0)
    pixels -= mean
    variances, directions = np.linalg.eigh(pixels.T @ pixels / len(pixels))  # ascending
    best = directions[:, ::-1][:, :3]
    best = best * np.sign(best[np.abs(best).argmax(axis=0), np.arange(best.shape[1])])  # else any sign
    low, high = np.percentile(pixels @ best, [2, 98], axis=0)
    shares = np.zeros(3)
    shares[: best.shape[1]] = variances[::-1][:3] / max(variances.sum(), 1e-12)
    return ColourAxes(mean, best, low, high, shares)


def paint_maps(axes: ColourAxes, maps: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Paint feature maps (B, C, H, W): (B, H, W, 3) uint8; colours left over are black."""
    values = (_pixels(maps) - axes.mean) @ axes.directions
    colours = np.zeros((len(values), 3))
    span = np.maximum(axes.high - axes.low, 1e-12)
    colours[:, : values.shape[1]] = np.clip((values - axes.low) / span, 0, 1)
    batch, _, height, width = maps.shape
    return (255 * colours).round().astype(np.uint8).reshape(batch, height, width, 3)


def _pixels(maps: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    return maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1]).astype(np.float64)


def pca_colours(maps: NDArray[np.floating[Any]]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Paint feature maps by their three strongest principal components.

    Args:
        maps: (B, C, H, W); with fewer than three channels the colours left over are black.

    Returns:
        (B, H, W, 3) uint8, and each colour's share of the variance, (3,).
    """
    axes = axes_of(maps)
    return paint_maps(axes, maps), axes.shares


def telling_inputs(store: FeatureStore, scores: Mapping[Input, float]) -> list[Input]:
    """The timestep and layer of each stride with the highest score, or else its last layer at mid noise.

    Args:
        store: The store.
        scores: What a probe or a fusion found out on train and val.
    """
    steps, chosen = store.attributes.timesteps, []
    for stride in sorted({layer.stride for layer in store.attributes.layers}):
        names = [layer.name for layer in store.attributes.layers if layer.stride == stride]
        here = {key: score for key, score in scores.items() if key[1] in names and key[0] in steps}
        chosen.append(max(here, key=lambda key: here[key]) if here else (steps[len(steps) // 2], names[-1]))
    return chosen
