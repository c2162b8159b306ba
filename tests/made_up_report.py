"""Run and probe folders as `fit`, `evaluate` and `probe` write them, made up without any of these.

And the page that tells of them, as a reader's program sees it.
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from made_up import SKIPPED, random_row, random_store, run_record
from PIL import Image

from satdifuser.evaluate.metrics import (
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    segmentation_metrics,
)
from satdifuser.fuse.train import MAIN_METRIC
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo
from satdifuser.store.writer import TileRow

CLASSES = ["forest", "river & lake", "<b>city</b>", "bare soil"]
LAYERS = [f"up_blocks.{i}.{part}" for i in (1, 2) for part in ("attentions.0.attn1", "resnets.0.conv2")]
TILES = 40
MAPS = [
    LayerInfo(name=name, channels=6, stride=stride, height=32 // stride, width=32 // stride)
    for name, stride in zip(LAYERS, (8, 8, 4, 4), strict=True)
]


def tile_store(path: Path, task: str = "classification", **fields: Any) -> FeatureStore:
    """A store of random features: 40 test tiles by the names of `fake_run` (one skipped), 24 others."""

    def row(number: int) -> TileRow:
        if number == SKIPPED:
            return random_row(number)
        split = "test" if number < TILES else ("train", "val")[number % 2]
        random = np.random.default_rng(number)
        coarse = random.integers(40, 200, (8, 8, 3)).astype(np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC))
        mask = random.integers(0, 4, (8, 8)).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        target = mask if task == "segmentation" else np.array(number % 4, np.int32)
        return TileRow(
            f"tile_{number:03}", split, colour=np.zeros(1, np.float32), target=target, preview=picture
        )

    held = {"classes": CLASSES, "task": task, "tile_size": (32, 32)}
    return random_store(path, MAPS, TILES + 24, row_of=row, **(held | fields))


def record_of(store: FeatureStore) -> dict[str, Any]:
    """What a run keeps of its store."""
    return {"path": str(store.path), "hashes": store.hashes().model_dump()}


def fake_run(folder: Path, **changes: Any) -> Path:
    """Write a run folder as `fit` and `evaluate` do; `skill` is how often it is right on `split`."""
    skill, seed, split = changes.pop("skill", 0.8), changes.get("seed", 0), changes.pop("split", "test")
    info = run_record(
        name=folder.name,
        classes=CLASSES,
        timesteps=[21, 61, 161],
        layers=[{"name": name, "channels": 64, "stride": 8} for name in LAYERS],
        history=[
            {"epoch": e, "train_loss": 2 / e, "val": dict.fromkeys(MAIN_METRIC.values(), skill - 0.3 / e)}
            for e in range(1, 9)
        ],
    )
    info |= changes
    predict = {
        "classification": fake_classification,
        "multilabel": fake_multilabel,
        "segmentation": fake_segmentation,
    }[info["task"]]
    folder.mkdir(parents=True)
    table, reported = predict(folder, np.random.default_rng(seed), skill)
    table.assign(split=split).to_parquet(folder / "predictions.parquet")
    interval = {name: [value - 0.05, value + 0.05] for name, value in reported.items()}
    metrics = {"evaluate": {"split": split, "bootstrap": 1000, "level": 0.95}}
    metrics |= {"val": dict.fromkeys(reported, skill), split: {**reported, "interval": interval}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def fake_classification(
    folder: Path, generator: np.random.Generator, skill: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    target = np.random.default_rng(0).integers(0, 4, TILES)  # the same for all runs
    known = (generator.random(TILES) < skill)[:, None] & (target[:, None] == np.arange(4))
    raw = generator.random((TILES, 4)) + 2 * known
    probabilities = (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
    table = pd.DataFrame({"tile_id": [f"tile_{i:03}" for i in range(TILES)], "target": target})
    table["predicted"] = probabilities.argmax(axis=1)
    table["probabilities"] = list(probabilities)
    return table, classification_metrics(target, probabilities)


def fake_multilabel(
    folder: Path, generator: np.random.Generator, skill: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    target = np.random.default_rng(0).integers(0, 2, (TILES, 4))
    target[0] = 0
    probabilities = np.where(generator.random((TILES, 4)) < skill, target, 1 - target).astype(np.float32)
    table = pd.DataFrame({"tile_id": [f"tile_{i:03}" for i in range(TILES)], "target": list(target)})
    table["predicted"], table["probabilities"] = list(probabilities.astype(np.int64)), list(probabilities)
    return table, multilabel_metrics(target, probabilities)


def fake_segmentation(
    folder: Path, generator: np.random.Generator, skill: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    coarse = np.random.default_rng(0).integers(0, 4, (TILES, 4, 4)).astype(np.uint8)
    target = coarse.repeat(8, axis=1).repeat(8, axis=2)
    noise = generator.integers(0, 4, target.shape).astype(np.uint8)
    blur = generator.random(target.shape) < np.linspace(0.1, 1.5 - skill, TILES)[:, None, None]
    predicted = np.where(blur, noise, target)
    target[:, :4, :4] = 255
    confusions = [confusion_matrix(t, p, 4, 255) for t, p in zip(target, predicted, strict=True)]
    names = [f"tile_{i:03}" for i in range(TILES)]
    np.savez(folder / "masks.npz", tile_id=np.array(names[::4]), target=target[::4], predicted=predicted[::4])
    table = pd.DataFrame({"tile_id": names, "confusion": [c.ravel() for c in confusions]})
    table["miou"] = [segmentation_metrics(c)["miou"] for c in confusions]
    return table, segmentation_metrics(np.sum(confusions, axis=0))


def fake_weights() -> dict[str, Any]:
    values = np.random.default_rng(0).dirichlet(np.ones(12)).reshape(3, 4)
    return {"timesteps": [21, 61, 161], "layers": LAYERS, "values": values.tolist()}


HASHES = {"feature": "f1", "contents": "c1", "labels": "l1"}
AMOUNTS = {"1%": 6, "10%": 60, "100%": 600}


def fake_probe(folder: Path, **changes: Any) -> Path:
    """Write a sweep of 2 probes x 2 draws of few labels; layer 3 at timestep 61 is the best on val.

    Keys of probe.json are for the caller.
    """
    folder.mkdir(parents=True)
    random, rows = np.random.default_rng(0), []
    for labels, n_train in AMOUNTS.items():
        for draw in range(1 if labels == "100%" else 2):
            for kind in ("logistic", "knn"):
                rows += fake_sweep(labels, n_train, draw, kind, random)
    table = pd.DataFrame(rows)
    table.to_parquet(folder / "probe.parquet")
    table.to_csv(folder / "probe.csv", index=False)
    info = {
        "kind": "probe",
        "task": "classification",
        "partition": "default",
        "store": {"path": "features.zarr", "hashes": HASHES},
        "metric": "accuracy",
        "command": "satdifuser probe features.zarr -o probe",
    }
    (folder / "probe.json").write_text(json.dumps(info | changes))
    return folder


def fake_sweep(
    labels: str, n_train: int, draw: int, kind: str, random: np.random.Generator
) -> list[dict[str, Any]]:
    """The rows of one probe with one amount of labels: val of all inputs, test of the one that is best."""
    rows = []
    for timestep in (21, 61, 161, None):
        for layer in (*LAYERS, None):
            inputs = {(True, True): "single", (True, False): "timestep", (False, True): "layer"}
            good = 0.05 * np.log10(n_train) + 0.2 * (layer == LAYERS[3]) + 0.1 * (timestep == 61)
            row = {
                "dataset": "features",
                "partition": "default",
                "labels": labels,
                "draw": draw,
                "n_train": n_train,
                "n_val": 20,
                "n_test": TILES,
                "inputs": inputs.get((timestep is not None, layer is not None), "all"),
                "timestep": timestep,
                "layer": layer,
                "stride": None if layer is None else 16 >> LAYERS.index(layer) // 2,
                "probe": kind,
                "strength": 1.0,
                "metric": "accuracy",
                "split": "val",
                "value": 0.4 + good + 0.02 * random.random(),
                "low": np.nan,
                "high": np.nan,
                "seed": 0,
                "seconds": 0.1,
                "gradient_norm": 1e-5,
                "converged": True,
                "chosen": False,
            }
            rows.append(row)
    best = max(rows, key=lambda row: row["value"])
    best["chosen"] = True
    value = best["value"] - 0.1
    return [*rows, best | {"split": "test", "value": value, "low": value - 0.05, "high": value + 0.05}]


class Page(HTMLParser):
    """What the tests ask of a page: tags with attributes, and visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
