"""Measures runs: predictions of a split become metrics with intervals, kept beside the run.

metrics.json          metrics on val (for choosing) and on the reported split, and how they were measured
predictions.parquet   one row per tile of the reported split
masks.npz             segmentation only: masks of some of these tiles and of the worst ones, for pictures
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from satdifuser.errors import RunError
from satdifuser.evaluate.intervals import (
    classification_intervals,
    multilabel_intervals,
    segmentation_intervals,
)
from satdifuser.evaluate.metrics import (
    at_least_half,
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    segmentation_metrics,
)
from satdifuser.evaluate.published import format_published, published_beside
from satdifuser.evaluate.reference_metrics import (
    TILE_REFERENCES,
    format_reference,
    reference_segmentation,
    with_faults,
)
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.data import MapLoader, labelled
from satdifuser.fuse.reference import WAITING, complete
from satdifuser.fuse.run_folder import METRICS_FILE, SETTINGS_FILE, Run, open_run
from satdifuser.fuse.run_network import load_network, predict, run_inputs
from satdifuser.store.files import write_durably
from satdifuser.store.location import Location
from satdifuser.store.reader import FeatureStore, Indices, open_store
from satdifuser.store.schema import canonical_hash, differing_fields

TILE_METRICS = {"classification": classification_metrics, "multilabel": multilabel_metrics}
TILE_INTERVALS = {"classification": classification_intervals, "multilabel": multilabel_intervals}

INTERVAL_SETTINGS = ("bootstrap", "level", "seed")


@dataclass
class Outcome:
    """What became of the tiles of a split, gathered batch by batch.

    Classification keeps (N,) targets and (N, classes) probabilities, multilabel (N, classes) of both.
    Segmentation keeps (N, classes, classes) confusion counts, and the masks, predicted and true, of the
    tiles at the positions `kept` and of as many others that have the lowest mIoU.
    """

    task: str
    classes: int
    ignore_value: int
    kept: Sequence[int] = ()
    targets: list[NDArray[np.int64]] = field(default_factory=list)
    probabilities: list[NDArray[np.float32]] = field(default_factory=list)
    confusions: list[NDArray[np.int64]] = field(default_factory=list)
    masks: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = field(default_factory=dict)
    worst: list[tuple[float, int]] = field(default_factory=list)

    def add(self, probabilities: NDArray[np.float32], targets: NDArray[np.int64]) -> None:
        """Take in the predictions of some tiles, see `satdifuser.fuse.train.Prediction`."""
        if self.task in TILE_METRICS:
            self.targets.append(targets)
            self.probabilities.append(probabilities)
            return
        for predicted, target in zip(probabilities.argmax(1), targets, strict=True):
            confusion = confusion_matrix(target, predicted, self.classes, self.ignore_value)
            if self.kept:
                self._keep_masks(segmentation_metrics(confusion)["miou"], predicted, target)
            self.confusions.append(confusion)

    def _keep_masks(self, miou: float, predicted: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Keep the masks of the tile that is next, and let go of one that is no longer among the worst."""
        position = len(self.confusions)
        self.masks[position] = (predicted.astype(np.uint8), target.astype(np.uint8))
        if position in self.kept:
            return
        self.worst.append((miou if math.isfinite(miou) else math.inf, position))  # NaN: nothing is labelled
        self.worst.sort()
        for _, better in self.worst[len(self.kept) :]:
            del self.masks[better]
        del self.worst[len(self.kept) :]

    def metrics(self) -> dict[str, float]:
        """Metrics over all tiles."""
        if self.task in TILE_METRICS:
            return TILE_METRICS[self.task](np.concatenate(self.targets), np.concatenate(self.probabilities))
        return segmentation_metrics(np.sum(self.confusions, axis=0))

    def reference(self) -> dict[str, Any]:
        """Metrics of the released code over all tiles, and their faults."""
        if self.task in TILE_REFERENCES:
            targets, probabilities = np.concatenate(self.targets), np.concatenate(self.probabilities)
            return with_faults(self.task, TILE_REFERENCES[self.task](targets, probabilities))
        return with_faults(self.task, reference_segmentation(np.sum(self.confusions, axis=0)))

    def intervals(self, settings: EvaluateSettings) -> dict[str, list[float]]:
        """Bootstrap intervals of the metrics over the tiles."""
        chance = (settings.bootstrap, settings.seed, settings.level)
        if self.task in TILE_INTERVALS:
            targets, probabilities = np.concatenate(self.targets), np.concatenate(self.probabilities)
            return TILE_INTERVALS[self.task](targets, probabilities, *chance)
        return segmentation_intervals(np.stack(self.confusions), *chance)

    def table(self, tile_ids: list[str], split: str) -> pd.DataFrame:
        """One row per tile."""
        table = pd.DataFrame({"tile_id": tile_ids, "split": split})
        if self.task in TILE_METRICS:
            targets, probabilities = np.concatenate(self.targets), np.concatenate(self.probabilities)
            several = self.task == "multilabel"
            predicted = at_least_half(probabilities).astype(np.int64) if several else probabilities.argmax(1)
            table["target"], table["predicted"] = list(targets), list(predicted)
            table["probabilities"] = list(probabilities.astype(np.float32))
            return table
        each = [segmentation_metrics(confusion) for confusion in self.confusions]
        table["confusion"] = pd.Series([confusion.ravel() for confusion in self.confusions], dtype=object)
        table["miou"] = [metrics["miou"] for metrics in each]
        table["pixel_accuracy"] = [metrics["pixel_accuracy"] for metrics in each]
        return table


