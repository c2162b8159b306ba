"""The folder source: layouts, labels, splits, padding, and every way a folder can be wrong."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from satdifuser.errors import ImageError, SatDiFuserError, SettingsError, SourceError
from satdifuser.extract.images import to_rgb
from satdifuser.extract.settings import FolderSettings, ImageSettings
from satdifuser.extract.sources import Source, list_tiles, open_source
from satdifuser.extract.sources.files import parse_date
from satdifuser.labels.settings import SplitShares
from satdifuser.labels.splits import draw_splits


def write_image(path: Path, size: tuple[int, int] = (8, 8), bands: int = 3) -> np.ndarray:
    """Write random pixels; return them as (H, W, B)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, path.name))
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, bands), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def open_folder(root: Path, **settings: Any) -> Source:
    return open_source(FolderSettings(kind="folder", root=root, **settings))


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two class folders of five images each."""
    for name in ["wood", "field"]:
        for number in range(5):
            write_image(tmp_path / name / f"{name}_{number}.png")
    return tmp_path


def test_class_folders_give_labels_and_a_stratified_split(classes: Path) -> None:
    source = open_folder(classes)
    records = list_tiles(source)
    assert source.task == "classification"
    assert source.classes == ("field", "wood")
    assert [record.tile_id for record in records[:2]] == ["field/field_0", "field/field_1"]
    counts = Counter((record.label, record.split) for record in records)
    assert counts == {(c, s): n for c in (0, 1) for s, n in [("train", 3), ("val", 1), ("test", 1)]}
    assert all(record.size == (8, 8) and not record.padded for record in records)


def test_pixels_are_those_of_the_file(classes: Path) -> None:
    pixels = write_image(classes / "wood" / "wood_0.png")
    source = open_folder(classes)
    record = next(record for record in list_tiles(source) if record.tile_id == "wood/wood_0")
    tile = source.read(record)
    np.testing.assert_array_equal(tile.image, np.moveaxis(pixels, -1, 0))
    assert tile.image.dtype == np.uint8
    assert tile.valid.all()
    assert tile.mask is None
    assert tile.band_names == ("R", "G", "B")


def test_an_image_changed_between_reads_is_read_anew(classes: Path) -> None:
    source = open_folder(classes)
    record = list_tiles(source)[0]
    before = source.read(record).image
    path = Path(record.path)
    Image.new("RGB", (8, 8), "red").save(path)
    assert not np.array_equal(source.read(record).image, before)


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "PNG", "tif", "TIFF"])
def test_images_folder_and_suffixes(tmp_path: Path, suffix: str) -> None:
    write_image(tmp_path / "images" / "wood" / f"a.b.{suffix}")
    write_image(tmp_path / "images" / "wood" / "._a.jpg")
    (tmp_path / "images" / "wood" / "notes.txt").write_text("no image")
    source = open_folder(tmp_path, split=SplitShares(train=1, val=0, test=0))
    [record] = list_tiles(source)
    assert record.tile_id == "images/wood/a.b"
    assert source.read(record).image.shape == (3, 8, 8)


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", bands=4)
    source = open_folder(tmp_path)
    [record] = list_tiles(source)
    assert (source.task, source.classes, record.label, record.split) == (None, (), None, "none")
    tile = source.read(record)
    np.testing.assert_array_equal(tile.valid, tile.image[3] > 0)  # alpha says what is valid


def test_splits_file_and_class_list_win_over_folders(classes: Path) -> None:
    rows = [
        {"path": f"wood/wood_{number}.png", "label": "field", "fold": split, "note": "x"}
        for number, split in enumerate(["train", "val", "test", "none"])
    ]
    (classes / "tables").mkdir()
    write_table(classes / "tables" / "mine.csv", [row | {"path": "../" + row["path"]} for row in rows])
    (classes / "classes.json").write_text(json.dumps({"classes": ["wood", "field"]}))
    source = open_folder(classes, splits=classes / "tables" / "mine.csv", split_column="fold")
    records = list_tiles(source)
    assert [record.split for record in records] == ["train", "val", "test", "none"]
    assert {record.label for record in records} == {1}
    assert records[0].tile_id == "wood/wood_0"
    assert source.read(records[0]).image.shape == (3, 8, 8)


def test_a_splits_file_of_none_only_asks_for_nothing(classes: Path) -> None:
    write_table(classes / "splits.csv", [{"path": "wood/wood_0.png", "label": "wood", "split": "none"}])
    assert [record.split for record in list_tiles(open_folder(classes))] == ["none"]


def test_smaller_images_are_padded_and_marked_when_asked(tmp_path: Path) -> None:
    small = write_image(tmp_path / "a.png", (6, 5))
    source = open_folder(tmp_path, tile_size=(8, 8), pad=True)
    [record] = list_tiles(source)
    assert record.padded
    assert record.size == (8, 8)
    assert record.valid_share == 30 / 64
    tile = source.read(record)
    np.testing.assert_array_equal(tile.image[:, :6, :5], np.moveaxis(small, -1, 0))
    np.testing.assert_array_equal(tile.image[:, 7, 7], small[5, 4])
    assert tile.valid.sum() == 30
    assert tile.valid[:6, :5].all()


def test_a_geotiff_tile_carries_its_place_and_date(tmp_path: Path) -> None:
    transform = Affine(10, 0, 500000, 0, -10, 5000000)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=4, height=4, count=2, dtype="uint16",
        crs="EPSG:32632", transform=transform,
    ) as dataset:  # fmt: skip
        dataset.write(np.ones((2, 4, 4), np.uint16))
        dataset.descriptions = ("red", None)
        dataset.update_tags(TIFFTAG_DATETIME="2019:04:16 10:00:31")
    source = open_folder(tmp_path)
    [record] = list_tiles(source)
    assert record.georeference is not None
    assert record.georeference.crs == "EPSG:32632"
    assert record.georeference.bounds(*record.size) == (500000, 4999960, 500040, 5000000)
    assert record.date == "2019-04-16T10:00:31"
    assert source.read(record).band_names == ("red", "")


@pytest.mark.parametrize(
    ("tags", "date"),
    [
        ({}, ""),
        ({"DATETIME": "2020-01-02"}, "2020-01-02T00:00:00"),
        ({"datetime": "soon"}, ""),
        ({"TIFFTAG_DATETIME": "2021:01:01 00:00:00", "ACQUISITIONDATE": "2020-06-01"}, "2020-06-01T00:00:00"),
    ],
)
def test_dates(tags: dict[str, str], date: str) -> None:
    assert parse_date(tags) == date


@given(st.permutations(range(30)), st.integers(0, 3))
def test_drawn_splits_do_not_depend_on_order(order: list[int], seed: int) -> None:
    shares = SplitShares(train=0.6, val=0.2, test=0.2, seed=seed)
    labels = [number % 3 for number in range(30)]
    ids = [f"t{number}" for number in range(30)]
    drawn = draw_splits(ids, labels, shares)
    assert drawn == draw_splits([ids[n] for n in order], [labels[n] for n in order], shares)
    counts = Counter((labels[n], drawn[ids[n]]) for n in range(30))
    assert counts == {(c, s): n for c in range(3) for s, n in [("train", 6), ("val", 2), ("test", 2)]}


def test_another_seed_draws_another_split(classes: Path) -> None:
    drawn = [list_tiles(open_folder(classes, split=SplitShares(seed=seed))) for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def raised(root: Path, kind: type[SatDiFuserError] = SourceError, **settings: Any) -> str:
    """Return the message of listing and reading a folder."""
    with pytest.raises(kind) as info:
        read_all(root, **settings)
    return str(info.value)


def read_all(root: Path, **settings: Any) -> None:
    source = open_folder(root, **settings)
    for record in list_tiles(source):
        source.read(record)


def test_errors_of_the_folder(tmp_path: Path) -> None:
    message = raised(tmp_path / "missing", SettingsError)
    assert f"source.root: {tmp_path / 'missing'} is missing or of another kind; expected a folder" in message
    suffixes = "expected files that end in .jpg, .jpeg, .png, .tif, .tiff"
    assert raised(tmp_path) == f"source.root: no images in {tmp_path} or below; {suffixes}"
    (tmp_path / "images").mkdir()
    assert f"no images in {tmp_path / 'images'} or below; {suffixes}" in raised(tmp_path)
    (tmp_path / "images").rmdir()
    write_image(tmp_path / "wood" / "a.png")
    write_image(tmp_path / "stray.png")
    assert f"{tmp_path / 'stray.png'} lies beside class folders" in raised(tmp_path)


def test_error_duplicate_ids_names_both_files(classes: Path) -> None:
    write_image(classes / "wood" / "wood_0.jpg")
    message = raised(classes)
    assert "tile id 'wood/wood_0' appears twice" in message
    assert "wood_0.jpg" in message
    assert "wood_0.png" in message


def test_error_image_listed_twice_names_both_lines(classes: Path) -> None:
    lines = ["path,label,split", *[f"wood/wood_{number}.png,wood,none" for number in (0, 1, 0)]]
    (classes / "splits.csv").write_text("\n".join(lines))
    message = raised(classes)
    assert f"twice, in {classes / 'splits.csv'}, line 2 ({classes}/wood/wood_0.png) and " in message
    assert f" and {classes / 'splits.csv'}, line 4 ({classes}/wood/wood_0.png); rename" in message


def test_error_empty_split(classes: Path) -> None:
    shares = SplitShares(train=0.98, val=0.01, test=0.01)
    message = raised(classes, split=shares)
    assert "no tile in split val, test (found: train 10, val 0, test 0, none 0)" in message
    write_table(classes / "splits.csv", [{"path": "wood/wood_0.png", "label": "wood", "split": "train"}])
    assert "no tile in split val, test" in raised(classes)


def test_error_label_outside_the_class_list(classes: Path) -> None:
    (classes / "classes.json").write_text('{"classes": ["field", "woods"]}')
    message = raised(classes)
    assert f"{classes}/wood/wood_0.png: label 'wood' is not among the 2 classes of" in message
    assert "classes.json (field, woods); did you mean woods?" in message


def test_error_unknown_label_names_the_line_and_the_first_classes(classes: Path) -> None:
    table = classes / "splits.csv"
    table.write_text("path,label,split\nwood/wood_0.png,c3,train\nwood/wood_1.png,c99,train\n")
    (classes / "classes.json").write_text(json.dumps({"classes": [f"c{n}" for n in range(13)]}))
    message = raised(classes)
    assert f"{table}, line 3: label 'c99' is not among the 13 classes of {classes}/classes.json" in message
    assert "(c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, …); did you mean c9" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not json", "not a class list (JSONDecodeError"),
        ('{"names": []}', "not a class list (KeyError"),
        ('{"classes": [1]}', "not a class list (TypeError"),
        ('{"classes": {"0": "field"}}', "not a class list (TypeError: classes is no list"),
        ('{"classes": ["a", "a"]}', "class name a appears twice"),
        ('{"classes": [{"id": 255, "name": "a"}]}', "255 is both a class id and the ignored value"),
        (
            json.dumps({"classes": [f"c{n}" for n in range(256)], "ignore_index": -1}),
            "256 classes, expected at",
        ),
    ],
)
def test_errors_of_the_class_list(classes: Path, text: str, expected: str) -> None:
    (classes / "classes.json").write_text(text)
    assert expected in raised(classes)


@pytest.mark.parametrize(
    ("header", "line", "expected"),
    [
        ("path,class,split", "a,b,train", "column 'label' is missing; it has path, class, split"),
        ("path,label,splits", "a,b,train", "column 'split' is missing; it has path, label, splits; did you"),
        ("path,label,split", "a,b,training", "line 2: split is 'training', expected train, val, test, none"),
        ("path,label,split", "a,,train", "line 2: label is empty"),
        (
            "path,label,split",
            "missing.png,wood,train",
            "missing.png is not a file; correct its path, seen from the splits file's folder, or remove",
        ),
        ("path,label,split", "missing.png,wood,train", "splits.csv, line 2, column 'path': "),
        ("path,label,split", "", "splits.csv: no line below the header; list the images"),
        ("path,label,split", "../out.png,wood,train", "lies outside source.root"),
    ],
)
def test_errors_of_the_splits_file(classes: Path, header: str, line: str, expected: str) -> None:
    write_image(classes.parent / "out.png")
    (classes / "splits.csv").write_text(f"{header}\n{line}\n")
    assert expected in raised(classes)


def test_error_missing_splits_file(classes: Path) -> None:
    message = raised(classes, SettingsError, splits=Path("nowhere.csv"))
    assert "source.splits: nowhere.csv is not a file" in message


def test_a_listed_image_that_is_missing_is_skipped_with_its_line(classes: Path) -> None:
    lines = ["wood/wood_0.png,wood,none", "wood/gone.png,wood,none"]
    (classes / "splits.csv").write_text("\n".join(["path,label,split", *lines]))
    source = open_folder(classes, on_error="skip")
    assert unreadable(source) == ["wood/gone"]
    with pytest.raises(ImageError, match=r"splits\.csv, line 3, column 'path': .*gone\.png is not a file"):
        source.read(list_tiles(source)[1])


@pytest.mark.parametrize(("bands", "name"), [(4, "R, G, B, A"), (2, "L, A"), (1, "L")])
def test_error_image_of_another_band_count(classes: Path, bands: int, name: str) -> None:
    path = classes / "field" / "odd.png"
    Image.new({4: "RGBA", 2: "LA", 1: "L"}[bands], (8, 8), 5).save(path)
    source = open_folder(classes)
    [record] = [record for record in list_tiles(source) if record.path == str(path)]
    with pytest.raises(ImageError) as info:
        to_rgb(source.read(record), ImageSettings())
    held = f"{path}, tile field/odd: it has {bands} bands ({name}), expected 3"
    assert f"{held}; convert it to RGB, or name red, green and blue with source.bands" in str(info.value)


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({}, (9, 8), "image is 9x8 px (height x width), expected 8x8 px as the first image says"),
        ({}, (7, 8), "to pad smaller images set source.pad: true"),
        (
            {"tile_size": 8, "pad": True},
            (7, 9),
            "as source.tile_size says; to pad smaller images set source.tile",
        ),
    ],
)
def test_errors_of_image_size(classes: Path, settings: dict[str, Any], size: Any, expected: str) -> None:
    write_image(classes / "wood" / "wood_3.png", size)
    message = raised(classes, **settings)
    assert "wood_3.png" in message
    assert expected in message
    skipping = open_folder(classes, on_error="skip", **settings)
    assert unreadable(skipping) == ["wood/wood_3"]


def unreadable(source: Source) -> list[str]:
    """Return the ids of tiles that are listed but fail when they are read."""
    failed = []
    for record in list_tiles(source):
        try:
            source.read(record)
        except ImageError:
            failed.append(record.tile_id)
    return failed


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_unreadable_and_truncated_images_are_named_or_skipped(classes: Path, suffix: str) -> None:
    truncated = classes / "field" / f"cut.{suffix}"
    write_image(truncated, (8, 8))
    truncated.write_bytes(truncated.read_bytes()[:-40])
    assert f"{truncated}: cannot be read as an image (" in raised(classes)
    truncated.write_bytes(b"nothing like an image")
    message = raised(classes)
    assert f"{truncated}: cannot be read as an image (" in message
    assert message.endswith("; replace or remove it; source.on_error: skip leaves such tiles out")
    assert unreadable(open_folder(classes, on_error="skip")) == ["field/cut"]


def test_skipped_images_are_not_advised_to_be_skipped(classes: Path) -> None:
    path = classes / "field" / "field_0.png"
    path.write_bytes(path.read_bytes()[:-40])
    assert raised(classes).endswith("source.on_error: skip leaves such tiles out")
    source = open_folder(classes, on_error="skip")
    with pytest.raises(ImageError, match=r"; replace or remove it$"):
        source.read(list_tiles(source)[0])


@pytest.mark.parametrize("settings", [{}, {"tile_size": 8}])
def test_error_no_image_can_be_read(tmp_path: Path, settings: dict[str, Any]) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"")
    message = raised(tmp_path, on_error="skip", **settings)
    first = f"{tmp_path / 'a.png'}: cannot be read as an image ("
    assert message.startswith(f"source: none of the 3 images can be read; the first: {first}")
    assert "on_error" not in message


def test_real_eurosat(shared: Path) -> None:
    source = open_folder(shared / "data" / "eurosat")
    records = list_tiles(source)
    assert Counter(record.split for record in records) == {"train": 2000, "val": 500, "test": 1000}
    assert source.classes[0] == "AnnualCrop"
    assert len(source.classes) == 10
    assert {source.read(record).image.shape for record in records[::100]} == {(3, 64, 64)}
