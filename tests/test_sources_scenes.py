"""The scenes source: grids, nodata, labels on other grids, and every way a scene can be wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.warp import transform

from satdifuser.errors import ImageError, SatDiFuserError, SettingsError, SourceError
from satdifuser.extract.settings import ScenesSettings
from satdifuser.extract.sources import Source, list_tiles, open_source
from satdifuser.extract.sources.grid import offsets, windows
from satdifuser.labels.classes import IGNORE
from satdifuser.labels.rasters import check_overlap
from satdifuser.labels.settings import RandomSplit
from satdifuser.store.georeference import Georeference

LEFT, TOP = 500000, 5000000
ALL_TRAIN = RandomSplit(train=1, val=0, test=0)


def write_raster(path: Path, pixels: np.ndarray, pixel: float = 10, **profile: Any) -> None:
    """Write (B, H, W) pixels with their upper left corner at (LEFT, TOP) of UTM 32N by default."""
    bands, height, width = pixels.shape
    place = {"crs": "EPSG:32632", "transform": Affine(pixel, 0, LEFT, 0, -pixel, TOP)}
    shape = {"count": bands, "height": height, "width": width, "dtype": pixels.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", **(place | shape | profile)) as dataset:
        dataset.write(pixels)


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 5000, shape, dtype=np.uint16)


def open_scenes(root: Path, **settings: Any) -> Source:
    return open_source(ScenesSettings(kind="scenes", root=root, **{"tile_size": 8, **settings}))


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_offsets_cover_the_axis_and_none_is_in_vain(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    starts = list(offsets(length, tile, overlap))
    assert starts[0] == 0
    assert starts[-1] + tile >= length
    assert all(later - earlier == tile - overlap for earlier, later in pairwise(starts))
    assert all(start + tile < length for start in starts[:-1])


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_windows_tile_an_image_exactly_once(size: tuple[int, int], tile: tuple[int, int]) -> None:
    seen = np.zeros(size, int)
    for row, col, height, width in windows(size, tile):
        seen[row : row + height, col : col + width] += 1
    assert (seen == 1).all()


def test_a_scene_is_cut_into_placed_tiles(tmp_path: Path) -> None:
    pixels = random_pixels(2, 20, 16)
    write_raster(tmp_path / "a.tif", pixels)
    source = open_scenes(tmp_path / "a.tif")
    records = list_tiles(source)
    assert (source.task, source.classes) == (None, ())
    assert [r.tile_id for r in records] == ["a/0_0", "a/0_8", "a/8_0", "a/8_8", "a/16_0", "a/16_8"]
    assert [r.padded for r in records] == [False] * 4 + [True] * 2
    assert records[3].georeference is not None
    assert records[3].georeference.bounds(8, 8) == (LEFT + 80, TOP - 160, LEFT + 160, TOP - 80)
    np.testing.assert_array_equal(source.read(records[3]).image, pixels[:, 8:16, 8:16])
    edge = source.read(records[4])
    np.testing.assert_array_equal(edge.image[:, 4:], np.repeat(pixels[:, 19:20, :8], 4, axis=1))
    assert edge.valid[:4].all()
    assert not edge.valid[4:].any()


def test_overlap_folder_and_band_names(tmp_path: Path) -> None:
    for name in ["b.tif", "a.TIFF"]:
        write_raster(tmp_path / name, random_pixels(2, 8, 12))
        with rasterio.open(tmp_path / name, "r+") as dataset:
            dataset.descriptions = ("B04", None)
    (tmp_path / "readme.txt").write_text("no scene")
    source = open_scenes(tmp_path, overlap=4)
    records = list_tiles(source)
    assert [record.tile_id for record in records] == ["a/0_0", "a/0_4", "b/0_0", "b/0_4"]
    assert source.read(records[0]).band_names == ("B04", "")


def test_the_split_is_seeded(tmp_path: Path) -> None:
    write_raster(tmp_path / "a.tif", random_pixels(1, 40, 40))
    splits = [
        [r.split for r in list_tiles(open_scenes(tmp_path, split=RandomSplit(seed=s)))] for s in (0, 0, 1)
    ]
    assert Counter(splits[0]) == {"train": 15, "val": 5, "test": 5}
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize("how", ["file", "setting", "nan", "mask", "alpha"])
def test_pixels_without_data_are_invalid(tmp_path: Path, how: str) -> None:
    """The left quarter holds no data in any band, one more pixel none in the first band only."""
    pixels = random_pixels(3, 8, 16).astype("float32" if how == "nan" else "uint8").clip(1)
    empty = np.zeros((8, 16), bool)
    empty[:, :4] = True
    pixels[:, empty] = np.nan if how == "nan" else 0
    pixels[0, 7, 15] = np.nan if how == "nan" else 0
    if how == "alpha":
        pixels = np.stack([*pixels, np.where(empty, 0, 255)]).astype(np.uint8)
    profile = {"file": {"nodata": 0}, "alpha": {"alpha": "yes", "photometric": "rgb"}}
    write_raster(tmp_path / "a.tif", pixels, **profile.get(how, {}))
    if how == "mask":
        with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
            dataset.write_mask(~empty)
    source = open_scenes(tmp_path, nodata=0 if how == "setting" else None)
    left, right = list_tiles(source)
    assert left.valid_share == 0.5
    np.testing.assert_array_equal(source.read(left).valid, ~empty[:, :8])
    assert source.read(right).valid[7, 7] == (how != "nan")  # one band of three is enough, unless it is NaN


def test_tiles_with_too_little_data_are_left_out_and_counted(tmp_path: Path) -> None:
    pixels = random_pixels(1, 8, 24)
    pixels[:, :, :6] = 0
    write_raster(tmp_path / "a.tif", pixels, nodata=0)
    source = open_scenes(tmp_path, min_valid=0.5)
    assert [record.tile_id for record in list_tiles(source)] == ["a/0_8", "a/0_16"]
    assert source.left_out == 1


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A scene of 16x16 px of 10 m, and labels of 20 m pixels that end before the scene's last 40 m."""
    (tmp_path / "scenes").mkdir()
    (tmp_path / "labels").mkdir()
    write_raster(tmp_path / "scenes" / "a.tif", random_pixels(3, 16, 16))
    labels = np.tile(np.array([[1, 2], [2, 9]], np.uint8), (3, 3))
    write_raster(tmp_path / "labels" / "a.tif", labels[None], pixel=20, nodata=9)
    (tmp_path / "classes.json").write_text('{"classes": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]}')
    return tmp_path


