"""Feeds feature maps from a store to a network: resident in memory where they fit, else read per batch.

Legend: B tiles, T timesteps, L layers of a group, C channels, H and W feature pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from satdifuser.errors import RunError
from satdifuser.fuse.fusion import FeatureMaps
from satdifuser.fuse.settings import FitSettings
from satdifuser.store.batches import BatchReader
from satdifuser.store.encoding import Floats
from satdifuser.store.layout import UNLABELLED
from satdifuser.store.reader import FeatureStore, Indices

STATISTICS_TILES = 256


class MapLoader:
    """Batches of feature maps and targets of some tiles, standardised if statistics are given.

    Stored bytes stay in memory where the selection fits `budget_bytes`, so that every epoch after the
    first reads nothing; the batches are the same either way.
    """

    def __init__(self, store: FeatureStore, rows: Indices, budget_bytes: float) -> None:
        self.store = store
        self.rows = rows
        self._targets = store.targets(rows)
        self._reader = BatchReader(store, rows, budget_bytes=budget_bytes)

    def batches(
        self, order: NDArray[np.intp], batch_size: int, statistics: Statistics | None
    ) -> Iterator[tuple[FeatureMaps, Tensor | None, NDArray[np.intp]]]:
        """Yield (maps, targets, positions) over an order of positions 0 … N-1 of `rows`."""
        parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for chosen, stored in zip(parts, self._reader.batches(parts), strict=True):
            maps = as_feature_maps(self.store, self.store.decode(stored), statistics)
            targets = None if self._targets is None else torch.from_numpy(self._targets[chosen]).long()
            yield maps, targets, chosen

    def statistics(self) -> Statistics:
        """Mean and spread of every timestep, layer and channel over evenly spaced tiles."""
        chosen = np.linspace(0, len(self.rows) - 1, min(len(self.rows), STATISTICS_TILES)).astype(np.intp)
        totals: dict[str, list[NDArray[np.float64]]] = {}
        for part in np.array_split(chosen, -(-len(chosen) // 16)):
            for group, maps in self.store.decode(self._reader.read(part)).items():
                wide = maps.astype(np.float64)
                sums = [wide.sum(axis=(0, -2, -1)), np.square(wide).sum(axis=(0, -2, -1))]
                totals[group] = [a + b for a, b in zip(totals.get(group, (0.0, 0.0)), sums, strict=True)]
        pixels = {
            group: len(chosen)
            * self.store.attributes.layers[held[0]].height
            * self.store.attributes.layers[held[0]].width
            for group, held in self.store.groups.items()
        }
        return {g: _mean_and_spread(a, b, pixels[g]) for g, (a, b) in totals.items()}


class TrainingData:
    """The tiles that trainings of one store and partition read, each loaded when it is first asked for.

    Args:
        store: A complete store with targets.
        settings: Its partition, and the memory for stored features of each split.
    """

    def __init__(self, store: FeatureStore, settings: FitSettings) -> None:
        self.store, self.settings = store, settings

    @cached_property
    def train(self) -> MapLoader:
        """The tiles to learn from."""
        return self._load("train")

    @cached_property
    def val(self) -> MapLoader:
        """The tiles to choose an epoch by."""
        return self._load("val")

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and spread of the features to learn from."""
        return self.train.statistics()

    def _load(self, split: str) -> MapLoader:
        rows = labelled(self.store, split, self.settings.partition)
        return MapLoader(self.store, rows, self.settings.memory_gb * 1e9)


def labelled(store: FeatureStore, split: str, partition: str = "auto") -> Indices:
    """Rows of a split of a partition that carry a label.

    Raises:
        SettingsError: the store does not hold the partition.
        StoreError: the split holds no tile.
        RunError: none of its tiles has a label.
    """
    rows, task = store.select(split, partition), store.attributes.task
    if task not in UNLABELLED:
        return rows
    labels = np.asarray(store.targets(rows)).reshape(len(rows), -1)  # a multilabel tile has all or none
    kept: Indices = rows[labels[:, 0] != UNLABELLED[task]]
    if not len(kept):
        raise RunError(f"{store.path}: no tile of split {split!r} has a label")
    return kept


Statistics = dict[str, tuple[Floats, Floats]]
"""Group name to mean and standard deviation, each (T, L, C) float32."""


def _mean_and_spread(
    total: NDArray[np.float64], squares: NDArray[np.float64], count: int
) -> tuple[Floats, Floats]:
    mean = total / count
    spread = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return mean.astype(np.float32), spread.astype(np.float32)


def as_feature_maps(
    store: FeatureStore, maps: dict[str, Floats], statistics: Statistics | None
) -> FeatureMaps:
    """Lay out decoded groups as stride -> one (B, T, C, H, W) tensor per layer, in table order."""
    by_position: dict[int, Tensor] = {}
    for group, held in store.groups.items():
        values = maps[group]  # (B, T, L, C, H, W)
        if statistics is not None:
            mean, spread = statistics[group]
            values = (values - mean[..., None, None]) / spread[..., None, None]
        for i, position in enumerate(held):
            by_position[position] = torch.from_numpy(values[:, :, i])
    layers = store.attributes.layers
    strides = sorted({layer.stride for layer in layers})
    return {s: [by_position[p] for p, layer in enumerate(layers) if layer.stride == s] for s in strides}


def channels_by_stride(store: FeatureStore) -> dict[int, list[int]]:
    """Stride -> the width of each layer, in table order, finest first."""
    layers = store.attributes.layers
    strides: Sequence[int] = sorted({layer.stride for layer in layers})
    return {s: [layer.channels for layer in layers if layer.stride == s] for s in strides}
