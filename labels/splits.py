"""Random splits of tiles, drawn with a seed; splits of the ground are those of `spatial`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np

from satdifuser.labels.settings import SplitShares

Split = Literal["train", "val", "test", "none"]
USED_SPLITS: tuple[Split, ...] = ("train", "val", "test")


def draw_splits(tile_ids: Sequence[str], labels: Sequence[int], shares: SplitShares) -> dict[str, Split]:
    """Draw a seeded random split, stratified by label; the order of ``tile_ids`` does not matter.

    Going through the shuffled tiles class by class, each goes to the split that lacks most. So the whole
    keeps the shares as closely as it can, and so does each class, down to a few tiles.

    Args:
        tile_ids: Ids of all tiles.
        labels: Class of each tile, or one number for all.
        shares: Shares of the splits and the seed.
    """
    strata: dict[int, list[str]] = defaultdict(list)
    for tile_id, label in zip(tile_ids, labels, strict=True):
        strata[label].append(tile_id)
    drawn: dict[str, Split] = {}
    lacking: dict[Split, float] = dict.fromkeys(USED_SPLITS, 0.0)
    for label in sorted(strata):
        for tile_id in (
            np.random.default_rng((shares.seed, label)).permutation(sorted(strata[label])).tolist()
        ):
            for split in USED_SPLITS:
                lacking[split] += getattr(shares, split)
            drawn[tile_id] = max(USED_SPLITS, key=lambda split: lacking[split])
            lacking[drawn[tile_id]] -= 1
    return drawn


def splits_of_shares(shares: SplitShares) -> tuple[Split, ...]:
    """Return the splits that hold tiles when shares are drawn."""
    return tuple(split for split in USED_SPLITS if getattr(shares, split) > 0)
