"""Splits of the ground: whole blocks go to one split, and tiles near another split's go to none.

Neighbouring tiles look alike, so a random split tests on what was nearly trained on; blocks with a buffer do
not (Roberts et al., "Cross-validation strategies for data with temporal, spatial, hierarchical, or
phylogenetic structure", Ecography 40, 2017). Distances are in metres, on a plane of equal area.
Legend: N tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.warp import transform

from satdifuser.errors import LabelError
from satdifuser.labels.settings import AnySplit, RandomSplit, SpatialBlocks, SpatialFolds
from satdifuser.labels.splits import USED_SPLITS, Split, draw_splits, splits_of_shares
from satdifuser.store.georeference import Georeference
from satdifuser.store.place import EARTH_RADIUS
from satdifuser.store.schema import DEFAULT_PARTITION

SEAM = 1e-5  # of a tile's side: neighbours share an edge, and rounding must not make an overlap of it
Splits = NDArray[np.str_]  # (N,)


@dataclass(frozen=True)
class Drawn:
    """Partitions that were drawn, the first of them for use, and what people should know of them."""

    partitions: dict[str, Splits]
    notes: list[str]


@dataclass(frozen=True)
class Footprints:
    """The ground under N tiles."""

    polygons: NDArray[Any]  # (N,) of shapely, in m on a plane around them all
    stretch: float  # by which the plane may show a distance too long

    def near(self, some: NDArray[np.intp], others: NDArray[np.intp], distance_m: float) -> NDArray[np.intp]:
        """Which of some tiles overlap any of the others, or are nearer to one than a distance."""
        tree = shapely.STRtree(self.polygons[others])
        found = tree.query(self.polygons[some], predicate="dwithin", distance=distance_m * self.stretch)
        nearby: NDArray[np.intp] = some[np.unique(found[0])]
        return nearby


def footprints(places: Sequence[Georeference], size: tuple[int, int]) -> Footprints:
    """Lay the tiles of (H, W) px onto one plane: Lambert's azimuthal equal-area one around their middle."""
    corners = np.array([place.corners(*size) for place in places])  # (N, 4, 2) in each tile's CRS
    crs = np.array([place.crs for place in places])
    degrees = np.radians(_project(corners, crs, "EPSG:4326"))
    lon, lat = degrees[..., 0], degrees[..., 1]
    x, y, z = (np.cos(lat) * np.cos(lon)).mean(), (np.cos(lat) * np.sin(lon)).mean(), np.sin(lat).mean()
    middle = f"+lat_0={np.degrees(np.arctan2(z, np.hypot(x, y)))} +lon_0={np.degrees(np.arctan2(y, x))}"
    plane = _project(corners, crs, f"+proj=laea {middle} +datum=WGS84 +units=m")
    inner = plane + SEAM * (plane.mean(axis=1, keepdims=True) - plane)
    farthest = float(np.hypot(plane[..., 0], plane[..., 1]).max())
    # it lengthens what lies across the line to its centre by 1 / cos(c / 2), c the angle from there
    stretch = 1 / np.sqrt(max(1 - (farthest / (2 * EARTH_RADIUS)) ** 2, 1e-2))
    return Footprints(shapely.polygons(inner), float(stretch))


def _project(corners: NDArray[np.float64], crs: NDArray[np.str_], target: str) -> NDArray[np.float64]:
    """Take (N, 4, 2) corners to another CRS."""
    projected = np.empty_like(corners)
    for own in np.unique(crs):
        chosen = crs == own
        points = corners[chosen].reshape(-1, 2)
        moved = np.column_stack(transform(str(own), target, points[:, 0], points[:, 1]))
        projected[chosen] = moved.reshape(-1, 4, 2)
    return projected


def draw_partitions(
    split: AnySplit, tile_ids: Sequence[str], places: Sequence[Georeference | None], size: tuple[int, int]
) -> Drawn:
    """Draw the partitions that the settings ask for.

    Args:
        split: The kind of split and its settings.
        tile_ids: Of the N tiles.
        places: Where they lie.
        size: (H, W) px of each.

    Raises:
        LabelError: a tile has no place where the split is one of the ground, or a split stays empty.
    """
    if isinstance(split, RandomSplit):
        drawn = draw_splits(tile_ids, [0] * len(tile_ids), split)
        return Drawn({DEFAULT_PARTITION: np.array([drawn[name] for name in tile_ids])}, [])
    known = [place for place in places if place is not None]
    if len(known) < len(places):
        lost = tile_ids[[place is None for place in places].index(True)]
        raise LabelError(
            f"split.kind: {split.kind}, but tile {lost} has no place on the ground "
            f"({len(places) - len(known)} such tiles); set it to random"
        )
    ground = footprints(known, size)
    blocks = block_numbers(ground, split.size_m)
    whole = blocks_of(split, blocks)
    cleared = {name: clear_buffer(ground, splits, split.buffer_m) for name, splits in whole.items()}
    for name, splits in cleared.items():
        _check_filled(split, name, splits, whole[name], int(blocks.max()) + 1)
    dropped = {name: int((splits == "none").sum()) for name, splits in cleared.items()}
    return Drawn(
        cleared, [_note(split, name, len(tile_ids), count) for name, count in dropped.items() if count]
    )


