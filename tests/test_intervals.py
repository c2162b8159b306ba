"""Bootstrap intervals: the fast paths against the plain one, coverage, and the paired comparison."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from satdifuser.errors import RunError
from satdifuser.evaluate import intervals
from satdifuser.evaluate.intervals import (
    bootstrap,
    classification_intervals,
    multilabel_intervals,
    paired_difference,
    segmentation_intervals,
)
from satdifuser.evaluate.metrics import (
    classification_metrics,
    classification_scores,
    multilabel_metrics,
    segmentation_metrics,
    segmentation_scores,
)


def fake_predictions(tiles: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels of three classes and rounded (so sometimes tied) probabilities that know a little of them."""
    generator = np.random.default_rng(seed)
    target = generator.integers(0, 3, tiles)
    raw = generator.random((tiles, 3)) + 0.5 * (target[:, None] == np.arange(3))
    return target, np.round(raw / raw.sum(axis=1, keepdims=True), 2)


def fake_confusions(tiles: int, seed: int = 0) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 20, (tiles, 3, 3)) + 30 * np.eye(3, dtype=np.int64)


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "f1_micro", "average_precision"])
def test_fast_classification_equals_plain_bootstrap(metric: str) -> None:
    target, probabilities = fake_predictions(25)
    plain = bootstrap(
        lambda draw: classification_metrics(target[draw], probabilities[draw])[metric], 25, resamples=50
    )
    assert classification_intervals(target, probabilities, resamples=50)[metric] == pytest.approx(plain)


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "f1_micro", "average_precision"])
def test_fast_multilabel_equals_plain_bootstrap(metric: str) -> None:
    generator = np.random.default_rng(0)
    target = (generator.random((25, 4)) < [0.5, 0.2, 0.05, 0]).astype(np.int64)  # one class is never there
    probabilities = np.round(0.7 * generator.random((25, 4)) + 0.3 * target, 1)
    plain = bootstrap(
        lambda draw: multilabel_metrics(target[draw], probabilities[draw])[metric], 25, resamples=50
    )
    assert multilabel_intervals(target, probabilities, resamples=50)[metric] == pytest.approx(plain)


@pytest.mark.parametrize("metric", ["miou", "pixel_accuracy", "f1_macro"])
def test_fast_segmentation_equals_plain_bootstrap(metric: str) -> None:
    confusions = fake_confusions(12)
    plain = bootstrap(lambda draw: segmentation_metrics(confusions[draw].sum(0))[metric], 12, resamples=50)
    assert segmentation_intervals(confusions, resamples=50)[metric] == pytest.approx(plain)


def test_interval_of_a_mean_matches_theory() -> None:
    """For a share p of n tiles the interval is close to p ± 1.96 sqrt(p (1 - p) / n)."""
    right = np.arange(400) < 300
    low, high = bootstrap(lambda draw: float(right[draw].mean()), 400, resamples=2000)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)
    inner = bootstrap(lambda draw: float(right[draw].mean()), 400, resamples=2000, level=0.5)
    assert low < inner[0] < 0.75 < inner[1] < high


def test_seed_decides_the_draws() -> None:
    target, probabilities = fake_predictions(60)
    first = classification_intervals(target, probabilities, resamples=100, seed=1)
    assert first == classification_intervals(target, probabilities, resamples=100, seed=1)
    assert first != classification_intervals(target, probabilities, resamples=100, seed=2)


def test_blocks_cover_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "BLOCK_ENTRIES", 70)
    blocks = list(intervals.draw_tiles(10, resamples=24, seed=0))
    assert [block.shape for block in blocks] == [(7, 10), (7, 10), (7, 10), (3, 10)]
    counts = intervals.count_tiles(blocks[0])
    assert (counts.sum(axis=1) == 10).all()
    assert (counts[3] == np.bincount(blocks[0][3], minlength=10)).all()


def test_paired_interval_is_narrower_than_two_separate_ones() -> None:
    """A run and the same run with five tiles spoilt: the shared luck of the draw cancels."""
    target, probabilities = fake_predictions(200)
    worse = probabilities.copy()
    spoilt = np.flatnonzero(probabilities.argmax(1) == target)[:5]
    worse[spoilt] = np.eye(3)[(target[spoilt] + 1) % 3]
    runs = [partial(classification_scores, target, values) for values in (probabilities, worse)]
    paired = paired_difference(runs[0], runs[1], 200)["accuracy"]
    low, high = paired["interval"]
    assert paired["difference"] == pytest.approx(5 / 200)
    assert 0 < low < 5 / 200 < high
    separate = classification_intervals(target, probabilities)["accuracy"]
    assert high - low < 0.5 * (separate[1] - separate[0])


def test_paired_difference_changes_sign_with_the_order() -> None:
    better, worse = fake_confusions(30), fake_confusions(30, seed=1)
    better[:, 0, 0] += 40
    runs = [partial(segmentation_scores, confusions) for confusions in (better, worse)]
    there = paired_difference(runs[0], runs[1], 30, resamples=100)["miou"]
    back = paired_difference(runs[1], runs[0], 30, resamples=100)["miou"]
    assert there["difference"] == pytest.approx(-back["difference"])
    assert there["interval"] == pytest.approx([-back["interval"][1], -back["interval"][0]])
    same = paired_difference(runs[0], runs[0], 30, resamples=100)["miou"]
    assert same == {"difference": 0, "interval": [0, 0], "ahead": 0.5}
    assert there["ahead"] == pytest.approx(1 - back["ahead"])


def test_undefined_draws_are_left_out() -> None:
    confusions = np.zeros((4, 2, 2), np.int64)
    assert np.isnan(segmentation_intervals(confusions, resamples=20)["miou"]).all()
    confusions[0] = [[3, 1], [0, 4]]  # the one tile with labels; many draws miss it
    low, high = segmentation_intervals(confusions, resamples=50)["miou"]
    assert low == high == pytest.approx(segmentation_metrics(confusions[0])["miou"])


def test_no_tiles_is_an_error() -> None:
    with pytest.raises(RunError, match="there is no tile to draw: an interval needs one or more"):
        bootstrap(lambda draw: 0.0, 0)
    with pytest.raises(RunError, match="there is no tile to draw"):
        segmentation_intervals(np.zeros((0, 2, 2), np.int64))
