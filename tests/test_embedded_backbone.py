"""The embedded backbone: its card tells the truth about the weights, and no test image was trained on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import pytest
from embedded_images import hash_pixels, is_train_everywhere, read_parents
from PIL import Image

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights/embedded"
CARD = ROOT / "docs/embedded_backbone.md"


def test_hashes_in_the_card_are_those_of_the_weights() -> None:
    written = {
        name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", CARD.read_text(), re.M)
    }
    found = {
        path.relative_to(WEIGHTS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in WEIGHTS.rglob("*.safetensors")
    }
    assert written == found


def test_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")) < 16e6


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """Hashes of all images that the weights were trained on."""
    sources = json.loads((WEIGHTS / "seen_images.json").read_text())["sources"]
    return {digest for source in sources.values() for digest in source["parents"]}


def digests(paths: Iterable[Path]) -> list[str]:
    return [hash_pixels(pixels) for path in paths for pixels, _ in read_parents(str(path))]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "splits.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_record_is_of_the_images_that_were_given(shared: Path, seen: set[str]) -> None:
    """Pixels hash here as they did then, else the tests below would pass whatever was seen."""
    with zipfile.ZipFile(shared / "data/eurosat_unlabelled_12k.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::40]
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    assert {hash_pixels(np.asarray(image)) for image in images} <= seen


def test_no_eurosat_image_was_seen(shared: Path, seen: set[str]) -> None:
    folder = shared / "data/eurosat"
    assert not seen.intersection(digests(folder / row["path"] for row in rows(folder)))


@pytest.mark.parametrize("name", ["dubai", "amazon"])
def test_no_image_of_a_val_or_test_split_was_seen(shared: Path, seen: set[str], name: str) -> None:
    folder = shared / "data/seg" / name
    held_out = [folder / row["image"] for row in rows(folder) if not is_train_everywhere(row)]
    assert len(held_out) > 10
    assert not seen.intersection(digests(held_out))


def test_no_geobench_fixture_was_seen(shared: Path, seen: set[str]) -> None:
    """Each is an image of `eurosat/`, which the test above covers: as it is in m-eurosat, else enlarged."""
    paths = [shared / "data/eurosat" / row["path"] for row in rows(shared / "data/eurosat")]
    own = np.stack([thumbnail(np.asarray(Image.open(path).convert("RGB"))) for path in paths])
    fixtures = sorted((shared / "data/geobench").glob("*/*/*.hdf5"))
    assert len(fixtures) > 50
    for path in fixtures:
        pixels = read_geobench(path)
        assert (own @ thumbnail(pixels)).max() > 0.996, path
        assert hash_pixels(pixels) not in seen


def read_geobench(path: Path) -> np.ndarray:
    """Red, green and blue of a fixture as (H, W, 3) uint8."""
    with h5py.File(path) as file:
        names = [
            next(n for n in file if f"{colour}_" in n and "Edge" not in n)
            for colour in ("Red", "Green", "Blue")
        ]
        bands = np.stack([file[name][()] for name in names], axis=-1).astype(float)
    return np.rint(bands * (255 / 4095 if bands.max() > 255 else 1)).clip(0, 255).astype(np.uint8)


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """16 x 16 px without mean and contrast, so that products of two are correlations."""
    small = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX)).astype(float).ravel()
    small -= small.mean()
    return small / np.linalg.norm(small)
