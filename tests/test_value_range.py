"""Values outside [0, 1] and tiles that are all but black: counted per tile, warned of over all tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from satdifuser.cli import cli
from satdifuser.extract.images import Prepared, to_rgb
from satdifuser.extract.settings import ImageSettings
from satdifuser.extract.sources.tile import Tile, TileRecord
from satdifuser.extract.value_range import ValueRange

SCENE = "data/geotiff/s2_l2a_aquileia_20190416_12band_u16.tif"


def prepare(raw: Any, **settings: Any) -> Prepared:
    """Prepare a tile of one row of values, the same in all bands; NaN holds no data."""
    image = np.broadcast_to(np.array(raw, np.float32), (3, 1, len(raw)))
    record = TileRecord("t", "t.tif", "none", (1, len(raw)))
    return to_rgb(Tile(record, image, ~np.isnan(image[0])), ImageSettings(**settings))


@given(st.lists(st.integers(-500, 1500), min_size=1), st.integers(0, 5))
def test_the_share_clipped_is_that_of_the_values_with_data(raw: list[int], missing: int) -> None:
    raw = [0, *raw]  # not all above 1
    tile = prepare([*raw, *[np.nan] * missing], scale=1e-3)
    assert tile.clipped_share == pytest.approx(np.mean([not 0 <= value <= 1000 for value in raw]))
    assert tile.raw_range == (min(raw), max(raw))
    assert tile.rgb.min() >= 0
    assert tile.rgb.max() <= 1


@pytest.mark.parametrize("full", [255, 4095, 10000, 65535])
def test_rounding_is_not_clipping(full: int) -> None:
    assert prepare([0, full], scale=1 / full).clipped_share == 0
    assert prepare([0, full * 1.0001], scale=1 / full).clipped_share == 0.5


@pytest.mark.parametrize(("scale", "offset"), [(1e-4, -0.1), (1e-3, -0.5), (1e-3, -2), (1 / 255, -5)])
def test_rounding_of_an_offset_is_not_clipping(scale: float, offset: float) -> None:
    black, white = -offset / scale, (1 - offset) / scale
    assert prepare([black, white], scale=scale, offset=offset).clipped_share == 0
    assert prepare([black - 1, white + 1], scale=scale, offset=offset).clipped_share == 1


def test_digests_tell_pictures_apart() -> None:
    assert prepare([1, 2], scale=0.1).digest("blake3") == prepare([1, 2], scale=0.1).digest("blake3")
    assert prepare([1, 2], scale=0.1).digest("blake3") != prepare([2, 1], scale=0.1).digest("blake3")


def warning(tiles: list[list[float]], **settings: Any) -> str:
    values = ValueRange(ImageSettings(**settings))
    for raw in tiles:
        values.add(prepare(raw, **settings))
    return values.warning()


def test_no_warning_where_the_scale_fits() -> None:
    assert ValueRange(ImageSettings()).warning() == ""
    assert warning([[0, 0.5] * 50], scale=1.0) == ""
    assert warning([[0, 0.5] * 50, [2, *[0.5] * 49]], scale=1.0) == ""  # 1 % is clipped
    assert warning([[0.01] * 50, [0.2] * 50], scale=1.0) == ""  # half of the tiles are dark


@pytest.mark.parametrize(
    ("tiles", "settings", "expected"),
    [
        (
            [[0, 20000, 5000, 5000], [5000] * 4],
            {"scale": 1e-4},
            "warning: 12.5% of the values lie outside [0, 1] and are clipped: raw values of 0 to 20000 "
            "(2 tiles read) with source.scale 0.0001 and source.offset 0; check both against the data's "
            "documentation, reflectance is often stored times 10000 or 65535; source.scale=1/20000 would "
            "bring all values into [0, 1]",
        ),
        ([[-0.5, 1.5]], {"scale": 1.0}, "; source.scale=0.5 source.offset=0.25 would bring all values into"),
        (
            [[300, 10], [600, 10], [9000, 10]],
            {"scale": 1e-4},
            "warning: in 2 of 3 tiles no value reaches 0.1: raw values of 10 to 9000 (3 tiles read)",
        ),
        ([[3, 10]], {"scale": 1 / 255}, "source.scale=1/10 would"),
        ([[0, 0]], {"scale": 1.0}, "raw values of 0 to 0 (1 tiles read)"),
    ],
)
def test_warnings(tiles: list[list[float]], settings: dict[str, Any], expected: str) -> None:
    assert expected in warning(tiles, **settings)


# --- the commands


def run_command(name: str, root: Path, scale: str, *more: str) -> Result:
    chosen = ["kind=scenes", f"root={root}", "bands=[3, 2, 1]", f"scale={scale}", "tile_size=32"]
    words = [word for text in chosen for word in ("--set", f"source.{text}")]
    result = CliRunner().invoke(cli, [name, *words, *more])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiles of reflectance times 65535; the first is brighter than 10000 in a quarter of its pixels."""
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    image = np.full((3, 32, 64), 8000, np.uint16)
    image[:, :8, :32] = 30000
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 3e5, 0, -10, 5e6)}
    with rasterio.open(path, "w", "GTiff", 64, 32, 3, dtype="uint16", **place) as file:
        file.write(image)
    return path


def test_tiles_shows_what_is_clipped_and_warns(scene: Path) -> None:
    result = run_command("tiles", scene, "1/10000")
    assert ["clipped 25.00%" in line for line in result.stdout.splitlines()] == [True, False]
    assert "warning: 12.5% of the values lie outside [0, 1] and are clipped: raw values of 8000 to 30000" in (
        result.stderr
    )
    lines = run_command("tiles", scene, "1/10000", "--json").stdout.splitlines()
    assert [json.loads(line)["clipped"] for line in lines] == [0.25, 0]
    for scale, warned in (("1/65535", False), ("1/650000", True)):
        result = run_command("tiles", scene, scale)
        assert "clipped" not in result.stdout
        assert ("no value reaches 0.1" in result.stderr) is warned


def test_extract_warns_once_on_stderr(scene: Path, tmp_path: Path) -> None:
    words = ["timesteps=[21]", "layers=['up_blocks.1.*attn1']", "batch_size=1", "threads=1"]
    more = [word for text in words for word in ("--set", f"extract.{text}")]
    more += ["--set", "store.tiles_per_shard=1", "--set", "backbone.device=cpu", "-o"]
    for scale, warnings in (("1/10000", 1), ("1/65535", 0)):
        result = run_command("extract", scene, scale, *more, str(tmp_path / f"{warnings}.zarr"))
        assert result.stderr.count("warning: ") == warnings
        assert "warning" not in result.stdout


def test_a_real_scene_of_reflectance_times_65535(shared: Path) -> None:
    for scale, warned in (("1/10000", True), ("1/65535", False)):
        more = ("--set", "source.bands=[4, 3, 2]", "--set", "source.tile_size=256")
        result = run_command("tiles", shared / SCENE, scale, *more)
        assert ("are clipped: raw values of " in result.stderr) is warned
        assert ("warning" in result.stderr) is warned
