"""Draws of few labelled tiles: nested, fair to classes, seeded; and the requests that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import store_attributes
from made_up_store import LAYER
from numpy.typing import NDArray

from satdifuser.errors import SettingsError, StoreError
from satdifuser.store.encoding import encode
from satdifuser.store.few_labels import (
    ALL_LABELS,
    Budget,
    check_classes_known,
    class_presence,
    draw_labelled,
    draw_tiles,
    parse_budgets,
)
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.writer import TileRow

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
NAMES = ["a", "b", "c", "d"]


@st.composite
def one_class_each(draw: st.DrawFn) -> NDArray[np.bool_]:
    counts = draw(st.lists(st.integers(1, 60), min_size=2, max_size=4))
    labels = np.repeat(np.arange(len(counts)), counts)
    return labels[:, None] == np.arange(len(counts))


@st.composite
def several_classes(draw: st.DrawFn) -> NDArray[np.bool_]:
    tiles, classes = draw(st.integers(4, 80)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    return random.random((tiles, classes)) < random.uniform(0.05, 0.7, classes)


shares = st.fractions(Fraction(1, 200), 1)
seeds = st.integers(0, 5)


def drawn(present: NDArray[np.bool_], budget: Budget, seed: int, draw: int = 0) -> NDArray[np.bool_] | None:
    """The draw, or None where a class would be left without a tile."""
    try:
        return draw_tiles(present, budget, seed, draw, NAMES)
    except SettingsError:
        return None


@settings(deadline=None)
@given(one_class_each() | several_classes(), shares, shares, seeds)
def test_a_share_is_nested_in_a_larger_one_and_of_its_size(
    present: NDArray[np.bool_], first: Fraction, second: Fraction, seed: int
) -> None:
    small, large = sorted((first, second))
    inner, outer = drawn(present, Budget(small), seed), drawn(present, Budget(large), seed)
    for share, taken in ((small, inner), (large, outer)):
        if taken is not None:
            assert abs(taken.sum() - share * len(present)) <= Fraction(1, 2)
            assert (present[taken].any(axis=0) == present.any(axis=0)).all()
    if inner is not None:
        assert outer is not None
        assert not (inner & ~outer).any()


@settings(deadline=None)
@given(one_class_each(), shares, seeds)
def test_a_share_gives_each_class_its_share(present: NDArray[np.bool_], share: Fraction, seed: int) -> None:
    """Webster's method may leave the quota by one tile where rounding up or down does not add up."""
    taken = drawn(present, Budget(share), seed)
    quota = float(share) * present.sum(axis=0)
    if taken is None:
        assert quota.min() < 1
    else:
        assert (np.abs(present[taken].sum(axis=0) - quota) < 1.5).all()


@settings(deadline=None)
@given(one_class_each() | several_classes(), st.integers(1, 8), st.integers(1, 8), seeds)
def test_shots_are_nested_and_as_many_of_each_class(
    present: NDArray[np.bool_], first: int, second: int, seed: int
) -> None:
    few, many = sorted((first, second))
    inner, outer = drawn(present, Budget(shots=few), seed), drawn(present, Budget(shots=many), seed)
    held = present.sum(axis=0)
    assert (outer is None) == bool(((held > 0) & (held < many)).any())
    if inner is None or outer is None:
        return
    assert not (inner & ~outer).any()
    counts = present[inner].sum(axis=0)[held > 0]
    one_each = (present.sum(axis=1) == 1).all()
    assert (counts == few).all() if one_each else (counts >= few).all()
    assert inner.sum() <= few * (held > 0).sum()


@pytest.mark.parametrize("budget", [Budget(Fraction(1, 10)), Budget(shots=5)])
def test_draws_repeat_with_their_seed_and_number_and_differ_otherwise(budget: Budget) -> None:
    present = np.repeat(np.eye(4, dtype=bool), 50, axis=0)
    first = draw_tiles(present, budget, 0, 0, NAMES)
    np.testing.assert_array_equal(first, draw_tiles(present, budget, 0, 0, NAMES))
    assert (first != draw_tiles(present, budget, 0, 1, NAMES)).any()
    assert (first != draw_tiles(present, budget, 1, 0, NAMES)).any()


def test_every_tile_of_a_class_is_drawn_equally_often() -> None:
    present = np.repeat(np.eye(2, dtype=bool), 10, axis=0)
    counts = np.sum([draw_tiles(present, Budget(shots=3), 0, d, NAMES) for d in range(1000)], axis=0)
    assert counts.sum() == 6000
    assert np.abs(counts - 300).max() < 60  # four standard deviations


def test_requests_are_read_as_written() -> None:
    budgets = parse_budgets("0.5%, 1%,100%", "1,5")
    assert [str(budget) for budget in budgets] == ["0.5%", "1%", "100%", "1 shot", "5 shots"]
    assert [budget.is_drawn for budget in budgets] == [True, True, False, True, True]
    assert parse_budgets() == [ALL_LABELS]


