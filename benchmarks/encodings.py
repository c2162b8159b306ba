"""What each encoding costs and keeps: bytes, error of the centred features, and the score of a fusion.

    python benchmarks/encodings.py FLOAT32_STORE --out FOLDER [--seeds 5] [--epochs 20] [--trained-on int8]

FLOAT32_STORE is extracted with `--set store.encoding=float32` from labelled tiles. FOLDER keeps a copy in
each encoding, and one run of the global fusion per encoding and seed; the command goes on where it stopped.
The error of a layer is that of its maps minus their channel means, which carry much of their energy.
"Tested on it": the networks of float32, measured on the test tiles of each encoding, their change in points.
It shows what an encoding loses; two trainings of one seed part by chance, whatever their features differ in.
Where --trained-on names some encodings, the score of the others is that of the networks of float32.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import get_args

import numpy as np

import satdifuser
from satdifuser.evaluate.evaluation import StoreNetwork
from satdifuser.fuse.data import labelled
from satdifuser.fuse.run_folder import Run
from satdifuser.store.copy import copy_store
from satdifuser.store.reader import FeatureStore
from satdifuser.store.settings import Encoding, StoreSettings

SAMPLE = 64  # tiles whose error is measured
HEADLINE = {"classification": "accuracy", "multilabel": "map", "segmentation": "miou"}


def main() -> None:
    args = parse_args()
    original = satdifuser.open_store(args.store)
    args.out.mkdir(parents=True, exist_ok=True)
    print(
        "| encoding | bytes, of float16 | error of a layer: median, largest "
        "| networks of float32 tested on it, points "
        "| networks trained on it: test score by seed | mean | against float32, points |"
    )
    print("|---|---|---|---|---|---|---|")
    reference = feature_bytes(copy_store(original, args.out / "float16.zarr", settings=encoded("float16")))
    exact = [trained(original, seed, args) for seed in range(args.seeds)]
    own = [tested(run, original) for run in exact]
    for encoding in get_args(Encoding):
        store = copy_store(original, args.out / f"{encoding}.zarr", settings=encoded(encoding))
        errors = layer_errors(original, store)
        kept = [tested(run, store) for run in exact]
        again = encoding != "float32" and encoding in args.trained_on
        runs = [trained(store, seed, args) for seed in range(args.seeds)] if again else []
        scores = [tested(run, store) for run in runs] or kept
        changes = [found - score for found, score in zip(kept, own, strict=True)]
        mean = statistics.mean(scores)
        print(
            f"| `{encoding}` | {feature_bytes(store) / reference:.3f} | {statistics.median(errors):.4f}, "
            f"{max(errors):.4f} | {100 * statistics.mean(changes):+.2f} | "
            f"{', '.join(f'{score:.3f}' for score in scores)} | {mean:.4f} | "
            f"{100 * (mean - statistics.mean(own)):+.2f} |",
            flush=True,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=Path, help="a store in float32")
    parser.add_argument("--out", type=Path, required=True, help="for the copies and the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--trained-on",
        type=lambda names: names.split(","),
        default=get_args(Encoding),
        help="encodings to train on beside float32, commas between; default: all",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.004)
    return parser.parse_args()


def encoded(encoding: Encoding) -> StoreSettings:
    return StoreSettings(encoding=encoding)


def feature_bytes(store: FeatureStore) -> int:
    """Bytes on disk of all feature arrays but the pooled ones."""
    return sum(
        size
        for record in store.commits
        for key, (size, _) in record["files"].items()
        if key.startswith("features/") and "/pooled/" not in key
    )


def layer_errors(original: FeatureStore, store: FeatureStore) -> list[float]:
    """Relative error of every layer's centred maps, over the timesteps and some tiles."""
    rows = original.select()
    rows = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.intp)]
    exact, found, errors = original.maps(rows), store.maps(rows), []
    for group, positions in store.groups.items():
        side = store.attributes.layers[positions[0]].pool
        wanted = exact[group] - exact[group].mean((-2, -1), keepdims=True)
        error = (
            spread(found[group] - exact[group].mean((-2, -1), keepdims=True), wanted.shape[-2:], side)
            - wanted
        )
        axes = (0, 1, 3, 4, 5)
        errors += np.sqrt(np.square(error).sum(axes) / np.square(wanted).sum(axes)).tolist()
    return errors


def spread(maps: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """Undo `average_windows` as far as that goes: each average stands for its whole window."""
    return maps.repeat(side, -2).repeat(side, -1)[..., : size[0], : size[1]]


def trained(store: FeatureStore, seed: int, args: argparse.Namespace) -> Run:
    out = args.out / "runs" / store.attributes.encoding / str(seed)
    how = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    return satdifuser.fit(store, seed=seed, out=out, **how)


def tested(run: Run, store: FeatureStore) -> float:
    """The score of a network on the test tiles of a store, which may not be the one it was fitted on."""
    rows = labelled(store, "test", run.partition)
    return float(StoreNetwork(run, store).predict(rows).metrics()[HEADLINE[run.info["task"]]])


if __name__ == "__main__":
    main()
