"""Colours, charts and heat maps of the report, alone."""

from __future__ import annotations

import base64
import io
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from satdifuser.errors import ImageError
from satdifuser.evaluate.report.charts import DASHES, Line, interval_chart, line_chart, round_ticks
from satdifuser.evaluate.report.colours import (
    colour_distance,
    colour_mask,
    exact_picture,
    luminance,
    palette,
    photo,
    shade,
)
from satdifuser.evaluate.report.heat_map import heat_map, short_name

SVG = "{http://www.w3.org/2000/svg}"


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_palette_is_distinct_also_for_a_deuteranope() -> None:
    colours = palette(16).astype(int)
    apart = colour_distance(colours, colours) + 1000 * np.eye(16)
    assert apart.min() > 55
    assert (palette(5) == palette(16)[:5]).all()
    assert palette(0).shape == (0, 3)


def test_masks_keep_every_pixel_and_photos_are_kept_small() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    mask = exact_picture(rgb, "m")
    assert mask.uri.startswith("data:image/png;base64,")
    assert (np.asarray(decoded(mask.uri)) == rgb).all()
    assert mask.sharp
    large = photo(np.full((600, 300, 3), 77, np.uint8), "tile", "image")
    assert decoded(large.uri).size == (128, 256)
    assert (large.sharp, large.alt, large.label) == (False, "tile", "image")
    assert decoded(photo(rgb, "tile").uri).size == (7, 5)


def test_colour_mask_by_hand() -> None:
    painted = colour_mask(np.array([[0, 1, 255]], np.uint8), palette(2), ignore_value=255)
    assert painted.tolist() == [[*palette(2).tolist(), [128, 128, 128]]]


def test_picture_errors() -> None:
    for make in (exact_picture, photo):
        with pytest.raises(ImageError, match=r"must be \(H, W, 3\) uint8, got \(4, 4\) float64"):
            make(np.zeros((4, 4)), "x")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="the mask holds the class 3, but there are 2 classes"):
        colour_mask(np.array([[0, 3]]), palette(2))


