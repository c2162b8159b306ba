"""Polygons and points: how files are read, what is refused, and which pixels they label."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_scene import CRS, LEFT, PIXEL, TOP, box, point, write_vectors
from rasterio.warp import transform

from satdifuser.errors import LabelError, SatDiFuserError, SettingsError
from satdifuser.labels.burn import PlacedShapes
from satdifuser.labels.classes import IGNORE
from satdifuser.labels.label_file import Tally, VectorLabels, explain_miss, open_labels
from satdifuser.labels.settings import VectorSettings
from satdifuser.labels.vectors import read_shapes
from satdifuser.store.georeference import Georeference

PLACE = Georeference(CRS, (PIXEL, 0, LEFT, 0, -PIXEL, TOP))
BOW_TIE = shapely.Polygon([(LEFT, TOP), (LEFT + 40, TOP - 40), (LEFT + 40, TOP), (LEFT, TOP - 40)])


def mask_of(path: Path, size: tuple[int, int] = (8, 8), **fields: Any) -> np.ndarray:
    return VectorLabels(path, VectorSettings(**fields)).mask(PLACE, size)


def refusal(kind: type[SatDiFuserError], path: Path, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        open_labels(path, VectorSettings(**fields))
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp"])
@pytest.mark.parametrize("crs", [CRS, "EPSG:4326", "EPSG:3857"])
def test_every_format_and_crs_labels_the_same_pixels(tmp_path: Path, suffix: str, crs: str) -> None:
    if suffix == ".geojson" and crs == "EPSG:3857":
        pytest.skip("GeoJSON is in degrees")
    shapes = [box(1, 1, 3, 4), box(5, 0, 2, 8), shapely.union(box(0, 6, 1, 1), box(2, 6, 1, 1))]
    path = write_vectors(tmp_path / f"a{suffix}", shapes, ["b", "a", "b"], crs, geometry_type="MultiPolygon")
    labels = VectorLabels(path, VectorSettings())
    expected = np.full((8, 8), IGNORE)
    expected[1:4, 1:5] = 1
    expected[5:7] = 0
    expected[0, 6] = expected[2, 6] = 1
    assert labels.classes == ("a", "b")
    np.testing.assert_array_equal(labels.mask(PLACE, (8, 8)), expected)


def test_points_label_their_pixel(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [point(0, 0), point(7, 3)], ["x", "y"], "EPSG:4326")
    expected = np.full((8, 8), IGNORE)
    expected[0, 0], expected[7, 3] = 0, 1
    np.testing.assert_array_equal(mask_of(path), expected)


def test_a_point_on_the_border_of_a_tile_lies_on_it(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [point(-0.5, -0.5), point(20, 20)], ["x", "y"])
    labels, tally = open_labels(path, VectorSettings()), Tally()
    assert (labels.mask(PLACE, (8, 8), tally) == 0).sum() == 1
    assert any("1 of 2 features lie on tiles" in note for note in labels.notes(tally))


def test_touch_rule(tmp_path: Path) -> None:
    """A square that covers one centre and touches nine pixels."""
    path = write_vectors(tmp_path / "a.gpkg", [box(2.7, 2.7, 1.6, 1.6)], ["x"])
    assert np.argwhere(mask_of(path) == 0).tolist() == [[3, 3]]
    assert np.argwhere(mask_of(path, touch="all") == 0).tolist() == [
        [r, c] for r in (2, 3, 4) for c in (2, 3, 4)
    ]


@pytest.mark.parametrize(("rule", "contested"), [("ignore", IGNORE), ("first", 1), ("last", 0)])
def test_overlaps_follow_the_rule_and_are_counted(tmp_path: Path, rule: str, contested: int) -> None:
    """The first shape is of class y, number 1; two shapes of one class are no conflict."""
    shapes = [box(0, 0, 4, 4), box(2, 2, 4, 4), box(0, 0, 2, 2)]
    path = write_vectors(tmp_path / "a.gpkg", shapes, ["y", "x", "y"])
    labels, tally = VectorLabels(path, VectorSettings(overlaps=rule)), Tally()  # type: ignore[arg-type]
    mask = labels.mask(PLACE, (8, 8), tally)
    assert (mask[2:4, 2:4] == contested).all()
    assert ((mask[:2, :4] == 1).all(), (mask[4:6, 2:6] == 0).all()) == (True, True)
    assert tally.conflicts == 4
    told = {
        "ignore": "ignored",
        "first": "given to the first in the file",
        "last": "given to the last in the file",
    }
    assert f"a.gpkg: 4 pixels that several classes claim: {told[rule]}" in "\n".join(labels.notes(tally))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_far_vertices_and_projection_change_no_pixel(data: st.DataObject) -> None:
    """A rectangle along pixel borders, of any size, in degrees, against the one that it was drawn as."""
    row, col = data.draw(st.integers(-500, 7)), data.draw(st.integers(-500, 7))
    height, width = data.draw(st.integers(1, 1500)), data.draw(st.integers(1, 1500))
    dense = shapely.segmentize(box(row, col, height, width), 50)
    degrees = shapely.transform(dense, lambda xy: np.column_stack(transform(CRS, "EPSG:4326", *xy.T)))
    placed = PlacedShapes(np.array([degrees]), np.zeros(1, np.uint8), "EPSG:4326", False, "ignore")
    rows, cols = np.mgrid[:8, :8]
    inside = (rows >= row) & (rows < row + height) & (cols >= col) & (cols < col + width)
    np.testing.assert_array_equal(placed.burn(PLACE, (8, 8)).mask, np.where(inside, 0, IGNORE))


def test_a_long_edge_is_a_curve_in_another_crs() -> None:
    """A parallel, drawn with two corners: over 512 km UTM shows it 5 km off the straight line."""
    shape = shapely.Polygon([(4, 40), (14, 40), (14, 45), (4, 45)])
    placed = PlacedShapes(np.array([shape]), np.zeros(1, np.uint8), "EPSG:4326", False, "ignore")
    place = Georeference(CRS, (2000, 0, 244000, 0, -2000, 5260000))
    burnt = placed.burn(place, (256, 256)).mask
    rows, cols = np.mgrid[:256, :256] + 0.5
    x, y = place.at(rows, cols)  # type: ignore[arg-type]
    latitude = np.array(transform(CRS, "EPSG:4326", np.ravel(x), np.ravel(y))[1]).reshape(256, 256)
    certain = np.abs(latitude - 45) > 0.002  # a tenth of a pixel
    np.testing.assert_array_equal((burnt == 0)[certain], (latitude < 45)[certain])


def test_shapes_across_the_antimeridian() -> None:
    """UTM 1 has its western edge at 180 degrees: a tile there sees shapes at both ends of the world."""
    x, y = (values[0] for values in transform("EPSG:4326", "EPSG:32601", [180.0], [10.0]))
    place = Georeference("EPSG:32601", (100, 0, x - 3200, 0, -100, y + 3200))
    shapes = np.array([shapely.box(179, 9, 180, 11), shapely.box(-180, 9, -179, 11)])
    burnt = PlacedShapes(shapes, np.array([0, 1], np.uint8), "EPSG:4326", False, "ignore").burn(
        place, (64, 64)
    )
    assert ((burnt.mask[:, :31] == 0).all(), (burnt.mask[:, 33:] == 1).all()) == (True, True)


def test_polygons_that_cross_themselves_are_repaired_or_refused(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [box(6, 6, 1, 1), BOW_TIE], ["x", "x"])
    labels = VectorLabels(path, VectorSettings())
    mask = labels.mask(PLACE, (8, 8))
    assert (mask[1:3, [0, 3]] == 0).all()  # in both halves
    assert (mask[0, 1:3] == IGNORE).all()
    assert "a.gpkg: 1 polygons that were not valid: repaired" in "\n".join(labels.notes(Tally()))
    told = refusal(LabelError, path, invalid="refuse")
    assert "a.gpkg: feature 2: not valid (Self-intersection[" in told
    assert told.endswith("mend it, or set `invalid` to repair")


def test_an_open_ring_is_repaired_or_refused(tmp_path: Path) -> None:
    ring = [[9.0, 45.0], [9.001, 45.0], [9.001, 45.001], [9.0, 45.001]]
    feature = {
        "type": "Feature",
        "properties": {"class": "x"},
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    assert read_shapes(path).repaired == 1
    assert "feature 1: not valid (a ring is open)" in refusal(LabelError, path, invalid="refuse")


def test_features_without_geometry_or_class_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [box(0, 0, 1, 1), None, box(1, 1, 1, 1)], ["x", "x", None])
    labels = VectorLabels(path, VectorSettings())
    assert (labels.mask(PLACE, (8, 8)) == 0).sum() == 1
    notes = "\n".join(labels.notes(Tally()))
    assert "1 features without a geometry: left out" in notes
    assert "1 features without a class: left out" in notes


def test_numbers_are_classes(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [box(0, 0, 1, 1), box(1, 1, 1, 1)], [10, 9])
    assert VectorLabels(path, VectorSettings()).classes == ("9", "10")
    (tmp_path / "c.json").write_text('{"classes": [{"id": 10, "name": "x"}, {"id": 9, "name": "y"}]}')
    labels = open_labels(path, VectorSettings(), tmp_path / "c.json")
    assert labels.classes == ("x", "y")
    assert labels.mask(PLACE, (8, 8))[[0, 1], [0, 1]].tolist() == [0, 1]
    (tmp_path / "c.json").write_text('{"classes": [{"id": 10, "name": "x"}], "ignore_index": 9}')
    labels = open_labels(path, VectorSettings(), tmp_path / "c.json")
    assert labels.mask(PLACE, (8, 8))[[0, 1], [0, 1]].tolist() == [0, IGNORE]


def test_unknown_classes_are_refused_or_left_out_and_counted(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [box(0, 0, 1, 1), box(1, 1, 1, 1)], ["water", "watre"])
    (tmp_path / "c.json").write_text('{"classes": ["water", "forest"]}')
    with pytest.raises(LabelError) as caught:
        open_labels(path, VectorSettings(), tmp_path / "c.json")
    told = str(caught.value)
    assert "a.gpkg: column 'class' holds the class 'watre' (1), which is not among the 2 known ones" in told
    assert (
        "(water, forest); did you mean water?; correct it, add it to the class list, or set `unknown`" in told
    )
    labels = open_labels(path, VectorSettings(unknown="ignore"), tmp_path / "c.json")
    assert "1 features of unknown classes (watre): left out" in "\n".join(labels.notes(Tally()))
    assert (labels.mask(PLACE, (8, 8)) != IGNORE).sum() == 1


@pytest.mark.parametrize("suffix", [".gpkg", ".shp"])
def test_error_no_crs(tmp_path: Path, suffix: str) -> None:
    with pytest.warns(UserWarning, match="crs"):
        path = write_vectors(tmp_path / f"a{suffix}", [box(0, 0, 1, 1)], ["x"], None, geometry_type="Polygon")
    told = refusal(LabelError, path)
    assert f"a{suffix}: has no CRS" in told
    assert ("a Shapefile keeps it in a .prj" in told) == (suffix == ".shp")
    assert "ogr2ogr -a_srs" in told


def test_errors_of_files(tmp_path: Path) -> None:
    assert "no such file of labels" in refusal(SettingsError, tmp_path / "a.gpkg")
    (tmp_path / "a.gpkg").write_bytes(b"nothing like a GeoPackage")
    assert "a.gpkg: cannot be read as polygons or points (" in refusal(LabelError, tmp_path / "a.gpkg")
    (tmp_path / "a.txt").write_text("no labels")
    told = refusal(SettingsError, tmp_path / "a.txt")
    assert "a.txt: got the ending '.txt', expected labels in a file that ends in .tif, .tiff, .gpkg" in told
    path = write_vectors(tmp_path / "b.gpkg", [box(0, 0, 1, 1)], ["x"], column="klass")
    told = refusal(SettingsError, path)
    assert "b.gpkg: has no column 'class'; it has klass; did you mean klass?" in told
    write_vectors(path, [box(0, 0, 1, 1)], ["x"], layer="more", append=True)
    assert "b.gpkg: holds several layers (b, more); name one of them in label.layer, or" in refusal(
        SettingsError, path
    )
    assert "holds no layer 'mare' (b, more)" in refusal(SettingsError, path, layer="mare")
    assert (mask_of(path, layer="more") == 0).sum() == 1


def test_errors_of_shapes_and_columns(tmp_path: Path) -> None:
    path = write_vectors(
        tmp_path / "a.gpkg", [box(0, 0, 1, 1), shapely.LineString([(0, 0), (1, 1)])], ["x", "x"]
    )
    assert "a.gpkg: feature 2: a line, expected polygons or points" in refusal(LabelError, path)
    path = write_vectors(tmp_path / "b.gpkg", [None], ["x"])
    assert "b.gpkg: holds no polygon or point in its 1 features; draw some first" in refusal(LabelError, path)
    path = write_vectors(tmp_path / "c.gpkg", [box(0, 0, 1, 1)], [0.5])
    assert "c.gpkg: column 'class' holds 0.5, expected names or whole numbers" in refusal(LabelError, path)
    shapes = [box(0, 0, 1, 1)] * 256
    path = write_vectors(tmp_path / "d.gpkg", shapes, list(range(256)))
    assert "d.gpkg: 256 classes in column 'class', expected 1 to 255" in refusal(LabelError, path)


def test_a_miss_is_explained(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [box(900, 900, 1, 1), box(0.6, 0.6, 0.3, 0.3)], ["x", "x"])
    labels, tally = VectorLabels(path, VectorSettings()), Tally()
    labels.mask(PLACE.shifted(16, 16), (8, 8), tally)
    told = explain_miss(labels, tally, [PLACE.shifted(16, 16), None], (8, 8))
    assert (
        "a.gpkg: labels nothing here: in its own EPSG:32632 it lies at (500006, 4990990, 509010, 4999994)"
        in told
    )
    assert (
        "what it should label in EPSG:32632 at (500160, 4999760, 500240, 4999840) (left, bottom, right, top)"
        in told
    )
    beside = write_vectors(tmp_path / "b.gpkg", [box(0, 8, 8, 0.3)], ["x"])  # it shares an edge with the tile
    near, none = VectorLabels(beside, VectorSettings()), Tally()
    near.mask(PLACE, (8, 8), none)
    assert "in its own EPSG:32632 it lies at" in explain_miss(near, none, [PLACE], (8, 8))
    labels.mask(PLACE, (8, 8), tally)
    told = explain_miss(labels, tally, [PLACE], (8, 8))
    assert (
        "1 of its features lie at tiles, but cover the centre of no pixel with data; set `touch` to all"
        in told
    )
    assert "the tiles have no place on the ground" in explain_miss(labels, tally, [None], (8, 8))


def test_tiles_are_labelled_in_several_threads_at_once() -> None:
    """Warnings are errors here, and hiding those of one thread must not show those of another."""
    shapes = np.array([box(i, i, 20, 20) for i in range(0, 60, 3)])
    placed = PlacedShapes(shapes, np.zeros(20, np.uint8), CRS, False, "ignore")
    places = [PLACE.shifted(i, i) for i in range(64)] * 8
    expected = [placed.burn(place, (16, 16)).mask for place in places[:64]] * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: placed.burn(place, (16, 16)).mask, places))
    np.testing.assert_array_equal(found, expected)