def new_outcome(store: FeatureStore, kept: Sequence[int] = ()) -> Outcome:
    """An empty outcome for a store's task and classes."""
    a = store.attributes
    return Outcome(str(a.task), len(a.classes), a.ignore_value, kept)


def spread_positions(tiles: int, count: int) -> list[int]:
    """Positions of at most `count` of some tiles, evenly spaced, since neighbours look alike."""
    positions: list[int] = np.linspace(0, tiles - 1, min(tiles, count)).round().astype(int).tolist()
    return positions


def ensure_evaluated(run: Run, store: FeatureStore, settings: EvaluateSettings) -> dict[str, Any]:
    """Measure a fitted fusion, unless that was done in the same way; return what metrics.json holds."""
    if is_evaluated(run, store, settings):
        return run.metrics
    return evaluate_run(run.path, store.path, settings)


def ensure_measured_on_val(run: Run, store: FeatureStore, settings: EvaluateSettings) -> None:
    """Measure a fitted fusion on val alone, unless this very model was measured before, on any split."""
    if not is_measured(run, store):
        evaluate_run(run.path, store.path, settings.model_copy(update={"split": "val"}))


def is_evaluated(run: Run, store: FeatureStore, settings: EvaluateSettings) -> bool:
    """Say whether a run's metrics are of this very model, this store and these settings."""
    if not (run.path / METRICS_FILE).is_file():
        return False
    held = run.metrics
    return all(held.get(name) == value for name, value in measurement(run, store, settings).items())


def is_measured(run: Run, store: FeatureStore) -> bool:
    """Say whether a run's metrics are of this very model and store, by whatever settings."""
    if not (run.path / METRICS_FILE).is_file():
        return False
    held = run.metrics
    return all(held.get(name) == value for name, value in measured_things(run, store).items())


def measurement(run: Run, store: FeatureStore, settings: EvaluateSettings) -> dict[str, Any]:
    """What two measurements must share to be the same one; a part of metrics.json."""
    asked = settings.model_dump(mode="json", exclude={"baselines"})
    return measured_things(run, store) | {"evaluate": asked}


def measured_things(run: Run, store: FeatureStore) -> dict[str, Any]:
    """The model and the store of a measurement."""
    return {"run_hash": canonical_hash(run.info), "store_hashes": store.hashes().model_dump()}


def evaluate_run(folder: Path, store_path: Location | None, settings: EvaluateSettings) -> dict[str, Any]:
    """Measure a run on one split of a store, and write what was found beside it.

    Args:
        folder: The run.
        store_path: A store with the run's features; None for the one it was fitted on.
        settings: Split, bootstrap, number of pictures.

    Returns:
        What metrics.json holds.

    Raises:
        RunError: the run or the store is not there, or they do not fit each other, or metrics.json is
            damaged, so that its count of test reads is lost.
    """
    run = open_run(folder)
    if run.info["kind"] == WAITING:
        if store_path is None:
            raise RunError(
                f"{folder}: was imported without a store; name one: `satdifuser evaluate {folder} STORE`"
            )
        run = complete(run, open_store(store_path))
    if run.info["kind"] != "fusion":
        raise RunError(f"{folder}: is no fitted network but a {run.info['kind']}")
    previous_test_reads(run)  # a damaged count is told before test is read once more
    store = open_store(store_path or run.info["store"]["path"])
    check_features(run, store)
    network = StoreNetwork(run, store)
    rows = labelled(store, settings.split, run.partition)
    outcome = network.predict(rows, spread_positions(len(rows), settings.pictures))
    val = known_val(run, store, settings)
    if val is None:  # imported: its training was measured elsewhere
        val = network.predict(labelled(store, "val", run.partition)).metrics()
    return write_outcome(run, store, rows, outcome, val, settings)


class StoreNetwork:
    """A run's network at work on a store, whose targets are known."""

    def __init__(self, run: Run, store: FeatureStore) -> None:
        self.store, self.inputs = store, run_inputs(run, store)
        self.network, self.statistics, self.settings = load_network(run)

    def predict(self, rows: Indices, kept: Sequence[int] = ()) -> Outcome:
        """What becomes of some tiles; masks are kept at the positions `kept`."""
        outcome = new_outcome(self.store, kept)
        device = next(self.network.parameters()).device
        once = self.settings.model_copy(update={"device_memory_gb": 0.0})  # nothing is read again
        loader = MapLoader(self.store, rows, once, device, self.inputs)
        for probabilities, targets in predict(self.network, loader, self.settings, self.statistics):
            outcome.add(probabilities, targets)
        return outcome


