"""Draws few labelled tiles of a split: a share of them (``1%``) or so many of each class (``5 shots``).

Draws are nested (the 1 % is inside the 10 %, 1 shot inside 5), seeded, and fair to classes:

- A share takes so many tiles of the split, one after the other, each from the class that is furthest behind
  its share (Webster's method of apportionment). A tile with several classes counts for each of them, and
  those without any count as a class of their own.
- Shots go in turns: in the n-th turn each class that has fewer than n tiles is given one, the rarest first.
  So where a tile has one class there are exactly so many of each, where it may have several at least so many.

A mask has the classes that any of its pixels show. A mask with no labelled pixel is never drawn.
The training tiles of a partition that the store holds (GEO-Bench's ``0.01x_train``) can stand for a draw.

Legend: N tiles, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import SettingsError, StoreError, suggest
from satdifuser.store.settings import PARTITION_NAME

if TYPE_CHECKING:
    from satdifuser.store.reader import FeatureStore, Indices

MASKS_AT_ONCE = 64
Presence = NDArray[np.bool_]
"""(N, K): whether a tile has a class."""


@dataclass(frozen=True)
class Budget:
    """How many labels may be used: a share of the tiles, so many shots of each class, or a partition's."""

    share: Fraction = Fraction(1)
    shots: int = 0
    partition: str = ""

    def __str__(self) -> str:
        if self.shots:
            return f"{self.shots} shot{'s' if self.shots > 1 else ''}"
        return self.partition or f"{float(self.share * 100):g}%"

    @property
    def is_drawn(self) -> bool:
        """Whether draws differ: they do not where all tiles are taken, or those of a partition."""
        return bool(self.shots) or (self.share < 1 and not self.partition)


ALL_LABELS = Budget()


def parse_budgets(labels: str = "", shots: str = "") -> list[Budget]:
    """Read what a user asked for; all labels where that is nothing.

    Args:
        labels: Shares, ``1%,10%,100%``, or names of partitions.
        shots: Tiles of each class, ``1,5,10``.

    Raises:
        SettingsError: one is not of that form, out of range, or named twice.
    """
    found = [_parse_labels(text.strip()) for text in labels.split(",") if labels]
    found += [_parse_shots(text.strip()) for text in shots.split(",") if shots]
    for budget in found:
        if found.count(budget) > 1:
            raise SettingsError(
                f"{'shots' if budget.shots else 'labels'}: {budget} is named twice; name it once"
            )
    return found or [ALL_LABELS]


def _parse_labels(text: str) -> Budget:
    if re.fullmatch(PARTITION_NAME, text):
        return Budget(partition=text)
    try:
        share = Fraction(text.removesuffix("%")) / 100 if text.endswith("%") else Fraction(0)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise SettingsError(
            f"labels: got {text!r}, expected shares above 0% and up to 100%, such as 1%,10%,100%, or names "
            "of partitions"
        )
    return Budget(share)


def _parse_shots(text: str) -> Budget:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise SettingsError(f"shots: got {text!r}, expected whole numbers from 1, such as 1,5,10")
    return Budget(shots=int(text))


def draw_labelled(
    store: FeatureStore,
    rows: Indices,
    budget: Budget,
    seed: int,
    draw: int = 0,
    present: Presence | None = None,
) -> Indices:
    """The tiles among some rows whose labels may be used.

    Args:
        store: A store with targets.
        rows: N tiles that carry a label, such as those of the split train.
        budget: How many.
        seed: Of the draws.
        draw: Which one; draws of one number are nested in each other over all budgets.
        present: The tiles' classes, where `class_presence` was asked before.

    Returns:
        Rows in rising order.

    Raises:
        SettingsError: a class has fewer tiles than shots, or its share of them is none, or the store holds
            no such partition.
        StoreError: the tiles have one class only, or none.
    """
    present = class_presence(store, rows) if present is None else present
    if budget.partition:
        held = np.isin(rows, _partition_rows(store, rows, budget.partition))
        rows, present = rows[held], present[held]
    check_classes_differ(store, present)
    if store.attributes.task == "segmentation":
        shown = present.any(axis=1)
        rows, present = rows[shown], present[shown]
    taken = draw_tiles(present, budget, seed, draw, store.attributes.classes)
    return np.sort(rows[taken])


def _partition_rows(store: FeatureStore, rows: Indices, name: str) -> Indices:
    """Those of some rows that a partition trains on."""
    held = store.partitions()
    if name not in held:
        raise SettingsError(
            f"labels: got {name!r}, expected a share such as 10%, or a partition of {store.path}: "
            f"{', '.join(held)}{suggest(name, held)}"
        )
    train = store.select("train", name)
    outside = np.setdiff1d(train, rows)
    if len(outside) and class_presence(store, outside).any():
        raise SettingsError(
            f"labels: partition {name!r} trains on tiles that are no training tiles of the partition in use; "
            f"use it by itself: partition={name}"
        )
    return np.intersect1d(rows, train)


