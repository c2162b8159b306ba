"""Adds timesteps, layers, tiles or labels to a complete store, and computes only what it does not hold.

The grown store is built beside the old one, shard by shard, and takes its place when it is complete; the
same call goes on after an interruption.
"""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from satdifuser.errors import SettingsError, StoreError
from satdifuser.extract.backbone import Backbone, BackboneInfo, find_backbone, load_backbone
from satdifuser.extract.compute import Work
from satdifuser.extract.device import fix_arithmetic
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.grow_shards import Growth, fill
from satdifuser.extract.job import (
    Job,
    chosen_partition,
    feature_identity,
    fix_automatic,
    partition_names,
    planned_labels,
    resolved_settings,
    tile_size,
)
from satdifuser.extract.layers import select_layers
from satdifuser.extract.loading import with_lanes
from satdifuser.extract.metadata import collect_metadata
from satdifuser.extract.noising import check_timesteps
from satdifuser.extract.plan import format_bytes, with_margin
from satdifuser.extract.sources import list_tiles, open_source
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.store.card import carry_card
from satdifuser.store.copy import tile_rows
from satdifuser.store.files import take_place
from satdifuser.store.georeference import Georeference
from satdifuser.store.lock import StoreLock
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore, end_cut_off
from satdifuser.store.schema import (
    Attributes,
    LayerInfo,
    bytes_per_tile,
    canonical_hash,
    contents_hash,
    differing_fields,
    kept_layers,
)
from satdifuser.store.settings import StoreSettings
from satdifuser.store.writer import TileRow


@dataclass(frozen=True)
class Additions:
    """What a store is to hold besides."""

    timesteps: Sequence[int] = ()
    layers: Sequence[str] = ()  # names or patterns
    tiles: bool = False  # those that its source has by now
    labels: bool = False  # its source's labels, classes and partitions as they are now; so with tiles

    @property
    def listed(self) -> bool:
        """Whether the source is listed anew."""
        return self.tiles or self.labels


def grow(
    job: Job, path: Path, additions: Additions, overwrite: bool, ignore_free_space: bool
) -> FeatureStore:
    """Let a store grow.

    Args:
        job: The settings that the store was made with, perhaps with another place of its images or backbone.
        path: The store.
        additions: What it is to hold besides.
        overwrite: Drop what an earlier growth of this store left unfinished.
        ignore_free_space: Start even if the disk looks too small.

    Returns:
        The grown store, in the old one's place.

    Raises:
        StoreError: the store is incomplete or damaged, or was made with other settings; tiles are gone from
            the source or differ; the disk is too small.
        SettingsError: there is no such timestep or layer.
        SatDiFuserError: bad input; what was computed stays.
    """
    path = path.resolve()  # a link to a store stays one
    beside = path.with_name(f".{path.name}.growing")
    with StoreLock(path):
        end_cut_off(beside, path)
        growth = _prepare(job, FeatureStore(path), additions)
        if not ignore_free_space:
            _require_space(growth)
        with open_or_create(beside, growth.new, overwrite) as writer:
            fill(growth, writer)
        carry_card(growth.old, beside)
        take_place(beside, path)
    return FeatureStore(path)


# --- what will be held


def _prepare(job: Job, old: FeatureStore, additions: Additions) -> Growth:
    old.require_complete()
    a = old.attributes
    if a.labelled and additions.tiles and not additions.labels:
        raise StoreError(
            f"{old.path}: holds labels of {a.labelled['file']}, which --add-tiles would replace by its "
            f"source's; add --relabel, and then `satdifuser label {old.path} {a.labelled['file']}` again"
        )
    job = _as_stored(fix_automatic(job, old.folder, overwrite=False), a)
    info = find_backbone(job.backbone_settings)
    image_size = info.image_size(job.settings.image_size, a.tile_size)
    known = [layer.name for layer in a.layers]
    layers = select_layers(info.layers(image_size), [*known, *additions.layers])
    timesteps = sorted({*a.timesteps, *additions.timesteps})
    settings = job.settings
    check_timesteps(timesteps, settings.noising, info.train_steps, settings.steps, info.steps_offset)
    source, records = _list_tiles(job, old, additions)
    backbone = _load(job, info, old, image_size)
    metadata = collect_metadata(records, image_size) if job.backbone_settings.metadata else {}

    def work(timesteps: list[int], layers: list[LayerInfo]) -> Work:
        chosen = settings.model_copy(update={"timesteps": timesteps, "layers": [x.name for x in layers]})
        extractor = FeatureExtractor(backbone, chosen, layers)
        return with_lanes(Work(replace(job, settings=chosen), extractor, image_size, metadata))

    whole = work(timesteps, layers)
    added = [t for t in timesteps if t not in a.timesteps], [x for x in layers if x.name not in known]
    rest = work(added[0] if not added[1] else timesteps, layers if added[0] else added[1])
    new = _grown(a, whole, records, source if additions.listed else None)
    return Growth(old, new, source, additions.listed, records, rest if any(added) else None, whole)


