"""Confidence intervals of metrics by bootstrap over tiles, and the paired comparison of two runs.

The test tiles are drawn with replacement, as many as there are; the metric of each such draw is one
sample, and the interval is between two percentiles of the samples (Efron, "Bootstrap Methods: Another
Look at the Jackknife", 1979). Whole tiles are drawn because the pixels of a tile are not independent.
The interval tells how much the figure owes to the choice of test tiles, not to the training seed.

Shape letters: N tiles, C classes, B draws in one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import RunError
from satdifuser.evaluate.metrics import (
    Floats,
    Ints,
    classification_scores,
    multilabel_scores,
    segmentation_scores,
)

# (B, N) counts of how often each tile was drawn -> (B,) values of each metric
Scores = Callable[[NDArray[np.int64]], dict[str, Floats]]

BLOCK_ENTRIES = 4_000_000  # drawn tiles held in memory at once


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    n: int,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of any statistic of tiles; the functions below are far faster for the usual metrics.

    Args:
        statistic: Takes (N,) drawn tile indices, returns a number (NaN: undefined for this draw).
        n: Number of tiles N.
        resamples: Number of draws.
        seed: Seed of the draws; the same seed draws the same tiles in every function of this module.
        level: Share of the samples inside the interval.

    Returns:
        Low and high end; NaN where every sample was undefined.

    Raises:
        RunError: There is no tile.
    """
    samples = [statistic(draw) for block in draw_tiles(n, resamples, seed) for draw in block]
    return percentiles(np.array(samples), level)


def classification_intervals(
    target: Ints,
    probabilities: NDArray[np.floating[Any]],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Intervals of the metrics of `classification_metrics`.

    Args:
        target: (N,) true labels, integers.
        probabilities: (N, C) predicted probabilities.
        resamples: Number of draws.
        seed: Seed of the draws.
        level: Share of the samples inside the interval.

    Returns:
        [low, high] of every metric.

    Raises:
        RunError: There is no tile, or labels and probabilities are unusable.
    """
    samples = sample(partial(classification_scores, target, probabilities), len(target), resamples, seed)
    return {name: list(percentiles(values, level)) for name, values in samples.items()}


def multilabel_intervals(
    target: Ints,
    probabilities: NDArray[np.floating[Any]],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Intervals of the metrics of `multilabel_metrics`.

    Args:
        target: (N, C) zeros and ones, integers.
        probabilities: (N, C) predicted probabilities.
        resamples: Number of draws.
        seed: Seed of the draws.
        level: Share of the samples inside the interval.

    Returns:
        [low, high] of every metric.

    Raises:
        RunError: There is no tile, or labels and probabilities are unusable.
    """
    samples = sample(partial(multilabel_scores, target, probabilities), len(target), resamples, seed)
    return {name: list(percentiles(values, level)) for name, values in samples.items()}


def segmentation_intervals(
    confusions: NDArray[np.int64], resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, list[float]]:
    """Intervals of the metrics of `segmentation_metrics`.

    Args:
        confusions: (N, C, C) pixel counts of every tile; rows are the truth.
        resamples: Number of draws.
        seed: Seed of the draws.
        level: Share of the samples inside the interval.

    Returns:
        [low, high] of every metric.

    Raises:
        RunError: There is no tile.
    """
    samples = sample(partial(segmentation_scores, confusions), len(confusions), resamples, seed)
    return {name: list(percentiles(values, level)) for name, values in samples.items()}


def paired_difference(
    first: Scores, second: Scores, n: int, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[str, Any]]:
    """Compare two runs on the same tiles: every draw scores both, so what the tiles share cancels out.

    A run is given by its scores: ``partial(classification_scores, target, probabilities)``, the same of
    ``multilabel_scores``, or ``partial(segmentation_scores, confusions)``, with tiles in the same order.

    Args:
        first: Scores of the first run.
        second: Scores of the second run.
        n: Number of tiles N.
        resamples: Number of draws.
        seed: Seed of the draws.
        level: Share of the samples inside the interval.

    Returns:
        Per metric ``{"difference": first - second, "interval": [low, high], "ahead": share}``; an interval
        without zero means that other test tiles of the same kind would hardly turn the order around. The
        share is that of the draws in which the first run is ahead, where both are even by half.

    Raises:
        RunError: There is no tile, or labels and probabilities are unusable.
    """

    def difference(counts: NDArray[np.int64]) -> dict[str, Floats]:
        theirs = second(counts)
        return {name: values - theirs[name] for name, values in first(counts).items()}

    samples = sample(difference, n, resamples, seed)
    return {
        name: {
            "difference": float(value[0]),
            "interval": list(percentiles(samples[name], level)),
            "ahead": float(np.mean((samples[name] > 0) + (samples[name] == 0) / 2)),
        }
        for name, value in difference(np.ones((1, n), np.int64)).items()
    }


def sample(scores: Scores, n: int, resamples: int, seed: int) -> dict[str, Floats]:
    """(resamples,) values of each metric, one for every draw of the tiles."""
    blocks = [scores(count_tiles(draws)) for draws in draw_tiles(n, resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def draw_tiles(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Draw N of N tiles with replacement, `resamples` times; yields (B, N) tile indices."""
    if n < 1:
        raise RunError("there is no tile to draw: an interval needs one or more; evaluate a split with tiles")
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_ENTRIES // n)
    for start in range(0, resamples, block):
        yield generator.integers(n, size=(min(block, resamples - start), n))


def count_tiles(draws: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B, N) drawn tile indices -> (B, N) how often each tile was drawn."""
    blocks, n = draws.shape
    row_start = np.arange(blocks)[:, None] * n
    return np.bincount((draws + row_start).ravel(), minlength=draws.size).reshape(blocks, n)


def percentiles(samples: Floats, level: float) -> tuple[float, float]:
    """The central interval that holds `level` of the samples; undefined samples are left out."""
    defined = samples[~np.isnan(samples)]
    if defined.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
