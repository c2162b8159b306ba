"""STAC Items of stores and maps: valid by pystac's own schemas and by the models of mlm's authors."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pystac
import pytest
import rasterio
import shapely
from command_line import succeed
from made_up import image_folder
from made_up_maps import CLASSES, ONE_THREAD, Mapped, settings
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.validation import validate_dict
from stac_model.schema import MLModelProperties

from satdifuser.store.reader import open_store
from satdifuser.store.stac import crs_fields, model_name, times, zulu

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation must not fetch a schema."""

    def refuse(*_: object) -> None:
        raise AssertionError("somebody asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def validated(found: dict[str, Any]) -> pystac.Item:
    """The Item, valid by the core's schemas and with models as mlm describes them."""
    item = pystac.Item.from_dict(found)
    validate_dict(found, extensions=[])
    described = {key: value for key, value in found["properties"].items() if key.startswith("mlm:")}
    MLModelProperties.model_validate(described)
    assert described.keys() <= {field.alias for field in MLModelProperties.model_fields.values()}
    assert any("mlm:model" in asset.roles for asset in item.assets.values() if asset.roles)
    for asset in item.assets.values():
        assert ("mlm:artifact_type" in asset.extra_fields) == ("mlm:model" in (asset.roles or []))
    return item


def store_item(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("store", "info", path, "--stac"))
    return found


def test_a_stores_item(mapped: Mapped) -> None:
    found, store = store_item(mapped.store), open_store(mapped.store)
    item = validated(found)
    assert item.id == store.attributes.store_id
    assert item.assets["embeddings"].href == str(mapped.store)
    assert item.assets["embeddings"].extra_fields["satdifuser:content_digest"] == store.content_digest()
    place = ProjectionExtension.ext(item)
    assert place.code == "EPSG:32632"
    ground = shapely.geometry.shape(found["geometry"])
    assert shapely.bounds(ground).tolist() == pytest.approx(found["bbox"])
    with rasterio.open(mapped.scene) as scene:
        left, bottom, right, top = rasterio.warp.transform_bounds(scene.crs, "EPSG:4326", *scene.bounds)
    assert found["bbox"][0] == pytest.approx(left, abs=1e-5)
    assert found["bbox"][3] == pytest.approx(top, abs=1e-5)
    assert found["bbox"][2] >= right  # tiles are padded
    assert found["bbox"][1] <= bottom
    assert item.properties["emb:quantization"]["quantized_dtype"] == "int8"
    assert item.properties["emb:runtime_parameters"]["timesteps"] == [21]
    shapes = {output["name"]: output["result"]["shape"] for output in item.properties["mlm:output"]}
    assert shapes.keys() == store.groups.keys()
    assert item.datetime is None
    assert item.common_metadata.start_datetime is not None


def test_a_maps_item(mapped: Mapped, tmp_path: Path) -> None:
    scene = tmp_path / "scene.tif"
    shutil.copy(mapped.scene, scene)
    with rasterio.open(scene, "r+") as dataset:
        dataset.update_tags(ACQUISITIONDATE="2019-04-16T10:00:31")
    out = tmp_path / "map.tif"
    succeed("predict", mapped.run, scene, "-o", out, "--confidence", *settings(ONE_THREAD))
    item = validated(json.loads((tmp_path / "map.stac.json").read_text()))
    place = ProjectionExtension.ext(item)
    with rasterio.open(out) as dataset:
        assert place.code == "EPSG:32632"
        assert place.shape == list(dataset.shape)
        assert place.transform == list(dataset.transform)[:6]
        assert place.bbox == list(dataset.bounds)
    assert item.datetime is not None
    assert item.datetime.isoformat() == "2019-04-16T10:00:31+00:00"
    classes = ClassificationExtension.ext(item.assets["map"]).classes
    assert classes is not None
    assert [one.name for one in classes] == CLASSES
    assert [band["name"] for band in item.assets["map"].extra_fields["bands"]] == ["class", "confidence"]
    assert (tmp_path / item.assets["map"].href).samefile(out)
    assert (tmp_path / item.assets["model"].href).is_file()
    (scaling,) = item.properties["mlm:input"][0]["value_scaling"]
    assert scaling == {"type": "min-max", "minimum": pytest.approx(0), "maximum": pytest.approx(255)}
    outputs = item.properties["mlm:output"][0]
    assert [one["description"] for one in outputs["classification:classes"]] == CLASSES


def test_a_map_of_tiles_has_an_item_too(mapped: Mapped, tmp_path: Path) -> None:
    succeed("predict", mapped.tile_run, mapped.tile_store, "-o", tmp_path / "map.tif")
    item = validated(json.loads((tmp_path / "map.stac.json").read_text()))
    assert item.properties["mlm:tasks"] == ["scene-classification"]
    assert item.properties["proj:shape"] == [1, 30]


def test_a_store_without_places(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", {"a": 2, "b": 2})
    folder = settings("source.kind=folder", f"source.root={tmp_path / 'images'}", "source.tile_size=16")
    succeed(
        "extract",
        *folder,
        *settings("extract.image_size=32", "extract.timesteps=[21]"),
        "-o",
        tmp_path / "s.zarr",
    )
    found = store_item(tmp_path / "s.zarr")
    assert found["geometry"] is None
    assert "bbox" not in found
    validated(found)


def test_times_of_several_images() -> None:
    assert times(["2020-01-02", "2019-05-06T10:00:00+02:00", ""], "2024-01-01T00:00:00") == {
        "datetime": None,
        "start_datetime": "2019-05-06T10:00:00+02:00",
        "end_datetime": "2020-01-02T00:00:00Z",
    }
    assert times(["2020-01-02"] * 3, "2024-01-01") == {"datetime": "2020-01-02T00:00:00Z"}
    assert zulu("2020-01-02T03:04:05Z") == "2020-01-02T03:04:05Z"


def test_a_crs_without_a_code_is_told_as_wkt() -> None:
    local = "+proj=tmerc +lat_0=52.1 +lon_0=10.2 +k=0.99993 +x_0=1000 +y_0=2000 +ellps=bessel +units=m"
    found = crs_fields(local)
    assert found["proj:code"] is None
    assert found["proj:wkt2"].startswith("PROJCRS[")


def test_names_of_models() -> None:
    assert model_name("stabilityai/stable-diffusion-2-1") == "stabilityai-stable-diffusion-2-1"
    assert model_name("../models/x_") == "models-x"
    assert model_name("7") == "model-7"