def class_presence(store: FeatureStore, rows: Indices) -> Presence:
    """Which classes each of some tiles has, (N, K); a mask has those of its labelled pixels."""
    task, classes = store.attributes.task, np.arange(len(store.attributes.classes))
    if task == "segmentation":
        ignored = store.attributes.ignore_value
        parts = [rows[start : start + MASKS_AT_ONCE] for start in range(0, len(rows), MASKS_AT_ONCE)]
        masks = (mask for part in parts for mask in np.asarray(store.targets(part)))
        return np.array([(classes != ignored) & np.isin(classes, mask) for mask in masks])
    targets = store.targets(rows)
    if targets is None:
        raise StoreError(f"{store.path}: holds no targets; extract again from a source with labels")
    present: Presence = targets == 1 if task == "multilabel" else targets[:, None] == classes
    return present


def check_classes_differ(store: FeatureStore, present: Presence) -> None:
    """Refuse tiles from which nothing can be told apart.

    Raises:
        StoreError: all have one class, or none.
    """
    names, counts = store.attributes.classes, present.sum(axis=0)
    several = store.attributes.task == "multilabel"
    if (several and ((counts > 0) & (counts < len(present))).any()) or (
        not several and (counts > 0).sum() > 1
    ):
        return
    held = ", ".join(names[c] for c in np.flatnonzero(counts)) or "none, all pixels are ignored"
    raise StoreError(
        f"{store.path}: nothing to tell apart: the classes of all {len(present)} training tiles are the same "
        f"({held}); choose a partition, or extract from a source, whose split train holds two or more"
    )


def check_classes_known(store: FeatureStore, train: Presence, val: Presence) -> None:
    """Refuse a class on val that no training tile has; among several classes a tile it is only never found.

    Raises:
        StoreError: there is one.
    """
    counts, names = val.sum(axis=0), store.attributes.classes
    unknown = np.flatnonzero((counts > 0) & ~train.any(axis=0))
    if len(unknown) and store.attributes.task != "multilabel":
        which = ", ".join(f"{names[c]} ({counts[c]} tiles on val)" for c in unknown)
        raise StoreError(
            f"{store.path}: no training tile has the class {which}, so nothing can learn it; choose another "
            "partition, or label or extract again with splits that hold every class"
        )


def draw_tiles(
    present: Presence, budget: Budget, seed: int, draw: int, names: Sequence[str]
) -> NDArray[np.bool_]:
    """Which of N tiles are drawn.

    Args:
        present: (N, K) the classes that each has.
        budget: How many tiles.
        seed: Of the draws.
        draw: Which one.
        names: Of the K classes, for errors.

    Raises:
        SettingsError: a class has fewer tiles than shots, or its share of them is none.
    """
    if not budget.is_drawn:
        return np.ones(len(present), bool)
    drawing = _Drawing(present, np.random.default_rng([seed, draw]))
    if budget.shots:
        _check_shots(present, budget, names)
        drawing.take_turns(budget.shots)
    else:
        drawing.take_share(int(budget.share * len(present) + Fraction(1, 2)))
        _check_share(present, drawing.taken, budget, names)
    return drawing.taken


def _check_shots(present: Presence, budget: Budget, names: Sequence[str]) -> None:
    totals = present.sum(axis=0)
    short = [
        f"{names[c]} has {totals[c]}" for c in np.flatnonzero((totals > 0) & (totals < budget.shots)).tolist()
    ]
    if short:
        raise SettingsError(
            f"shots: {budget} of each class, but there are fewer training tiles: {', '.join(short)}; ask for "
            f"{totals[totals > 0].min()} or fewer"
        )


def _check_share(present: Presence, taken: NDArray[np.bool_], budget: Budget, names: Sequence[str]) -> None:
    totals, drawn = present.sum(axis=0), present[taken].sum(axis=0)
    gone = np.flatnonzero((totals > 0) & (drawn == 0))
    if len(gone):
        which = ", ".join(f"{names[c]} ({totals[c]} tiles)" for c in gone.tolist())
        least = np.ceil(1000 / totals[gone].min()) / 10  # one tile of the rarest
        raise SettingsError(
            f"labels: {budget} of the {len(present)} training tiles leaves none of {which}; ask for "
            f"{least:g}% or more, or name shots of each class"
        )


class _Drawing:
    """Takes tile after tile, each for the sake of one class; within a class the order is random."""

    def __init__(self, present: Presence, generator: np.random.Generator) -> None:
        shuffled = present[:, generator.permutation(present.shape[1])]  # so that ties go to any class
        self.present = np.column_stack([shuffled, ~present.any(axis=1)])
        self.totals = self.present.sum(axis=0)
        members = [generator.permutation(np.flatnonzero(column)).tolist() for column in self.present.T]
        self._queues = [iter(tiles) for tiles in members]
        self.counts = np.zeros_like(self.totals)
        self.taken = np.zeros(len(present), bool)

    def take_share(self, tiles: int) -> None:
        """Take so many tiles, each for the class furthest behind."""
        for _ in range(tiles):
            behind = np.full(len(self.totals), np.inf)
            np.divide(self.counts + 0.5, self.totals, out=behind, where=self.counts < self.totals)
            self._take(int(behind.argmin()))

    def take_turns(self, turns: int) -> None:
        """Give each class but the last, of tiles without any, so many tiles."""
        rarest_first = np.argsort(self.totals[:-1], kind="stable")
        for turn in range(1, turns + 1):
            for c in rarest_first[self.totals[rarest_first] > 0]:
                if self.counts[c] < turn:
                    self._take(int(c))

    def _take(self, c: int) -> None:
        tile = next(tile for tile in self._queues[c] if not self.taken[tile])
        self.taken[tile] = True
        self.counts += self.present[tile]
