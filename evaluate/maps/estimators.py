"""Accuracy of a map and areas of its classes, from reference labels of a part of its pixels.

The estimators for stratified random sampling of Olofsson, Foody, Herold, Stehman, Woodcock and Wulder, "Good
practices for estimating area and assessing accuracy of land change", Remote Sensing of Environment 148, 2014,
doi:10.1016/j.rse.2014.02.015; (n) below are its equations. The strata are the classes of the map; within
each, the reference pixels are taken to be drawn at random, one by one.

Legend: K classes, i those of the map (rows), j those of the reference (columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Values with the half widths of their intervals; NaN where nothing can be said."""

    value: Floats
    half_width: Floats

    def bounded(self, low: float, high: float) -> tuple[Floats, Floats]:
        """Both ends of the intervals, within the limits of what is estimated."""
        return np.clip(self.value - self.half_width, low, high), np.clip(
            self.value + self.half_width, low, high
        )


@dataclass(frozen=True)
class Accuracy:
    """What reference pixels say of a map."""

    proportions: Floats  # (K, K) share of the area mapped as i that is j
    overall: Estimate  # ()
    users: Estimate  # (K,) share of what is mapped as a class that is of it
    producers: Estimate  # (K,) share of a class that is mapped as it
    areas: Estimate  # (K,) in the unit of the mapped areas


def estimate(counts: NDArray[np.int64], mapped: Floats, level: float = 0.95) -> Accuracy:
    """Estimate accuracy and areas.

    A class of the map without any reference pixel says nothing: what it covers is left out of everything.

    Args:
        counts: (K, K) reference pixels; rows are the map, columns the reference.
        mapped: (K,) area that is mapped as each class, in any unit.
        level: Of the intervals, which come from the normal distribution.
    """
    drawn = counts.sum(axis=1).astype(np.float64)  # n_i.
    sampled = np.where(drawn > 0, mapped, 0.0)
    total = sampled.sum()
    weight = _ratio(sampled, np.full(len(mapped), total))  # W_i
    share = _ratio(counts, drawn[:, None])  # n_ij / n_i., NaN without a pixel
    known = np.where(drawn[:, None] > 0, share, 0.0)
    proportions = weight[:, None] * known  # (4)
    users = np.diagonal(share)  # (2)
    truth = proportions.sum(axis=0)  # p_.j, (9)
    producers = _ratio(np.diagonal(proportions), truth)  # (3)
    spread = _spread(known, drawn)  # of each n_ij / n_i.
    z = NormalDist().inv_cdf((1 + level) / 2)

    def estimated(value: Any, variance: Any) -> Estimate:
        return Estimate(np.asarray(value, np.float64), z * np.sqrt(np.asarray(variance, np.float64)))

    own = np.diagonal(spread)
    overall = estimated(np.trace(proportions), _weighted(weight**2, own).sum())  # (1), (5)
    areas = estimated(
        total * truth, total**2 * _weighted(weight[:, None] ** 2, spread).sum(axis=0)
    )  # (10), (11)
    return Accuracy(
        proportions,
        overall,
        estimated(users, np.where(drawn > 0, own, np.nan)),  # (6)
        estimated(producers, _producers_variance(weight, spread, producers, truth)),  # (7)
        areas,
    )


def _spread(share: Floats, drawn: Floats) -> Floats:
    """Variance of each share of a stratum (K, K): s (1 - s) / (n - 1); NaN where one pixel tells nothing."""
    beyond_first = np.where(drawn > 1, drawn - 1, np.nan)
    return share * (1 - share) / beyond_first[:, None]


def _producers_variance(weight: Floats, spread: Floats, producers: Floats, truth: Floats) -> Floats:
    """(7), with areas as shares of the whole."""
    terms = _weighted(weight[:, None] ** 2, spread)  # N_i² n_ij/n_i (1 - n_ij/n_i) / (n_i - 1)
    own = np.diagonal(terms)
    others = terms.sum(axis=0) - own
    return _ratio((1 - producers) ** 2 * own + producers**2 * others, truth**2)


def _weighted(weight: Floats, spread: Floats) -> Floats:
    """Weight times spread, 0 where a stratum has no weight."""
    weight = np.broadcast_to(weight, spread.shape)
    product: Floats = np.where(weight > 0, weight * spread, 0.0)
    return product


def _ratio(numerator: Any, denominator: Any) -> Floats:
    """Divide, with NaN for a division by 0."""
    above, below = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    result: Floats = np.full(above.shape, np.nan)
    np.divide(above, below, out=result, where=below != 0)
    return result