def open_labelled(root: Path, **settings: Any) -> Source:
    given = {"labels": root / "labels", "classes": root / "classes.json", "split": ALL_TRAIN}
    return open_scenes(root / "scenes", **(given | settings))


def test_labels_are_warped_to_the_scene(labelled: Path) -> None:
    source = open_labelled(labelled)
    records = list_tiles(source)
    assert (source.task, source.classes) == ("segmentation", ("x", "y"))
    masks = [source.read(record).mask for record in records]
    expected = np.full((16, 16), IGNORE)
    expected[:12, :12] = np.tile(np.array([[0, 1], [1, IGNORE]]), (3, 3)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(np.block([masks[:2], masks[2:]]), expected)


def test_labels_under_pixels_without_data_are_ignored(labelled: Path) -> None:
    pixels = random_pixels(3, 12, 12)
    pixels[:, :, :2] = 0
    write_raster(labelled / "scenes" / "a.tif", pixels, nodata=0)
    source = open_labelled(labelled)
    for record in list_tiles(source):
        tile = source.read(record)
        assert tile.mask is not None
        assert not tile.valid.all()
        assert (tile.mask[~tile.valid] == IGNORE).all()


def test_labels_in_another_crs_fall_on_the_right_pixels(labelled: Path) -> None:
    """Halves east and west of a meridian, written in degrees, part the scene at the same place."""
    xs, ys = transform("EPSG:32632", "EPSG:4326", [LEFT, LEFT + 80, LEFT + 160], [TOP] * 3)
    labels = np.ones((1, 400, 400), np.uint8)
    step = (xs[2] - xs[0]) / 200
    labels[:, :, 200:] = 2
    grid = Affine(step, 0, xs[1] - 200 * step, 0, -step, ys[0] + 200 * step)
    write_raster(labelled / "labels.tif", labels, crs="EPSG:4326", transform=grid)
    source = open_labelled(labelled, labels=labelled / "labels.tif")
    west, east = (source.read(record).mask for record in list_tiles(source)[:2])
    assert west is not None
    assert east is not None
    assert (west == 0).all()
    assert (east == 1).all()


def test_error_labels_that_miss_their_scene(labelled: Path) -> None:
    far = Affine(10, 0, LEFT + 1e6, 0, -10, TOP)
    write_raster(labelled / "labels.tif", np.ones((1, 8, 8), np.uint8), crs="EPSG:32633", transform=far)
    with pytest.raises(SourceError) as info:
        list_tiles(open_labelled(labelled, labels=labelled / "labels.tif"))
    scene, message = labelled / "scenes" / "a.tif", str(info.value)
    assert message.startswith(
        f"{labelled / 'labels.tif'}: label raster does not overlap its scene {scene}: "
        "in the scene's EPSG:32632 it lies at (1977353.2, 5093166.4, 1977440.3, 5093253.5), the scene"
    )
    assert "the scene at (500000, 4999840, 500160, 5000000) (left, bottom, right, top); in its" in message
    assert "own EPSG:32633 the raster lies at (1500000, 4999920, 1500080, 5000000); name the" in message


def place(crs: str, left: float, top: float, pixel: float, side: int) -> tuple[Georeference, tuple[int, int]]:
    """Return the place of a square raster, and its size."""
    return Georeference(crs, (pixel, 0, left, 0, -pixel, top)), (side, side)


WORLD = place("EPSG:4326", -180, 180, 1, 360)
WORLD_FROM_GREENWICH = place("EPSG:4326", 0, 180, 1, 360)
ITALY = place("EPSG:32632", LEFT, TOP, 10, 16)
BERING_SEA = place("EPSG:32601", 180000, TOP, 10000, 16)  # 179 degrees east to 178 west


@pytest.mark.parametrize(
    ("scene", "labels", "overlap"),
    [
        (ITALY, ITALY, True),
        (ITALY, place("EPSG:32632", LEFT + 150, TOP - 150, 10, 16), True),  # by one pixel
        (ITALY, place("EPSG:32632", LEFT + 160, TOP, 10, 16), False),  # neighbours
        (ITALY, place("EPSG:32632", LEFT, TOP + 160, 10, 16), False),
        (ITALY, WORLD, True),
        (WORLD, place("EPSG:32632", 300000, TOP, 10, 16), True),
        (WORLD, place("EPSG:3857", -2e7, 2e7, 1e5, 400), True),
        (BERING_SEA, place("EPSG:4326", -179, 50, 1, 16), True),
        (BERING_SEA, place("EPSG:4326", 170, 50, 1, 16), True),
        (BERING_SEA, ITALY, False),
        (place("EPSG:32610", 300000, TOP, 10, 16), WORLD_FROM_GREENWICH, True),
        (place("EPSG:32610", LEFT, TOP, 10, 16), ITALY, False),
        (ITALY, place("EPSG:32633", 1e12, 1e12, 10, 16), False),  # beyond the projection
    ],
)
def test_labels_must_overlap_their_scene(tmp_path: Path, scene: Any, labels: Any, overlap: bool) -> None:
    grid, size = labels
    write_raster(
        tmp_path / "l.tif", np.ones((1, *size), np.uint8), crs=grid.crs, transform=Affine(*grid.transform)
    )
    if overlap:
        check_overlap(tmp_path / "l.tif", Path("scene.tif"), *scene)
    else:
        with pytest.raises(SourceError, match="does not overlap its scene"):
            check_overlap(tmp_path / "l.tif", Path("scene.tif"), *scene)


def test_damaged_labels_are_named_or_skipped_when_read(labelled: Path) -> None:
    (labelled / "labels" / "a.tif").write_bytes(b"nothing like a raster")
    message = raised(ImageError, open_labelled, labelled)
    assert "labels/a.tif: cannot be read as an image (" in message
    assert message.endswith("source.on_error: skip leaves such tiles out")
    source = open_labelled(labelled, on_error="skip")
    with pytest.raises(ImageError, match=r"labels/a\.tif: .*replace or remove it$"):
        source.read(list_tiles(source)[0])


def raised(kind: type[SatDiFuserError], opener: Callable[..., Source], root: Path, **settings: Any) -> str:
    """Return the message of opening, listing and reading scenes."""
    with pytest.raises(kind) as info:
        read_all(opener, root, **settings)
    return str(info.value)


def read_all(opener: Callable[..., Source], root: Path, **settings: Any) -> None:
    source = opener(root, **settings)
    for record in list_tiles(source):
        source.read(record)


def test_errors_of_settings(labelled: Path) -> None:
    message = raised(SettingsError, open_labelled, labelled, overlap=8)
    assert "source.overlap: 8 px, expected less than source.tile_size (8 px)" in message
    message = raised(SettingsError, open_labelled, labelled, classes=None)
    assert "source.classes: missing, but source.labels is" in message
    message = raised(SettingsError, open_scenes, labelled / "missing")
    assert "is missing or of another kind; expected a GeoTIFF or a folder of them" in message
    message = raised(SettingsError, open_labelled, labelled, classes=Path("nowhere"))
    assert "nowhere: no such class list; name one in source.classes" in message
    message = raised(SettingsError, open_labelled, labelled, labels=Path("nowhere"))
    assert (
        "source.labels: nowhere is missing; expected a label raster, a file of polygons or points, or a"
        in message
    )


def test_errors_of_labels(labelled: Path) -> None:
    write_raster(labelled / "labels" / "a.tif", np.full((1, 16, 16), 5, np.uint8))
    message = raised(ImageError, open_labelled, labelled)
    assert "a.tif: mask holds 5; allowed are the class ids 1, 2 and 255" in message
    write_raster(labelled / "plain.tif", np.ones((1, 16, 16), np.uint8), crs=None)
    message = raised(SourceError, open_labelled, labelled, labels=labelled / "plain.tif")
    assert "plain.tif: label raster has no CRS or transform" in message
    (labelled / "labels" / "a.tif").unlink()
    message = raised(SourceError, open_labelled, labelled)
    assert "source.labels: no labels for" in message
    assert "labels/a.tif or" in message


def test_error_scene_without_place(tmp_path: Path) -> None:
    write_raster(tmp_path / "a.tif", random_pixels(3, 8, 8), crs=None)
    assert "a.tif: no CRS or transform; georeference it" in raised(SourceError, open_scenes, tmp_path)


def test_error_all_nodata_scene_is_named(tmp_path: Path) -> None:
    write_raster(tmp_path / "a.tif", random_pixels(3, 8, 8), nodata=0)
    write_raster(tmp_path / "b.tif", np.zeros((3, 8, 8), np.uint8), nodata=0)
    assert "b.tif: no pixel holds data; check source.nodata" in raised(SourceError, open_scenes, tmp_path)


def test_error_small_scene_unless_padded(tmp_path: Path) -> None:
    write_raster(tmp_path / "a.tif", random_pixels(3, 7, 8))
    message = raised(ImageError, open_scenes, tmp_path)
    assert "a tile of 8x8 px at row 0, column 0 reaches beyond the image of 7x8 px" in message
    [record] = list_tiles(open_scenes(tmp_path, pad=True))
    assert record.padded
    assert record.valid_share == 7 / 8


def test_damaged_scenes_are_named_or_skipped(tmp_path: Path) -> None:
    write_raster(tmp_path / "a.tif", random_pixels(3, 8, 8))
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:100])
    message = raised(ImageError, open_scenes, tmp_path)
    assert "b.tif: cannot be read as an image (" in message
    source = open_scenes(tmp_path, on_error="skip")
    good, bad = list_tiles(source)
    assert source.read(good).valid.all()
    with pytest.raises(ImageError, match=r"b\.tif"):
        source.read(bad)


