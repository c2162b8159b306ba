"""The baselines that every comparison includes: colour statistics, the best single map, plain concatenation.

All but one are logistic regressions on standardised inputs; strength and, for `single`,
timestep and layer are chosen on validation. Where a tile may have several classes there is one model for
each, against the rest. For masks the model is trained on pixels drawn at random and applied at each layer's
own resolution; its logits are enlarged, which for a linear model is the same as enlarging the features.
Colour of pixels is a random forest on each pixel's colour and on mean and spread in a 9 x 9 window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from sklearn.ensemble import RandomForestClassifier
from tqdm import tqdm

from satdifuser.errors import RunError
from satdifuser.evaluate.evaluation import (
    is_measured,
    known_val,
    new_outcome,
    spread_positions,
    write_outcome,
)
from satdifuser.evaluate.probe_predictions import predict_with
from satdifuser.evaluate.probes import Probes, fit_probes
from satdifuser.evaluate.samples import (
    PIXELS_PER_TILE,
    TILES_PER_READ,
    Input,
    Samples,
    gather_samples,
    score_samples,
)
from satdifuser.evaluate.settings import EvaluateSettings, ProbeSettings
from satdifuser.fuse.data import labelled
from satdifuser.fuse.run_folder import RUN_FILE, Run, open_run, save_run
from satdifuser.fuse.run_network import Prediction
from satdifuser.store.encoding import Floats
from satdifuser.store.reader import FeatureStore, Indices

NAMES = ("colour", "single", "concatenation")
STRENGTHS = ProbeSettings().logistic
TREES, WINDOW = 50, 9

Predictor = Callable[[Indices], Iterator[Prediction]]
"""Rows of a store -> predictions of these tiles."""


def fit_baselines(
    store: FeatureStore,
    settings: EvaluateSettings,
    folder: Path,
    overwrite: bool,
    partition: str = "auto",
) -> list[Run]:
    """Fit all baselines and measure them on val; those already fitted to this store are kept.

    Args:
        store: A complete store with targets and the splits train and val.
        settings: Bootstrap, seed.
        folder: Each baseline becomes the run `folder/baseline-NAME`.
        overwrite: Fit them anew.
        partition: Which partition of the store gives the splits.

    Raises:
        SettingsError: the store does not hold the partition.
        StoreError: shards are missing, or a split is empty.
        RunError: a baseline of another partition is there, or no tile of a split has a label.
    """
    runs: list[Run] = []
    samples: dict[str, Samples] = {}
    settings, partition = settings.model_copy(update={"split": "val"}), store.choose_partition(partition)
    rows = {split: labelled(store, split, partition) for split in ("train", "val")}
    for name in tqdm(NAMES, desc="baselines", unit="baseline", disable=None):
        path = folder / f"baseline-{name}"
        if not overwrite and (done := _finished(path, store, settings.seed, partition)):
            runs.append(done)
            continue
        began = time.monotonic()
        if name != "colour" and not samples:
            samples = {s: gather_samples(store, rows[s], settings.seed) for s in ("train", "val")}
        predictor, facts = _fit(name, store, samples, rows, settings.seed)
        facts |= {"name": path.name, "partition": partition, "seconds": round(time.monotonic() - began, 3)}
        run = save_run(path, _describe(name, store, facts, settings), store.attributes.settings)
        _measure(run, store, predictor, rows, settings)
        runs.append(run)
    return runs


def evaluate_baseline(run: Run, store: FeatureStore, settings: EvaluateSettings) -> dict[str, Any]:
    """Measure a baseline on a split: it is fitted again, with the inputs and the strength it chose on val.

    Args:
        run: The baseline.
        store: The store it was fitted on.
        settings: Split, bootstrap, number of pictures.

    Returns:
        What metrics.json holds.

    Raises:
        RunError: it was fitted on another store.
    """
    if run.info["store"]["hashes"] != store.hashes().model_dump():
        raise RunError(
            f"{run.path}: was fitted on another store than {store.path}, and the weights of a baseline are "
            "not kept; fit it there: `satdifuser fit`"
        )
    splits: list[str] = ["train", "val", settings.split]
    rows = {split: labelled(store, split, run.partition) for split in splits}
    samples: dict[str, Samples] = {}
    if run.info["fusion"] != "colour":
        samples = {s: gather_samples(store, rows[s], run.info["seed"]) for s in ("train", "val")}
    predictor, _ = _fit(run.info["fusion"], store, samples, rows, run.info["seed"], run.info)
    return _measure(run, store, predictor, rows, settings)


def _finished(path: Path, store: FeatureStore, seed: int, partition: str) -> Run | None:
    if not (path / RUN_FILE).is_file():
        return None
    run = open_run(path)
    if run.partition != partition:
        raise RunError(
            f"{path}: holds a baseline of partition {run.partition}, asked for {partition}; write to another "
            "folder, or replace it with --overwrite"
        )
    return run if run.info["seed"] == seed and is_measured(run, store) else None


def _fit(
    name: str,
    store: FeatureStore,
    samples: dict[str, Samples],
    rows: dict[str, Indices],
    seed: int,
    chosen_before: Mapping[str, Any] | None = None,
) -> tuple[Predictor, dict[str, Any]]:
    before = chosen_before or {}
    strengths = [before["strength"]] if "strength" in before else STRENGTHS
    if name == "colour":
        return _fit_colour(store, rows, seed, strengths)
    inputs = list(samples["train"].features)
    candidates = [inputs] if name == "concatenation" else [[key] for key in inputs]
    if name == "single" and before:
        candidates = [[(t, layer) for t, layer in before["inputs"]]]
    chosen, probe, strength = choose_on_val(store, samples, candidates, strengths)
    facts = {
        "inputs": chosen if name == "single" else len(chosen),
        "strength": strength,
        "converged": bool(probe.converged[0]),
        "parameters": probe.parameters,
    }
    return partial(predict_with, store, probe, chosen), facts


def choose_on_val(
    store: FeatureStore,
    samples: dict[str, Samples],
    candidates: list[list[Input]],
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[list[Input], Probes, float]:
    """The inputs and strength whose logistic regression is best on validation."""
    train, val = samples["train"], samples["val"]
    classes, task = len(store.attributes.classes), str(store.attributes.task)
    best: tuple[float, list[Input], Probes, float] | None = None
    for inputs in candidates:
        probes = fit_probes("logistic", train.joined(inputs), train.labels, classes, strengths)
        for j, probabilities in enumerate(probes.probabilities(val.joined(inputs))):
            score = score_samples(task, val.labels, probabilities)
            if best is None or score > best[0]:
                best = (score, inputs, probes.only(j), strengths[j])
    if best is None:
        raise RunError(f"{store.path}: holds no features to probe")
    return best[1:]


def _fit_colour(
    store: FeatureStore, rows: dict[str, Indices], seed: int, strengths: Sequence[float]
) -> tuple[Predictor, dict[str, Any]]:
    if store.attributes.task == "segmentation":
        return _fit_colour_forest(store, rows["train"], seed)
    key: Input = (0, "colour")
    samples = {
        split: Samples(
            {key: store.colour(rows[split])}, np.asarray(store.targets(rows[split]), np.int64), rows[split]
        )
        for split in ("train", "val")
    }
    _, probe, strength = choose_on_val(store, samples, [[key]], strengths)

    def predict_tiles(rows: Indices) -> Iterator[Prediction]:
        yield probe.probabilities(store.colour(rows))[0], np.asarray(store.targets(rows), np.int64)

    return predict_tiles, {
        "inputs": "colour statistics",
        "strength": strength,
        "converged": bool(probe.converged[0]),
    }


def _fit_colour_forest(store: FeatureStore, train: Indices, seed: int) -> tuple[Predictor, dict[str, Any]]:
    generator = np.random.default_rng(seed)
    pixels, labels = [], []
    for features, masks in _colour_tiles(store, train):
        for tile, mask in zip(features, masks, strict=True):
            places = np.flatnonzero(mask.ravel() != store.attributes.ignore_value)
            chosen = generator.choice(places, min(PIXELS_PER_TILE, len(places)), replace=False)
            pixels.append(tile.reshape(-1, tile.shape[-1])[chosen])
            labels.append(mask.ravel()[chosen])
    forest = RandomForestClassifier(TREES, random_state=seed, min_samples_leaf=5, n_jobs=-1)
    forest.fit(np.concatenate(pixels), np.concatenate(labels))

    def predict_pixels(rows: Indices) -> Iterator[Prediction]:
        for features, masks in _colour_tiles(store, rows):
            found = forest.predict_proba(features.reshape(-1, features.shape[-1]))
            full = np.zeros((*masks.shape, len(store.attributes.classes)), np.float32)
            full[..., forest.classes_] = found.reshape(*masks.shape, -1)
            yield np.moveaxis(full, -1, 1), masks.astype(np.int64)

    return predict_pixels, {"inputs": "pixel colour", "trees": TREES}


def _colour_tiles(store: FeatureStore, rows: Indices) -> Iterator[tuple[Floats, NDArray[np.generic]]]:
    """Each pixel's colour, and mean and spread around it: (B, H, W, 9) float32, with the masks."""
    for start in range(0, len(rows), TILES_PER_READ):
        chosen = rows[start : start + TILES_PER_READ]
        colour = store.previews(chosen).astype(np.float32) / 255
        mean = uniform_filter(colour, (0, WINDOW, WINDOW, 0))
        square = uniform_filter(colour**2, (0, WINDOW, WINDOW, 0))
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        yield np.concatenate([colour, mean, spread], axis=-1), np.asarray(store.targets(chosen))


