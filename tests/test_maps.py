"""Maps through the command line: georeference, values, bands, nodata, parts of scenes, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyogrio
import pytest
import rasterio
from affine import Affine
from command_line import call, refuse, succeed
from made_up_maps import (
    CLASSES,
    ONE_THREAD,
    OVERLAP,
    TILE,
    Mapped,
    land_cover,
    photograph,
    settings,
    write_scene,
)
from numpy.typing import NDArray
from rasterio.crs import CRS

from satdifuser.evaluate.maps import pixel_maps
from satdifuser.extract.scene import SceneFeatures
from satdifuser.store.reader import open_store

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

# of the scene's tiles for the run of tiles
KEPT = (
    "source.kind=scenes",
    f"source.tile_size={TILE}",
    f"source.overlap={OVERLAP}",
    "extract.timesteps=[21]",
)


def predict(*words: object) -> Path:
    """Run the command; what it wrote."""
    return Path(succeed("predict", *words, *options_of(words[1])).strip())


def options_of(place: object) -> tuple[str, ...]:
    """What a scene needs besides, to be quick."""
    return settings(ONE_THREAD) if str(place).endswith(".tif") else ()


def read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as dataset:
        found: NDArray[Any] = dataset.read()
    return found


@pytest.fixture(scope="module")
def scene_map(mapped: Mapped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("map") / "map.tif"
    return predict(mapped.run, mapped.scene, "-o", out, "--probabilities", "--confidence")


# --- what a map is


def test_a_map_lies_exactly_on_its_scene(mapped: Mapped, scene_map: Path) -> None:
    with rasterio.open(mapped.scene) as scene, rasterio.open(scene_map) as found:
        assert (found.crs, found.transform, found.shape) == (scene.crs, scene.transform, scene.shape)
        assert found.nodata == 255
        assert found.dtypes[0] == "uint8"
        nowhere = scene.dataset_mask() == 0
        assert 0 < nowhere.mean() < 0.1
        np.testing.assert_array_equal(found.read(1) == 255, nowhere)
        np.testing.assert_array_equal(found.dataset_mask() == 0, nowhere)


def test_a_map_says_what_it_holds_and_what_made_it(mapped: Mapped, scene_map: Path) -> None:
    run = json.loads((mapped.run / "run.json").read_text())
    with rasterio.open(scene_map) as found:
        tags = found.tags()
        assert found.descriptions == ("class", "confidence", *(f"probability: {name}" for name in CLASSES))
        assert found.scales == (1, 1 / 250, 1 / 250, 1 / 250, 1 / 250)
    assert json.loads(tags["SATDIFUSER_CLASSES"]) == CLASSES
    assert tags["SATDIFUSER_STORE"] == open_store(mapped.store).hashes().feature
    assert tags["SATDIFUSER_MODEL_SHA256"] == run["model_sha256"]
    assert "global fusion" in tags["SATDIFUSER_MODEL"]
    assert tags["SATDIFUSER_VERSION"] == "0.1.0"
    assert tags["SATDIFUSER_SCENE"] == "scene.tif"


def test_probabilities_and_confidence_agree_with_the_class(scene_map: Path) -> None:
    bands = read(scene_map)
    seen = bands[0] != 255
    shares = bands[2:, seen].astype(int)
    assert np.abs(shares.sum(axis=0) - 250).max() <= len(CLASSES) / 2
    chosen = np.take_along_axis(shares, bands[0, seen][None].astype(int), axis=0)[0]
    assert (chosen == shares.max(axis=0)).all()
    ordered = np.sort(shares, axis=0)
    assert np.abs(bands[1, seen] - (ordered[-1] - ordered[-2])).max() <= 1
    assert (bands[:, ~seen] == 255).all()


def test_a_map_has_learned_something(mapped: Mapped, scene_map: Path) -> None:
    """Against guessing the most frequent class, a third of all."""
    bands, cover = read(scene_map), land_cover((70, 90))
    seen = bands[0] != 255
    assert (bands[0] == cover)[seen].mean() > 0.6


def test_a_plain_map_carries_colours(mapped: Mapped, scene_map: Path, tmp_path: Path) -> None:
    plain = predict(mapped.run, mapped.scene, "-o", tmp_path / "map.tif")
    with rasterio.open(plain) as found:
        assert found.count == 1
        colours = [found.colormap(1)[number][:3] for number in range(len(CLASSES))]
        named = json.loads(found.tags()["SATDIFUSER_COLOURS"])
    assert ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours] == named
    assert len(set(named)) == len(CLASSES)
    np.testing.assert_array_equal(read(plain)[0], read(scene_map)[0])
    beside = (tmp_path / "map.tif.aux.xml").read_text()
    assert all(f"<Category>{name}</Category>" in beside for name in CLASSES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.stac.json", "map.tif", "map.tif.aux.xml"]


def steepness(bands: NDArray[Any], overlap: int) -> list[float]:
    """How much more than elsewhere probabilities change where tiles begin and end, down and across."""
    shares, found = bands[1:].astype(float), []
    for axis, length in enumerate(bands.shape[1:]):
        changes = np.abs(np.diff(shares, axis=1 + axis)).mean(axis=(0, 2 - axis))
        starts = range(0, length - overlap, TILE - overlap)
        edges = {edge - 1 for start in starts for edge in (start, start + TILE) if 0 < edge < length}
        there = np.isin(np.arange(len(changes)), sorted(edges))
        found.append(float(changes[there].mean() / changes[~there].mean()))
    return found


def test_no_seam_shows_between_tiles(mapped: Mapped, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", photograph(land_cover((104, 128), seed=5)))
    words = (mapped.run, scene, "--probabilities")
    apart = read(predict(*words, "-o", tmp_path / "a.tif", "--overlap", 0))
    blended = read(predict(*words, "-o", tmp_path / "b.tif"))
    assert min(steepness(apart, 0)) > 3
    assert max(steepness(blended, TILE // 4)) < 1.3


# --- parts of a scene


def test_a_window_is_cut_from_the_same_map(mapped: Mapped, scene_map: Path, tmp_path: Path) -> None:
    whole = read(scene_map)
    out = predict(
        mapped.run, mapped.scene, "-o", tmp_path / "w.tif", "--window", "13,30,29,41", "--confidence"
    )
    np.testing.assert_array_equal(read(out), whole[:2, 13:42, 30:71])
    with rasterio.open(out) as found:
        assert found.transform == Affine(10, 0, 500300, 0, -10, 4999870)


def write_polygons(path: Path, rings: list[list[tuple[float, float]]], crs: str = "EPSG:32632") -> Path:
    import shapely

    wkb = np.array([shapely.Polygon(ring).wkb for ring in rings], dtype=object)
    pyogrio.raw.write(path, wkb, [], [], geometry_type="Polygon", crs=crs)
    return path


def corner(row: float, column: float) -> tuple[float, float]:
    """Coordinates in UTM 32N of a place of the scene in px."""
    return 500000 + 10 * column, 5000000 - 10 * row


def test_only_what_lies_inside_polygons_is_mapped(mapped: Mapped, scene_map: Path, tmp_path: Path) -> None:
    ring = [corner(*place) for place in ((10, 50), (10, 80), (30, 50))]  # a triangle
    aoi = write_polygons(tmp_path / "aoi.gpkg", [ring])
    out = predict(mapped.run, mapped.scene, "-o", tmp_path / "a.tif", "--aoi", aoi)
    found, whole = read(out)[0], read(scene_map)[0, 10:30, 50:80]
    rows, columns = np.indices(found.shape) + 0.5
    inside = columns / 30 + rows / 20 < 1
    edge = np.abs(columns / 30 + rows / 20 - 1) < 1e-9
    np.testing.assert_array_equal(found[inside & ~edge], whole[inside & ~edge])
    assert (found[~inside & ~edge] == 255).all()


def test_polygons_in_degrees_land_on_the_same_place(mapped: Mapped, tmp_path: Path) -> None:
    from rasterio.warp import transform

    ring = [corner(*place) for place in ((10, 50), (10, 80), (30, 80), (30, 50))]
    degrees = list(zip(*transform("EPSG:32632", "EPSG:4326", *zip(*ring, strict=True)), strict=True))
    areas = [
        write_polygons(tmp_path / "m.gpkg", [ring]),
        write_polygons(tmp_path / "d.geojson", [degrees], "EPSG:4326"),
    ]
    maps = [predict(mapped.run, mapped.scene, "-o", tmp_path / f"{a.stem}.tif", "--aoi", a) for a in areas]
    with rasterio.open(maps[0]) as first, rasterio.open(maps[1]) as second:
        assert np.abs(np.subtract(first.bounds, second.bounds)).max() <= 10
    assert abs(int((read(maps[0]) != 255).sum()) - int((read(maps[1]) != 255).sum())) <= 60


def test_a_wide_polygon_in_degrees_covers_what_it_covers(
    mapped: Mapped, scene_map: Path, tmp_path: Path
) -> None:
    """Its southern edge is a curve on the scene, and most of it is beyond the reach of the scene's CRS."""
    from rasterio.warp import transform

    columns = np.arange(90) + 0.5
    xs, ys = zip(*(corner(row, column) for row in (34.5, 35.5) for column in columns), strict=True)
    _, latitudes = transform("EPSG:32632", "EPSG:4326", xs, ys)
    border = float(np.mean(latitudes))  # between two rows of the scene, all along it
    ring = [(-180.0, border), (180.0, border), (180.0, 90.0), (-180.0, 90.0)]
    aoi = write_polygons(tmp_path / "aoi.geojson", [ring], "EPSG:4326")
    out = predict(mapped.run, mapped.scene, "-o", tmp_path / "a.tif", "--aoi", aoi)
    found = read(out)[0]
    np.testing.assert_array_equal(found[:35], read(scene_map)[0, :35])
    assert (found[35:] == 255).all()