def known_val(run: Run, store: FeatureStore, settings: EvaluateSettings) -> dict[str, Any] | None:
    """A run's metrics on val: with intervals where they were measured so, else those of its training."""
    if is_measured(run, store):
        held = run.metrics
        alike = all(held["evaluate"][name] == getattr(settings, name) for name in INTERVAL_SETTINGS)
        if alike and "interval" in held["val"]:
            return dict(held["val"])
    history = run.info["history"]
    return history[run.info["best_epoch"] - 1]["val"] if history else None


def check_features(run: Run, store: FeatureStore) -> None:
    """Refuse a store that does not hold the features a run was fitted on, or holds other classes."""
    a, info = store.attributes, run.info
    names = [layer["name"] for layer in info["layers"]]
    ours: dict[str, Any] = {"feature": store.hashes().feature, "classes": a.classes, "task": a.task}
    ours["timesteps"] = sorted(t for t in a.timesteps if t in info["timesteps"])
    ours["layers"] = [layer.name for layer in a.layers if layer.name in names]
    theirs = {"feature": info["store"]["hashes"]["feature"]}
    theirs |= {name: info[name] for name in ("timesteps", "classes", "task")} | {"layers": names}
    if ours != theirs:
        fields = differing_fields(ours, theirs, "run expects", "store has")
        raise RunError(
            f"{store.path}: does not hold the features that {run.path} was fitted on:\n  "
            + "\n  ".join(fields)
        )


def write_outcome(
    run: Run,
    store: FeatureStore,
    rows: Indices,
    outcome: Outcome,
    val: dict[str, float],
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """Write all that was found out about a run, metrics.json last; return the metrics.

    Args:
        run: The run that was measured.
        store: The store that was read.
        rows: The N tiles of the reported split.
        outcome: What became of them, in the order of `rows`.
        val: Metrics on val; where that is the reported split, they give way to the outcome's.
        settings: How it was measured.
    """
    reads = previous_test_reads(run) + (settings.split == "test")
    tile_ids = [str(name) for name in store.tiles.tile_id.to_numpy()[rows]]
    buffer = io.BytesIO()
    outcome.table(tile_ids, settings.split).to_parquet(buffer)
    write_durably(run.path / "predictions.parquet", buffer.getvalue())
    if outcome.masks:
        positions = sorted(outcome.masks)
        pairs = [outcome.masks[position] for position in positions]
        predicted, target = (np.stack(masks) for masks in zip(*pairs, strict=True))
        buffer = io.BytesIO()
        kept_ids = np.array([tile_ids[position] for position in positions])
        np.savez_compressed(buffer, tile_id=kept_ids, predicted=predicted, target=target)
        write_durably(run.path / "masks.npz", buffer.getvalue())
    note_settings(run, settings)
    reported: dict[str, Any] = {**outcome.metrics(), "interval": outcome.intervals(settings)}
    if settings.metrics == "reference":
        reported["reference"] = outcome.reference()
    metrics = {
        "task": run.info["task"],
        "fusion": run.info["fusion"],
        "head": run.info["head"],
        "seed": run.info["seed"],
        "partition": run.partition,
        "store_fingerprint": store.hashes().feature,
        "selected_on": "val",
        "val": val,
        settings.split: reported,
        "test_reads": reads,
        **published_beside(run, store, settings.split, len(rows), reported),
        **measurement(run, store, settings),
    }
    write_durably(run.path / METRICS_FILE, (json.dumps(metrics, indent=1) + "\n").encode())
    return metrics


def note_settings(run: Run, settings: EvaluateSettings) -> None:
    """Add the settings of the evaluation to the run's settings.yaml."""
    path = run.path / SETTINGS_FILE
    sections = yaml.safe_load(path.read_text()) | {"evaluate": settings.model_dump(mode="json")}
    write_durably(path, yaml.safe_dump(sections, sort_keys=False).encode())


def previous_test_reads(run: Run) -> int:
    """How often this run's test split was read before.

    Raises:
        RunError: metrics.json is damaged.
    """
    return int(run.metrics.get("test_reads", 0)) if (run.path / METRICS_FILE).is_file() else 0


def format_metrics(folder: Path, metrics: dict[str, Any]) -> str:
    """Metrics for reading: one line per metric, of val and of the reported split, and what is published."""
    lines = [f"{folder}: {metrics['fusion']}, {metrics['head']} head, seed {metrics['seed']}"]
    for split in ("val", "train", "test"):
        values = metrics.get(split, {})
        intervals = values.get("interval", {})
        for name, value in values.items():
            if name not in ("interval", "reference"):
                low, high = intervals.get(name, (None, None))
                certainty = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
                lines.append(f"  {split:5} {name:18} {value:.3f}{certainty}")
        lines += format_reference(split, values.get("reference", {}))
    if "published" in metrics:
        lines.append(format_published(metrics["published"]))
    return "\n".join(lines)
