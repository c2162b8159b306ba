"""Feeds feature maps from a store to a network: resident in memory where they fit, else read per batch.

Stored bytes travel to the network's device, and are decoded and standardised there.

Legend: B tiles, T timesteps, L layers of a group, C channels, H and W feature pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from satdifuser.errors import RunError, SettingsError
from satdifuser.fuse.fusion import FeatureMaps
from satdifuser.fuse.inputs import Inputs, Statistics, named_inputs
from satdifuser.fuse.settings import TrainingSettings
from satdifuser.store.batches import BatchReader
from satdifuser.store.device import choose_device
from satdifuser.store.encoding import Floats
from satdifuser.store.few_labels import Budget, class_presence, draw_labelled
from satdifuser.store.layout import UNLABELLED
from satdifuser.store.reader import FeatureStore, Indices, Stored
from satdifuser.store.schema import LayerInfo, group_layers

STATISTICS_TILES = 256
DRAW_SEED = 0  # few labels: every seed of a training, and every probe, learns from the same draws
LOADED_AT_ONCE = 64  # tiles on their way to the device
GPU_SHARE = 0.25  # of its free memory, for the features of a split; what trains needs the rest
Tensors = dict[str, dict[str, Tensor]]
"""Group name to array name to (B, T, L, …), as kept; see `satdifuser.store.reader.Stored`."""


class MapLoader:
    """Batches of feature maps and targets of some tiles, standardised if statistics are given.

    Stored bytes stay on the device where they fit `device_memory_gb`, or else in memory where they fit
    `memory_gb`, so that every epoch after the first reads nothing; the batches are the same each way.

    Args:
        store: The store.
        rows: The rows of the tiles.
        settings: The two budgets.
        device: Where the network is.
        inputs: Which timesteps and layers; None for all.
    """

    def __init__(
        self,
        store: FeatureStore,
        rows: Indices,
        settings: TrainingSettings,
        device: torch.device,
        inputs: Inputs | None = None,
    ) -> None:
        self.store, self.rows, self.device = store, rows, device
        self.inputs = inputs or named_inputs(store, None, ["*"])
        self._targets = store.targets(rows)
        selection = self.inputs.selection
        size = store.stored_bytes_per_tile(selection) * len(rows)
        self._held = self._load() if size <= device_budget(settings, device) else None
        budget = 0 if self._held else settings.memory_gb * 1e9
        self._reader = BatchReader(store, rows, selection, budget)

    def _load(self) -> Tensors:
        """All stored arrays on the device, a few tiles at a time."""
        held: Tensors = {}
        for start in range(0, len(self.rows), LOADED_AT_ONCE):
            rows = self.rows[start : start + LOADED_AT_ONCE]
            part = to_tensors(self.store.stored(rows, self.inputs.selection), self.device)
            held = held or self._room_for(part)
            for group, arrays in part.items():
                for name, array in arrays.items():
                    held[group][name][start : start + len(array)] = array
        return held

    def _room_for(self, part: Tensors) -> Tensors:
        """Empty arrays of all tiles, otherwise like those of a few."""
        return {
            group: {name: array.new_empty(len(self.rows), *array.shape[1:]) for name, array in arrays.items()}
            for group, arrays in part.items()
        }

    def batches(
        self, order: NDArray[np.intp], batch_size: int, statistics: Statistics | None
    ) -> Iterator[tuple[FeatureMaps, Tensor | None, NDArray[np.intp]]]:
        """Yield (maps, targets, positions) over an order of positions 0 … N-1 of `rows`."""
        parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        standard = None if statistics is None else Standard(statistics, self.device)
        layers = self.store.attributes.layers
        for chosen, stored in zip(parts, self._stored(parts), strict=True):
            maps = as_feature_maps(layers, decode(layers, stored), standard, self.inputs)
            targets = None if self._targets is None else torch.from_numpy(self._targets[chosen]).long()
            yield maps, targets, chosen

    def labelled_batches(
        self, order: NDArray[np.intp], batch_size: int, statistics: Statistics | None
    ) -> Iterator[tuple[FeatureMaps, Tensor]]:
        """The same with targets, of a store that holds some.

        Raises:
            SettingsError: it holds none.
        """
        for maps, targets, _ in self.batches(order, batch_size, statistics):
            if targets is None:
                raise SettingsError(f"{self.store.path}: holds no targets; extract from a source with labels")
            yield maps, targets

    def _stored(self, parts: Sequence[Indices]) -> Iterator[Tensors]:
        """The stored arrays of one list of positions after the other, on the device."""
        if self._held is None:
            yield from (to_tensors(stored, self.device) for stored in self._reader.batches(parts))
            return
        for part in parts:
            chosen = torch.from_numpy(part).to(self.device)
            yield {g: {name: array[chosen] for name, array in held.items()} for g, held in self._held.items()}

    def _read(self, chosen: Indices) -> Stored:
        """The stored arrays of some positions in the CPU's memory."""
        if self._held is None:
            return self._reader.read(chosen)
        rows = torch.from_numpy(chosen).to(self.device)
        return {
            g: {name: a[rows].cpu().numpy() for name, a in held.items()} for g, held in self._held.items()
        }

    def statistics(self) -> Statistics:
        """Mean and spread of every timestep, layer and channel over evenly spaced tiles."""
        chosen = np.linspace(0, len(self.rows) - 1, min(len(self.rows), STATISTICS_TILES)).astype(np.intp)
        totals: dict[str, list[NDArray[np.float64]]] = {}
        for part in np.array_split(chosen, -(-len(chosen) // 16)):
            for group, maps in self.store.decode(self._read(part)).items():
                wide = maps.astype(np.float64)
                sums = [wide.sum(axis=(0, -2, -1)), np.square(wide).sum(axis=(0, -2, -1))]
                totals[group] = [a + b for a, b in zip(totals.get(group, (0.0, 0.0)), sums, strict=True)]
        tables = {g: self.store.attributes.layers[self.store.groups[g][0]] for g in totals}
        pixels = {group: len(chosen) * layer.height * layer.width for group, layer in tables.items()}
        return {g: _mean_and_spread(a, b, pixels[g]) for g, (a, b) in totals.items()}


def device_budget(settings: TrainingSettings, device: torch.device) -> float:
    """Bytes of a device's memory that the features of a split may take.

    Args:
        settings: ``device_memory_gb``; ``auto`` is a part of what is free on a GPU, and nothing on a CPU, for
            which there is ``memory_gb``.
        device: Where the network is.
    """
    if settings.device_memory_gb != "auto":
        return settings.device_memory_gb * 1e9
    return GPU_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0


class TrainingData:
    """The tiles that trainings of one store and partition read, each loaded when it is first asked for.

    Args:
        store: A complete store with targets.
        settings: Its partition, and the memory for stored features of each split.
        inputs: The timesteps and layers that any of the trainings sees; None for all.
    """

    def __init__(self, store: FeatureStore, settings: TrainingSettings, inputs: Inputs | None = None) -> None:
        self.store, self.settings = store, settings
        self.inputs = inputs or named_inputs(store, None, ["*"])

    @cached_property
    def train(self) -> MapLoader:
        """The tiles to learn from."""
        return self._load("train")

    @cached_property
    def val(self) -> MapLoader:
        """The tiles to choose an epoch by."""
        return self._load("val")

    @cached_property
    def statistics(self) -> Statistics | None:
        """Mean and spread of the features to learn from; None where they are taken as they are."""
        return self.train.statistics() if self.settings.normalise else None

    def training_positions(self, budget: Budget, draw: int) -> Indices:
        """Positions in `train` of the tiles whose labels may be used.

        Raises:
            SettingsError: a class has too few tiles for the budget.
            StoreError: the tiles have one class only, or none.
        """
        rows = self.train.rows
        return np.flatnonzero(np.isin(rows, draw_labelled(self.store, rows, budget, DRAW_SEED, draw)))

    def unseen_classes(self, positions: Indices) -> list[str]:
        """Classes of val that none of some training tiles has."""
        seen = class_presence(self.store, self.train.rows[positions]).any(axis=0)
        wanted = class_presence(self.store, self.val.rows).any(axis=0)
        return [str(self.store.attributes.classes[c]) for c in np.flatnonzero(wanted & ~seen)]

    def _load(self, split: str) -> MapLoader:
        rows = labelled(self.store, split, self.settings.partition)
        return MapLoader(
            self.store, rows, self.settings, choose_device(self.settings.device, "fit.device"), self.inputs
        )


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


def _mean_and_spread(
    total: NDArray[np.float64], squares: NDArray[np.float64], count: int
) -> tuple[Floats, Floats]:
    mean = total / count
    spread = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return mean.astype(np.float32), spread.astype(np.float32)


class Standard:
    """Statistics as tensors on a device."""

    def __init__(self, statistics: Statistics, device: torch.device) -> None:
        self._by_group = {
            group: [torch.from_numpy(values)[..., None, None].to(device) for values in pair]
            for group, pair in statistics.items()
        }

    def apply(self, group: str, maps: Tensor) -> Tensor:
        """Standardise the maps (B, T, L, C, H, W) of a group in place."""
        mean, spread = self._by_group[group]
        return maps.sub_(mean).div_(spread)


def to_tensors(stored: Stored, device: torch.device) -> Tensors:
    """Stored arrays as tensors on a device; on the CPU they share the arrays' memory."""
    return {
        group: {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        for group, arrays in stored.items()
    }


def decode(layers: Sequence[LayerInfo], stored: Tensors) -> dict[str, Tensor]:
    """Decode stored arrays as `satdifuser.store.encoding.decode` does.

    Args:
        layers: The table of the store's layers.
        stored: Its arrays.

    Returns:
        Group to (B, T, L, C, H, W) float32, in memory of its own.
    """
    groups = group_layers(layers)
    return {g: _decode(arrays, layers[groups[g][0]].width) for g, arrays in stored.items()}


def _decode(arrays: Mapping[str, Tensor], width: int) -> Tensor:
    values = arrays["values"]
    if values.dtype == torch.uint8:  # two values in a byte
        values = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)[..., :width]
    maps = values.to(torch.float32, copy=True)
    if "scale" in arrays:
        maps.mul_(arrays["scale"][..., None, None])
    if "offset" in arrays:
        maps.add_(arrays["offset"][..., None, None])
    return maps


def as_feature_maps(
    layers: Sequence[LayerInfo], maps: dict[str, Tensor], standard: Standard | None, inputs: Inputs
) -> FeatureMaps:
    """Lay out decoded groups as stride -> one (B, T, C, H, W) tensor per layer, in table order.

    Args:
        layers: The table of the store's layers.
        maps: Those of the inputs, by group.
        standard: Standardises them in place; None leaves them.
        inputs: The timesteps and layers that were read.
    """
    groups, by_name = group_layers(layers), dict[str, Tensor]()
    for group, held in inputs.selection.layers.items():
        values = maps[group] if standard is None else standard.apply(group, maps[group])
        for i, place in enumerate(held):
            by_name[layers[groups[group][place]].name] = values[:, :, i]
    return {s: [by_name[layer.name] for layer in held] for s, held in inputs.by_stride.items()}
