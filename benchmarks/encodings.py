"""What each encoding costs and keeps: bytes, error of the centred features, and the score of a fusion.

    python benchmarks/encodings.py FLOAT32_STORE --out FOLDER [--seeds 5] [--epochs 20]

FLOAT32_STORE is extracted with `--set store.encoding=float32` from labelled tiles. FOLDER keeps a copy in
each encoding, and one run of the global fusion per encoding and seed; the command goes on where it stopped.
The error of a layer is that of its maps minus their channel means, which carry much of their energy.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import get_args

import numpy as np

import satdifuser
from satdifuser.store.copy import copy_store
from satdifuser.store.reader import FeatureStore
from satdifuser.store.settings import Encoding, StoreSettings

SAMPLE = 64  # tiles whose error is measured
HEADLINE = {"classification": "accuracy", "multilabel": "map", "segmentation": "miou"}


def main() -> None:
    args = parse_args()
    original = satdifuser.open_store(args.store)
    args.out.mkdir(parents=True, exist_ok=True)
    print("| encoding | bytes, of float16 | error of a layer: median, largest | test score by seed | mean |")
    print("|---|---|---|---|---|")
    reference = feature_bytes(copy_store(original, args.out / "float16.zarr", settings=encoded("float16")))
    for encoding in get_args(Encoding):
        store = copy_store(original, args.out / f"{encoding}.zarr", settings=encoded(encoding))
        errors = layer_errors(original, store)
        scores = [score(store, seed, args) for seed in range(args.seeds)]
        print(
            f"| `{encoding}` | {feature_bytes(store) / reference:.3f} | {statistics.median(errors):.4f}, "
            f"{max(errors):.4f} | {', '.join(f'{s:.3f}' for s in scores)} | {statistics.mean(scores):.4f} |",
            flush=True,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=Path, help="a store in float32")
    parser.add_argument("--out", type=Path, required=True, help="for the copies and the runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
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


def score(store: FeatureStore, seed: int, args: argparse.Namespace) -> float:
    run = satdifuser.fit(
        store, seed=seed, out=args.out / "runs" / store.attributes.encoding / str(seed), epochs=args.epochs
    )
    return float(run.metrics["test"][HEADLINE[store.attributes.task]])


if __name__ == "__main__":
    main()