def _describe(
    name: str, store: FeatureStore, facts: dict[str, Any], settings: EvaluateSettings
) -> dict[str, Any]:
    a = store.attributes
    return {
        "format_version": 1,
        "kind": "baseline",
        "task": a.task,
        "fusion": name,
        "head": "forest" if "trees" in facts else "linear",
        "seed": settings.seed,
        "classes": a.classes,
        "ignore_value": a.ignore_value,
        "timesteps": a.timesteps,
        "layers": [layer.model_dump() for layer in a.layers],
        "store": {"path": str(store.path), "hashes": store.hashes().model_dump()},
        "history": [],
        "best_epoch": 0,
        "parameters": 0,
        "weights": None,
        **facts,
    }


def _measure(
    run: Run,
    store: FeatureStore,
    predictor: Predictor,
    rows: dict[str, Indices],
    settings: EvaluateSettings,
) -> dict[str, Any]:
    reported = rows[settings.split]
    kept = spread_positions(len(reported), settings.pictures)
    outcomes = {"val": new_outcome(store), settings.split: new_outcome(store, kept)}
    for split, outcome in outcomes.items():
        for probabilities, targets in predictor(rows[split]):
            outcome.add(probabilities, targets)
    val = known_val(run, store, settings) or outcomes["val"].metrics()
    return write_outcome(run, store, reported, outcomes[settings.split], val, settings)
