"""The baselines that every comparison includes: colour statistics, the best single map, plain concatenation.

All but one are logistic regressions (scikit-learn) on standardised inputs; strength and, for `single`,
timestep and layer are chosen on validation. For masks the model is trained on pixels drawn at random and
applied at each layer's own resolution; its logits are enlarged, which for a linear model is the same as
enlarging the features. Colour of pixels is a random forest on each pixel's colour and on mean and spread
in a 9 x 9 window.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from satdifuser.errors import RunError
from satdifuser.evaluate.evaluation import is_evaluated, new_outcome, spread_positions, write_outcome
from satdifuser.evaluate.metrics import classification_metrics, confusion_matrix, segmentation_metrics
from satdifuser.evaluate.samples import (
    PIXELS_PER_TILE,
    TILES_PER_READ,
    Input,
    Samples,
    gather_samples,
    input_positions,
    pooled_features,
    read_tiles,
)
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.run_folder import RUN_FILE, Run, open_run, save_run
from satdifuser.fuse.train import MAIN_METRIC, Prediction, labelled
from satdifuser.store.encoding import Floats
from satdifuser.store.reader import FeatureStore

NAMES = ("colour", "single", "concatenation")
STRENGTHS = (0.01, 0.1, 1.0)  # scikit-learn's C, inverse strength of the L2 penalty
TREES, WINDOW = 50, 9

Predictor = Callable[[str], Iterator[Prediction]]
"""Split -> predictions of its tiles."""


class LinearProbe:
    """Logistic regression on standardised features."""

    def __init__(self, features: Floats, labels: NDArray[np.int64], classes: int, strength: float) -> None:
        self.classes = classes
        self.scaler = StandardScaler().fit(features)
        self.model = LogisticRegression(C=strength, max_iter=1000, tol=1e-3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            self.model.fit(self.scaler.transform(features), labels)
        self.converged = not caught

    def probabilities(self, features: Floats) -> NDArray[np.float32]:
        """(N, C) features to (N, classes) probabilities; 0 for classes never seen in training."""
        full = np.zeros((len(features), self.classes), np.float32)
        full[:, self.model.classes_] = self.model.predict_proba(self.scaler.transform(features))
        return full

    def affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same model as logits = features @ weight + bias: (C, classes) and (classes,)."""
        weight = np.zeros((self.model.n_features_in_, self.classes), np.float32)
        bias = np.full(self.classes, -np.inf, np.float32)
        coefficients, intercept = self.model.coef_, self.model.intercept_
        if len(self.model.classes_) == 2:  # one row stands for the second class
            coefficients = np.vstack([-coefficients, coefficients]) / 2
            intercept = np.array([-1, 1]) * intercept / 2
        scaled = coefficients / self.scaler.scale_
        weight[:, self.model.classes_] = scaled.T
        bias[self.model.classes_] = intercept - scaled @ self.scaler.mean_
        return weight, bias


def fit_baselines(
    store: FeatureStore, settings: EvaluateSettings, folder: Path, overwrite: bool
) -> list[Run]:
    """Fit and measure all baselines; those already measured so on this store are kept.

    Args:
        store: A complete store with targets and all three splits.
        settings: Evaluated split, bootstrap, seed.
        folder: Each baseline becomes the run `folder/baseline-NAME`.
        overwrite: Fit them anew.
    """
    runs: list[Run] = []
    samples: dict[str, Samples] = {}
    for name in tqdm(NAMES, desc="baselines", unit="baseline", disable=None):
        path = folder / f"baseline-{name}"
        if not overwrite and (done := _finished(path, store, settings)):
            runs.append(done)
            continue
        began = time.monotonic()
        if name != "colour" and not samples:
            samples = {split: gather_samples(store, split, settings.seed) for split in ("train", "val")}
        predictor, facts = _fit(name, store, samples, settings.seed)
        info = _describe(name, store, facts | {"seconds": round(time.monotonic() - began, 3)}, settings)
        run = save_run(path, info | {"name": path.name}, store.attributes.settings)
        _measure(run, store, predictor, settings)
        runs.append(run)
    return runs


def _finished(path: Path, store: FeatureStore, settings: EvaluateSettings) -> Run | None:
    if not (path / RUN_FILE).is_file():
        return None
    run = open_run(path)
    return run if is_evaluated(run, store, settings) else None


def _fit(
    name: str, store: FeatureStore, samples: dict[str, Samples], seed: int
) -> tuple[Predictor, dict[str, Any]]:
    if name == "colour":
        return _fit_colour(store, seed)
    inputs = list(samples["train"].features)
    candidates = [inputs] if name == "concatenation" else [[key] for key in inputs]
    chosen, probe, strength = choose_on_val(store, samples, candidates)
    facts = {
        "inputs": chosen if name == "single" else len(chosen),
        "strength": strength,
        "converged": probe.converged,
        "parameters": int(probe.model.coef_.size + probe.model.intercept_.size),
    }
    return _feature_predictor(store, probe, chosen), facts


