"""From raw tile values to RGB: declared bands and scale, clear refusals, sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from satdifuser.errors import ImageError, SettingsError
from satdifuser.extract.images import (
    COLOUR_STATISTICS,
    PERCENTILES,
    colour_statistics,
    preview,
    raw_means,
    resize,
    resolve_image_size,
    to_rgb,
)
from satdifuser.extract.settings import ImageSettings
from satdifuser.extract.sources.tile import Tile, TileRecord


def make_tile(
    image: NDArray[Any], names: tuple[str, ...] = (), valid: NDArray[np.bool_] | None = None
) -> Tile:
    size = (image.shape[1], image.shape[2])
    valid = np.ones(size, bool) if valid is None else valid
    return Tile(TileRecord("t1", "t1.tif", "train", size), image, valid, band_names=names)


def bands(count: int, dtype: type = np.uint16) -> NDArray[Any]:
    return np.stack([np.full((4, 4), 1000 * (i + 1)) for i in range(count)]).astype(dtype)


def test_eight_bits_need_no_scale() -> None:
    rgb = to_rgb(make_tile(np.full((3, 4, 4), 51, np.uint8)), ImageSettings()).rgb
    assert rgb.dtype == np.float32
    np.testing.assert_allclose(rgb, 0.2, rtol=1e-6)


@pytest.mark.parametrize("chosen", [[4, 3, 2], ["B4", "B3", "B2"], ["B4", 3, "B2"]])
def test_bands_are_chosen_by_number_and_name_then_scaled_and_clipped(chosen: list[int | str]) -> None:
    chosen_bands = ImageSettings(bands=chosen, scale="1/4000", offset=-0.6)  # type: ignore[arg-type]
    rgb = to_rgb(make_tile(bands(4), ("B1", "B2", "B3", "B4")), chosen_bands).rgb
    np.testing.assert_allclose(rgb[:, 0, 0], [0.4, 0.15, 0], atol=1e-6)


@pytest.mark.parametrize("nodata", [np.nan, np.inf, -1.7e308])
def test_pixels_without_data_take_the_mean_colour(nodata: float) -> None:
    image = bands(3, np.float64)
    image[:, 0] = nodata
    valid = np.ones((4, 4), bool)
    valid[0] = not np.isfinite(nodata)  # values that are not finite count as no data by themselves
    rgb = to_rgb(make_tile(image, valid=valid), ImageSettings(scale=1e-4)).rgb
    np.testing.assert_allclose(rgb, np.broadcast_to([[[0.1]], [[0.2]], [[0.3]]], (3, 4, 4)), rtol=1e-6)


def test_a_value_without_data_may_overflow_when_scaled() -> None:
    image = np.full((3, 4, 4), 0.1, np.float32)
    image[:, 0] = np.finfo(np.float32).min
    valid = image[0] > 0
    rgb = to_rgb(make_tile(image, valid=valid), ImageSettings(scale=2)).rgb
    np.testing.assert_allclose(rgb, 0.2, rtol=1e-6)


ERRORS = [
    (bands(4), (), {}, r"t1: it has 4 bands, expected 3; name red, green and blue .* e\.g\. \[3, 2, 1\]"),
    (
        bands(4),
        ("red", "green", "blue", "nir"),
        {"bands": ["red", "green", "bleu"]},
        r"no band 'bleu' in source.bands; it has 4 bands \(red, green, blue, nir\); did you mean blue",
    ),
    (bands(3), (), {"bands": [1, 2, 7]}, r"no band 7 in source.bands; it has 3 bands"),
    (bands(3), (), {}, r"uint16 pixels without a declared scale \(values 1000 to 3000\); set source.scale"),
    (bands(3), (), {"scale": 1.0}, r"t1: value \* 1 \+ 0 is above 1 everywhere \(values 1000 to 3000\)"),
    (np.full((3, 4, 4), np.nan), (), {"scale": 1.0}, "t1: no pixel holds data"),
]


@pytest.mark.parametrize(("image", "names", "settings", "message"), ERRORS)
def test_refusals(image: NDArray[Any], names: tuple[str, ...], settings: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        to_rgb(make_tile(image, names), ImageSettings(**settings))


@pytest.mark.parametrize(
    ("image", "chosen", "message"),
    [
        (bands(3), {}, r"uint16 pixels without a declared scale \(values 1000 to 3000\)"),
        (bands(3), {"scale": 1.0}, r"above 1 everywhere \(values 1000 to 3000\)"),
        (bands(3, np.float64), {}, r"float64 pixels without a declared scale \(values 1000 to 3000\)"),
    ],
)
def test_value_ranges_leave_out_pixels_without_data(
    image: NDArray[Any], chosen: dict[str, Any], message: str
) -> None:
    valid = np.ones((4, 4), bool)
    valid[0] = False
    image = np.where(valid, image, 65535).astype(image.dtype)
    if image.dtype.kind == "f":
        image[:, 1] = np.inf
    with pytest.raises(ImageError, match=message):
        to_rgb(make_tile(image, valid=valid), ImageSettings(**chosen))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tile_without_data_is_refused_whatever_its_type(dtype: type) -> None:
    with pytest.raises(ImageError, match="t1: no pixel holds data"):
        to_rgb(make_tile(bands(3, dtype), valid=np.zeros((4, 4), bool)), ImageSettings())


def test_colour_statistics_means_and_preview() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 5, dtype=np.float32), (3, 4, 5))
    values = dict(zip(COLOUR_STATISTICS, colour_statistics(ramp).tolist(), strict=True))
    assert values["red_mean"] == values["blue_p50"] == 0.5
    assert values["green_gradient_mean"] == pytest.approx(0.25)
    assert values["green_gradient_std"] == pytest.approx(0)
    assert preview(ramp)[0, :, 1].tolist() == [0, 64, 128, 191, 255]
    noise = np.random.default_rng(0).random((3, 7, 9), np.float32)
    values = dict(zip(COLOUR_STATISTICS, colour_statistics(noise).tolist(), strict=True))
    expected = np.percentile(noise[1], PERCENTILES)
    np.testing.assert_allclose([values[f"green_p{p}"] for p in PERCENTILES], expected, rtol=1e-6)
    valid = np.arange(16).reshape(4, 4) < 8
    image = np.where(valid, 10, 99)[None].astype(np.uint16)
    assert raw_means(make_tile(image, valid=valid)) == [10]


@settings(deadline=None)
@given(
    st.tuples(st.integers(2, 30), st.integers(2, 30)),
    st.sampled_from([1, 2, 255, 10000, 2**24]),
    st.integers(0, 2**32 - 1),
)
def test_percentiles_are_those_of_numpy(size: tuple[int, int], steps: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rgb = (random.integers(0, steps + 1, (3, *size)) / steps).astype(np.float32)
    rgb[0, ::2] *= -0.0  # whose place among other zeros depends on the processor
    values = dict(zip(COLOUR_STATISTICS, colour_statistics(rgb), strict=True))
    for name, band in zip(("red", "green", "blue"), rgb, strict=True):
        found = np.array([values[f"{name}_p{p}"] for p in PERCENTILES])
        np.testing.assert_allclose(found, np.percentile(band, PERCENTILES), rtol=1e-5, atol=1e-6)
        assert not np.signbit(found).any()


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([4, 16, 64]))
def test_automatic_size_is_the_next_multiple(height: int, width: int, stride: int) -> None:
    for side, given_side in zip(
        resolve_image_size("auto", (height, width), stride), (height, width), strict=True
    ):
        assert side % stride == 0
        assert 0 <= side - given_side < stride


def test_given_sizes() -> None:
    assert resolve_image_size(128, (50, 60), 64) == (128, 128)
    assert resolve_image_size((64, 128), (50, 60), 64) == (64, 128)
    with pytest.raises(SettingsError, match=r"image_size: got 64 x 65, .* stride 64, e\.g\. 64 x 128"):
        resolve_image_size((64, 65), (50, 60), 64)


def test_resize() -> None:
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert resize(x, (8, 8)) is x
    assert resize(x, (4, 16)).shape == (1, 3, 4, 16)
    torch.testing.assert_close(resize(torch.full((1, 3, 8, 8), 0.3), (5, 7)), torch.full((1, 3, 5, 7), 0.3))
