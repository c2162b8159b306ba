"""What linear models see of a store: pooled features of tiles, or features of single pixels for masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from satdifuser.evaluate.metrics import (
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    segmentation_metrics,
)
from satdifuser.fuse.train import MAIN_METRIC
from satdifuser.store.encoding import Floats
from satdifuser.store.reader import FeatureStore, Indices

Input = tuple[int, str]
"""One (timestep, layer)."""
PIXELS_PER_TILE = 64
PIXEL_BYTES = 2 * 10**9  # of features of all drawn pixels, at most
TILES_PER_READ = 16


@dataclass(frozen=True)
class Samples:
    """Features and labels of tiles or pixels."""

    features: dict[Input, Floats]  # (N, C) of each input
    labels: NDArray[np.int64]  # (N,), or (N, classes) zeros and ones
    rows: Indices  # (N,) of the tiles in the store

    def joined(self, inputs: Sequence[Input], places: Indices | None = None) -> Floats:
        """Features of several inputs side by side, (N, sum of C), or only those at some places."""
        parts = (self.features[key] for key in inputs)
        return np.concatenate([part if places is None else part[places] for part in parts], axis=1)

    def places(self, rows: Indices) -> Indices:
        """Where the tiles or pixels of some rows of the store are."""
        return np.flatnonzero(np.isin(self.rows, rows))


def gather_samples(
    store: FeatureStore, rows: Indices, seed: int, pixels: int | Literal["auto"] = "auto"
) -> Samples:
    """Pooled features of some tiles, or for masks those of pixels drawn at random from each tile.

    Args:
        store: A store with targets.
        rows: The tiles.
        seed: Of the draw of pixels; which are drawn from a tile depends on the tile alone.
        pixels: Of each tile; auto: 64, or fewer where their features would take more than 2 GB.
    """
    if store.attributes.task != "segmentation":
        targets = np.asarray(store.targets(rows), np.int64)
        return Samples(pooled_features(store, rows), targets, rows)
    return _pixel_samples(
        store, rows, seed, pixels_per_tile(store, len(rows)) if pixels == "auto" else pixels
    )


def score_samples(task: str, labels: NDArray[np.int64], probabilities: NDArray[np.float32]) -> float:
    """The metric that choices are made by, of (N, classes) probabilities; for masks over the drawn pixels."""
    if task != "segmentation":
        measure = multilabel_metrics if task == "multilabel" else classification_metrics
        return measure(labels, probabilities)[MAIN_METRIC[task]]
    confusion = confusion_matrix(labels, probabilities.argmax(1), probabilities.shape[1])
    return segmentation_metrics(confusion)[MAIN_METRIC[task]]


def pixels_per_tile(store: FeatureStore, tiles: int) -> int:
    """As many pixels of each tile as fit into memory, at most 64."""
    layers, steps = store.attributes.layers, len(store.attributes.timesteps)
    per_pixel = 4 * steps * sum(layer.channels for layer in layers)
    return max(1, min(PIXELS_PER_TILE, PIXEL_BYTES // (per_pixel * tiles)))


def pooled_features(store: FeatureStore, rows: Indices) -> dict[Input, Floats]:
    """Each input's pooled features (N, C) of some rows."""
    features: dict[Input, Floats] = {}
    for group in store.groups:
        block = store.pooled_group(group, rows)  # (N, T, L, C)
        for (t, layer), (step, place) in input_positions(store, group).items():
            features[t, layer] = block[:, step, place]
    return features


def input_positions(store: FeatureStore, group: str) -> dict[Input, tuple[int, int]]:
    """Where each input of a group lies in its arrays: positions along timestep and layer."""
    a = store.attributes
    return {
        (t, a.layers[p].name): (step, place)
        for place, p in enumerate(store.groups[group])
        for step, t in enumerate(a.timesteps)
    }


def read_tiles(store: FeatureStore, rows: Indices) -> Iterator[tuple[dict[str, Floats], NDArray[np.generic]]]:
    """Read feature maps and targets of some rows, a few tiles at a time."""
    for start in range(0, len(rows), TILES_PER_READ):
        chosen = rows[start : start + TILES_PER_READ]
        yield store.maps(chosen), np.asarray(store.targets(chosen))


def _pixel_samples(store: FeatureStore, rows: Indices, seed: int, pixels: int) -> Samples:
    parts: dict[Input, list[Floats]] = {}
    labels: list[NDArray[np.int64]] = []
    tiles: list[Indices] = []
    for number, (maps, masks) in enumerate(read_tiles(store, rows)):
        here = rows[number * TILES_PER_READ :][: len(masks)]
        tile, y, x = _draw_pixels(masks, here, store.attributes.ignore_value, seed, pixels)
        labels.append(masks[tile, y, x].astype(np.int64))
        tiles.append(here[tile])
        for group, values in maps.items():  # (B, T, L, C, H, W)
            rows_at = y * values.shape[-2] // masks.shape[1]
            columns_at = x * values.shape[-1] // masks.shape[2]
            for key, (step, place) in input_positions(store, group).items():
                parts.setdefault(key, []).append(values[tile, step, place, :, rows_at, columns_at])
    features = {key: np.concatenate(p) for key, p in parts.items()}
    return Samples(features, np.concatenate(labels), np.concatenate(tiles))


def _draw_pixels(
    masks: NDArray[np.generic], rows: Indices, ignore_value: int, seed: int, pixels: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Draw labelled pixels of each mask (B, H, W); returns their tile, row and column."""
    drawn = []
    for tile, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        places = np.flatnonzero(mask != ignore_value)
        count = min(pixels, len(places))
        chosen = np.random.default_rng([seed, int(row)]).choice(places, count, replace=False)
        drawn.append(np.stack([np.full(count, tile), *np.unravel_index(chosen, mask.shape)]))
    tile, y, x = np.concatenate(drawn, axis=1)
    return tile, y, x
