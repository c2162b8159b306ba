"""What a scene tells of its place, date and clouds, and that it reaches DiffusionSat."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from command_line import succeed
from made_up import diffusionsat
from made_up_scene import write_scene

from satdifuser.extract.metadata import tile_metadata
from satdifuser.extract.settings import ScenesSettings
from satdifuser.extract.sources import list_tiles, open_source
from satdifuser.extract.sources.tile import TileRecord
from satdifuser.store.georeference import Georeference
from satdifuser.store.reader import open_store


def tile(crs: str = "EPSG:32633", transform: Any = (10, 0, 500000, 0, -10, 0), **fields: Any) -> TileRecord:
    return TileRecord("a", "a.tif", "none", (64, 64), georeference=Georeference(crs, transform), **fields)


def scene_tiles(path: Path, **fields: Any) -> list[TileRecord]:
    settings = {"kind": "scenes", "root": path, "tile_size": 16, "split": {"train": 1, "val": 0, "test": 0}}
    return list_tiles(open_source(ScenesSettings.model_validate(settings | fields)))


def test_georeference_and_date_of_a_tile() -> None:
    """On the central meridian of UTM 33, where its metres are 1 / 0.9996 on the ground; twice enlarged."""
    record = tile(transform=(10, 0, 499680, 0, -10, 320), date="2019-04-16T10:00:31", cloud_cover=0.25)
    found = tile_metadata(record, (128, 128))
    assert found.longitude == pytest.approx(15, abs=1e-6)
    assert found.latitude == pytest.approx(0, abs=1e-6)
    assert found.gsd == pytest.approx(5 / 0.9996, rel=1e-5)
    assert (found.year, found.month, found.day, found.cloud_cover) == (2019, 4, 16, 0.25)


@pytest.mark.parametrize(
    ("crs", "transform", "metres"),
    [
        # at 60 degrees north a degree is 111.412 km along the meridian and 55.800 km across it
        ("EPSG:4326", (0.001, 0, 10, 0, -0.001, 60.032), math.sqrt(111.412 * 55.800)),
        ("EPSG:2263", (2, 0, 1e6, 0, -2, 2e5), 2 * 0.3048006),  # US survey feet
        # at 60 degrees north Web Mercator is twice too wide; its ellipsoid makes the rest
        ("EPSG:3857", (20, 0, 1.1e6, 0, -20, 8399738 + 640), 10.0),
        ("EPSG:32633", (8, 6, 499680, 6, -8, 320), 10 / 0.9996),  # turned
    ],
)
def test_metres_per_pixel_are_those_on_the_ground(crs: str, transform: Any, metres: float) -> None:
    assert tile_metadata(tile(crs, transform), (64, 64)).gsd == pytest.approx(metres, rel=4e-3)


@pytest.mark.parametrize(
    ("tags", "date", "clouds"),
    [
        ({"ACQUISITIONDATE": "2019-04-16"}, "2019-04-16T00:00:00", None),
        ({"PRODUCT_START_TIME": "2019-04-16T10:00:31.024Z"}, "2019-04-16T10:00:31.024000+00:00", None),
        ({"DATE_ACQUIRED": "2019-04-16", "CLOUD_COVER": "12.5"}, "2019-04-16T00:00:00", 0.125),
        ({"TIFFTAG_DATETIME": "2019:04:16 10:00:31", "CLOUDCOVER": "0"}, "2019-04-16T10:00:31", 0.0),
        ({"CLOUD_COVERAGE_ASSESSMENT": "100.0"}, "", 1.0),
        ({"CLOUD_COVER": "-1"}, "", None),
        ({"CLOUDCOVER": "unknown"}, "", None),
    ],
)
def test_tags_of_a_scene(tmp_path: Path, tags: dict[str, str], date: str, clouds: float | None) -> None:
    write_scene(tmp_path / "a.tif", np.ones((3, 16, 16), np.uint8))
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.update_tags(**tags)
    [record] = scene_tiles(tmp_path / "a.tif")
    assert (record.date, record.cloud_cover) == (date, clouds)


def test_tags_of_gdals_imagery_domain(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.tif", np.ones((3, 16, 16), np.uint8))
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.update_tags(ns="IMAGERY", ACQUISITIONDATETIME="2020-02-03T10:00:00", CLOUDCOVER="40")
    [record] = scene_tiles(tmp_path / "a.tif")
    assert (record.date, record.cloud_cover) == ("2020-02-03T10:00:00", 0.4)


def test_settings_say_date_and_clouds_instead(tmp_path: Path) -> None:
    write_scene(tmp_path / "a.tif", np.ones((3, 16, 16), np.uint8))
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.update_tags(ACQUISITIONDATE="2019-04-16", CLOUDCOVER="40")
    [record] = scene_tiles(tmp_path / "a.tif", date=datetime.date(2021, 7, 1), cloud_cover=0)
    assert (record.date, record.cloud_cover) == ("2021-07-01", 0)


def test_what_a_scene_tells_reaches_the_backbone(tmp_path: Path) -> None:
    """Through `extract`, and through growth from the latents, where there is no scene any more."""
    torch.manual_seed(0)
    folder = diffusionsat(tmp_path / "resolution16")
    write_scene(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (3, 16, 16), np.uint8))
    words = ["--set", "source.kind=scenes", "--set", f"source.root={tmp_path / 'a.tif'}"]
    words += [
        "--set",
        "source.tile_size=16",
        "--set",
        "source.date=2019-04-16",
        "--set",
        "source.cloud_cover=0.5",
    ]
    words += ["--set", f"backbone.model={folder}", "--set", "extract.layers=['*.conv2']"]
    pooled = {}
    for name, more in {"told": ["true"], "clear": ["true", "0"], "off": ["false"]}.items():
        given = [*words, "--set", f"backbone.metadata={more[0]}"]
        given += ["--set", "source.cloud_cover=0"] if len(more) > 1 else []
        succeed("extract", *given, "--set", "extract.timesteps=[21]", "-o", tmp_path / f"{name}.zarr")
        pooled[name] = open_store(tmp_path / f"{name}.zarr").pooled().values
    assert np.abs(pooled["told"] - pooled["clear"]).max() > 1e-6  # clouds alone make a difference
    assert np.abs(pooled["told"] - pooled["off"]).max() > 1e-6
    store = open_store(tmp_path / "told.zarr")
    assert store.attributes.backbone["metadata_missing"] == {}
    given = [*words, "--set", "backbone.metadata=true", "--set", "extract.timesteps=[21, 61]"]
    succeed("extract", *given, "-o", tmp_path / "fresh.zarr")
    (tmp_path / "a.tif").unlink()
    succeed("extract", "-o", tmp_path / "told.zarr", "--add-timesteps", "61")
    grown, fresh = (open_store(tmp_path / f"{name}.zarr").pooled().values for name in ("told", "fresh"))
    np.testing.assert_allclose(grown, fresh, atol=1e-5 * np.abs(fresh).max())
