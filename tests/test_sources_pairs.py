"""The pairs source: grids and windows, remapped masks, padding, and every way a pair can be wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image

from satdifuser.errors import ImageError, SatDiFuserError, SettingsError, SourceError
from satdifuser.extract.settings import PairsSettings
from satdifuser.extract.sources import Source, list_tiles, open_source
from satdifuser.labels.classes import IGNORE

CLASSES = {"classes": [{"id": 3, "name": "water"}, {"id": 7, "name": "land"}], "ignore_index": 0}
SPLITS = "image,mask,split\nimages/a.png,masks/a.png,train\nimages/b.png,masks/b.png,val\n"


def write_pair(root: Path, name: str, size: tuple[int, int], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Write a random image and mask; return their pixels, (H, W, RGB) and (H, W)."""
    rng = np.random.default_rng(ord(name))
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = rng.choice(np.array([0, 3, 7], np.uint8), size)
    for folder, pixels in [("images", image), ("masks", mask)]:
        (root / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / folder / f"{name}.png")
    table = root / "splits.csv"
    header = "" if table.exists() else "image,mask,split\n"
    with table.open("a") as stream:
        stream.write(f"{header}images/{name}.png,masks/{name}.png,{split}\n")
    return image, mask


def open_pairs(root: Path, **settings: Any) -> Source:
    return open_source(PairsSettings(kind="pairs", root=root, **{"tile_size": 8, **settings}))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs, of 16x16, 20x12 and 8x8 px, with ids 3 and 7 and 0 for ignored pixels."""
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    write_pair(tmp_path, "a", (16, 16), "train")
    write_pair(tmp_path, "b", (20, 12), "val")
    write_pair(tmp_path, "c", (8, 8), "test")
    return tmp_path


def write_windows(root: Path, *lines: str) -> None:
    (root / "splits.csv").write_text("\n".join(["image,mask,x,y,w,h,split", *lines]) + "\n")


def test_grids_cover_whole_images(pairs: Path) -> None:
    source = open_pairs(pairs)
    records = list_tiles(source)
    assert source.task == "segmentation"
    assert source.classes == ("water", "land")
    assert Counter(record.split for record in records) == {"train": 4, "val": 5, "test": 1}
    assert [record.tile_id for record in records[:4]] == ["a/0_0", "a/0_8", "a/8_0", "a/8_8"]
    assert {record.tile_id for record in records if record.padded} == {"b/0_8", "b/8_8", "b/16_0"}
    assert source.left_out == 1  # b/16_8: a quarter of a tile
    assert list_tiles(source) == records
    assert source.left_out == 1


def test_tiles_hold_pixels_and_class_indices(pairs: Path) -> None:
    image, mask = write_pair(pairs, "d", (16, 16), "none")
    source = open_pairs(pairs)
    record = next(record for record in list_tiles(source) if record.tile_id == "d/8_0")
    tile = source.read(record)
    np.testing.assert_array_equal(tile.image, np.moveaxis(image[8:, :8], -1, 0))
    assert tile.mask is not None
    assert tile.mask.dtype == np.uint8
    np.testing.assert_array_equal(tile.mask == 0, mask[8:, :8] == 3)
    np.testing.assert_array_equal(tile.mask == 1, mask[8:, :8] == 7)
    np.testing.assert_array_equal(tile.mask == source.ignore_value, mask[8:, :8] == 0)


def test_edge_tiles_are_padded_and_ignored(pairs: Path) -> None:
    source = open_pairs(pairs)
    record = next(record for record in list_tiles(source) if record.tile_id == "b/16_0")
    tile = source.read(record)
    assert record.valid_share == 0.5
    assert tile.valid[:4].all()
    assert not tile.valid[4:].any()
    assert tile.mask is not None
    assert (tile.mask[4:] == IGNORE).all()
    np.testing.assert_array_equal(tile.image[:, 7], tile.image[:, 3])


def test_windows_are_read_where_the_file_says(pairs: Path) -> None:
    image, _ = write_pair(pairs, "a", (16, 16), "train")
    write_windows(
        pairs,
        "images/a.png,masks/a.png,5,2,8,8,train",
        "images/a.png,masks/a.png,0,8,8,8,val",
        "images/c.png,masks/c.png,0,0,8,8,test",
    )
    source = open_pairs(pairs)
    records = list_tiles(source)
    assert [record.tile_id for record in records] == ["a/2_5", "a/8_0", "c/0_0"]
    np.testing.assert_array_equal(source.read(records[0]).image, np.moveaxis(image[2:10, 5:13], -1, 0))


def test_small_images_are_padded_when_asked(pairs: Path) -> None:
    write_pair(pairs, "s", (6, 8), "test")
    [record] = [record for record in list_tiles(open_pairs(pairs, pad=True)) if record.tile_id == "s/0_0"]
    assert record.padded
    assert open_pairs(pairs, pad=True).read(record).valid.sum() == 48


def test_geotiff_tiles_are_placed_and_nodata_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"classes": ["zero", "one"]}')
    pixels = np.ones((3, 8, 16), np.uint8)
    pixels[:, :, 12:] = 9
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=16, height=8, count=3, dtype="uint8", nodata=9,
        crs="EPSG:32632", transform=Affine(10, 0, 500000, 0, -10, 5000000),
    ) as dataset:  # fmt: skip
        dataset.write(pixels)
    Image.fromarray(np.ones((8, 16), np.uint8)).save(tmp_path / "m.png")
    (tmp_path / "splits.csv").write_text("image,mask,split\na.tif,m.png,none\n")
    source = open_pairs(tmp_path)
    _, record = list_tiles(source)
    assert record.valid_share == 0.5
    assert record.georeference is not None
    assert record.georeference.transform == (10, 0, 500080, 0, -10, 5000000)
    tile = source.read(record)
    assert tile.mask is not None
    np.testing.assert_array_equal(tile.mask, np.where(tile.valid, 1, IGNORE))


def raised(root: Path, kind: type[SatDiFuserError] = SourceError, **settings: Any) -> str:
    """Return the message of listing and reading pairs."""
    with pytest.raises(kind) as info:
        read_all(root, **settings)
    return str(info.value)


def read_all(root: Path, **settings: Any) -> None:
    source = open_pairs(root, **settings)
    for record in list_tiles(source):
        source.read(record)


def unreadable(source: Source) -> list[str]:
    """Return the ids of tiles that are listed but fail when they are read."""
    failed = []
    for record in list_tiles(source):
        try:
            source.read(record)
        except ImageError:
            failed.append(record.tile_id)
    return failed


def test_error_mask_of_another_size(pairs: Path) -> None:
    Image.fromarray(np.zeros((16, 15), np.uint8)).save(pairs / "masks" / "a.png")
    message = raised(pairs, ImageError)
    assert f"{pairs / 'masks' / 'a.png'}: mask is 16x15 px (height x width), but its image" in message
    assert "is 16x16 px; make both the same size" in message
    write_pair(pairs, "d", (16, 16), "train")
    assert unreadable(open_pairs(pairs, on_error="skip")) == ["a/0_0"]


def test_error_mask_values_outside_the_class_list(pairs: Path) -> None:
    Image.fromarray(np.full((8, 8), 4, np.uint8)).save(pairs / "masks" / "c.png")
    message = raised(pairs, ImageError)
    assert "c.png: mask holds 4; allowed are the class ids 3, 7 and 0 for ignored pixels" in message
    assert unreadable(open_pairs(pairs, on_error="skip")) == ["c/0_0"]


def test_error_mask_in_colours(pairs: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(pairs / "masks" / "c.png")
    assert "c.png: mask has 3 bands, expected one band of class ids" in raised(pairs, ImageError)


def test_error_image_smaller_than_a_tile(pairs: Path) -> None:
    write_pair(pairs, "s", (6, 20), "test")
    message = raised(pairs, ImageError)
    assert "s.png: a tile of 8x8 px at row 0, column 0 reaches beyond the image of 6x20 px" in message
    assert "source.pad: true" in message
    assert unreadable(open_pairs(pairs, on_error="skip")) == ["s/0_0"]


@pytest.mark.parametrize("name", ["images/c.png", "masks/c.png"])
def test_error_missing_and_damaged_files(pairs: Path, name: str) -> None:
    (pairs / name).write_bytes((pairs / name).read_bytes()[:60])
    assert f"{name}: cannot be read as an image (" in raised(pairs, ImageError)
    assert unreadable(open_pairs(pairs, on_error="skip")) == ["c/0_0"]
    (pairs / name).unlink()
    expected = f"splits.csv, line 4, column '{name[:-7]}': {pairs / name} is not a file; correct its path"
    assert expected in raised(pairs, ImageError)
    source = open_pairs(pairs, on_error="skip")
    assert unreadable(source) == ["c/0_0"]
    with pytest.raises(ImageError) as info:
        source.read(list_tiles(source)[-1])
    assert expected in str(info.value)
    assert "on_error" not in str(info.value)


def test_paths_of_a_splits_file_are_seen_from_its_own_folder(pairs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (pairs / "splits.csv").rename(elsewhere / "mine.csv")
    with pytest.raises(
        ImageError, match=r"mine\.csv, line 2, column 'image': .*correct its path, seen from the"
    ):
        list_tiles(open_pairs(pairs, splits=elsewhere / "mine.csv"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "images/a.png,masks/a.png,0,0,4,8,train",
            "line 2: window is 8x4 px (height x width), but source.tile",
        ),
        ("images/a.png,masks/a.png,-1,0,8,8,train", "line 2: x is '-1', expected a whole number of px"),
        (
            "images/a.png,masks/a.png,0,9,8,8,train",
            "a tile of 8x8 px at row 9, column 0 reaches beyond the image",
        ),
        ("images/a.png,masks/a.png,0,0,8,8,", "line 2: split is '', expected train"),
        ("images/a.png,,0,0,8,8,train", "line 2: mask is empty"),
    ],
)
def test_errors_of_windows(pairs: Path, line: str, expected: str) -> None:
    write_windows(pairs, line)
    assert expected in raised(pairs)


def test_error_windows_listed_twice(pairs: Path) -> None:
    write_windows(pairs, *["images/a.png,masks/a.png,0,0,8,8,none"] * 2)
    message = raised(pairs)
    assert f"tile id 'a/0_0' appears twice, in {pairs}/splits.csv, line 2 ({pairs}/images/a.png)" in message
    assert f" and {pairs}/splits.csv, line 3 ({pairs}/images/a.png); rename one, or list it once" in message


def test_errors_of_missing_tables(pairs: Path) -> None:
    nowhere = Path("nowhere")
    assert "source.splits: nowhere is not a file" in raised(pairs, SettingsError, splits=nowhere)
    assert "nowhere: no such class list; name one" in raised(pairs, SettingsError, classes=nowhere)
    (pairs / "splits.csv").unlink()
    message = raised(pairs, SettingsError)
    assert "has no splits.csv; name a CSV file with the columns image, mask, split" in message
    (pairs / "classes.json").unlink()
    assert "classes.json: no such class list; name one in source.classes" in raised(pairs, SettingsError)


def test_error_empty_split_and_nothing_valid(pairs: Path) -> None:
    (pairs / "splits.csv").write_text(SPLITS)
    assert "no tile in split test (found: train 4, val 5, test 0, none 0)" in raised(pairs)
    assert "source: no tiles, 2 left out for too little valid data" in raised(pairs, tile_size=32, pad=True)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ("chips_256.csv", {"train": 525, "val": 105, "test": 315}),
        ("splits.csv", {"train": 570, "val": 114, "test": 342}),
    ],
)
def test_real_dubai(shared: Path, splits: str, expected: dict[str, int]) -> None:
    root = shared / "data" / "seg" / "dubai"
    source = open_pairs(root, splits=root / splits, tile_size=256)
    records = list_tiles(source)
    assert Counter(record.split for record in records) == expected
    tile = source.read(records[0])
    assert tile.image.shape == (3, 256, 256)
    assert tile.mask is not None
    assert set(np.unique(tile.mask)) <= {0, 1, 2, 3, 4, 255}


def test_real_amazon(shared: Path) -> None:
    source = open_pairs(shared / "data" / "seg" / "amazon", tile_size=256)
    records = list_tiles(source)
    assert Counter(record.split for record in records) == {"train": 72, "val": 16, "test": 28}
    assert all(record.georeference is not None for record in records)