def test_error_no_scenes(tmp_path: Path) -> None:
    message = raised(SourceError, open_scenes, tmp_path)
    assert message == f"source.root: no scenes in {tmp_path}; expected files that end in .tif, .tiff"


def test_error_no_tiles_and_empty_split(labelled: Path) -> None:
    shares = RandomSplit(train=0.9, val=0.05, test=0.05)
    assert "no tile in split val, test" in raised(SourceError, open_labelled, labelled, split=shares)
    pixels = np.zeros((1, 16, 16), np.uint8)
    pixels[0, 0, 0] = 1
    write_raster(labelled / "scenes" / "a.tif", pixels, nodata=0)
    message = raised(SourceError, open_labelled, labelled)
    assert "source: no tiles, 4 left out for too little valid data" in message
    assert "lower source.min_valid" in message


def test_real_scenes(shared: Path) -> None:
    source = open_scenes(shared / "data" / "geotiff", tile_size=256)
    records = list_tiles(source)
    by_scene = Counter(record.tile_id.split("_")[0] for record in records)
    assert by_scene == {"landsat7": 6, "naip": 12, "s2": 14}
    assert source.left_out == 7
    tile = source.read(records[-1])
    assert tile.image.shape == (12, 256, 256)
    assert tile.band_names[:4] == ("B01", "B02", "B03", "B04")
