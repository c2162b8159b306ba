"""Which timesteps and layers of a store a network sees; several networks may look at one reading of more.

Legend: B tiles, T timesteps, L layers of a group, C channels, H and W feature pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from satdifuser.fuse.fusion import FeatureMaps
from satdifuser.fuse.settings import FitSettings
from satdifuser.store.encoding import Floats
from satdifuser.store.reader import FeatureStore, Selection
from satdifuser.store.schema import LayerInfo, group_layers

Statistics = dict[str, tuple[Floats, Floats]]
"""Group name to mean and standard deviation, each (T, L, C) float32."""


@dataclass(frozen=True)
class Inputs:
    """Some timesteps and layers of a store.

    Args:
        timesteps: Ascending.
        layers: In the order of the store's table.
        selection: The same by position in the store.
    """

    timesteps: list[int]
    layers: list[LayerInfo]
    selection: Selection

    @cached_property
    def channels(self) -> dict[int, list[int]]:
        """Stride -> the width of each layer, in table order, finest first."""
        return {s: [layer.channels for layer in held] for s, held in self.by_stride.items()}

    @cached_property
    def by_stride(self) -> dict[int, list[LayerInfo]]:
        """Stride -> its layers, in table order, finest first."""
        strides = sorted({layer.stride for layer in self.layers})
        return {s: [layer for layer in self.layers if layer.stride == s] for s in strides}

    def maps_of(self, whole: Inputs, maps: FeatureMaps) -> FeatureMaps:
        """Pick from the maps of other inputs, which hold all of these."""
        picked = {
            stride: [maps[stride][whole.by_stride[stride].index(layer)] for layer in layers]
            for stride, layers in self.by_stride.items()
        }
        if self.timesteps == whole.timesteps:
            return picked
        steps = [whole.timesteps.index(t) for t in self.timesteps]
        return {stride: [x[:, steps] for x in layers] for stride, layers in picked.items()}

    def statistics_of(self, whole: Inputs, statistics: Statistics) -> Statistics:
        """Pick from the statistics of other inputs, which hold all of these."""
        steps = [whole.timesteps.index(t) for t in self.timesteps]
        found: Statistics = {}
        for group, layers in self.selection.layers.items():
            places = [whole.selection.layers[group].index(p) for p in layers]
            mean, spread = (values[steps][:, places] for values in statistics[group])
            found[group] = (mean, spread)
        return found


def choose_inputs(store: FeatureStore, settings: FitSettings) -> Inputs:
    """The timesteps and layers of a store that the settings ask for.

    Raises:
        SettingsError: the store does not hold a timestep, or no layer matches a pattern.
    """
    timesteps = None if settings.timesteps == "all" else settings.timesteps
    return named_inputs(store, timesteps, settings.layers)


def named_inputs(store: FeatureStore, timesteps: Sequence[int] | None, layers: Sequence[str]) -> Inputs:
    """Some timesteps (None: all) and layers of a store, by name or pattern.

    Raises:
        SettingsError: the store does not hold a timestep, or no layer matches a pattern.
    """
    held = sorted(set(store.attributes.timesteps if timesteps is None else timesteps))
    names = {name for _, _, name in store.layer_positions(layers)}
    table = [layer for layer in store.attributes.layers if layer.name in names]
    return Inputs(held, table, store.selection(held, [layer.name for layer in table]))


def join_inputs(store: FeatureStore, several: Sequence[Inputs]) -> Inputs:
    """The inputs that hold all of these."""
    timesteps = {t for inputs in several for t in inputs.timesteps}
    return named_inputs(store, sorted(timesteps), [layer.name for i in several for layer in i.layers])


def whole_inputs(timesteps: Sequence[int], layers: Sequence[LayerInfo]) -> Inputs:
    """All of these timesteps and layers, whether or not a store holds more."""
    groups = {name: tuple(range(len(held))) for name, held in group_layers(layers).items()}
    return Inputs(list(timesteps), list(layers), Selection(tuple(range(len(timesteps))), groups))
