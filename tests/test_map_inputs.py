"""Scenes of all kinds become maps, and bad requests are refused with one clear message."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from affine import Affine
from command_line import call, refuse, succeed
from made_up_maps import ONE_THREAD, OVERLAP, Mapped, land_cover, photograph, settings, write_scene
from numpy.typing import NDArray

from satdifuser.errors import StoreError
from satdifuser.store.georeference import Georeference
from satdifuser.store.place import crosses_antimeridian, ground_distance, typical_pixel_size
from satdifuser.store.reader import open_store

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

SIZE = (40, 48)
ONE_STEP = 0.02  # share of pixels that may change class where values were rounded on another scale


@pytest.fixture(scope="module")
def plain(mapped: Mapped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of three 8-bit bands, with its map beside it."""
    folder = tmp_path_factory.mktemp("plain")
    write_scene(folder / "scene.tif", photograph(land_cover(SIZE)))
    predict(mapped, folder / "scene.tif", folder / "map.tif")
    return folder


def predict(mapped: Mapped, scene: Path, out: Path, *words: object) -> NDArray[Any]:
    """Map a scene; the bands of the map."""
    succeed("predict", mapped.run, scene, "-o", out, *settings(ONE_THREAD), *words)
    return read(out)


def read(path: Path) -> NDArray[Any]:
    with rasterio.open(path) as dataset:
        found: NDArray[Any] = dataset.read()
    return found


# --- kinds of scenes


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_types_with_a_scale_make_the_same_map(
    mapped: Mapped, plain: Path, tmp_path: Path, dtype: str
) -> None:
    pixels = read(plain / "scene.tif").astype(dtype)
    values, scale = (pixels * 10, "1/2550") if dtype == "uint16" else (pixels / np.float32(255), "1")
    scene = write_scene(tmp_path / "scene.tif", values)
    found = predict(mapped, scene, tmp_path / "map.tif", *settings(f"source.scale={scale}"))
    assert (found != read(plain / "map.tif")).mean() <= ONE_STEP


@pytest.mark.parametrize("bands", ["[4, 3, 2]", "[B04, B03, B02]"])
def test_bands_of_twelve_are_chosen_by_number_or_name(
    mapped: Mapped, plain: Path, tmp_path: Path, bands: str
) -> None:
    red, green, blue = read(plain / "scene.tif")
    others = np.random.default_rng(0).integers(1, 255, (9, *SIZE), np.uint8)
    scene = write_scene(tmp_path / "scene.tif", np.stack([others[0], blue, green, red, *others[1:]]))
    names = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
    with rasterio.open(scene, "r+") as dataset:
        dataset.descriptions = names
    found = predict(mapped, scene, tmp_path / "map.tif", *settings(f"source.bands={bands}"))
    np.testing.assert_array_equal(found, read(plain / "map.tif"))


@pytest.mark.parametrize("how", ["mask", "alpha", "nan", "setting"])
def test_pixels_without_data_stay_without(mapped: Mapped, plain: Path, tmp_path: Path, how: str) -> None:
    pixels, empty = read(plain / "scene.tif"), np.zeros(SIZE, bool)
    empty[5:9] = empty[:, 40:] = True  # a stripe, and an edge
    options: tuple[str, ...] = ()
    profile: dict[str, Any] = {}
    if how == "nan":
        pixels = pixels / np.float32(255)
        pixels[:, empty] = np.nan
        options = settings("source.scale=1")
    elif how == "alpha":
        pixels = np.stack([*pixels, np.where(empty, 0, 255).astype(np.uint8)])
        profile, options = {"alpha": "yes", "photometric": "rgb"}, settings("source.bands=[1,2,3]")
    elif how == "setting":
        pixels[:, empty] = 7
        options = settings("source.nodata=7")
    scene = write_scene(tmp_path / "scene.tif", pixels, **profile)
    if how == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(scene, "r+") as dataset:
            dataset.write_mask(~empty)
    found = predict(mapped, scene, tmp_path / "map.tif", *options)
    np.testing.assert_array_equal(found[0] == 255, empty)


