"""Scenes whose labels are polygons or points, and splits of their ground, from the source to the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
import yaml
from command_line import call, refuse, succeed
from made_up import diffusionsat
from made_up_scene import box, point, write_scene, write_vectors
from PIL import Image
from rasterio.features import shapes

from satdifuser.errors import LabelError, SatDiFuserError, SettingsError, SourceError
from satdifuser.extract.settings import ScenesSettings
from satdifuser.extract.sources import TileRecord, list_tiles, open_source
from satdifuser.labels.classes import IGNORE
from satdifuser.store.reader import open_store
from satdifuser.store.repair import repair
from satdifuser.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

ALL_TRAIN = {"train": 1, "val": 0, "test": 0}


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """32 x 32 px, the right 3 columns without data."""
    pixels = np.random.default_rng(0).integers(1, 255, (3, 32, 32), np.uint8)
    pixels[:, :, 29:] = 0
    return write_scene(tmp_path / "a.tif", pixels, nodata=0)


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    return write_vectors(
        tmp_path / "f.gpkg", [box(0, 0, 16, 32), box(18, 2, 4, 4)], ["water", "forest"], "EPSG:4326"
    )


def tiles_of(scene: Path, labels: Path | None, **fields: Any) -> tuple[Any, list[TileRecord]]:
    settings = {"kind": "scenes", "root": scene, "tile_size": 8, "labels": labels, **fields}
    source = open_source(ScenesSettings.model_validate(settings))
    return source, list_tiles(source)


def refusal(kind: type[SatDiFuserError], *rest: Any, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        tiles_of(*rest, **fields)
    return str(caught.value)


def test_polygons_label_a_scene(scene: Path, fields: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, records = tiles_of(scene, fields)
    assert (source.task, source.classes) == ("segmentation", ("forest", "water"))
    masks = [source.read(record).mask for record in records]
    expected = np.full((32, 32), IGNORE)
    expected[:16, :29] = 1
    expected[18:22, 2:6] = 0
    rows = [np.hstack(masks[i : i + 4]) for i in range(0, 16, 4)]
    np.testing.assert_array_equal(np.vstack(rows), expected)
    told = capsys.readouterr().err
    assert "f.gpkg: 2 of 2 features lie on tiles" in told
    assert "f.gpkg: 9 of 16 tiles are labelled" in told
    in_use = {record.tile_id for record in records if record.split != "none"}
    assert in_use == {
        record.tile_id for record, mask in zip(records, masks, strict=True) if (mask != IGNORE).any()
    }


def test_settings_of_vectors_reach_the_source(scene: Path, tmp_path: Path) -> None:
    path = write_vectors(
        tmp_path / "f.gpkg", [box(0.7, 0.7, 0.6, 0.6), box(2, 2, 2, 2)], ["x", "z"], column="kind"
    )
    (tmp_path / "c.json").write_text('{"classes": ["x", "y"]}')
    vectors = {"column": "kind", "touch": "all", "unknown": "ignore"}
    source, records = tiles_of(scene, path, vectors=vectors, classes=tmp_path / "c.json", split=ALL_TRAIN)
    assert source.classes == ("x", "y")
    assert (source.read(records[0]).mask != IGNORE).sum() == 4
    message = refusal(LabelError, scene, path, vectors={"column": "kind"}, classes=tmp_path / "c.json")
    assert "holds the class 'z' (1)" in message


def test_each_scene_may_have_a_file_of_its_own(scene: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    write_vectors(tmp_path / "labels/a.shp", [point(3, 3)], [4], geometry_type="Point")
    assert "source.classes: missing, but source.labels is" in refusal(
        SettingsError, scene, tmp_path / "labels"
    )
    (tmp_path / "c.json").write_text('{"classes": [{"id": 4, "name": "x"}]}')
    given = {"classes": tmp_path / "c.json", "split": ALL_TRAIN}
    source, records = tiles_of(scene, tmp_path / "labels", **given)
    assert source.read(records[0]).mask[3, 3] == 0
    (tmp_path / "labels/a.shp").unlink()
    message = refusal(SourceError, scene, tmp_path / "labels", **given)
    assert "source.labels: no labels for" in message
    assert "labels/a.tif or" in message
    assert "labels/a.gpkg or" in message


def test_labels_that_miss_the_scene(scene: Path, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "f.gpkg", [box(500, 500, 9, 9)], ["x"])
    message = refusal(LabelError, scene, path)
    assert "f.gpkg: labels nothing here: in its own EPSG:32632 it lies at (505000, 4994910" in message


def test_blocks_and_folds_of_a_scene(scene: Path, fields: Path) -> None:
    split = {"kind": "spatial_blocks", "size_m": 160, "buffer_m": 0}
    _, records = tiles_of(scene, None, split=split)
    assert {record.split for record in records} == {"train", "val", "test"}
    assert all(dict(record.partitions) == {"spatial_blocks": record.split} for record in records)
    split = {"kind": "spatial_folds", "size_m": 80, "folds": 3}
    _, records = tiles_of(scene, fields, split=split)
    assert {tuple(record.partitions) for record in records} == {("fold_0", "fold_1", "fold_2")}
    unlabelled = [record for record in records if record.tile_id == "a/24_24"]
    assert [set(record.partitions.values()) for record in unlabelled] == [{"none"}]


def test_a_random_split_of_overlapping_tiles_is_warned_of(
    scene: Path, fields: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles_of(scene, fields, overlap=4)
    assert "train tiles overlap a tile of val or test" in capsys.readouterr().err
    split = {"kind": "spatial_blocks", "size_m": 160, "train": 0.5, "val": 0.5, "test": 0}
    tiles_of(scene, fields, overlap=4, split=split)
    assert "warning" not in capsys.readouterr().err


# --- with a backbone


@pytest.fixture
def config(scene: Path, tmp_path: Path) -> Path:
    """Settings of an extraction of the scene without labels, split by blocks of ground."""
    settings = {
        "source": {
            "kind": "scenes",
            "root": str(scene),
            "tile_size": 16,
            "overlap": 8,
            "split": {"kind": "random"},
        },
        "backbone": {"model": str(diffusionsat(tmp_path / "tiny")), "device": "cpu"},
        "extract": {"timesteps": [21], "layers": ["up_blocks.*.conv2"], "batch_size": 2, "threads": 1},
        "store": {"tiles_per_shard": 4},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "c.yaml"


def test_labels_before_and_after_extraction_are_the_same(config: Path, fields: Path, tmp_path: Path) -> None:
    split = "split={kind: spatial_blocks, size_m: 160, buffer_m: 0, train: 0.5, val: 0.5, test: 0}"
    before = ("--set", f"source.labels={fields}", "--set", f"source.{split}")
    succeed("extract", "-c", config, "-o", tmp_path / "before.zarr", *before)
    succeed("extract", "-c", config, "-o", tmp_path / "after.zarr")
    succeed("label", tmp_path / "after.zarr", fields, "--set", f"label.{split}")
    first, second = open_store(tmp_path / "before.zarr"), open_store(tmp_path / "after.zarr")
    assert first.partitions() == second.partitions() == ["spatial_blocks"]
    assert first.hashes() == second.hashes()
    np.testing.assert_array_equal(first.targets(np.arange(9)), second.targets(np.arange(9)))


def test_a_labelled_store_that_lost_a_shard_is_extracted_on(
    config: Path, fields: Path, tmp_path: Path
) -> None:
    path, again = tmp_path / "s.zarr", ("extract", "-c", config, "-o", tmp_path / "s.zarr")
    succeed(*again)
    digest = open_store(path).content_digest()
    succeed("label", path, fields)
    masks = open_store(path).targets(np.arange(9))
    next((path / "features").rglob("c/1/0/*/*/*/*")).write_bytes(b"")
    repair(path)
    result = call(*again)
    assert "4 tiles that were extracted now have no label; give the store its labels again" in result.stderr
    mended = open_store(path)
    assert (mended.content_digest(), verify(mended, deep=True)) == (digest, [])
    assert (mended.targets(np.arange(4, 8)) == IGNORE).all()
    assert set(mended.splits()[4:8]) == {"none"}
    np.testing.assert_array_equal(mended.targets(np.arange(4)), masks[:4])  # type: ignore[index]
    succeed("label", path, fields)
    np.testing.assert_array_equal(open_store(path).targets(np.arange(9)), masks)


def test_a_labelled_store_grows_with_its_labels(config: Path, fields: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    succeed("extract", "-c", config, "-o", path)
    succeed("label", path, fields)
    before = open_store(path)
    hashes = before.hashes()
    succeed("extract", "-o", path, "--add-timesteps", "61")
    grown = open_store(path)
    assert grown.attributes.timesteps == [21, 61]
    assert grown.attributes.labelled == before.attributes.labelled
    assert grown.hashes().labels == hashes.labels
    told = refuse("extract", "-o", path, "--add-tiles")
    assert "f.gpkg, which --add-tiles would replace by its source's; add --relabel, and then" in told
    succeed("extract", "-o", path, "--add-tiles", "--relabel")
    assert (open_store(path).attributes.task, open_store(path).attributes.labelled) == (None, {})


def test_real_labels_of_real_scenes(shared: Path, tmp_path: Path) -> None:
    """The masks of two scenes as polygons: the pixels that come back are those of the masks."""
    root, drawn, names, truth = shared / "data/seg/amazon", [], [], {}
    (tmp_path / "scenes").mkdir()
    for path in sorted((root / "images").glob("*.tif"))[:2]:
        (tmp_path / "scenes" / path.name).symlink_to(path)
        truth[path.stem] = np.array(Image.open(root / "masks" / f"{path.stem}.png"))
        with rasterio.open(path) as dataset:
            found = list(shapes(truth[path.stem].astype(np.uint8), transform=dataset.transform))
        drawn += [shapely.geometry.shape(shape) for shape, _ in found]
        names += [("other", "forest")[int(value)] for _, value in found]
    labels = write_vectors(tmp_path / "amazon.gpkg", drawn, names, drawn_in="EPSG:4326", crs="EPSG:4326")
    source, records = tiles_of(tmp_path / "scenes", labels, tile_size=256)
    assert len(records) == 8
    for record in records:
        row, col, height, width = record.window or (0, 0, 256, 256)
        expected = truth[Path(record.path).stem][row : row + height, col : col + width]
        np.testing.assert_array_equal(source.read(record).mask, np.where(expected == 1, 0, 1))
