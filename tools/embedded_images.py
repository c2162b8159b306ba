"""What the embedded backbone is trained on: parent images, their hashes, and crops that point to them.

A source is a folder of images, a zip of images, a GeoTIFF, or ``synthetic:N`` for N generated scenes. In a
folder with a splits.csv only images count that are ``train`` in every column whose name starts with
"split", so that no image of any evaluation split is seen.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from satdifuser.extract.settings import SyntheticSettings
from satdifuser.extract.sources.files import SUFFIXES, read_pixels
from satdifuser.extract.sources.synthetic import SyntheticSource
from satdifuser.store.location import is_tiff

Pixels = NDArray[np.uint8]
SYNTHETIC = "synthetic:"
SYNTHETIC_SEED = 1000  # far from the seeds of the packaged job and of its tuning
SCALES = (1, 2, 4)  # px of a large image that become one px of a crop
HASH_RULE = "first 16 hex digits of the SHA-256 of the decoded pixels, (height, width, RGB) uint8"


@dataclass(frozen=True)
class Crops:
    """Square images to train on, and where each comes from."""

    pixels: Tensor  # (N, 3, size, size) uint8
    parents: NDArray[np.int64]  # (N,) positions in hashes
    hashes: list[str]  # of the parent images
    sources: list[str]  # of the parent images, as named on the command line

    def save_record(self, path: Path) -> None:
        """Write the hashes of all parents by source, with their numbers of crops."""
        found: dict[str, dict[str, object]] = {}
        for source in dict.fromkeys(self.sources):
            chosen = [i for i, name in enumerate(self.sources) if name == source]
            crops = int(np.isin(self.parents, chosen).sum())
            found[source] = {"crops": crops, "parents": sorted(self.hashes[i] for i in chosen)}
        path.write_text(json.dumps({"hash": HASH_RULE, "sources": found}, indent=0) + "\n")


def hash_pixels(pixels: Pixels) -> str:
    """Hash an image (H, W, 3) uint8 by HASH_RULE."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def load_crops(sources: list[str], size: int, seed: int) -> Crops:
    """Read all parent images and cut them to crops: one of an image of this size, more of larger ones."""
    crops: list[Pixels] = []
    parents: list[int] = []
    hashes: list[str] = []
    names: list[str] = []
    for source in sources:
        before = len(crops)
        for pixels, valid in read_parents(source):
            cut = list(cut_crops(pixels, valid, size, np.random.default_rng((seed, len(hashes)))))
            crops += cut
            parents += [len(hashes)] * len(cut)
            hashes.append(hash_pixels(pixels))
            names.append(source if source.startswith(SYNTHETIC) else Path(source).name)
        if len(crops) == before:
            raise SystemExit(
                f"{source}: found no image of at least {size} px to train on ({', '.join(SUFFIXES)})"
            )
    stacked = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    return Crops(stacked, np.array(parents), hashes, names)


def read_parents(source: str) -> Iterator[tuple[Pixels, NDArray[np.bool_]]]:
    """Yield every image of a source, (H, W, 3) uint8, with the pixels that hold data, (H, W)."""
    if source.startswith(SYNTHETIC):
        yield from paint_scenes(int(source.removeprefix(SYNTHETIC)))
        return
    path = Path(source)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if n.lower().endswith(SUFFIXES)):
                yield all_valid(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
        return
    for file in list_images(path):
        if is_tiff(file):
            image, valid = read_pixels(file)
            yield np.ascontiguousarray(image[:3].transpose(1, 2, 0)).astype(np.uint8), valid
        else:
            yield all_valid(np.asarray(Image.open(file).convert("RGB")))


def all_valid(pixels: Pixels) -> tuple[Pixels, NDArray[np.bool_]]:
    return pixels, np.ones(pixels.shape[:2], bool)


def list_images(path: Path) -> list[Path]:
    """The image itself, or the images of a folder that may be trained on."""
    if path.is_file():
        return [path]
    if not (path / "splits.csv").is_file():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    with (path / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    column = "image" if "image" in rows[0] else "path"
    return [path / row[column] for row in rows if is_train_everywhere(row)]


def is_train_everywhere(row: dict[str, str]) -> bool:
    return all(value == "train" for name, value in row.items() if name.startswith("split"))


def paint_scenes(count: int) -> Iterator[tuple[Pixels, NDArray[np.bool_]]]:
    source = SyntheticSource(SyntheticSettings(tiles=count, seed=SYNTHETIC_SEED))
    for record in source.records():
        yield all_valid(source.read(record).image.transpose(1, 2, 0))


def cut_crops(
    pixels: Pixels, valid: NDArray[np.bool_], size: int, rng: np.random.Generator
) -> Iterator[Pixels]:
    """Yield random crops, as many as cover the area, each at one of SCALES; none without data."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        yield pixels
        return
    scales = [scale for scale in SCALES if scale * size <= min(height, width)]
    if not scales:
        return
    for _ in range(height * width // size**2):
        side = size * int(rng.choice(scales))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        window = slice(top, top + side), slice(left, left + side)
        if valid[window].all():
            yield np.asarray(Image.fromarray(pixels[window]).resize((size, size), Image.Resampling.BOX))