def test_a_scene_without_any_data_is_no_map(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", np.full((3, *SIZE), 7, np.uint8), nodata=7)
    message = refuse("predict", mapped.run, scene, "-o", out, *settings(ONE_THREAD))
    assert "no pixel of what is asked for holds data" in message
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_a_scene_smaller_than_a_tile(mapped: Mapped, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", photograph(land_cover((9, 50))))
    found = predict(mapped, scene, tmp_path / "map.tif")
    assert found.shape == (1, 9, 50)
    assert (found != 255).all()


def test_a_saturated_tile_is_mapped_with_a_warning(mapped: Mapped, tmp_path: Path) -> None:
    """A cloud brighter than white is no reason to stop, though a source of tiles to learn from refuses it."""
    pixels = photograph(land_cover(SIZE)).astype(np.uint16)
    pixels[:, :, :32] = 900
    scene = write_scene(tmp_path / "scene.tif", pixels)
    words = (
        "predict",
        mapped.run,
        scene,
        "-o",
        tmp_path / "m.tif",
        *settings(ONE_THREAD, "source.scale=1/255"),
    )
    result = call(*words)
    assert result.exit_code == 0
    assert "of the values lie outside [0, 1] and are clipped" in result.stderr
    assert (read(tmp_path / "m.tif") != 255).all()


@pytest.mark.parametrize("transform", [Affine(9, 3, 500000, 3, -9, 5000000), Affine(10, 0, 5e5, 0, 10, 5e6)])
def test_rotated_and_south_up_scenes(mapped: Mapped, plain: Path, tmp_path: Path, transform: Affine) -> None:
    scene = write_scene(tmp_path / "scene.tif", read(plain / "scene.tif"), transform=transform)
    np.testing.assert_array_equal(predict(mapped, scene, tmp_path / "map.tif"), read(plain / "map.tif"))
    with rasterio.open(tmp_path / "map.tif") as found:
        assert found.transform == transform


def test_dates_of_scenes_are_kept(mapped: Mapped, plain: Path, tmp_path: Path) -> None:
    scene = shutil.copy(plain / "scene.tif", tmp_path / "scene.tif")
    with rasterio.open(scene, "r+") as dataset:
        dataset.update_tags(ACQUISITIONDATE="2019-04-16T10:00:31")
    predict(mapped, scene, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as found:
        assert found.tags()["ACQUISITIONDATE"] == "2019-04-16T10:00:31"


# --- pixel sizes


def test_pixel_sizes_in_metres(mapped: Mapped) -> None:
    store = open_store(mapped.store)
    assert typical_pixel_size(store) == pytest.approx(10, rel=1e-3)
    degrees = Georeference("EPSG:4326", (0.001, 0, 10, 0, -0.001, 60.5))
    assert ground_distance(degrees, (1000, 1000)) == pytest.approx(78.8, abs=0.1)


def test_another_pixel_size_is_warned_of(mapped: Mapped, plain: Path, tmp_path: Path) -> None:
    for metres, warned in ((14, False), (16, True), (6, True)):
        scene = write_scene(
            tmp_path / "s.tif", read(plain / "scene.tif"), transform=Affine(metres, 0, 5e5, 0, -metres, 5e6)
        )
        result = call(
            "predict", mapped.run, scene, "-o", tmp_path / "m.tif", "--overwrite", *settings(ONE_THREAD)
        )
        expected = (
            f"its pixels are {metres} m wide, those that the run was fitted on 10 m: what it knows of sizes"
        )
        assert (expected in result.stderr) == warned


def test_a_scene_of_larger_pixels_is_seen_at_those_of_the_fit(
    mapped: Mapped, plain: Path, tmp_path: Path
) -> None:
    """Pixels of 5 m: each tile covers twice as many, and the map keeps the scene's grid."""
    doubled = read(plain / "scene.tif").repeat(2, axis=1).repeat(2, axis=2)
    scene = write_scene(tmp_path / "s.tif", doubled, transform=Affine(5, 0, 500000, 0, -5, 5000000))
    result = call(
        "predict", mapped.run, scene, "-o", tmp_path / "m.tif", "--resample", "auto", *settings(ONE_THREAD)
    )
    assert result.exit_code == 0
    assert "warning" not in result.stderr
    found, expected = read(tmp_path / "m.tif")[0], read(plain / "map.tif")[0]
    assert found.shape == (80, 96)
    halved = found[::2, ::2]
    ignoring_resampling = found[:, :] == expected.repeat(2, axis=0).repeat(2, axis=1)
    assert ignoring_resampling.mean() > 0.9
    assert halved.shape == expected.shape
    named = predict(mapped, scene, tmp_path / "n.tif", "--resample", "10")
    np.testing.assert_array_equal(named[0], found)


# --- refusals


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.tif"


def test_a_scene_with_fewer_bands(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "s.tif", photograph(land_cover(SIZE))[:2])
    message = "it has 2 bands, expected 3; name red, green and blue with source.bands"
    assert message in refuse("predict", mapped.run, scene, "-o", out)
    message = "no band 4 in source.bands; it has 2 bands"
    assert message in refuse("predict", mapped.run, scene, "-o", out, "--set", "source.bands=[1,2,4]")


def test_values_without_a_scale(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "s.tif", photograph(land_cover(SIZE)).astype(np.uint16))
    assert "uint16 pixels without a declared scale" in refuse("predict", mapped.run, scene, "-o", out)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:4326", Affine(0.01, 0, 179.8, 0, -0.01, 10)),
        ("EPSG:32660", Affine(1000, 0, 800000, 0, -1000, 1000000)),
        ("EPSG:3413", Affine(1000, 0, -20000, 0, -1000, 20000)),  # around the pole
    ],
)
def test_scenes_across_the_antimeridian(
    mapped: Mapped, out: Path, tmp_path: Path, crs: str, transform: Affine
) -> None:
    scene = write_scene(tmp_path / "s.tif", photograph(land_cover(SIZE)), crs=crs, transform=transform)
    message = refuse("predict", mapped.run, scene, "-o", out)
    assert "reaches across the antimeridian (180 degrees east or west) or around a pole" in message
    assert message in refuse(
        "tiles", *settings("source.kind=scenes", f"source.root={scene}", "source.tile_size=32")
    )


def test_scenes_near_the_antimeridian_are_welcome() -> None:
    degrees = Georeference("EPSG:4326", (0.01, 0, 179, 0, -0.01, 10))
    world = Georeference("EPSG:4326", (1, 0, -180, 0, -1, 90))
    zone = Georeference("EPSG:32601", (10, 0, 300000, 0, -10, 7000000))
    for place, size in ((degrees, (100, 100)), (world, (180, 360)), (zone, (100, 100))):
        assert not crosses_antimeridian(place, size)


def test_a_picture_without_a_place(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "s.tif", photograph(land_cover(SIZE)), crs=None)
    assert "no CRS or transform; georeference it" in refuse("predict", mapped.run, scene, "-o", out)


REFUSED = [
    (
        ("--window", "0,0,20"),
        "--window 0,0,20: expected row, column, height and width in px, e.g. 0,0,1024,1024",
    ),
    (
        ("--window", "60,0,20,20"),
        "--window 60,0,20,20: expected row, column, height and width in px inside the raster",
    ),
    (("--window", "0,0,0,5"), "inside the raster of 70 x 90 px (height x width)"),
    (("--window", "0,0,5,5", "--aoi", "a.gpkg"), "--window and --aoi: name one of them"),
    (("--overlap", "17"), "--overlap: got 17 px, expected 0 to 16, half of a tile of 32 x 32 px"),
    (("--resample", "-3"), "--resample -3: expected auto, or metres per pixel such as 10"),
    (("--resample", "10m"), "--resample 10m: expected auto, or metres per pixel such as 10"),
    (("--set", "source.bamds=[1]"), "source.bamds = [1]: unknown setting; did you mean bands"),
    (("--tiles", "x*"), "--tiles: is for stores, but got the scene"),
    (("--resample", "1"), "holds 3 x 3 px of"),
    (("--resample", "20", "--store", "k.zarr"), "--store: keeps features of the scene's own pixels"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_bad_requests(mapped: Mapped, out: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refuse("predict", mapped.run, mapped.scene, "-o", out, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (shapely.Point(500100, 4999900), "holds 1 features and no polygon"),
        (shapely.box(500101, 4999891, 500103, 4999893), "its polygons cover the centre of no pixel"),
        (
            shapely.box(499900, 4999500, 500000, 4999900),
            "none of its 1 polygons lies on the raster",
        ),  # an edge
    ],
)
def test_areas_of_interest_that_hold_nothing(
    mapped: Mapped, out: Path, tmp_path: Path, shape: Any, message: str
) -> None:
    aoi, wkb = tmp_path / "a.gpkg", np.array([shape.wkb], dtype=object)
    pyogrio.raw.write(aoi, wkb, [], [], geometry_type=shape.geom_type, crs="EPSG:32632")
    kept = tmp_path / "kept.zarr"
    assert message in refuse("predict", mapped.run, mapped.scene, "-o", out, "--aoi", aoi, "--store", kept)
    assert not kept.exists()  # told before anything is computed
    assert not out.exists()


def test_an_output_that_is_there_is_kept(mapped: Mapped, out: Path) -> None:
    out.write_text("precious")
    message = f"{out}: exists; choose another -o, or replace it with --overwrite"
    assert message in refuse("predict", mapped.run, mapped.store, "-o", out)
    assert out.read_text() == "precious"
    succeed("predict", mapped.run, mapped.store, "-o", out, "--overwrite")
    assert read(out).shape[0] == 1


@pytest.mark.parametrize(
    ("run", "name", "expected"),
    [
        ("masks", "map.csv", ".tif or .tiff for a run of segmentation"),
        ("tiles", "map.png", ".gpkg or .csv or .parquet"),
    ],
)
def test_an_output_of_an_unknown_kind(
    mapped: Mapped, tmp_path: Path, run: str, name: str, expected: str
) -> None:
    message = refuse("predict", mapped.folder / "runs" / run, mapped.scene, "-o", tmp_path / name)
    assert f"got the ending '.{name[-3:]}', expected" in message
    assert expected in message


def test_what_is_neither_scene_nor_store(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    assert "missing.zarr: no such store" in refuse(
        "predict", mapped.run, tmp_path / "missing.zarr", "-o", out
    )
    assert "missing.tif: cannot be read" in refuse("predict", mapped.run, tmp_path / "missing.tif", "-o", out)
    message = refuse("predict", mapped.run, mapped.store, "-o", out, "--overlap", OVERLAP)
    assert "--overlap: is for scenes, GeoTIFFs that end in .tif or .tiff" in message


def test_another_backbone_than_that_of_the_fit(mapped: Mapped, out: Path) -> None:
    message = refuse("predict", mapped.run, mapped.scene, "-o", out, "--set", "extract.seed=5")
    assert f"its features are not made as those that {mapped.run} was fitted on:" in message
    assert "seed: the run expects 0, here it is 5" in message


def test_a_store_of_other_features(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    small = ("--set", "source.tiles=5", "--set", "source.tile_size=32")
    succeed(
        "extract", *small, *settings("extract.timesteps=[21]", "extract.seed=5"), "-o", tmp_path / "s.zarr"
    )
    message = refuse("predict", mapped.run, tmp_path / "s.zarr", "-o", out)
    assert "seed: the run expects 0, here it is 5" in message


def test_a_baseline_maps_nothing(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    run = shutil.copytree(mapped.run, tmp_path / "run")
    info = (run / "run.json").read_text().replace('"kind": "fusion"', '"kind": "baseline"')
    (run / "run.json").write_text(info)
    assert "holds no fitted fusion (its kind is baseline)" in refuse("predict", run, mapped.scene, "-o", out)


def test_a_run_of_before(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    run = shutil.copytree(mapped.run, tmp_path / "run")
    info = (run / "run.json").read_text().replace('"feature_identity"', '"forgotten"')
    (run / "run.json").write_text(info)
    assert "does not say how its features were made; fit it again" in refuse(
        "predict", run, mapped.store, "-o", out
    )


def test_a_run_without_its_settings(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    run = shutil.copytree(mapped.run, tmp_path / "run")
    (run / "settings.yaml").unlink()
    assert "settings.yaml: cannot be read" in refuse("predict", run, mapped.scene, "-o", out)


def test_two_commands_for_one_map(mapped: Mapped, out: Path) -> None:
    from satdifuser.store.lock import StoreLock

    with StoreLock(out):
        assert "is being written by process" in refuse("predict", mapped.run, mapped.store, "-o", out)


def test_tiles_without_places_make_tables_only(mapped: Mapped, tmp_path: Path) -> None:
    from made_up import image_folder

    image_folder(tmp_path / "images", {"a": 2, "b": 2})
    folder = settings("source.kind=folder", f"source.root={tmp_path / 'images'}", "source.tile_size=16")
    succeed(
        "extract",
        *folder,
        *settings("extract.image_size=32", "extract.timesteps=[21]"),
        "-o",
        tmp_path / "s.zarr",
    )
    quick = settings("fit.fusion=[global]", "fit.projection=16", "fit.norm_groups=1", "fit.epochs=1")
    succeed(
        "fit", tmp_path / "s.zarr", *quick, *settings("evaluate.baselines=false"), "-o", tmp_path / "runs"
    )
    words = ("predict", tmp_path / "runs/global-seed0", tmp_path / "s.zarr", "-o")
    for name in ("a.tif", "a.gpkg"):
        assert "not all tiles have a place on the ground, so they make no map" in refuse(
            *words, tmp_path / name
        )
    succeed(*words, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().startswith("tile_id,class,class_number,probability\n")
    message = "so their pixel size is not known; name it in metres, e.g. --resample 10"
    assert message in refuse(words[0], words[1], mapped.scene, "-o", tmp_path / "b.csv", "--resample", "auto")


def test_an_incomplete_store(mapped: Mapped, out: Path, tmp_path: Path) -> None:
    store = shutil.copytree(mapped.store, tmp_path / "s.zarr")
    (store / "commits/c/0").unlink()
    with pytest.raises(StoreError):
        open_store(store).require_complete()
    assert "shards are missing" in refuse("predict", mapped.run, store, "-o", out)
