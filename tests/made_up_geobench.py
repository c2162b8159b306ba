"""A data set in the layout of GEO-Bench's package, made up without it."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS

from satdifuser.extract.settings import GeobenchSettings
from satdifuser.extract.sources import Source, open_source

S2 = ["01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red", "05 - Vegetation Red Edge", "08 - NIR"]
AERIAL = ["Red", "Green", "Blue"]
CLASSES = ["wood", "field", "town"]
DATE = datetime(2018, 6, 1)
PLACE = {"transform": Affine(10, 0, 500000, 0, -10, 5200000), "crs": CRS.from_epsg(32632)}


def fake_geobench(patch: pytest.MonkeyPatch, package: str) -> Callable[..., Any]:
    """Put fake modules of the benchmark's package in place; return what makes instances of their classes."""
    made: dict[str, list[str]] = {
        "dataset": ["SpectralBand", "Sentinel2", "SegmentationClasses"],
        "label": ["Classification", "MultiLabelClassification", "Regression"],
        "task": ["TaskSpecifications"],
    }
    for name in (package.split(".")[0], package):
        patch.setitem(sys.modules, name, ModuleType(name))
    for module, classes in made.items():
        full = f"{package}.{module}"
        patch.setitem(sys.modules, full, ModuleType(full))
        for name in classes:
            setattr(sys.modules[full], name, type(name, (), {"__module__": full}))

    def make(place: str, **state: Any) -> Any:
        module, name = place.split(".")
        instance = getattr(sys.modules[f"{package}.{module}"], name)()
        instance.__dict__.update(state)
        return instance

    return make


class Bench:
    """A data set that a test writes, in the layout of the benchmark's package."""

    def __init__(self, root: Path, make: Callable[..., Any]) -> None:
        self.root, self.make = root, make
        self.folder = root / "classification_v1.0" / "m-eurosat"
        self.folder.mkdir(parents=True)
        self.task("label.Classification", n_classes=3, _class_names=CLASSES)
        self.partition("default", train=["a", "b"], valid=["c"], test=["d"])
        self.partition("0.50x_train", train=["b"], valid=["c"], test=["d"])
        for number, name in enumerate("abcd"):
            self.sample(name, label=number % 3)

    def task(self, kind: str, **state: Any) -> None:
        specs = self.make("task.TaskSpecifications", label_type=self.make(kind, **state), patch_size=(1, 1))
        (self.folder / "task_specs.pkl").write_bytes(pickle.dumps(specs, protocol=4))

    def partition(self, partition: str, **splits: list[str]) -> None:
        (self.folder / f"{partition}_partition.json").write_text(json.dumps(splits))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.hdf5"

    def sample(
        self,
        name: str,
        names: list[str] = S2,
        mask: Any = None,
        place: dict[str, Any] = PLACE,
        **content: Any,
    ) -> np.ndarray:
        """Write a sample of random digital numbers; return them as (B, H, W)."""
        rng = np.random.default_rng(ord(name[0]))
        pixels = rng.integers(0, 3000, (len(names), 6, 8)).astype(np.int16)
        bands = {
            f"{band}_2018-06-01": (array, self.band(band) | place)
            for band, array in zip(names, pixels, strict=True)
        }
        if mask is not None:
            info = self.make("dataset.SegmentationClasses", name="label", n_classes=3)
            bands["label"] = (mask, {"band_info": info, "date": None, "transform": None, "crs": None})
        self.write(name, {key: array for key, (array, _) in bands.items()}, {
            **content, **{key: note for key, (_, note) in bands.items()}, "bands_order": list(bands),
        })  # fmt: skip
        return pixels

    def band(self, name: str) -> dict[str, Any]:
        info = self.make("dataset.Sentinel2", name=name, alt_names=(name[:2], name.split(" ")[-1].lower()))
        return {
            "band_info": info,
            "date": DATE,
            "date_id": DATE,
            "spatial_resolution": np.float64(10),
        }

    def write(self, name: str, arrays: dict[str, Any], content: Any) -> None:
        with h5py.File(self.path(name), "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array)
            file.attrs["pickle"] = str(pickle.dumps(content))

    def settings(self, **settings: Any) -> GeobenchSettings:
        return GeobenchSettings(kind="geobench", **({"root": self.root, "dataset": "m-eurosat"} | settings))

    def open(self, **settings: Any) -> Source:
        return open_source(self.settings(**settings))
