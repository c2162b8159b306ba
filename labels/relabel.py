"""Gives a complete store the labels of a file of polygons, points or pixels, and splits of its tiles.

The labelled store is made beside the old one and takes its place. Its features are the old files themselves
(hard links), so this takes seconds, and neither images nor backbone.
Legend: N tiles, K classes, H and W pixels of a tile.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from satdifuser.errors import LabelError, SettingsError
from satdifuser.labels.classes import IGNORE
from satdifuser.labels.label_file import LabelFile, Tally, explain_miss, open_labels
from satdifuser.labels.settings import LabelSettings, RandomSplit
from satdifuser.labels.spatial import Drawn, draw_partitions, leak_warning
from satdifuser.labels.splits import splits_of_shares
from satdifuser.store.card import carry_card
from satdifuser.store.digest import file_digest
from satdifuser.store.files import take_place
from satdifuser.store.layout import UNLABELLED
from satdifuser.store.location import Location, is_remote
from satdifuser.store.lock import StoreLock
from satdifuser.store.metadata import require_current
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore, Indices, end_cut_off
from satdifuser.store.schema import Attributes, canonical_hash
from satdifuser.store.writer import TileRow

NO_LABEL = UNLABELLED["classification"]
SHAPEFILE = (".shp", ".dbf", ".shx", ".prj", ".cpg")


@dataclass(frozen=True)
class Survey:
    """What a file of labels says of a store's tiles."""

    labels: NDArray[np.int32]  # (N,) class of each tile, `NO_LABEL` where it has none
    notes: list[str]

    @property
    def labelled(self) -> Indices:
        """Rows of the tiles that have a label."""
        return np.flatnonzero(self.labels != NO_LABEL)


def label_store(place: Location, labels: Path, settings: LabelSettings) -> tuple[FeatureStore, list[str]]:
    """Give a store the labels of a file, and partitions of the tiles that are labelled.

    Args:
        place: The store's folder.
        labels: The file, vector or raster.
        settings: How its labels become those of pixels or tiles, and how the tiles are split.

    Returns:
        The store, and what people should know of the labels.

    Raises:
        SettingsError: the store is not in a local folder, or file, column or class list are missing.
        StoreError: the store is incomplete or damaged, or somebody else writes to it.
        LabelError: the labels cannot be placed, miss all tiles, are of unknown classes, or leave a split
            empty.
    """
    if not isinstance(place, Path) or is_remote(place):
        raise SettingsError(f"{place}: only a store in a local folder can be labelled; copy it to one")
    path = place.resolve()
    beside = path.with_name(f".{path.name}.labelling")
    with StoreLock(path):
        end_cut_off(beside, path)
        old = FeatureStore(path)
        require_current(path, old.attributes)
        old.require_complete()
        file = open_labels(labels, settings, settings.classes)
        survey = _survey(old, file, settings)
        drawn = _draw(old, survey, settings)
        notes = [*survey.notes, *drawn.notes]
        try:
            _write(old, file, settings, survey, drawn, beside)
            carry_card(old, beside)
            take_place(beside, path)
        finally:
            if path.exists():  # else the new store is all there is
                shutil.rmtree(beside, ignore_errors=True)
    return FeatureStore(place), notes


# --- what the file says of the tiles


def _survey(store: FeatureStore, file: LabelFile, settings: LabelSettings) -> Survey:
    """Burn the labels of all tiles once, and count them."""
    a = store.attributes
    counts = np.zeros((a.tiles, len(file.classes)), np.int64)
    valid = np.zeros(a.tiles, np.int64)
    rows, tally = np.arange(a.tiles), Tally()
    with tqdm(total=a.tiles, desc="labels", unit="tile", disable=None) as bar:
        for start in range(0, a.tiles, a.tiles_per_shard):
            part = rows[start : start + a.tiles_per_shard]
            valid[part] = store.valid(part).sum(axis=(1, 2))
            for row, mask in zip(part, masks_of(store, file, part, tally), strict=True):
                counts[row] = np.bincount(mask.ravel(), minlength=IGNORE + 1)[: len(file.classes)]
            bar.update(len(part))
    if not counts.any():
        raise LabelError(explain_miss(file, tally, store.places(rows), a.tile_size))
    labels = _tile_labels(counts, valid, settings)
    if (labels == NO_LABEL).all():
        raise LabelError(
            f"{file.path}: no tile gets a label, for no class has in one what label.per_tile: "
            f"{settings.per_tile} asks for; set it to containing, or to false for labels of pixels"
        )
    return Survey(labels, file.notes(tally) + _describe(file, counts, labels))


def masks_of(
    store: FeatureStore, file: LabelFile, rows: Indices, tally: Tally | None = None
) -> Iterator[NDArray[np.uint8]]:
    """The mask (H, W) of each of some rows, ignored where the tile holds no data or has no place."""
    size = store.attributes.tile_size
    places, skipped, valid = store.places(rows), store.gather("tiles/skip_reason", rows), store.valid(rows)
    for place, reason, holds_data in zip(places, skipped.tolist(), valid, strict=True):
        mask = np.full(size, IGNORE, np.uint8) if place is None or reason else file.mask(place, size, tally)
        mask[~holds_data] = IGNORE
        yield mask


