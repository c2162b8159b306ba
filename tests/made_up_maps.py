"""A small georeferenced scene with labels, features of it, and runs that were fitted on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from command_line import succeed
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

CLASSES = ["water", "field", "wood"]
TILE, OVERLAP = 32, 16  # px
PLACE = {"crs": "EPSG:32632", "transform": Affine(10, 0, 500000, 0, -10, 5000000)}
ONE_THREAD = "extract.threads=1"  # several slow each other down where tensors are this small
COLOURS = np.array([[30, 60, 120], [170, 160, 90], [40, 110, 50]])


def land_cover(size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    """Patches of three classes, (H, W)."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(size), 6, mode="wrap")
    return np.digitize(noise, np.quantile(noise, [0.33, 0.66])).astype(np.uint8)


def photograph(cover: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
    """Red, green and blue of land cover, (3, H, W)."""
    noise = np.random.default_rng(seed).normal(0, 12, (*cover.shape, 3))
    return np.moveaxis((COLOURS[cover] + noise).clip(1, 255).astype(np.uint8), -1, 0)


def write_scene(path: Path, pixels: NDArray[Any], **profile: Any) -> Path:
    """Write (B, H, W) pixels as a GeoTIFF, in UTM 32N by default."""
    bands, height, width = pixels.shape
    shape = {"count": bands, "height": height, "width": width, "dtype": pixels.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", **(PLACE | shape | profile)) as dataset:
        dataset.write(pixels)
    return path


@dataclass(frozen=True)
class Mapped:
    """What map tests share: a folder with all of it, never written to."""

    folder: Path

    @property
    def scene(self) -> Path:
        """70 x 90 px with a stripe without data."""
        return self.folder / "scene.tif"

    @property
    def store(self) -> Path:
        """Features of the scene's tiles, with masks."""
        return self.folder / "masks.zarr"

    @property
    def run(self) -> Path:
        """A run for segmentation."""
        return self.folder / "runs/masks"

    @property
    def tile_store(self) -> Path:
        """Features of generated tiles of 10 classes, on a grid."""
        return self.folder / "tiles.zarr"

    @property
    def tile_run(self) -> Path:
        """A run for classification."""
        return self.folder / "runs/tiles"


def make_mapped(folder: Path) -> Mapped:
    """Write the scene, extract its features and fit the runs."""
    made, size = Mapped(folder), (70, 90)
    cover = land_cover(size)
    pixels = photograph(cover)
    pixels[:, :, 40:44] = 0
    write_scene(made.scene, pixels, nodata=0)
    write_scene(folder / "labels.tif", cover[None])
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    small = settings("extract.timesteps=[21]", ONE_THREAD)
    scene = settings("source.kind=scenes", f"source.root={made.scene}", f"source.tile_size={TILE}")
    labels = settings(f"source.labels={folder / 'labels.tif'}", f"source.classes={folder / 'classes.json'}")
    succeed("extract", *scene, f"--set=source.overlap={OVERLAP}", *labels, *small, "-o", made.store)
    tiles = settings("source.tiles=30", f"source.tile_size={TILE}")
    succeed("extract", *tiles, *small, "-o", made.tile_store)
    quick = settings("fit.fusion=[global]", "fit.projection=16", "fit.norm_groups=1", "fit.batch_size=4")
    quick += settings("fit.min_steps=1", "fit.warmup_epochs=0", "evaluate.baselines=false")
    for store, run, epochs in ((made.store, made.run, 8), (made.tile_store, made.tile_run, 2)):
        succeed(
            "fit",
            store,
            *quick,
            *settings(f"fit.epochs={epochs}", "fit.lr=0.02"),
            "-o",
            folder / "fits" / run.name,
        )
        run.parent.mkdir(exist_ok=True)
        (folder / "fits" / run.name / "global-seed0").rename(run)
    return made


def settings(*pairs: str) -> tuple[str, ...]:
    """``--set`` options."""
    return tuple(word for pair in pairs for word in ("--set", pair))
