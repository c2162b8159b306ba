"""What a page shows, layer by layer: of a store its scene, features, labels and predictions.

Letters of shapes: B tiles, H and W pixels of a tile, h and w pixels of the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from satdifuser.errors import SettingsError
from satdifuser.evaluate.maps.store_features import NetworkInputs
from satdifuser.evaluate.report.colours import palette
from satdifuser.evaluate.report.features import axes_of, maps_of, paint_maps, telling_inputs
from satdifuser.evaluate.report.heat_map import short_name
from satdifuser.evaluate.view.canvas import Picture, Sheet
from satdifuser.fuse.predictor import Predictor
from satdifuser.store.layout import UNLABELLED
from satdifuser.store.reader import FeatureStore, Indices

TILES_AT_ONCE = 16
SAMPLED_TILES = 48  # that the colours of features are chosen by
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """One picture of the canvas."""

    name: str
    picture: Picture
    smooth: bool  # a photo, rather than classes whose borders stay sharp
    legend: Mapping[str, Colour] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """Which features are shown."""

    timestep: int | None = None  # None: the middle one
    layers: Sequence[str] = ()  # names or patterns; none: the last one of each stride


def store_layers(
    store: FeatureStore, sheet: Sheet, choice: Choice, predictor: Predictor | None
) -> list[Layer]:
    """All that can be shown of a store.

    Args:
        store: A complete store.
        sheet: Where its tiles are.
        choice: Which features are shown.
        predictor: A run whose predictions are shown too.

    Raises:
        SettingsError: the store lacks the timestep, or a layer, or the run's timesteps or layers.
        RunError: its features are not those that the run was fitted on.
    """
    a, found = store.attributes, list[Layer]()
    if a.previews:
        found.append(Layer("scene", sheet.paint(scene_tiles(store, sheet.rows), smooth=True), smooth=True))
    found += [feature_layer(store, sheet, *one) for one in chosen_features(store, choice)]
    if a.task in ("classification", "segmentation"):
        colours = class_colours(a.classes)
        picture = sheet.paint(label_tiles(store, sheet.rows, colours), smooth=False)
        found.append(Layer("labels", picture, False, legend(a.classes, colours)))
    if predictor is not None:
        found.append(prediction_layer(store, sheet, predictor))
    return found


def parts(rows: Indices, what: str) -> Iterator[Indices]:
    """A few rows at a time, with a bar."""
    starts = range(0, len(rows), TILES_AT_ONCE)
    for start in tqdm(starts, desc=what, unit="batch", disable=None, leave=False):
        yield rows[start : start + TILES_AT_ONCE]


def with_alpha(pictures: NDArray[np.uint8], there: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) with 255 where (B, H, W) says so, else all 0: (B, H, W, 4)."""
    alpha = np.where(there, 255, 0).astype(np.uint8)[..., None]
    return np.concatenate([np.where(alpha > 0, pictures, 0).astype(np.uint8), alpha], axis=-1)


def scene_tiles(store: FeatureStore, rows: Indices) -> Iterator[NDArray[np.uint8]]:
    """The picture of each tile."""
    for part in parts(rows, "scene"):
        yield from with_alpha(store.previews(part), store.valid(part))


# --- features


def chosen_features(store: FeatureStore, choice: Choice) -> list[tuple[int, str]]:
    """Timesteps and layers to show.

    Raises:
        SettingsError: the store does not hold the timestep, or no layer matches.
    """
    held = store.attributes.timesteps
    if choice.timestep is not None and choice.timestep not in held:
        raise SettingsError(f"--timestep: {choice.timestep} is not in {store.path}; it holds {held}")
    names = [name for _, _, name in store.layer_positions(choice.layers)] if choice.layers else []
    inputs = [(held[len(held) // 2], name) for name in names] or telling_inputs(store, {})
    return [(t if choice.timestep is None else choice.timestep, name) for t, name in inputs]


def feature_layer(store: FeatureStore, sheet: Sheet, timestep: int, layer: str) -> Layer:
    """A layer's features in false colours: their three strongest principal components."""
    spread = np.linspace(0, len(sheet.rows) - 1, min(len(sheet.rows), SAMPLED_TILES)).astype(int)
    axes = axes_of(maps_of(store, sheet.rows[spread], timestep, layer))

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for part in parts(sheet.rows, "features"):
            painted = paint_maps(axes, maps_of(store, part, timestep, layer))
            yield from with_alpha(painted, np.ones(painted.shape[:3], np.bool_))

    stride = next(held.stride for held in store.attributes.layers if held.name == layer)
    name = f"features, {stride} px per cell"
    note = f"{short_name(layer)} at timestep {timestep}; equal colours mean that the features are alike"
    return Layer(name, sheet.paint(tiles(), smooth=True), True, note=note)


# --- classes


def class_colours(classes: Sequence[str]) -> NDArray[np.uint8]:
    """One colour per class, (K, 3)."""
    return palette(len(classes))


def legend(classes: Sequence[str], colours: NDArray[np.uint8]) -> dict[str, Colour]:
    """Name and colour of each class."""
    return {name: (int(r), int(g), int(b)) for name, (r, g, b) in zip(classes, colours, strict=True)}


def label_tiles(
    store: FeatureStore, rows: Indices, colours: NDArray[np.uint8]
) -> Iterator[NDArray[np.uint8]]:
    """The labels of each tile, transparent where there is none: of its pixels, or one for all."""
    ignored = UNLABELLED.get(str(store.attributes.task), store.attributes.ignore_value)
    for part in parts(rows, "labels"):
        targets = np.asarray(store.targets(part), np.int64)
        yield from painted_classes(targets, np.asarray(targets != ignored), colours)


def painted_classes(
    classes: NDArray[np.int64], there: NDArray[np.bool_], colours: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Colours of classes of pixels (B, H, W) or of tiles (B,): (B, H, W, 4), with one pixel for a tile."""
    shape = classes.shape if classes.ndim == 3 else (len(classes), 1, 1)
    there = there.reshape(shape)
    return with_alpha(colours[np.where(there, classes.reshape(shape), 0)], there)


def prediction_layer(store: FeatureStore, sheet: Sheet, predictor: Predictor) -> Layer:
    """What a run predicts of each tile.

    Raises:
        SettingsError: the run gives a tile several classes at once.
    """
    if predictor.task == "multilabel":
        raise SettingsError(f"{predictor.run.path}: gives tiles several classes at once, which is no layer")
    inputs, colours = NetworkInputs(store, predictor), class_colours(predictor.classes)
    size = store.attributes.tile_size if predictor.task == "segmentation" else None

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for part in parts(sheet.rows, "prediction"):
            classes = predictor.logits(inputs.stored(part), size).argmax(axis=1)
            valid = store.valid(part)
            there = valid if size else np.asarray(valid.any(axis=(1, 2)))
            yield from painted_classes(classes, there, colours)

    note = f"by {predictor.run.path.name}"
    picture = sheet.paint(tiles(), smooth=False)
    return Layer("prediction", picture, False, legend(predictor.classes, colours), note)
