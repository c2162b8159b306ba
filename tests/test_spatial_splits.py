"""Splits of the ground: whole blocks, buffers that hold, folds that test every tile once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from satdifuser.errors import LabelError
from satdifuser.labels.settings import LabelSettings, RandomSplit, SpatialBlocks, SpatialFolds
from satdifuser.labels.spatial import (
    block_numbers,
    draw_partitions,
    footprints,
    leak_warning,
)
from satdifuser.store.georeference import Georeference

CRS, LEFT, TOP, SIDE, PIXEL = "EPSG:32632", 500000, 5000000, 8, 10  # tiles of 80 m


def grid(rows: int, cols: int, step: float = SIDE, crs: str = CRS) -> tuple[list[str], list[Georeference]]:
    places = [
        Georeference(crs, (PIXEL, 0, LEFT, 0, -PIXEL, TOP)).shifted(int(r * step), int(c * step))
        for r in range(rows)
        for c in range(cols)
    ]
    return [f"s/{i}" for i in range(len(places))], places


def gap(first: Georeference, second: Georeference) -> float:
    """Metres between two tiles in their own CRS; -1 where they share ground."""
    a, b = (shapely.Polygon(place.corners(SIDE, SIDE)) for place in (first, second))
    return -1.0 if a.intersection(b).area > 1 else float(a.distance(b))


def blocks(**fields: Any) -> SpatialBlocks:
    return SpatialBlocks(kind="spatial_blocks", **fields)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5),
    st.sampled_from([0, 80, 100, 170]),
    st.sampled_from([160, 240, 333]),
    st.sampled_from([4, 8]),
)
def test_tiles_of_different_splits_keep_their_distance(seed: int, buffer: int, size: int, step: int) -> None:
    ids, places = grid(12, 12, step)
    try:
        drawn = draw_partitions(blocks(size_m=size, buffer_m=buffer, seed=seed), ids, places, (SIDE, SIDE))
    except LabelError:  # the buffer took a whole split
        return
    (splits,) = drawn.partitions.values()
    for first in ("train", "val", "test"):
        for second in ("train", "val", "test"):
            if first < second:
                pairs = [
                    gap(places[i], places[j])
                    for i in np.flatnonzero(splits == first)
                    for j in np.flatnonzero(splits == second)
                ]
                assert min(pairs) >= buffer * 0.999


def test_blocks_are_whole_and_shares_are_kept() -> None:
    ids, places = grid(20, 20)
    split = blocks(size_m=320, train=0.5, val=0.25, test=0.25)
    drawn = draw_partitions(split, ids, places, (SIDE, SIDE))
    assert list(drawn.partitions) == ["spatial_blocks"]
    splits = drawn.partitions["spatial_blocks"].reshape(20, 20)
    for row in range(0, 20, 4):
        for col in range(0, 20, 4):
            assert len(set(splits[row : row + 4, col : col + 4].ravel())) == 1
    shares = [(splits == name).mean() for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    assert drawn.notes == []
    other = draw_partitions(split.model_copy(update={"seed": 1}), ids, places, (SIDE, SIDE))
    assert (other.partitions["spatial_blocks"].reshape(20, 20) != splits).any()


def test_the_buffer_takes_tiles_out_of_train_first_and_is_told() -> None:
    ids, places = grid(12, 12)
    drawn = draw_partitions(blocks(size_m=320, buffer_m=100), ids, places, (SIDE, SIDE))
    bare = draw_partitions(blocks(size_m=320), ids, places, (SIDE, SIDE))
    before, after = (d.partitions["spatial_blocks"] for d in (bare, drawn))
    assert ((before == "test") == (after == "test")).all()
    dropped = after == "none"
    assert set(before[dropped]) <= {"train", "val"}
    near = (
        f"{dropped.sum()} of 144 tiles are in no split, for they overlap a tile of another one or are nearer"
    )
    assert near in drawn.notes[0]


def test_every_tile_is_tested_in_one_fold() -> None:
    ids, places = grid(12, 12)
    split = SpatialFolds(kind="spatial_folds", size_m=240, folds=4)
    drawn = draw_partitions(split, ids, places, (SIDE, SIDE))
    assert list(drawn.partitions) == ["fold_0", "fold_1", "fold_2", "fold_3"]
    folds = list(drawn.partitions.values())
    assert (sum((splits == "test").astype(int) for splits in folds) == 1).all()
    for here, after in pairwise([*folds, folds[0]]):
        assert ((here == "val") == (after == "test")).all()  # the next fold's test is this one's val
    assert max((s == "test").sum() for s in folds) - min((s == "test").sum() for s in folds) <= 9


@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:4326", "EPSG:3857", "EPSG:2263"])
def test_metres_are_metres_in_every_crs(crs: str) -> None:
    """Two tiles with about a kilometre between them, in degrees, feet and the stretched metres of the web."""
    unit = {"EPSG:32632": 1.0, "EPSG:4326": 1 / 111320, "EPSG:3857": 1.0, "EPSG:2263": 1 / 0.3048006}[crs]
    x, y = {"EPSG:4326": (9.0, 0.0), "EPSG:2263": (1e6, 2e5)}.get(crs, (500000.0, 0.0))
    pixel = 10 * unit
    first = Georeference(crs, (pixel, 0, x, 0, -pixel, y))
    ground = footprints([first, first.shifted(0, 108)], (SIDE, SIDE))
    assert float(ground.polygons[0].distance(ground.polygons[1])) == pytest.approx(1000, rel=0.002)
    assert ground.stretch == pytest.approx(1, abs=1e-6)


def test_scenes_far_apart_and_in_several_crs() -> None:
    """Far away, the plane lengthens distances: the buffer is made up for it."""
    ids, near = grid(2, 2)
    away = [Georeference("EPSG:32754", p.transform) for p in near]
    places = [*near, *away]
    ground = footprints(places, (SIDE, SIDE))
    assert ground.stretch > 1.2
    numbers = block_numbers(ground, 100_000)
    assert len(set(numbers[:4].tolist())) == len(set(numbers[4:].tolist())) == 1
    assert numbers[0] != numbers[4]
    assert len(ids) == 4


def test_overlapping_tiles_of_a_random_split_are_warned_of() -> None:
    ids, places = grid(6, 6, step=4)
    (splits,) = draw_partitions(RandomSplit(), ids, places, (SIDE, SIDE)).partitions.values()
    told = leak_warning(splits.tolist(), places, (SIDE, SIDE))
    assert told is not None
    assert "train tiles overlap a tile of val or test" in told
    assert "spatial_blocks" in told
    _, apart = grid(6, 6)
    assert leak_warning(splits.tolist(), apart, (SIDE, SIDE)) is None  # neighbours share an edge only
    assert leak_warning(["train"], [None], (SIDE, SIDE)) is None


def test_errors() -> None:
    ids, places = grid(4, 4)
    with pytest.raises(LabelError) as caught:
        draw_partitions(blocks(size_m=5000), ids, places, (SIDE, SIDE))
    told = str(caught.value)
    assert "no tile in train, val of partition spatial_blocks" in told or "no tile in val, test" in told
    assert "16 tiles lie in 1 blocks of size_m 5000" in told
    assert told.endswith("lower size_m, buffer_m or the number of splits")
    with pytest.raises(LabelError, match="buffer_m 1000 cleared"):
        draw_partitions(blocks(size_m=160, buffer_m=1000), ids, places, (SIDE, SIDE))
    with pytest.raises(
        LabelError, match=r"split.kind: spatial_blocks, but tile s/1 has no place on the ground"
    ):
        draw_partitions(blocks(size_m=160), ids[:2], [places[0], None], (SIDE, SIDE))


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValidationError, match="size_m"):
        LabelSettings(split={"kind": "spatial_blocks"})  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="spatial_folds"):
        LabelSettings(split={"kind": "blocks"})  # type: ignore[arg-type]
    assert LabelSettings(split="keep").split == "keep"
    assert LabelSettings(split={"train": 1, "val": 0, "test": 0}).split == RandomSplit(train=1, val=0, test=0)  # type: ignore[arg-type]
