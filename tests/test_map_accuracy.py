"""Accuracy of a map and areas of its classes: the published example, and maps on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from command_line import refuse, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import run_record
from made_up_scene import SIDE, box, point, scene_store, write_scene, write_vectors

import satdifuser
from satdifuser.evaluate.maps import assess
from satdifuser.evaluate.maps.assess import pixel_areas
from satdifuser.evaluate.maps.estimators import estimate
from satdifuser.store.georeference import Georeference

# Olofsson et al. 2014, table 8: deforestation, forest gain, stable forest, stable non-forest; mapped areas in
# pixels of 30 m
PUBLISHED = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
MAPPED = np.array([200_000, 150_000, 3_200_000, 6_450_000]) * 0.09  # ha


def test_the_published_example() -> None:
    """Section 5 of the paper: accuracies to two digits, areas in hectares."""
    found = estimate(PUBLISHED, MAPPED)
    assert (round(float(found.overall.value), 2), round(float(found.overall.half_width), 2)) == (0.95, 0.02)
    assert found.users.value.round(2).tolist() == [0.88, 0.73, 0.93, 0.96]
    assert found.users.half_width.round(2).tolist() == [0.07, 0.10, 0.04, 0.02]
    assert found.producers.value.round(2).tolist() == [0.75, 0.85, 0.93, 0.96]
    assert found.areas.value.round().tolist() == [21_158, 11_686, 285_770, 581_386]
    assert found.areas.half_width == pytest.approx([6_158, 3_756, 15_510, 16_282], abs=1)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_shares_add_up_and_a_sample_in_proportion_is_plain_accuracy(seed: int, classes: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 50, (classes, classes)) + 2
    found = estimate(counts, counts.sum(axis=1) * 3.0)
    assert found.proportions.sum() == pytest.approx(1)
    assert float(found.overall.value) == pytest.approx(np.trace(counts) / counts.sum())
    assert found.producers.value == pytest.approx(np.diagonal(counts) / counts.sum(axis=0))
    assert found.areas.value.sum() == pytest.approx(3 * counts.sum())


def test_intervals_hold_what_they_promise() -> None:
    """Of 400 samples, 95 % intervals of every estimate hold the truth about 95 times in 100."""
    random, rows = np.random.default_rng(0), np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.05, 0.05, 0.9]])
    mapped = np.array([100.0, 300.0, 600.0])
    truth = (mapped[:, None] * rows).sum(axis=0)
    right = mapped * np.diagonal(rows)
    exact = [np.diagonal(rows), right / truth, truth, np.array([right.sum() / 1000])]
    held = [np.zeros(len(values)) for values in exact]
    for _ in range(400):
        found = estimate(np.stack([random.multinomial(150, row) for row in rows]), mapped)
        for inside, values, told in zip(
            held, exact, (found.users, found.producers, found.areas, found.overall), strict=True
        ):
            inside += np.abs(np.atleast_1d(told.value) - values) <= np.atleast_1d(told.half_width)
    assert all((share / 400 > 0.91).all() and (share / 400 < 0.99).all() for share in held)


@pytest.mark.parametrize(
    ("mapped", "rows"),
    [
        ([100.0, 900.0], [[0.5, 0.5], [0.3, 0.7]]),  # most of the first class is mapped as the second
        ([500.0, 500.0], [[0.5, 0.5], [0.1, 0.9]]),
    ],
)
def test_half_widths_are_the_spread_of_repeated_samples(mapped: list[float], rows: list[list[float]]) -> None:
    random, samples = np.random.default_rng(1), 3000
    drawn = [np.stack([random.multinomial(300, row) for row in rows]) for _ in range(samples)]
    found = [estimate(counts, np.array(mapped)) for counts in drawn]
    for name in ("users", "producers", "areas", "overall"):
        values = np.array([getattr(one, name).value for one in found])
        told = np.array([getattr(one, name).half_width for one in found]) / 1.959964
        assert values.std(axis=0) == pytest.approx(np.sqrt((told**2).mean(axis=0)), rel=0.06)


def test_what_was_not_sampled_is_left_out_and_one_pixel_gives_no_interval() -> None:
    found = estimate(np.array([[5, 5, 0], [0, 0, 0], [0, 0, 1]]), np.array([10.0, 100.0, 10.0]))
    assert (float(found.overall.value), math.isnan(float(found.overall.half_width))) == (0.75, True)
    assert np.isnan(found.users.value).tolist() == [False, True, False]
    assert np.isnan(found.users.half_width).tolist() == [False, True, True]
    assert found.areas.value.tolist() == [5, 5, 10]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Georeference("EPSG:32632", (10, 0, 500000, 0, -10, 5000000)), 100 / 0.9996**2),
        (Georeference("EPSG:2263", (2, 0, 1e6, 0, -2, 2e5)), 4 * 0.3048006096**2),
        (Georeference("EPSG:32632", (8, 6, 500000, 6, -8, 5000000)), 100 / 0.9996**2),  # turned
        # in Mercator's a degree of latitude is 1 / cos(60 degrees) of itself, both ways
        (Georeference("EPSG:3857", (10, 0, 0, 0, -10, 8399738)), 25.084),
        (Georeference("EPSG:6933", (10, 0, 0, 0, -10, 6e6)), 100.0),  # of equal area
    ],
)
def test_ground_under_a_pixel(place: Georeference, expected: float) -> None:
    assert pixel_areas(place, 3, 4) == pytest.approx([expected] * 3, rel=1e-5)


def test_ground_under_pixels_of_degrees_shrinks_to_the_pole() -> None:
    """The rows of a grid over a whole hemisphere together have half the area of the earth."""
    areas = pixel_areas(Georeference("EPSG:4326", (1, 0, -180, 0, -0.25, 90)), 360, 360)
    assert 360 * areas.sum() == pytest.approx(510.07e12 / 2, rel=1e-4)
    assert areas[-1] / areas[119] == pytest.approx(2, rel=0.01)  # the equator against 60 degrees north


# --- maps on disk


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record = run_record(name="r", classes=["water", "forest"], layers=[], model_sha256="abc")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    return tmp_path / "run"


def write_map(path: Path, classes: list[str] | None = None, **more: Any) -> Path:
    """40 x 60 px: water in the left 20 columns, forest elsewhere, nothing in the last ten rows."""
    values = np.ones((1, 40, 60), np.uint8)
    values[:, :, :20], values[:, 30:] = 0, 255
    write_scene(path, values, nodata=255, **more)
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(SATDIFUSER_CLASSES=json.dumps(classes or ["water", "forest"]))
    return path


def georeference(path: Path) -> Georeference:
    with rasterio.open(path) as dataset:
        return Georeference(dataset.crs.to_string(), tuple(dataset.transform)[:6])


def test_a_map_against_polygons(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assess, "BLOCK", 16)  # labels across blocks, and a last block of another size
    shapes = [box(2, 2, 10, 10), box(2, 16, 10, 8), box(5, 30, 20, 20), box(28, 0, 10, 60)]
    path = write_vectors(tmp_path / "r.gpkg", shapes, ["water", "water", "forest", "forest"], "EPSG:4326")
    words = ("evaluate", run, "--reference", path, "--map", write_map(tmp_path / "m.tif"), "--json")
    found = json.loads(succeed(*words))
    assert found["confusion"] == [[100 + 40, 40], [40, 400 + 80]]
    assert found["reference_pixels"] == 700
    ground = pixel_areas(georeference(tmp_path / "m.tif"), 1, 1)[0] / 1e4  # ha under a pixel, about 0.01
    expected = estimate(np.array(found["confusion"]), np.array([600, 1200]) * ground)
    assert found["classes"]["water"]["mapped_ha"] == pytest.approx(600 * ground)
    assert found["overall_accuracy"]["value"] == pytest.approx(float(expected.overall.value))
    low, high = found["classes"]["forest"]["area_ha"]["interval"]
    assert (low + high) / 2 == pytest.approx(expected.areas.value[1])
    assert high - low == pytest.approx(2 * expected.areas.half_width[1])
    wide = json.loads(succeed(*words, "--set", "evaluate.level=0.99"))["overall_accuracy"]["interval"]
    assert wide[1] - wide[0] > np.diff(found["overall_accuracy"]["interval"])[0]
    told = succeed(*words[:-1])
    assert "overall accuracy 0.8" in told
    assert "water" in told.splitlines()[-2]
    assert told.splitlines()[-2].split()[1:] == ["140", "40"]


def test_points_and_rasters_as_reference(run: Path, tmp_path: Path) -> None:
    places = [(r, c) for r in range(0, 40, 4) for c in range(0, 60, 4)]
    classes = ["water" if c < 24 else "forest" for _, c in places]
    path = write_vectors(tmp_path / "p.geojson", [point(*p) for p in places], classes, "EPSG:4326")
    map_path = write_map(tmp_path / "m.tif")
    found = json.loads(succeed("evaluate", run, "--reference", path, "--map", map_path, "--json"))
    assert found["confusion"] == [[8 * 5, 0], [8 * 1, 8 * 9]]
    ids = np.zeros((1, 40, 60), np.uint8)
    ids[:, :, 24:] = 1
    path = write_scene(tmp_path / "r.tif", ids)
    found = json.loads(succeed("evaluate", run, "--reference", path, "--map", map_path, "--json"))
    assert found["confusion"] == [[600, 0], [120, 1080]]
    (tmp_path / "c.json").write_text('{"classes": ["forest", "water"]}')  # the other way round
    words = ("--set", f"label.classes={tmp_path / 'c.json'}", "--json")
    found = json.loads(succeed("evaluate", run, "--reference", path, "--map", map_path, *words))
    assert found["confusion"] == [[0, 600], [1080, 120]]


def test_a_map_in_degrees_is_weighted_by_ground(run: Path, tmp_path: Path) -> None:
    grid = {"crs": "EPSG:4326", "transform": Affine(0.001, 0, 9, 0, -0.001, 60)}
    map_path = write_map(tmp_path / "m.tif", **grid)
    path = write_scene(tmp_path / "r.tif", np.ones((1, 40, 60), np.uint8), **grid)
    found = json.loads(succeed("evaluate", run, "--reference", path, "--map", map_path, "--json"))
    mapped = [row["mapped_ha"] for row in found["classes"].values()]
    assert mapped[1] == pytest.approx(2 * mapped[0])
    assert mapped[0] == pytest.approx(
        600 * (111.412 * 55.825) / 1e4,
        rel=1e-4,  # km of a degree of latitude and of longitude at 59.985
    )


def test_a_class_without_reference_is_told(run: Path, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "r.gpkg", [box(0, 0, 9, 9)], ["water"])
    words = ["evaluate", run, "--reference", path, "--map", write_map(tmp_path / "m.tif")]
    found = json.loads(succeed(*words, "--json"))
    assert found["notes"][-1] == (
        "warning: no reference pixel on what is mapped as forest: 66.7% of the map is left out of all "
        "estimates"
    )
    assert found["classes"]["forest"]["users_accuracy"] == {"value": None, "interval": [None, None]}
    assert "not known" in succeed(*words)


def test_errors(run: Path, tmp_path: Path) -> None:
    map_path, words = write_map(tmp_path / "m.tif"), ["evaluate", run]
    path = write_vectors(tmp_path / "r.gpkg", [box(0, 0, 9, 9)], ["water"])
    assert "--reference: missing; name the labels to assess" in refuse(*words, "--map", map_path)
    told = refuse(*words, "s.zarr", "--reference", path, "--map", map_path)
    assert "--reference: takes one run, and either a store or a map (--map) of it" in told
    other = write_map(tmp_path / "o.tif", ["sea", "forest"])
    told = refuse(*words, "--reference", path, "--map", other)
    assert "o.tif: maps the classes sea, forest, but" in told
    assert "knows water, forest; name the run that made the map" in told
    plain = write_scene(tmp_path / "p.tif", np.zeros((1, 9, 9), np.uint8))
    told = refuse(*words, "--reference", path, "--map", plain)
    assert (
        "p.tif: has no class names (tag SATDIFUSER_CLASSES), so it is no map of `satdifuser predict`" in told
    )
    with rasterio.open(map_path, "r+") as dataset:
        dataset.update_tags(SATDIFUSER_MODEL_SHA256="other")
    told = refuse(*words, "--reference", path, "--map", map_path)
    assert "m.tif: was made by another run than" in told
    far = write_vectors(tmp_path / "f.gpkg", [box(900, 900, 9, 9)], ["water"])
    map_path = write_map(tmp_path / "n.tif")
    assert "f.gpkg: labels nothing here: in its own" in refuse(*words, "--reference", far, "--map", map_path)
    strange = write_vectors(tmp_path / "s.gpkg", [box(0, 0, 9, 9)], ["meadow"])
    told = refuse(*words, "--reference", strange, "--map", map_path)
    assert "s.gpkg: column 'class' holds the class 'meadow' (1), which is not among the 2 known ones" in told
    with rasterio.open(map_path, "r+") as dataset:
        dataset.write(np.full((1, 40, 60), 7, np.uint8))
    told = refuse(*words, "--reference", path, "--map", map_path)
    assert "n.tif: holds the class number 7, expected 0 to 1, or 255 for no data" in told
    nowhere = write_map(tmp_path / "w.tif", crs=None)
    assert "w.tif: has no CRS or transform" in refuse(*words, "--reference", path, "--map", nowhere)


def test_a_run_and_its_store_alone(tmp_path: Path) -> None:
    """What is told is that of the map that `predict` makes of the store."""
    scene_store(tmp_path / "s.zarr", feature_identity={"images": {"tile_size": [SIDE, SIDE]}})
    fields = write_vectors(tmp_path / "f.gpkg", [box(0, 0, 16, 32), box(16, 0, 16, 32)], ["water", "forest"])
    succeed("label", tmp_path / "s.zarr", fields)
    run = tmp_path / "run"
    satdifuser.fit(tmp_path / "s.zarr", out=run, epochs=1, batch_size=4)
    alone = json.loads(succeed("evaluate", run, "--reference", fields, "--json"))
    succeed("predict", run, tmp_path / "s.zarr", "-o", tmp_path / "m.tif")
    mapped = json.loads(
        succeed("evaluate", run, "--reference", fields, "--map", tmp_path / "m.tif", "--json")
    )
    assert alone.pop("map") == f"{run} on {tmp_path / 's.zarr'}"
    mapped.pop("map")
    assert alone == mapped
    assert alone["reference_pixels"] == 32 * 32


@pytest.mark.parametrize("other", ["--compare", "--across"])
def test_a_reference_goes_with_one_map_only(run: Path, tmp_path: Path, other: str) -> None:
    message = refuse("evaluate", run, other, "--reference", tmp_path / "r.gpkg")
    assert "--reference: assesses one map; leave out --compare and --across" in message
