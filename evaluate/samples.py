"""What linear models see of a store: pooled features of tiles, or features of single pixels for masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from satdifuser.store.encoding import Floats
from satdifuser.store.reader import FeatureStore, Indices

Input = tuple[int, str]
"""One (timestep, layer)."""
PIXELS_PER_TILE = 64
TILES_PER_READ = 16


@dataclass(frozen=True)
class Samples:
    """Features and labels of tiles or pixels."""

    features: dict[Input, Floats]  # (N, C) of each input
    labels: NDArray[np.int64]  # (N,), or (N, classes) zeros and ones

    def joined(self, inputs: list[Input]) -> Floats:
        """Features of several inputs side by side, (N, sum of C)."""
        return np.concatenate([self.features[key] for key in inputs], axis=1)


def gather_samples(store: FeatureStore, rows: Indices, seed: int) -> Samples:
    """Pooled features of some tiles, or for masks those of pixels drawn at random from each tile."""
    if store.attributes.task != "segmentation":
        return Samples(pooled_features(store, rows), np.asarray(store.targets(rows), np.int64))
    return _pixel_samples(store, rows, np.random.default_rng(seed))


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


def _pixel_samples(store: FeatureStore, rows: Indices, generator: np.random.Generator) -> Samples:
    parts: dict[Input, list[Floats]] = {}
    labels: list[NDArray[np.int64]] = []
    for maps, masks in read_tiles(store, rows):
        tile, y, x = _draw_pixels(masks, store.attributes.ignore_value, generator)
        labels.append(masks[tile, y, x].astype(np.int64))
        for group, values in maps.items():  # (B, T, L, C, H, W)
            rows_at = y * values.shape[-2] // masks.shape[1]
            columns_at = x * values.shape[-1] // masks.shape[2]
            for key, (step, place) in input_positions(store, group).items():
                parts.setdefault(key, []).append(values[tile, step, place, :, rows_at, columns_at])
    return Samples({key: np.concatenate(p) for key, p in parts.items()}, np.concatenate(labels))


def _draw_pixels(
    masks: NDArray[np.generic], ignore_value: int, generator: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Draw labelled pixels of each mask (B, H, W); returns their tile, row and column."""
    drawn = []
    for tile, mask in enumerate(masks):
        places = np.flatnonzero(mask != ignore_value)
        count = min(PIXELS_PER_TILE, len(places))
        chosen = generator.choice(places, count, replace=False)
        drawn.append(np.stack([np.full(count, tile), *np.unravel_index(chosen, mask.shape)]))
    tile, y, x = np.concatenate(drawn, axis=1)
    return tile, y, x
