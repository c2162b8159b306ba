"""Blending tiles: every pixel is the weighted mean of the tiles on it, and no seam shows."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from satdifuser.errors import SettingsError, StoreError
from satdifuser.evaluate.maps.blend import Blender, TileLogits, ramp
from satdifuser.store.tile_grid import TileGrid, regular_grid

CLASSES = 2
Tiles = dict[tuple[int, int], TileLogits]  # by row and column of the grid


def blend(grid: TileGrid, tiles: Tiles, first: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """All that a grid settles from a row on: logits (K, h, w) and where there is data (h, w)."""
    blender, strips = Blender(grid, CLASSES), []
    for row in range(first, len(grid.tops)):
        pieces = list(blender.blend_row(row, [tiles.get((row, column)) for column in range(len(grid.lefts))]))
        strips.append(
            [np.concatenate([getattr(p, name) for p in pieces], axis=-1) for name in ("logits", "seen")]
        )
    logits, seen = (np.concatenate(parts, axis=-2) for parts in zip(*strips, strict=True))
    return logits, seen


def whole_at_once(grid: TileGrid, tiles: Tiles) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same by its definition, with all sums in memory: logits, and sums of weights."""
    height = grid.tops[-1] + grid.tile[0] - grid.tops[0]
    sums, weights = np.zeros((CLASSES, height, grid.width)), np.zeros((height, grid.width))
    window = np.outer(*(ramp(*pair) for pair in zip(grid.tile, grid.overlap, strict=True)))
    for (row, column), (logits, valid) in tiles.items():
        top, left = grid.tops[row] - grid.tops[0], grid.lefts[column] - grid.lefts[0]
        here = slice(top, top + grid.tile[0]), slice(left, left + grid.tile[1])
        sums[:, *here] += logits * window * valid
        weights[here] += window * valid
    return sums / np.where(weights > 0, weights, 1), weights


def starts(draw: st.DrawFn, side: int) -> range:
    step = draw(st.integers(-(-side // 2), side + 3))  # up to half shared; or gaps between
    first, count = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    return range(first, first + count * step, step)


@st.composite
def grids_of_tiles(draw: st.DrawFn) -> tuple[TileGrid, Tiles]:
    tile = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    grid = TileGrid(starts(draw, tile[0]), starts(draw, tile[1]), tile)
    random = np.random.default_rng(draw(st.integers(0, 99)))
    tiles: Tiles = {}
    for row in range(len(grid.tops)):
        for column in range(len(grid.lefts)):
            if random.random() < 0.8:
                logits = random.normal(size=(CLASSES, *tile)).astype(np.float32)
                tiles[row, column] = logits, random.random(tile) < 0.9
    return grid, tiles


@given(grids_of_tiles())
def test_row_by_row_is_the_weighted_mean_of_all_tiles(drawn: tuple[TileGrid, Tiles]) -> None:
    grid, tiles = drawn
    logits, seen = blend(grid, tiles)
    expected, weights = whole_at_once(grid, tiles)
    np.testing.assert_array_equal(seen, weights > 0)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@given(grids_of_tiles(), st.integers(1, 3))
def test_going_on_needs_the_row_before_only(drawn: tuple[TileGrid, Tiles], first: int) -> None:
    grid, tiles = drawn
    if first >= len(grid.tops):
        return
    resumed, seen = blend(grid, tiles, first - 1)
    whole, all_seen = blend(grid, tiles)
    rows = slice(grid.tops[first] - grid.tops[0], None)
    done_again = grid.tops[first] - grid.tops[first - 1]
    np.testing.assert_array_equal(resumed[:, done_again:], whole[:, rows])
    np.testing.assert_array_equal(seen[done_again:], all_seen[rows])


@pytest.mark.parametrize(("length", "overlap"), [(16, 4), (16, 8), (7, 3), (8, 1)])
def test_windows_of_neighbours_add_up_to_one(length: int, overlap: int) -> None:
    weights = ramp(length, overlap)
    np.testing.assert_allclose(weights[-overlap:] + weights[:overlap], 1)
    assert (weights[overlap : length - overlap] == 1).all()
    assert (weights > 0).all()


def test_without_overlap_every_pixel_counts_fully() -> None:
    assert ramp(4, 0).tolist() == [1, 1, 1, 1]


def flat_tiles(grid: TileGrid, values: Sequence[Sequence[float]]) -> Tiles:
    ones = np.ones(grid.tile, np.float32)
    return {
        (row, column): (np.stack([value * ones, -value * ones]), ones > 0)
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    }


@pytest.mark.parametrize("overlap", [0, 4, 8])
def test_no_seam_between_tiles_that_disagree(overlap: int) -> None:
    """Tiles that differ by 1 differ so at once where nothing overlaps, else by the window's slope at most."""
    step = 16 - overlap
    grid = TileGrid(range(0, 3 * step, step), range(0, 3 * step, step), (16, 16))
    logits, _ = blend(grid, flat_tiles(grid, [[0, 1, 0], [1, 0, 1], [0, 1, 0]]))
    steepest = max(np.abs(np.diff(logits[0], axis=axis)).max() for axis in (0, 1))
    assert steepest == pytest.approx(1) if overlap == 0 else steepest <= np.pi / 2 / overlap


def test_a_grid_knows_what_each_row_settles() -> None:
    grid = TileGrid(range(0, 25, 12), range(5, 30, 12), (16, 16))
    assert grid.overlap == (4, 4)
    assert [grid.rows(row) for row in range(3)] == [(0, 12), (12, 24), (24, 40)]
    assert grid.columns(2) == (29, 45)
    assert grid.width == 40
    part = grid.touching((14, 20, 2, 2))
    assert (list(part.tops), list(part.lefts)) == ([0, 12], [5, 17])


def test_more_than_half_in_common_is_refused() -> None:
    message = (
        "neighbouring tiles share 9 of 16 columns, expected at most half of them; choose a smaller overlap"
    )
    with pytest.raises(SettingsError, match=message):
        TileGrid([0], [0, 7], (16, 16))


def test_a_grid_through_strewn_tiles() -> None:
    found = regular_grid(np.array([[0, 0], [0, 36], [24, 12]]), (16, 16))
    assert (list(found.tops), list(found.lefts)) == ([0, 24], [0, 12, 24, 36])
    message = re.escape(
        "the 2 tiles of 16 x 16 px lie on no regular grid, and make no one map; choose those of one"
    )
    for places in ([[0, 0], [0, 10**9]], [[0, 0], [0, 5]]):
        with pytest.raises(StoreError, match=message):
            regular_grid(np.array(places), (16, 16))
