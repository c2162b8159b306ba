"""The GeoTIFF of a map: valid for everybody who opens it, whatever its CRS, transform and class names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.vrt import WarpedVRT
from rio_cogeo.cogeo import cog_validate

from satdifuser.errors import MapError
from satdifuser.evaluate.maps import map_file
from satdifuser.evaluate.maps.map_file import MapFile, write_map
from satdifuser.evaluate.maps.strip_file import StripFile

NORTH_UP = (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)
ROTATED = (8.660254037844387, 5.0, 500000.123, 5.0, -8.660254037844387, 5000000.456)
DEGREES = (0.00017966666666666667, 0.0, 13.2962, 0.0, -0.0001254, 45.7937)
# A local transverse Mercator without a number of its own
LOCAL = CRS.from_proj4(
    "+proj=tmerc +lat_0=52.1 +lon_0=10.2 +k=0.99993 +x_0=1000 +y_0=2000 +ellps=bessel +units=m"
)


def write(
    folder: Path,
    size: tuple[int, int],
    crs: CRS,
    transform: tuple[float, ...],
    classes: list[str],
    bands: int = 1,
) -> tuple[Path, NDArray[np.uint8]]:
    """Write a map of random classes; its path, and what its bands must be."""
    values = np.random.default_rng(0).integers(0, len(classes), (size[0], bands, size[1]), np.uint8)
    values[: size[0] // 4] = 255
    rows = folder / ".rows"
    rows.write_bytes(values.tobytes())
    names = ["class", *(f"band {i}" for i in range(1, bands))]
    out = write_map(
        rows, folder / "map.tif", MapFile(size, crs.to_wkt(), transform, classes, names, {"A": "b"})
    )
    rows.unlink()
    return out, values.transpose(1, 0, 2)


@pytest.mark.parametrize("bands", [1, 4])
@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        (CRS.from_epsg(32632), NORTH_UP),
        (CRS.from_epsg(32632), ROTATED),
        (CRS.from_epsg(4326), DEGREES),
        (CRS.from_epsg(3035), ROTATED),
        (LOCAL, NORTH_UP),
    ],
)
def test_georeference_and_values_survive(
    tmp_path: Path, crs: CRS, transform: tuple[float, ...], bands: int
) -> None:
    out, values = write(tmp_path, (90, 70), crs, transform, ["a", "b"], bands)
    with rasterio.open(out) as found:
        assert found.crs == crs
        assert tuple(found.transform)[:6] == transform
        np.testing.assert_array_equal(found.read(), values)
        assert found.tags()["A"] == "b"
    assert cog_validate(out, strict=True) == (True, [], [])
    assert {path.name for path in tmp_path.iterdir()} == {"map.tif", "map.tif.aux.xml"}


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_colours_are_shown_and_no_band_is_opacity(tmp_path: Path, bands: int) -> None:
    out, values = write(tmp_path, (40, 60), CRS.from_epsg(32632), NORTH_UP, ["a", "b"], bands)
    others = (ColorInterp.undefined,) * (bands - 1)
    with rasterio.open(out) as found:
        assert found.colorinterp == (ColorInterp.palette, *others)
        colours = ["#{:02x}{:02x}{:02x}".format(*found.colormap(1)[i][:3]) for i in range(2)]
        assert colours == json.loads(found.tags()["SATDIFUSER_COLOURS"])
        with WarpedVRT(found, resampling=Resampling.nearest) as warped:
            np.testing.assert_array_equal(warped.read(1), values[0])
    (tmp_path / "map.tif.aux.xml").unlink()
    with rasterio.open(out) as alone:
        assert ColorInterp.alpha not in alone.colorinterp


def test_overviews_hold_the_most_frequent_class_and_no_other(tmp_path: Path) -> None:
    out, values = write(tmp_path, (1200, 1100), CRS.from_epsg(32632), NORTH_UP, ["a", "b", "c"])
    assert cog_validate(out, strict=True) == (True, [], [])
    with rasterio.open(out) as found:
        assert found.overviews(1) == [2, 4]
        small = found.read(1, out_shape=(600, 550))
    assert (small[:150] == 255).all()
    windows = values[0].reshape(600, 2, 550, 2).swapaxes(1, 2).reshape(600, 550, 4)
    counts = np.stack([(windows == number).sum(axis=2) for number in range(3)])
    clear = (np.sort(counts, axis=0)[-1] > 2) & (windows != 255).all(axis=2)
    assert clear.sum() > 10000
    np.testing.assert_array_equal(small[clear], counts.argmax(axis=0)[clear])


def test_strange_class_names(tmp_path: Path) -> None:
    names = ['<Wald & "Wiese">', "水面", "a;b,c", "c" * 300]
    out, _ = write(tmp_path, (20, 20), CRS.from_epsg(32632), NORTH_UP, names)
    with rasterio.open(out) as found:
        assert json.loads(found.tags()["SATDIFUSER_CLASSES"]) == names


def test_many_classes_have_a_colour_each(tmp_path: Path) -> None:
    out, _ = write(tmp_path, (20, 20), CRS.from_epsg(32632), NORTH_UP, [str(i) for i in range(200)])
    with rasterio.open(out) as found:
        assert len({found.colormap(1)[i][:3] for i in range(200)}) == 200
        assert len(set(json.loads(found.tags()["SATDIFUSER_COLOURS"]))) == 200


# --- writes that fail


def test_a_map_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        (tmp_path / ".map.tif.partial.tif").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(map_file.rasterio.shutil, "copy", fail)
    message = "map.tif: the disk is full; free some space and run the same command again"
    with pytest.raises(MapError, match=message):
        write(tmp_path, (20, 20), CRS.from_epsg(32632), NORTH_UP, ["a"])
    assert [path.name for path in tmp_path.iterdir()] == [".rows"]


def test_strips_that_are_done_are_kept_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strips = StripFile(tmp_path / "map.tif", {"a": 1}, [3, 3])
    strips.append(b"abc")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(MapError, match="the disk is full; free some space"):
            strips.append(b"def")
    strips.close()
    for identity, done in (({"a": 1}, (1, 2)), ({"a": 2}, (0,))):
        again = StripFile(tmp_path / "map.tif", identity, [3, 3])
        again.close()
        assert again.done in done