def _as_stored(job: Job, a: Attributes) -> Job:
    """The job with the store's encoding, which may be that of a copy."""
    pool = a.feature_identity.get("pool") or job.store.pool
    kept = job.store.model_dump() | {"encoding": a.encoding, "pool": pool}
    return replace(job, store=StoreSettings.model_validate(kept))


def _load(job: Job, info: BackboneInfo, old: FeatureStore, image_size: tuple[int, int]) -> Backbone:
    """Load the backbone; what it makes must fit to what is there."""
    a, path = old.attributes, old.path
    fix_arithmetic(int(job.settings.threads))
    backbone = load_backbone(info, job.backbone_settings)
    identity = feature_identity(job, info, backbone.loaded, image_size, a.tile_size)
    if canonical_hash(identity) != a.planned.feature:
        listing = "\n  ".join(differing_fields(identity, a.feature_identity))
        raise StoreError(f"{path}: cannot grow, for it was made with other settings:\n  {listing}")
    return backbone


def _list_tiles(job: Job, old: FeatureStore, additions: Additions) -> tuple[Source | None, list[TileRecord]]:
    """The source, where it is needed, and all tiles of the grown store."""
    ids = old.table("tiles/tile_id").tolist()
    if old.attributes.latents and not additions.listed:
        return None, [_record(row, old.attributes) for row in tile_rows(old, np.arange(len(ids)))]
    source = open_source(job.source_settings)
    records = {record.tile_id: record for record in list_tiles(source)}
    gone = [name for name in ids if name not in records]
    if gone:
        raise StoreError(
            f"{old.path}: tile {gone[0]} ({len(gone)} in all) is not in the source any more, which has "
            f"{len(records)} tiles; a store grows only with all its tiles: see `satdifuser tiles`"
        )
    kept = list(records.values()) if additions.tiles else [records[name] for name in ids]
    _check_tiles(job, old, kept, len(ids))
    return source, kept


def _check_tiles(job: Job, old: FeatureStore, records: list[TileRecord], held: int) -> None:
    """New tiles must fit to those that are there."""
    size, expected = tile_size(records), old.attributes.tile_size
    if size != expected:
        raise StoreError(
            f"{old.path}: holds tiles of {expected[0]} x {expected[1]} px, but the source's are {size[0]} x "
            f"{size[1]}; set source.tile_size to [{expected[0]}, {expected[1]}], or extract a new store"
        )
    if len(records) > held and isinstance(job.backbone_settings.prompt, list):
        raise SettingsError(
            "backbone.prompt: several texts, one for each place in a batch, and with more tiles those that "
            "are there would change places; extract a new store"
        )


def _record(row: TileRow, a: Attributes) -> TileRecord:
    place = Georeference(row.crs, row.transform) if row.crs else None
    clouds = None if math.isnan(row.cloud_cover) else row.cloud_cover
    known = {"georeference": place, "date": row.date, "cloud_cover": clouds}
    return TileRecord(row.tile_id, row.path, row.split, a.tile_size, **known)  # type: ignore[arg-type]


def _grown(a: Attributes, whole: Work, records: list[TileRecord], source: Source | None) -> Attributes:
    """What the grown store declares; `source` where that is listed anew."""
    job, size = whole.job, a.tile_size
    timesteps, layers = whole.extractor.timesteps, list(whole.extractor.layers)
    kept = kept_layers(layers, job.store)
    hashes = {"contents": contents_hash([record.tile_id for record in records], timesteps, kept)}
    update: dict[str, Any] = {}
    if source:
        hashes["labels"] = planned_labels(source, records)
        update = {
            "task": source.task,
            "classes": list(source.classes),
            "ignore_value": source.ignore_value,
            "partition": chosen_partition(job, records),
            "partitions": partition_names(records),
            "labelled": {},
            "left_out": source.left_out,
        }
    update |= {
        "store_id": uuid.uuid4().hex,
        "copied_from": [],  # what it was copied from holds less
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiles": len(records),
        "timesteps": timesteps,
        "layers": kept,
        "planned": a.planned.model_copy(update=hashes),
        "settings": resolved_settings(job, size, whole.image_size, timesteps, a.tiles_per_shard),
    }
    return a.model_copy(update=update)


def _require_space(growth: Growth) -> None:
    old, new = growth.old.attributes, growth.new
    features = [bytes_per_tile(x.layers, len(x.timesteps), x.encoding) for x in (old, new)]
    others = max(0, growth.old.size_bytes() - features[0] * old.tiles) / old.tiles
    needed = with_margin(int(new.tiles * (features[1] + others)))
    free = shutil.disk_usage(growth.old.folder.parent).free
    if needed > free:
        raise StoreError(
            f"{growth.old.path}: the grown store needs {format_bytes(needed)} beside the old one, which is "
            f"deleted only then; {format_bytes(free)} are free: free some space, or start anyway with "
            "--ignore-free-space"
        )