def test_tiles_away_from_the_polygons_are_not_computed(
    mapped: Mapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    row_of = SceneFeatures.row

    def spy(self: SceneFeatures, row: int, columns: list[int]) -> Any:
        asked.extend((self.grid.tops[row], self.grid.lefts[column]) for column in columns)
        return row_of(self, row, columns)

    monkeypatch.setattr(SceneFeatures, "row", spy)
    ring = [corner(*place) for place in ((1, 1), (1, 5), (5, 5), (5, 1))]
    far = [corner(*place) for place in ((60, 80), (60, 85), (65, 85), (65, 80))]
    aoi = write_polygons(tmp_path / "aoi.gpkg", [ring, far])
    predict(mapped.run, mapped.scene, "-o", tmp_path / "a.tif", "--aoi", aoi, "--overlap", 0)
    assert sorted(asked) == [(0, 0), (32, 64), (64, 64)]


# --- from a store


def test_a_store_and_its_scene_make_the_same_map(mapped: Mapped, tmp_path: Path) -> None:
    scene = predict(mapped.run, mapped.scene, "-o", tmp_path / "a.tif", "--overlap", OVERLAP, "--confidence")
    store = predict(mapped.run, mapped.store, "-o", tmp_path / "b.tif", "--confidence")
    ours, theirs = read(scene), read(store)
    np.testing.assert_array_equal(ours[:, : theirs.shape[1], : theirs.shape[2]], theirs)
    with rasterio.open(mapped.scene) as expected, rasterio.open(store) as found:
        assert (found.crs, found.transform) == (expected.crs, expected.transform)
        assert found.tags()["SATDIFUSER_SCENE"] == "masks.zarr"


def test_features_are_kept_where_asked_and_the_map_is_the_same(
    mapped: Mapped, scene_map: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.zarr"
    out = predict(mapped.run, mapped.scene, "-o", tmp_path / "map.tif", "--store", kept, "--confidence")
    np.testing.assert_array_equal(read(out), read(scene_map)[:2])
    assert len(open_store(kept).tiles) == 3 * 4
    again = predict(mapped.run, kept, "-o", tmp_path / "again.tif", "--window", "0,0,70,90", "--confidence")
    np.testing.assert_array_equal(read(again), read(out))
    message = refuse("predict", mapped.run, kept, "-o", tmp_path / "beyond.tif", "--window", "0,0,71,90")
    assert "inside the raster of 70 x 90 px" in message  # the last tiles are padded beyond it


def test_two_batches_at_once_make_the_same_map(mapped: Mapped, scene_map: Path, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "map.tif", "--set", "extract.threads=2", "--set", "extract.batch_size=1")
    alone = ("-o", tmp_path / "alone.tif", "--set", "extract.threads=1", "--set", "extract.batch_size=1")
    maps = [read(predict(mapped.run, mapped.scene, *each, "--confidence")) for each in (words, alone)]
    np.testing.assert_array_equal(*maps)


def test_tiles_of_a_store_are_chosen_by_their_ids(mapped: Mapped, tmp_path: Path) -> None:
    part = predict(mapped.run, mapped.store, "-o", tmp_path / "b.tif", "--tiles", "scene/16_*")
    with rasterio.open(part) as found:
        assert found.shape == (TILE, 90)
        assert found.transform == Affine(10, 0, 500000, 0, -10, 4999840)
    message = refuse("predict", mapped.run, mapped.store, "-o", tmp_path / "c.tif", "--tiles", "other/*")
    assert "no tile's id matches --tiles 'other/*'; the first of 20 is scene/0_0" in message


def test_windows_reach_into_the_gaps_between_tiles(mapped: Mapped, tmp_path: Path) -> None:
    """Tiles of rows 0 to 31 and 48 to 79, the last ten of which lie beyond the scene."""
    words = (mapped.run, mapped.store, "--tiles", "scene/[04]*", "-o")
    whole = read(predict(*words, tmp_path / "whole.tif"))
    assert (whole[0, 32:48] == 255).all()
    for number, (row, col, height, width) in enumerate(((34, 0, 20, 20), (0, 3, 40, 9), (33, 0, 36, 90))):
        window = f"{row},{col},{height},{width}"
        part = read(predict(*words, tmp_path / f"{number}.tif", "--window", window))
        np.testing.assert_array_equal(part, whole[:, row : row + height, col : col + width])
    message = refuse("predict", *words, tmp_path / "none.tif", "--window", "34,0,6,20")
    assert "no pixel of what is asked for holds data" in message


# --- classes of tiles


@pytest.fixture(scope="module")
def tile_table(mapped: Mapped, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("tiles") / "tiles.csv"
    return pd.read_csv(predict(mapped.tile_run, mapped.tile_store, "-o", out, "--probabilities"))


def test_classes_of_a_stores_tiles_as_a_table(
    mapped: Mapped, tile_table: pd.DataFrame, tmp_path: Path
) -> None:
    store = open_store(mapped.tile_store)
    classes = store.attributes.classes
    assert tile_table["tile_id"].astype(int).tolist() == store.tiles.tile_id.astype(int).tolist()
    shares = tile_table[[f"probability: {name}" for name in classes]].to_numpy()
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    assert [classes[number] for number in shares.argmax(axis=1)] == tile_table["class"].tolist()
    assert tile_table["probability"].to_numpy() == pytest.approx(shares.max(axis=1))
    other = pd.read_parquet(
        predict(mapped.tile_run, mapped.tile_store, "-o", tmp_path / "t.parquet", "--confidence")
    )
    top = np.sort(shares, axis=1)
    assert other["confidence"].to_numpy() == pytest.approx(top[:, -1] - top[:, -2], abs=1e-5)


def test_a_window_chooses_tiles_of_a_store(mapped: Mapped, tile_table: pd.DataFrame, tmp_path: Path) -> None:
    words = ("predict", mapped.tile_run, mapped.tile_store, "-o", tmp_path / "t.csv")
    succeed(*words, "--window", f"0,{TILE - 1},{TILE},{TILE}")
    assert pd.read_csv(tmp_path / "t.csv")["tile_id"].tolist() == tile_table["tile_id"].tolist()[:2]


def test_an_area_between_the_tiles_of_a_store_is_refused(mapped: Mapped, tmp_path: Path) -> None:
    stored = ("--tiles", "scene/[04]*", "-o", tmp_path / "t.csv")
    aoi = write_polygons(tmp_path / "aoi.gpkg", [[corner(r, c) for r, c in ((34, 2), (34, 9), (40, 9))]])
    kept = tmp_path / "kept.zarr"
    succeed("extract", *settings(*KEPT), *settings(f"source.root={mapped.scene}", ONE_THREAD), "-o", kept)
    assert len(predict(mapped.tile_run, kept, *stored).read_text().splitlines()) > 2
    for place in (("--aoi", aoi), ("--window", "34,2,6,7")):
        message = refuse("predict", mapped.tile_run, kept, *stored, "--overwrite", *place)
        assert "no tile of" in message
        assert "lies on what is asked for; choose another --window or --aoi" in message


def test_classes_of_tiles_as_polygons(mapped: Mapped, tile_table: pd.DataFrame, tmp_path: Path) -> None:
    import shapely

    out = predict(mapped.tile_run, mapped.tile_store, "-o", tmp_path / "tiles.gpkg")
    meta, _, wkb, fields = pyogrio.raw.read(out)
    columns = dict(zip(meta["fields"].tolist(), fields, strict=True))
    assert CRS.from_user_input(meta["crs"]) == CRS.from_epsg(32632)
    assert columns["class"].tolist() == tile_table["class"].tolist()
    bounds = open_store(mapped.tile_store).tiles[["left", "bottom", "right", "top"]].to_numpy()
    np.testing.assert_allclose(shapely.bounds(shapely.from_wkb(wkb)), bounds)


def test_classes_of_tiles_as_a_raster(mapped: Mapped, tile_table: pd.DataFrame, tmp_path: Path) -> None:
    out = predict(mapped.tile_run, mapped.tile_store, "-o", tmp_path / "tiles.tif")
    with rasterio.open(out) as found:
        cells, place = found.read(1), found.transform
    assert cells.shape == (1, 30)
    assert cells[0].tolist() == tile_table["class_number"].tolist()
    assert place == Affine(10 * TILE, 0, 400000, 0, -10 * TILE, 5400000)


def test_classes_of_a_scenes_tiles(mapped: Mapped, tmp_path: Path) -> None:
    """The grid of cells covers the scene, those without data stay empty; tables and rasters agree."""
    table = pd.read_csv(predict(mapped.tile_run, mapped.scene, "-o", tmp_path / "a.csv"))
    assert len(table) == 3 * 3
    raster = predict(mapped.tile_run, mapped.scene, "-o", tmp_path / "a.tif", "--overlap", 4, "--confidence")
    with rasterio.open(raster) as found:
        assert found.shape == (3, 4)
        assert found.transform == Affine(280, 0, 500020, 0, -280, 4999980)  # the middles of the tiles
    vectors = predict(mapped.tile_run, mapped.scene, "-o", tmp_path / "a.gpkg", "--window", "0,0,33,16")
    assert pyogrio.read_info(vectors)["features"] == 2
    assert table["tile_id"].tolist()[:2] == ["scene/0_0", "scene/0_32"]


# --- going on


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_map_goes_on_with_the_same_values(
    mapped: Mapped, scene_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out, rows = tmp_path / "map.tif", []
    row_of = SceneFeatures.row

    def interrupted(self: SceneFeatures, row: int, columns: list[int]) -> Any:
        rows.append(row)
        if len(rows) > after:
            raise KeyboardInterrupt
        return row_of(self, row, columns)

    words = ("predict", mapped.run, mapped.scene, "-o", out, "--confidence", *settings(ONE_THREAD))
    with monkeypatch.context() as patch:
        patch.setattr(SceneFeatures, "row", interrupted)
        stopped = call(*words)
    assert stopped.exit_code == 130
    assert "the same command (without --overwrite) goes on" in stopped.stderr
    assert not out.exists()
    rows.clear()
    monkeypatch.setattr(
        SceneFeatures, "row", lambda self, row, columns: rows.append(row) or row_of(self, row, columns)
    )
    succeed(*words)
    assert rows == list(range(max(0, after - 1), 3))  # the row before is done again for what it shares
    np.testing.assert_array_equal(read(out), read(scene_map)[:2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.stac.json", "map.tif", "map.tif.aux.xml"]


def test_what_another_request_left_is_not_gone_on_with(mapped: Mapped, tmp_path: Path) -> None:
    out = tmp_path / "map.tif"
    (tmp_path / ".map.tif.strips").write_bytes(bytes(90 * 24))
    (tmp_path / ".map.tif.strips.json").write_text('{"identity": "other"}')
    predict(mapped.run, mapped.scene, "-o", out)
    assert (read(out)[0, :24] != 0).any()


def test_a_half_written_strip_is_cut_off(
    mapped: Mapped, scene_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "map.tif"
    with monkeypatch.context() as patch:
        patch.setattr(pixel_maps, "write_map", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("predict", mapped.run, mapped.scene, "-o", out, *settings(ONE_THREAD)).exit_code == 130
    strips = tmp_path / ".map.tif.strips"
    whole = strips.read_bytes()
    strips.write_bytes(whole[: len(whole) // 2 + 7])
    predict(mapped.run, mapped.scene, "-o", out)
    np.testing.assert_array_equal(read(out)[0], read(scene_map)[0])
