"""Features taken out of a store as GeoParquet and as GeoTIFF, against the store's own values."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from click.testing import Result
from command_line import call
from made_up import random_row, random_store
from rasterio.crs import CRS

from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo
from satdifuser.store.writer import TileRow

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

LAYERS = [
    LayerInfo(name="up.0.attn1", channels=3, stride=4, height=4, width=4),
    LayerInfo(name="up.1.conv2", channels=2, stride=8, height=2, width=2),
]
COLUMNS = 3


def placed(number: int, rotation: float = 0.0, shift: float = 0.0, crs: str = "EPSG:32632") -> TileRow:
    """A tile of 16 px of 10 m in a grid of three columns; the second tile was skipped."""
    if number == 1:
        return random_row(number)
    row, column = divmod(number, COLUMNS)
    a, d = 10 * np.cos(np.radians(rotation)), 10 * np.sin(np.radians(rotation))
    b, e = d, -a
    x, y = 16 * column + shift * number, 16 * row
    transform = (a, b, 500_000 + a * x + b * y, d, e, 5_000_000 + d * x + e * y)
    split = ("train", "val")[number % 2]
    return TileRow(
        f"t{number}", split, crs=crs, transform=transform[:6], target=np.array(number % 2, np.int32)
    )


def make(folder: Path, **how: object) -> FeatureStore:
    return random_store(folder / "s.zarr", LAYERS, 7, "int8", row_of=lambda number: placed(number, **how))  # type: ignore[arg-type]


def export(store: FeatureStore, out: Path, *words: object) -> Result:
    return call("store", "export", store.path, "-o", out, *words)


def corners(wkb: bytes) -> list[tuple[float, ...]]:
    assert struct.unpack_from("<BIII", wkb) == (1, 3, 1, 5)
    flat = struct.unpack_from("<10d", wkb, 13)
    return list(zip(flat[::2], flat[1::2], strict=True))


def test_pooled_features_as_geoparquet(tmp_path: Path) -> None:
    store = make(tmp_path)
    assert export(store, tmp_path / "p.parquet").exit_code == 0
    file = pq.ParquetFile(tmp_path / "p.parquet")
    assert file.num_row_groups == store.attributes.shards
    table = file.read()
    rows = store.select()
    assert table["tile_id"].to_pylist() == [f"t{row}" for row in rows]
    assert table["label"].to_pylist() == [("sea", "land")[row % 2] for row in rows]
    for group, position, layer in store.layer_positions():
        for step, timestep in enumerate(store.attributes.timesteps):
            found = np.array(table[f"t{timestep}/{layer}"].to_pylist(), np.float32)
            np.testing.assert_array_equal(found, store.pooled_group(group, rows)[:, step, position])
    geo = json.loads(table.schema.metadata[b"geo"])
    assert (geo["version"], geo["primary_column"]) == ("1.1.0", "geometry")
    assert CRS.from_user_input(json.dumps(geo["columns"]["geometry"]["crs"])) == CRS.from_epsg(32632)
    assert corners(table["geometry"][1].as_py()) == [
        (500_320, 5_000_000),
        (500_480, 5_000_000),
        (500_480, 4_999_840),
        (500_320, 4_999_840),
        (500_320, 5_000_000),
    ]


@pytest.mark.parametrize("name", ["p.parquet", "p.tif"])
def test_a_file_that_is_there_is_not_replaced_by_itself(tmp_path: Path, name: str) -> None:
    store = make(tmp_path)
    (tmp_path / name).write_text("precious")
    words = ("--timesteps", "21", "--layers", "up.0.attn1")
    refused = export(store, tmp_path / name, *words)
    assert refused.exit_code == 2
    assert "is there; choose another name, or replace it with --overwrite" in refused.stderr
    assert (tmp_path / name).read_text() == "precious"
    assert export(store, tmp_path / name, *words, "--overwrite").exit_code == 0
    assert (tmp_path / name).read_bytes() != b"precious"


def test_a_part_of_it(tmp_path: Path) -> None:
    store = make(tmp_path)
    words = ("--timesteps", "21", "--layers", "*.conv2", "--splits", "val")
    assert export(store, tmp_path / "p.parquet", *words).exit_code == 0
    table = pq.read_table(tmp_path / "p.parquet")
    assert set(table["split"].to_pylist()) == {"val"}
    assert [name for name in table.column_names if name.startswith("t2")] == ["t21/up.1.conv2"]


def test_tiles_of_several_crs_are_in_longitude_and_latitude(tmp_path: Path) -> None:
    store = random_store(
        tmp_path / "s.zarr", LAYERS, 7, row_of=lambda n: placed(n, crs=f"EPSG:{32632 + n % 2}")
    )
    assert export(store, tmp_path / "p.parquet").exit_code == 0
    table = pq.read_table(tmp_path / "p.parquet")
    assert "crs" not in json.loads(table.schema.metadata[b"geo"])["columns"]["geometry"]
    longitude, latitude = corners(table["geometry"][0].as_py())[0]
    assert (longitude, latitude) == (pytest.approx(9, abs=1e-6), pytest.approx(45.15, abs=0.01))
    assert "differ in CRS" in export(store, tmp_path / "l.tif", "--timesteps", 21, "--layers", "up.0*").stderr


def test_tiles_without_a_place(tmp_path: Path) -> None:
    store = random_store(tmp_path / "n.zarr", LAYERS, 4, row_of=nowhere)
    assert export(store, tmp_path / "p.parquet").exit_code == 0
    schema = pq.read_schema(tmp_path / "p.parquet")
    assert ("geometry" in schema.names, b"geo" in (schema.metadata or {})) == (False, False)
    told = export(store, tmp_path / "l.tif", "--timesteps", 21, "--layers", "up.0*")
    assert (told.exit_code, "not all tiles have a place on the ground" in told.stderr) == (1, True)


def nowhere(number: int) -> TileRow:
    return random_row(1) if number == 1 else TileRow(f"t{number}", "train", target=np.array(0, np.int32))


@pytest.mark.parametrize("rotation", [0.0, 30.0])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_as_geotiff(tmp_path: Path, rotation: float, layer: int) -> None:
    store, info = make(tmp_path, rotation=rotation), LAYERS[layer]
    out = tmp_path / "l.tif"
    assert export(store, out, "--timesteps", 21, "--layers", info.name).exit_code == 0
    maps = store.decode(store.stored(np.arange(7)))[f"stride_0{info.stride}"]
    with rasterio.open(out) as raster:
        assert raster.crs == CRS.from_epsg(32632)
        assert (raster.count, raster.dtypes[0]) == (info.channels, "float32")
        scale = np.array([info.stride, info.stride, 1] * 2)
        np.testing.assert_allclose(raster.transform[:6], placed(0, rotation=rotation).transform * scale)
        assert (raster.height, raster.width) == (3 * info.height, 3 * info.width)
        assert raster.tags()["content_digest"] == store.content_digest()
        found = raster.read()
    for number in range(9):
        row, column = (info.height * part for part in divmod(number, COLUMNS))
        window = found[:, row : row + info.height, column : column + info.width]
        if number in (1, 7, 8):
            assert np.isnan(window).all()
        else:
            np.testing.assert_array_equal(window, maps[number, store.attributes.timesteps.index(21), 0])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_makes_no_raster_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path, shift=0.5)
    one = ("--timesteps", 21, "--layers", "up.0*")
    assert (
        "do not lie on one grid of feature pixels (stride 4 px)"
        in export(store, tmp_path / "l.tif", *one).stderr
    )
    assert "matches 2 layers" in export(store, tmp_path / "l.tif", "--timesteps", 21).stderr
    assert "a GeoTIFF takes one of --timesteps" in export(store, tmp_path / "l.tif").stderr
    assert "got the ending '.csv', expected .parquet or .tif" in export(store, tmp_path / "p.csv").stderr
    assert list(tmp_path.glob("*.tif")) == []


def test_strewn_tiles_make_no_raster(tmp_path: Path) -> None:
    store = make(tmp_path, shift=1e5)
    told = export(store, tmp_path / "l.tif", "--timesteps", 21, "--layers", "up.0*").stderr
    assert "would be all but empty" in told


def test_the_folder_is_made_and_each_tile_is_there_once(tmp_path: Path) -> None:
    store, out = make(tmp_path), tmp_path / "new/folder/p.parquet"
    assert export(store, out, "--splits", "val,val").exit_code == 0
    names = pq.read_table(out)["tile_id"].to_pylist()
    assert sorted(set(names)) == names