def _tile_labels(
    counts: NDArray[np.int64], valid: NDArray[np.int64], settings: LabelSettings
) -> NDArray[np.int32]:
    """The class of each tile (N,) by the most of its labelled pixels; none where two classes are even.

    By ``majority`` the class must cover more than half of the tile's pixels with data.
    """
    most = counts.max(axis=1)
    chosen = (most > 0) & ((counts == most[:, None]).sum(axis=1) == 1)
    if settings.per_tile == "majority":
        chosen &= 2 * most > valid
    elif not settings.per_tile:
        chosen = most > 0  # of masks it only matters that they are not empty
    return np.where(chosen, counts.argmax(axis=1), NO_LABEL).astype(np.int32)


def _describe(file: LabelFile, counts: NDArray[np.int64], labels: NDArray[np.int32]) -> list[str]:
    pixels = [f"{name} {count}" for name, count in zip(file.classes, counts.sum(axis=0), strict=True)]
    labelled = int((labels != NO_LABEL).sum())
    return [
        f"{labelled} of {len(labels)} tiles are labelled; labelled pixels: {', '.join(pixels)}",
    ]


# --- splits


def _draw(store: FeatureStore, survey: Survey, settings: LabelSettings) -> Drawn:
    """Partitions of the labelled tiles; all others are in no split."""
    if settings.split == "keep":
        return Drawn({name: store.splits(name) for name in _in_use_first(store)}, [])
    rows, size = survey.labelled, store.attributes.tile_size
    ids = [str(name) for name in store.gather("tiles/tile_id", rows)]
    places = store.places(rows)
    drawn = draw_partitions(settings.split, ids, places, size)
    partitions = {}
    for name, splits in drawn.partitions.items():
        whole = np.full(store.attributes.tiles, "none", "<U5")
        whole[rows] = splits
        partitions[name] = whole
    notes = list(drawn.notes)
    if isinstance(settings.split, RandomSplit):
        (splits,) = drawn.partitions.values()
        empty = [name for name in splits_of_shares(settings.split) if name not in splits]
        if empty:
            raise LabelError(
                f"label.split: no tile in {', '.join(empty)}, for only {len(rows)} tiles are labelled; label "
                "more, set the shares of label.split, or label.split: keep"
            )
        notes += [warning for warning in [leak_warning(splits.tolist(), places, size)] if warning]
    return Drawn(partitions, notes)


def _in_use_first(store: FeatureStore) -> list[str]:
    return sorted(store.partitions(), key=lambda name: name != store.attributes.partition)


# --- the labelled store


def _write(
    old: FeatureStore, file: LabelFile, settings: LabelSettings, survey: Survey, drawn: Drawn, out: Path
) -> None:
    attributes = _labelled(old.attributes, file, settings, survey, drawn)
    ids = old.table("tiles/tile_id").tolist()
    with open_or_create(out, attributes, overwrite=True) as writer:
        for shard in tqdm(writer.missing_shards(), desc="label", unit="shard", disable=None):
            part = np.arange(*attributes.shard_range(shard))
            targets: Sequence[Any] = _targets(old, file, settings, survey, part)
            rows = []
            for row, target in zip(part.tolist(), targets, strict=True):
                splits = {name: str(whole[row]) for name, whole in drawn.partitions.items()}
                rows.append(TileRow(ids[row], splits[attributes.partition], target=target, partitions=splits))
            writer.adopt_shard(shard, old, rows)


def _targets(
    old: FeatureStore, file: LabelFile, settings: LabelSettings, survey: Survey, rows: Indices
) -> list[NDArray[np.generic] | None]:
    """The target of each of some rows: a mask, or a label; None for a tile without."""
    if settings.per_tile:
        return [None if label == NO_LABEL else label for label in survey.labels[rows]]
    skipped = old.gather("tiles/skip_reason", rows) != ""
    masks = masks_of(old, file, rows)
    return [None if nothing else mask for nothing, mask in zip(skipped, masks, strict=True)]


def _labelled(
    a: Attributes, file: LabelFile, settings: LabelSettings, survey: Survey, drawn: Drawn
) -> Attributes:
    """What the labelled store declares."""
    files = {f.name: file_digest(f) for f in files_of(file.path)}
    origin = {"file": str(file.path), "sha256": files, "settings": settings.model_dump(mode="json")}
    names = list(drawn.partitions)
    planned = canonical_hash([list(file.classes), names, files, origin["settings"]])
    return a.model_copy(
        update={
            "store_id": uuid.uuid4().hex,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "task": "classification" if settings.per_tile else "segmentation",
            "classes": list(file.classes),
            "ignore_value": IGNORE,
            "partition": names[0],
            "partitions": names,
            "planned": a.planned.model_copy(update={"labels": planned}),
            "labelled": origin | {"notes": survey.notes},
            "copied_from": [],  # what it was copied from has other labels
        }
    )


def files_of(path: Path) -> list[Path]:
    """The files that make up a file of labels: a Shapefile is several."""
    if path.suffix.lower() != ".shp":
        return [path]
    return [f for f in sorted(path.parent.glob(f"{path.stem}.*")) if f.suffix.lower() in SHAPEFILE]