def splits_asked(split: AnySplit) -> tuple[Split, ...]:
    """The splits that must hold tiles."""
    return USED_SPLITS if isinstance(split, SpatialFolds) else splits_of_shares(split)


def blocks_of(split: SpatialBlocks | SpatialFolds, blocks: NDArray[np.intp]) -> dict[str, Splits]:
    """Partitions by name, from the block (N,) that each tile is in."""
    sizes = np.bincount(blocks)
    if isinstance(split, SpatialBlocks):
        return {split.kind: np.array(_share_blocks(sizes, split))[blocks]}
    folds = _fold_blocks(sizes, split)[blocks]
    partitions = {}
    for fold in range(split.folds):
        splits = np.full(len(blocks), "train", dtype="<U5")
        splits[folds == (fold + 1) % split.folds] = "val"
        splits[folds == fold] = "test"
        partitions[f"fold_{fold}"] = splits
    return partitions


def block_numbers(ground: Footprints, size_m: float) -> NDArray[np.intp]:
    """The block (N,) that each tile's centre lies in, from 0; blocks start at the tiles' lower left."""
    centres = shapely.get_coordinates(shapely.centroid(ground.polygons))
    corner = shapely.total_bounds(ground.polygons)[:2]
    cells = np.floor((centres - corner) / size_m).astype(np.int64)
    numbers: NDArray[np.intp] = np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)
    return numbers


def _share_blocks(sizes: NDArray[np.intp], split: SpatialBlocks) -> list[Split]:
    """The split of each block: going through them shuffled, each goes to the split that lacks most tiles."""
    asked = splits_of_shares(split)
    lacking = dict.fromkeys(USED_SPLITS, 0.0)
    drawn: dict[int, Split] = {}
    for left, block in enumerate(np.random.default_rng(split.seed).permutation(len(sizes)).tolist()):
        for name in USED_SPLITS:
            lacking[name] += getattr(split, name) * int(sizes[block])
        empty = [name for name in asked if name not in drawn.values()]
        open_to = empty if empty and len(sizes) - left <= len(empty) else asked
        drawn[block] = max(open_to, key=lambda name: lacking[name])
        lacking[drawn[block]] -= int(sizes[block])
    return [drawn[block] for block in range(len(sizes))]


def _fold_blocks(sizes: NDArray[np.intp], split: SpatialFolds) -> NDArray[np.intp]:
    """The fold of each block: the largest first, each goes to the fold with the fewest tiles."""
    shuffled = np.random.default_rng(split.seed).permutation(len(sizes))
    folds = np.zeros(len(sizes), np.intp)
    held = np.zeros(split.folds, np.intp)
    for block in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        folds[block] = held.argmin()
        held[folds[block]] += sizes[block]
    return folds


def clear_buffer(ground: Footprints, splits: Splits, buffer_m: float) -> Splits:
    """Take out of their split the tiles that overlap another split's, or are nearer to it than the buffer.

    Test tiles stay; val tiles give way to them, train tiles to both.
    """
    cleared = splits.copy()
    for giving, kept in (("val", ["test"]), ("train", ["val", "test"])):
        others = np.flatnonzero(np.isin(cleared, kept))
        cleared[ground.near(np.flatnonzero(cleared == giving), others, buffer_m)] = "none"
    return cleared


def count_leaks(splits: Splits, ground: Footprints) -> int:
    """How many train tiles share ground with a tile of val or test."""
    others = np.flatnonzero(np.isin(splits, ["val", "test"]))
    return len(ground.near(np.flatnonzero(splits == "train"), others, 0))


def leak_warning(
    splits: Sequence[str], places: Sequence[Georeference | None], size: tuple[int, int]
) -> str | None:
    """What to tell where tiles of different splits overlap; None where they do not.

    Args:
        splits: Of the N tiles.
        places: Where they lie.
        size: (H, W) px of each.
    """
    placed = [(split, place) for split, place in zip(splits, places, strict=True) if place is not None]
    if not placed:
        return None
    names = np.array([split for split, _ in placed])
    leaks = count_leaks(names, footprints([place for _, place in placed], size))
    if not leaks:
        return None
    return (
        f"warning: {leaks} of {(names == 'train').sum()} train tiles overlap a tile of val or test, so these "
        "are partly trained on and their figures flatter; split the ground instead: split: "
        "{kind: spatial_blocks, size_m: …, buffer_m: …}"
    )


def _check_filled(
    split: SpatialBlocks | SpatialFolds, name: str, splits: Splits, before: Splits, blocks: int
) -> None:
    empty = [which for which in splits_asked(split) if not (splits == which).any()]
    if empty:
        cleared = int((splits == "none").sum())
        counts = ", ".join(f"{which} {int((before == which).sum())}" for which in USED_SPLITS)
        raise LabelError(
            f"split: no tile in {', '.join(empty)} of partition {name}: {len(splits)} tiles lie in {blocks} "
            f"blocks of size_m {split.size_m:g} ({counts}), and buffer_m {split.buffer_m:g} cleared "
            f"{cleared} of them; lower size_m, buffer_m or the number of splits"
        )


def _note(split: SpatialBlocks | SpatialFolds, name: str, tiles: int, dropped: int) -> str:
    return (
        f"partition {name}: {dropped} of {tiles} tiles are in no split, for they overlap a tile of another "
        f"one or are nearer to it than buffer_m {split.buffer_m:g}"
    )
