"""Assesses a map against reference labels on the map's own grid, block by block.

Legend: K classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window
from tqdm import tqdm

from satdifuser.errors import LabelError, RunError
from satdifuser.evaluate.maps.estimators import Accuracy, Estimate, estimate
from satdifuser.evaluate.maps.map_file import CLASSES_TAG, MODEL_TAG, NODATA
from satdifuser.evaluate.maps.predict import Request, predict_store
from satdifuser.fuse.predictor import Predictor
from satdifuser.fuse.run_folder import open_run
from satdifuser.labels.classes import IGNORE
from satdifuser.labels.label_file import LabelFile, Tally, explain_miss, open_labels
from satdifuser.labels.settings import LabelSettings
from satdifuser.store.georeference import Georeference, georeference_of, open_raster
from satdifuser.store.location import Location
from satdifuser.store.place import ground_distance
from satdifuser.store.reader import open_store

BLOCK = 1024  # px a side, read at once
HECTARE = 1e4  # m²
SEMI_MAJOR, ECCENTRICITY_2 = 6_378_137.0, 0.00669438  # of WGS 84, m
MEASURED_ROWS = 17  # of a block, for the ground under a pixel


@dataclass(frozen=True)
class Counted:
    """What a map and its reference hold."""

    counts: NDArray[np.int64]  # (K, K) reference pixels; rows are the map, columns the reference
    mapped: NDArray[np.float64]  # (K,) m² of ground mapped as each class
    notes: list[str]


def assess_map(
    run_folder: Path, map_path: Path, reference: Path, settings: LabelSettings, level: float
) -> dict[str, Any]:
    """Measure a map of a run against reference labels.

    Args:
        run_folder: The run that made the map.
        map_path: GeoTIFF with class numbers in band 1, 255 where there is none, names in SATDIFUSER_CLASSES.
        reference: Polygons, points or a raster of class ids.
        settings: How these become labels of pixels.
        level: Of the intervals.

    Returns:
        Overall accuracy; per class user's and producer's accuracy, mapped area and area in hectares; each
        estimate with its interval, None where nothing can be said; the confusion matrix and its shares of
        the area; notes.

    Raises:
        RunError: the map is not of this run, or has no class names.
        LabelError: the reference cannot be placed, misses the map, or is of unknown classes.
    """
    classes = [str(name) for name in open_run(run_folder).info["classes"]]
    with open_raster(map_path) as dataset:
        _check_map(run_folder, map_path, dataset, classes)
        place = _placed(map_path, dataset)
        labels = open_labels(reference, settings, settings.classes, classes)
        counted = _count(dataset, place, labels, len(classes))
    accuracy = estimate(counted.counts, counted.mapped / HECTARE, level)
    return _report(map_path, labels, classes, counted, accuracy, level)


def assess_store(
    run_folder: Path, store: Location | None, reference: Path, settings: LabelSettings, level: float
) -> dict[str, Any]:
    """Measure a run against reference labels by a map of the tiles of a store, which is not kept.

    Args:
        run_folder: The run.
        store: A store of its features; None for the one it was fitted on.
        reference: See `assess_map`, as for the others.
        settings: How labels become those of pixels.
        level: Of the intervals.

    Raises:
        StoreError: the store's tiles make no one map.
        SatDiFuserError: see `assess_map`.
    """
    run = open_run(run_folder)
    opened = open_store(store or run.info["store"]["path"])
    with TemporaryDirectory() as folder:
        made = predict_store(Predictor(run), opened, Request(Path(folder) / "map.tif"))
        found = assess_map(run_folder, made, reference, settings, level)
    return found | {"map": f"{run_folder} on {opened.path}"}


def _check_map(run_folder: Path, path: Path, dataset: Any, classes: list[str]) -> None:
    tags = dataset.tags()
    try:
        named = json.loads(tags.get(CLASSES_TAG, ""))
    except ValueError:
        raise RunError(
            f"{path}: has no class names (tag {CLASSES_TAG}), so it is no map of `satdifuser predict`; make "
            f"one with `satdifuser predict {run_folder} SCENE -o MAP.tif`"
        ) from None
    if named != classes:
        raise RunError(
            f"{path}: maps the classes {', '.join(map(str, named))}, but {run_folder} knows "
            f"{', '.join(classes)}; name the run that made the map"
        )
    model = open_run(run_folder).info.get("model_sha256")
    if tags.get(MODEL_TAG, model) != model:
        raise RunError(
            f"{path}: was made by another run than {run_folder} (their weights differ); name that run, or "
            "map again"
        )


def _placed(path: Path, dataset: Any) -> Georeference:
    place = georeference_of(dataset)
    if place is None:
        raise RunError(
            f"{path}: has no CRS or transform, so no reference can be laid on it; map the scene again"
        )
    return place


def _count(dataset: Any, place: Georeference, labels: LabelFile, classes: int) -> Counted:
    """Go through the map and count pixels and ground."""
    counts, mapped = np.zeros((classes, classes), np.int64), np.zeros(classes)
    tally = Tally()
    blocks = list(_blocks(*dataset.shape))
    for row, col, height, width in tqdm(blocks, desc="assess", unit="block", disable=None):
        values = dataset.read(1, window=Window(col, row, width, height))
        here = place.shifted(row, col)
        _check_values(dataset, values, classes)
        holds = values != NODATA
        lines = np.broadcast_to(np.arange(height)[:, None], values.shape)
        cells = np.bincount(lines[holds] * classes + values[holds], minlength=height * classes).reshape(
            height, classes
        )
        mapped += pixel_areas(here, height, width) @ cells
        truth = labels.mask(here, (height, width), tally)
        both = holds & (truth != IGNORE)
        pairs = values[both].astype(np.int64) * classes + truth[both]
        counts += np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    if not counts.any():
        raise LabelError(explain_miss(labels, tally, [place], dataset.shape))
    return Counted(counts, mapped, labels.notes(tally))


def _blocks(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    for row in range(0, height, BLOCK):
        for col in range(0, width, BLOCK):
            yield row, col, min(BLOCK, height - row), min(BLOCK, width - col)


def _check_values(dataset: Any, values: NDArray[Any], classes: int) -> None:
    wrong = np.unique(values[(values >= classes) & (values != NODATA)])
    if len(wrong):
        raise RunError(
            f"{dataset.name}: holds the class number {wrong[0]}, expected 0 to {classes - 1}, or {NODATA} "
            "for no data; map the scene again"
        )


def pixel_areas(place: Georeference, height: int, width: int) -> NDArray[np.float64]:
    """Ground under a pixel of each row (H,) in m².

    In degrees by the ellipsoid's formula (a² (1 - e²) cos φ / (1 - e² sin² φ)² a radian each way), else
    measured at some of the rows, in the middle of the grid.
    """
    if CRS.from_user_input(place.crs).is_geographic:
        a, b, _, d, e, _ = place.transform
        latitudes = np.radians([place.at(row + 0.5, width / 2)[1] for row in range(height)])
        flattened = (1 - ECCENTRICITY_2) / (1 - ECCENTRICITY_2 * np.sin(latitudes) ** 2) ** 2
        unit = abs(a * e - b * d) * math.radians(SEMI_MAJOR) ** 2
        areas: NDArray[np.float64] = unit * np.cos(latitudes) * flattened
        return areas
    rows = np.unique(np.linspace(0, height - 1, MEASURED_ROWS).round().astype(int))
    measured = [ground_distance(place.shifted(int(row), 0), (1, width)) ** 2 for row in rows]
    return np.interp(np.arange(height), rows, measured)


def _report(
    map_path: Path,
    labels: LabelFile,
    classes: list[str],
    counted: Counted,
    accuracy: Accuracy,
    level: float,
) -> dict[str, Any]:
    users, producers = (_told(e, 0, 1) for e in (accuracy.users, accuracy.producers))
    areas = _told(accuracy.areas, 0, math.inf)
    rows = zip(classes, users, producers, counted.mapped / HECTARE, areas, strict=True)
    return {
        "map": str(map_path),
        "reference": str(labels.path),
        "level": level,
        "reference_pixels": int(counted.counts.sum()),
        "overall_accuracy": _told(accuracy.overall, 0, 1)[0],
        "classes": {
            name: {"users_accuracy": u, "producers_accuracy": p, "mapped_ha": float(m), "area_ha": a}
            for name, u, p, m, a in rows
        },
        "confusion": counted.counts.tolist(),
        "confusion_shares": accuracy.proportions.tolist(),
        "notes": counted.notes + _unsampled(classes, counted),
    }


def _told(estimate: Estimate, low: float, high: float) -> list[dict[str, Any]]:
    """Each value with its interval, as plain JSON values."""
    ends = estimate.bounded(low, high)
    columns = [np.atleast_1d(column).tolist() for column in (estimate.value, *ends)]
    return [
        {"value": _number(value), "interval": [_number(first), _number(last)]}
        for value, first, last in zip(*columns, strict=True)
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _unsampled(classes: list[str], counted: Counted) -> list[str]:
    """Classes of the map of which the reference says nothing."""
    total = counted.mapped.sum()
    return [
        f"warning: no reference pixel on what is mapped as {name}: {area / total:.1%} of the map is left out "
        "of all estimates"
        for name, area, drawn in zip(classes, counted.mapped, counted.counts.sum(axis=1), strict=True)
        if area and not drawn
    ]


def format_assessment(found: dict[str, Any]) -> str:
    """An assessment for reading."""
    classes = found["classes"]
    width = max(5, *(len(name) for name in classes))
    heads = ("user's accuracy", "producer's accuracy")
    lines = [
        f"{found['map']} against {found['reference']}: {found['reference_pixels']} reference pixels",
        f"overall accuracy {_shown(found['overall_accuracy'], 3)}, by area",
        "",
        f"{'':{width}}  {heads[0]:>22}  {heads[1]:>22}  {'mapped ha':>12}  area ha",
    ]
    for name, row in classes.items():
        users, producers = (_shown(row[key], 3) for key in ("users_accuracy", "producers_accuracy"))
        area = _shown(row["area_ha"], 1)
        lines.append(f"{name:{width}}  {users:>22}  {producers:>22}  {row['mapped_ha']:12.1f}  {area}")
    lines += ["", "reference pixels; rows: the map, columns: the reference"]
    lines.append(f"{'':{width}}  " + "  ".join(f"{name:>8}" for name in classes))
    for name, row in zip(classes, found["confusion"], strict=True):
        cells = zip(classes, row, strict=True)
        lines.append(f"{name:{width}}  " + "  ".join(f"{n:>{max(8, len(c))}}" for c, n in cells))
    return "\n".join(lines)


def _shown(estimate: dict[str, Any], digits: int) -> str:
    value, (low, high) = estimate["value"], estimate["interval"]
    if value is None:
        return "not known"
    interval = "[not known]" if low is None else f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f} {interval}"