@pytest.mark.parametrize(
    ("labels", "shots", "message"),
    [
        ("0%", "", r"labels: got '0%', expected shares above 0% and up to 100%, such as 1%.*, or names of"),
        ("101%", "", "got '101%'"),
        ("-1%", "", "got '-1%'"),
        ("1/0%", "", "got '1/0%'"),
        ("1%,", "", "got ''"),
        ("", "0", "shots: got '0', expected whole numbers from 1, such as 1,5,10"),
        ("", "1.5", "got '1.5'"),
        ("1%,2%,1%", "", "labels: 1% is named twice; name it once"),
        ("", "5,5", "shots: 5 shots is named twice"),
    ],
)
def test_other_requests_are_refused(labels: str, shots: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_budgets(labels, shots)


def test_what_leaves_a_class_without_a_tile_is_refused() -> None:
    present = np.repeat(np.eye(2, dtype=bool), [95, 5], axis=0)
    with pytest.raises(SettingsError, match=r"shots: 6 shots of each class, .*: b has 5; ask for 5 or fewer"):
        draw_tiles(present, Budget(shots=6), 0, 0, NAMES)
    message = (
        r"labels: 5% of the 100 training tiles leaves none of b \(5 tiles\); ask for 20% or more, or name"
    )
    with pytest.raises(SettingsError, match=message):
        draw_tiles(present, Budget(Fraction(5, 100)), 0, 0, NAMES)
    assert present[draw_tiles(present, Budget(Fraction(20, 100)), 0, 0, NAMES)].sum(axis=0).tolist() == [
        19,
        1,
    ]


def labelled_store(
    path: Path, task: str, targets: Sequence[NDArray[np.generic]], smaller: Sequence[str] | None = None
) -> FeatureStore:
    """A store of training tiles with these targets; a partition `smaller` may give them other splits."""
    attributes = store_attributes(
        task=task,
        classes=["sea", "land", "ice"],
        tiles=len(targets),
        tile_size=(4, 4),
        tiles_per_shard=len(targets),
        timesteps=[1],
        layers=[LAYER],
        encoding="int8",
        previews=False,
        colour_statistics=[],
        settings={},
        partitions=["default", "smaller"],
    )
    rows = [
        TileRow(
            f"t{i}",
            "train",
            colour=np.zeros(0, np.float32),
            target=target,
            partitions={"default": "train", "smaller": smaller[i] if smaller else "train"},
        )
        for i, target in enumerate(targets)
    ]
    maps = encode(np.ones((len(targets), 1, 1, 2, 2, 2), np.float32), "int8")
    open_or_create(path, attributes, overwrite=False).write_shard(0, rows, [{"stride_02": maps}], {})
    return FeatureStore(path)


def mask(*values: int) -> NDArray[np.uint8]:
    """A mask of 4 x 4 px that shows these values."""
    return np.resize(np.array(values, np.uint8), (4, 4))


def test_a_mask_has_the_classes_of_its_pixels_and_counts_only_if_it_has_any(tmp_path: Path) -> None:
    masks = [mask(0, 1), mask(0, 255), mask(255), mask(2), mask(0)]
    store = labelled_store(tmp_path / "s.zarr", "segmentation", masks)
    rows = np.arange(5)
    assert class_presence(store, rows).astype(int).tolist() == [
        [1, 1, 0],
        [1, 0, 0],
        [0, 0, 0],
        [0, 0, 1],
        [1, 0, 0],
    ]
    assert draw_labelled(store, rows, ALL_LABELS, seed=0).tolist() == [0, 1, 3, 4]
    assert draw_labelled(store, rows[::-1], Budget(shots=1), seed=0).tolist() == [0, 3]


def test_labels_of_several_classes_are_drawn_by_them(tmp_path: Path) -> None:
    labels = [np.array(row, np.uint8) for row in ([1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1])]
    store = labelled_store(tmp_path / "s.zarr", "multilabel", labels)
    assert draw_labelled(store, np.arange(5), ALL_LABELS, seed=0).tolist() == [0, 1, 2, 3, 4]
    taken = draw_labelled(store, np.arange(5), Budget(shots=1), seed=0)
    assert (len(taken), taken[0]) == (2, 0)
    # one class that varies is enough, if a tile may have several
    assert len(draw_labelled(store, np.array([0, 1]), ALL_LABELS, seed=0)) == 2


def test_a_partition_stands_for_a_draw(tmp_path: Path) -> None:
    targets = [np.array(c, np.int32) for c in (0, 1, 0, 1, -1)]
    store = labelled_store(
        tmp_path / "s.zarr", "classification", targets, ["train"] * 2 + ["none"] * 2 + ["train"]
    )
    (budget,) = parse_budgets("smaller")
    assert (str(budget), budget.is_drawn) == ("smaller", False)
    assert draw_labelled(store, np.arange(4), budget, seed=0).tolist() == [0, 1]
    with pytest.raises(
        SettingsError, match="labels: partition 'smaller' trains on tiles that are no training"
    ):
        draw_labelled(store, np.arange(1, 4), budget, seed=0)
    message = r"labels: got 'smal', expected a share such as 10%, or a partition of .*: default, smaller; did"
    with pytest.raises(SettingsError, match=message):
        draw_labelled(store, np.arange(4), Budget(partition="smal"), seed=0)


def test_a_class_that_only_val_has_is_refused(tmp_path: Path) -> None:
    targets = [np.array(c, np.int32) for c in (0, 1, 2, 2)]
    store = labelled_store(tmp_path / "s.zarr", "classification", targets)
    present = class_presence(store, np.arange(4))
    check_classes_known(store, present[:3], present[3:])
    with pytest.raises(StoreError, match=r"no training tile has the class ice \(2 tiles on val\), so"):
        check_classes_known(store, present[:2], present[2:])


@pytest.mark.parametrize(
    ("task", "target", "held"),
    [
        ("classification", np.array(1, np.int32), "land"),
        ("multilabel", np.array([1, 1, 0], np.uint8), "sea, land"),
        ("segmentation", mask(2, 255), "ice"),
        ("segmentation", mask(255), "none, all pixels are ignored"),
    ],
)
def test_one_class_only_is_refused(tmp_path: Path, task: str, target: NDArray[np.generic], held: str) -> None:
    store = labelled_store(tmp_path / "s.zarr", task, [target, target])
    message = rf"s\.zarr: nothing to tell apart: the classes of all 2 training tiles .* \({held}\); choose"
    with pytest.raises(StoreError, match=message):
        draw_labelled(store, np.arange(2), ALL_LABELS, seed=0)