def choose_on_val(
    store: FeatureStore, samples: dict[str, Samples], candidates: list[list[Input]]
) -> tuple[list[Input], LinearProbe, float]:
    """The inputs and strength whose probe is best on validation."""
    train, val = samples["train"], samples["val"]
    classes, task = len(store.attributes.classes), str(store.attributes.task)
    best: tuple[float, list[Input], LinearProbe, float] | None = None
    for inputs in candidates:
        features, held_out = train.joined(inputs), val.joined(inputs)
        for strength in STRENGTHS:
            probe = LinearProbe(features, train.labels, classes, strength)
            score = _score(task, val.labels, probe.probabilities(held_out))
            if best is None or score > best[0]:
                best = (score, inputs, probe, strength)
    if best is None:
        raise RunError(f"{store.path}: holds no features to probe")
    return best[1:]


def _score(task: str, labels: NDArray[np.int64], probabilities: NDArray[np.float32]) -> float:
    if task == "classification":
        return classification_metrics(labels, probabilities)[MAIN_METRIC[task]]
    confusion = confusion_matrix(labels, probabilities.argmax(1), probabilities.shape[1])
    return segmentation_metrics(confusion)[MAIN_METRIC[task]]


def _feature_predictor(store: FeatureStore, probe: LinearProbe, inputs: list[Input]) -> Predictor:
    if store.attributes.task == "classification":

        def predict_tiles(split: str) -> Iterator[Prediction]:
            rows = labelled(store, split)
            features = pooled_features(store, rows)
            joined = np.concatenate([features[key] for key in inputs], axis=1)
            yield probe.probabilities(joined), np.asarray(store.targets(rows), np.int64)

        return predict_tiles
    return lambda split: predict_masks(store, probe, inputs, split)


def predict_masks(
    store: FeatureStore, probe: LinearProbe, inputs: list[Input], split: str
) -> Iterator[Prediction]:
    weight, bias = probe.affine()
    widths = {layer.name: layer.channels for layer in store.attributes.layers}
    borders = np.cumsum([widths[layer] for _, layer in inputs])[:-1]
    weights = dict(zip(inputs, np.split(weight, borders), strict=True))
    for maps, masks in read_tiles(store, labelled(store, split)):
        logits = torch.from_numpy(bias)[None, :, None, None]
        for group, values in maps.items():
            for key, (step, place) in input_positions(store, group).items():
                if key in weights:
                    part = np.einsum("bchw,ck->bkhw", values[:, step, place], weights[key])
                    size = (masks.shape[1], masks.shape[2])
                    logits = logits + F.interpolate(torch.from_numpy(part), size, mode="bilinear")
        yield logits.softmax(1).numpy(), masks.astype(np.int64)


def _fit_colour(store: FeatureStore, seed: int) -> tuple[Predictor, dict[str, Any]]:
    if store.attributes.task == "segmentation":
        return _fit_colour_forest(store, seed)
    splits = {split: labelled(store, split) for split in ("train", "val")}
    key: Input = (0, "colour")
    samples = {
        split: Samples({key: store.colour(rows)}, np.asarray(store.targets(rows), np.int64))
        for split, rows in splits.items()
    }
    _, probe, strength = choose_on_val(store, samples, [[key]])

    def predict_tiles(split: str) -> Iterator[Prediction]:
        rows = labelled(store, split)
        yield probe.probabilities(store.colour(rows)), np.asarray(store.targets(rows), np.int64)

    return predict_tiles, {"inputs": "colour statistics", "strength": strength, "converged": probe.converged}


def _fit_colour_forest(store: FeatureStore, seed: int) -> tuple[Predictor, dict[str, Any]]:
    generator = np.random.default_rng(seed)
    pixels, labels = [], []
    for features, masks in _colour_tiles(store, "train"):
        for tile, mask in zip(features, masks, strict=True):
            places = np.flatnonzero(mask.ravel() != store.attributes.ignore_value)
            chosen = generator.choice(places, min(PIXELS_PER_TILE, len(places)), replace=False)
            pixels.append(tile.reshape(-1, tile.shape[-1])[chosen])
            labels.append(mask.ravel()[chosen])
    forest = RandomForestClassifier(TREES, random_state=seed, min_samples_leaf=5, n_jobs=-1)
    forest.fit(np.concatenate(pixels), np.concatenate(labels))

    def predict_pixels(split: str) -> Iterator[Prediction]:
        for features, masks in _colour_tiles(store, split):
            found = forest.predict_proba(features.reshape(-1, features.shape[-1]))
            full = np.zeros((*masks.shape, len(store.attributes.classes)), np.float32)
            full[..., forest.classes_] = found.reshape(*masks.shape, -1)
            yield np.moveaxis(full, -1, 1), masks.astype(np.int64)

    return predict_pixels, {"inputs": "pixel colour", "trees": TREES}


def _colour_tiles(store: FeatureStore, split: str) -> Iterator[tuple[Floats, NDArray[np.generic]]]:
    """Each pixel's colour, and mean and spread around it: (B, H, W, 9) float32, with the masks."""
    rows = labelled(store, split)
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


def _measure(run: Run, store: FeatureStore, predictor: Predictor, settings: EvaluateSettings) -> None:
    rows = labelled(store, settings.split)
    kept = spread_positions(len(rows), settings.pictures)
    outcomes = {"val": new_outcome(store), settings.split: new_outcome(store, kept)}
    for split, outcome in outcomes.items():
        for probabilities, targets in predictor(split):
            outcome.add(probabilities, targets)
    write_outcome(run, store, rows, outcomes[settings.split], outcomes["val"].metrics(), settings)
