"""How good are a backbone's features? Linear probes of pooled features, on train and val only.

    python tools/probe_backbone.py LABELLED_IMAGES BACKBONE [BACKBONE …]

LABELLED_IMAGES is a folder with splits.csv (path, label, split), such as EuroSAT's; test rows are never
read. BACKBONE is "embedded" or a diffusers folder. One line of JSON each: val accuracy of logistic
regressions on the best single (timestep, layer) and on all of them side by side, as the baselines of
`satdifuser fit` compute them (forward noising, default layers; strength chosen on val too).
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from satdifuser.evaluate.baselines import STRENGTHS
from satdifuser.evaluate.probes import Probes, fit_probes
from satdifuser.extract.backbone import find_backbone, load_backbone
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.layers import select_layers
from satdifuser.extract.settings import BackboneSettings, ExtractSettings

Floats = NDArray[np.float32]
Pooled = dict[tuple[int, str], Floats]
"""(timestep, layer) -> (N, C) means over the map."""


@dataclass(frozen=True)
class Labelled:
    """Images (N, 3, H, W) uint8 of one split with their labels (N,)."""

    names: list[str]
    images: Tensor
    labels: NDArray[np.int64]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    train, val = read_split(args.images, "train", args.train), read_split(args.images, "val")
    for model in args.backbones:
        started = time.process_time()
        extractor = open_extractor(model, args.noising, train.images.shape[-2:], args.device)
        scores = probe(pool(extractor, train), train, pool(extractor, val), val)
        spent = {"cpu_seconds": round(time.process_time() - started)}
        print(json.dumps({"backbone": model, "noising": args.noising, **scores, **spent}), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("backbones", nargs="+", metavar="BACKBONE")
    parser.add_argument(
        "--train", type=int, default=0, help="use so many train images, seeded choice; 0: all"
    )
    parser.add_argument("--noising", choices=("forward", "inversion"), default="forward")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def read_split(root: Path, split: str, limit: int = 0) -> Labelled:
    """Read the images of one split; of more than `limit` a seeded choice."""
    with (root / "splits.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    classes = sorted({row["label"] for row in rows})
    if limit:
        chosen = np.random.default_rng(0).permutation(len(rows))[:limit]
        rows = [rows[i] for i in sorted(chosen)]
    pixels = [np.asarray(Image.open(root / row["path"]).convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Labelled([r["path"] for r in rows], images, np.array([classes.index(r["label"]) for r in rows]))


def open_extractor(model: str, noising: str, size: Sequence[int], device: str) -> FeatureExtractor:
    settings = BackboneSettings(model=model, device=device)
    extract = ExtractSettings(noising=noising)
    info = find_backbone(settings)
    layers = select_layers(info.layers((size[0], size[1])), extract.layers)
    return FeatureExtractor(load_backbone(info, settings), extract, layers)


def pool(extractor: FeatureExtractor, part: Labelled, batch: int = 32) -> Pooled:
    """Mean over the map of every (timestep, layer)."""
    parts: list[list[Tensor]] = []
    for start in range(0, len(part.names), batch):
        rgb = part.images[start : start + batch].float() / 255
        maps = extractor(rgb, part.names[start : start + batch])  # per layer (B, T, C, H, W)
        parts.append([m.mean(dim=(3, 4)).cpu() for m in maps])
    pooled: Pooled = {}
    for layer, means in zip(extractor.layers, zip(*parts, strict=True), strict=True):
        joined = torch.cat(means).numpy()
        for step, t in enumerate(extractor.timesteps):
            pooled[t, layer.name] = joined[:, step]
    return pooled


def probe(seen: Pooled, train: Labelled, held_out: Pooled, val: Labelled) -> dict[str, object]:
    """Val accuracy of the best single input and of all inputs side by side."""
    singles = {key: accuracy(seen[key], train.labels, held_out[key], val.labels) for key in seen}
    best = max(singles, key=lambda key: singles[key])
    everything = accuracy(join(seen), train.labels, join(held_out), val.labels)
    by_timestep = {t: max(v for k, v in singles.items() if k[0] == t) for t, _ in singles}
    return {
        "train": len(train.labels),
        "val": len(val.labels),
        "single": singles[best],
        "at": f"t = {best[0]}, {best[1]}",
        "best_by_timestep": by_timestep,
        "concatenation": everything,
    }


def join(pooled: Pooled) -> Floats:
    return np.concatenate(list(pooled.values()), axis=1)


def accuracy(x: Floats, y: NDArray[np.int64], x_val: Floats, y_val: NDArray[np.int64]) -> float:
    """Best val accuracy over the strengths."""
    return best_accuracy(fit_all(x, y), x_val, y_val)


def fit_all(x: Floats, y: NDArray[np.int64]) -> Probes:
    """A logistic regression for each strength."""
    return fit_probes("logistic", x, y, int(y.max()) + 1, STRENGTHS)


def best_accuracy(probes: Probes, x: Floats, y: NDArray[np.int64]) -> float:
    """The best accuracy over the strengths."""
    return float((probes.probabilities(x).argmax(2) == y).mean(axis=1).max())


if __name__ == "__main__":
    main()