def test_text_on_every_shade_can_be_read() -> None:
    """At least 4.5 to 1, as WCAG 2.2 asks of text (success criterion 1.4.3)."""
    for share in np.linspace(0, 1, 101):
        background, ink = shade(float(share))
        colour = np.array([int(part) for part in background[4:-1].split(",")])
        text = np.array([int(ink[i : i + 2], 16) for i in (1, 3, 5)])
        light, dark = sorted([luminance(colour), luminance(text)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_luminance_of_known_colours() -> None:
    assert luminance(np.array([255, 255, 255])) == pytest.approx(1)
    assert luminance(np.array([0, 0, 0])) == 0
    assert luminance(np.array([255, 0, 0])) == pytest.approx(0.2126)


def test_heat_map_shades_from_the_lowest_to_the_highest() -> None:
    values = np.array([[0.5, 1.0], [0.75, math.nan]])
    drawn = heat_map(values, ["a", "b"], ["t", "u"], "c", "{:.2f}".format, chosen=(0, 1))
    (_, _, first), (_, _, second) = drawn.rows
    assert [cell.background for cell in (*first, *second)] == [
        "rgb(235,243,251)",
        "rgb(8,48,107)",
        "rgb(121,145,179)",
        "transparent",
    ]
    assert [cell.text for cell in (*first, *second)] == ["0.50", "1.00", "0.75", "–"]
    assert [cell.chosen for cell in (*first, *second)] == [False, True, False, False]
    assert first[1].tooltip == "a, u: 1.00"
    assert drawn.ends == ("0.50", "1.00")
    zero = heat_map(values, ["a", "b"], ["t", "u"], "c", "{:.2f}".format, low=0.0)
    assert zero.ends == ("0.00", "1.00")
    assert zero.rows[0][2][0].background == "rgb(121,145,179)"


def test_heat_map_of_equal_or_no_numbers() -> None:
    equal = heat_map(np.ones((1, 2)), ["a"], ["t", "u"], "c", "{:.0f}".format)
    assert {cell.background for cell in equal.rows[0][2]} == {"rgb(235,243,251)"}
    none = heat_map(np.full((1, 1), np.nan), ["a"], ["t"], "c", "{:.0f}".format)
    assert none.rows[0][2][0].text == "–"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1", "up 1 attn 0 attn1"),
        ("up_blocks.1.attentions.0.transformer_blocks.1.attn1", "up 1 attn 0 block 1 attn1"),
        ("up_blocks.2.resnets.1.conv2", "up 2 resnet 1 conv2"),
        ("down_blocks.0.resnets.0.conv1", "down 0 resnet 0 conv1"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2", "mid attn 0 attn2"),
        ("forest. and lake", "forest. and lake"),
    ],
)
def test_layers_have_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_line_chart_is_well_formed_and_escaped() -> None:
    points = [(1.0, 0.5), (2.0, math.nan), (3.0, 0.25)]
    drawn = line_chart([Line("a <&> b", points, [(0.4, 0.6)])], 'loss "x"', "epoch", "loss")
    chart = ElementTree.fromstring(drawn)
    circles = chart.findall("{*}circle")
    assert [circle.findtext("{*}title") for circle in circles] == ["a <&> b: 0.5 at 1", "a <&> b: 0.25 at 3"]
    assert chart.attrib["aria-label"] == 'loss "x"'
    ElementTree.fromstring(line_chart([Line("empty", [])], "t", "x", "y"))


def test_lines_are_told_apart_without_colour_too() -> None:
    lines = [Line(f"l{i}", [(1, i), (2, i)]) for i in range(len(DASHES))]
    chart = ElementTree.fromstring(line_chart(lines, "t", "x", "y"))
    assert [line.get("stroke-dasharray", "") for line in chart.findall("{*}polyline")] == DASHES


def test_a_logarithmic_axis_gives_each_doubling_the_same_width() -> None:
    line = Line("a", [(10, 0.1), (20, 0.2), (40, 0.3), (400, 0.4)])
    chart = ElementTree.fromstring(line_chart([line], "t", "x", "y", logarithmic=True))
    places = [float(circle.get("cx", 0)) for circle in chart.findall("{*}circle")]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert (places[3] - places[2]) / (places[1] - places[0]) == pytest.approx(math.log2(10), rel=0.01)
    ElementTree.fromstring(line_chart([Line("a", [(10, 0.1)])], "t", "x", "y", logarithmic=True))


def test_intervals_reach_from_end_to_end() -> None:
    bars = [("a", 0.5, 0.4, 0.7), ("<b>", 0.6, math.nan, math.nan), ("c" * 60, math.nan, 0.1, 0.2)]
    chart = ElementTree.fromstring(interval_chart(bars, "t", "accuracy"))
    (whisker,) = [line for line in chart.findall("{*}line") if line.get("stroke-width") == "3"]
    dots = chart.findall("{*}circle")
    assert [dot.findtext("{*}title") for dot in dots] == ["a: 0.5 (0.4 to 0.7)", "<b>: 0.6"]
    left, right = float(whisker.get("x1", 0)), float(whisker.get("x2", 0))
    share = (float(dots[0].get("cx", 0)) - left) / (right - left)
    assert share == pytest.approx(1 / 3, abs=0.01)
    assert f"{'c' * 28}…" in [text.text for text in chart.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("values", "whole", "expected"),
    [
        ([1, 8], True, [0, 2, 4, 6, 8]),
        ([1, 2], True, [1, 2]),
        ([3], True, [3, 4]),
        ([0.31, 0.62], False, [0.3, 0.4, 0.5, 0.6, 0.7]),
        ([], False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_values(values: list[float], whole: bool, expected: list[float]) -> None:
    assert round_ticks(values, whole) == pytest.approx(expected)
