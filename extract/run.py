"""The extraction run: every tile of a source through the backbone once, into a feature store.

Shards are the unit of work and of restart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from satdifuser.errors import FeatureError, ImageError, SourceError
from satdifuser.extract.backbone import find_backbone, load_backbone
from satdifuser.extract.changes import file_state, refuse_changed
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.images import Floats, Prepared, colour_statistics, preview, resize, to_rgb
from satdifuser.extract.job import Job, fix_automatic, new_attributes, plan_layers, tile_size
from satdifuser.extract.metadata import collect_metadata
from satdifuser.extract.sources import list_tiles, open_source
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.encoding import FORMS, encode
from satdifuser.store.files import discard
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo, group_layers
from satdifuser.store.writer import Encoded, StoreWriter, TileRow, open_or_create

SHOWN_SKIPPED = 10
LABEL_TYPES = {"classification": np.int32, "multilabel": np.uint8}


def extract(job: Job, out: Path, overwrite: bool = False) -> FeatureStore:
    """Write the features of all of a source's tiles to a store, or go on where an earlier run stopped.

    What people should know besides goes to stderr: a scale that looks wrong, and the tiles that were skipped.

    Args:
        job: The settings of source, backbone, extraction and store.
        out: The store's folder.
        overwrite: Replace a store that is there.

    Returns:
        The complete store.

    Raises:
        StoreError: the store at `out` was made with other settings, or of images that are others now, or
            another process is writing to it.
        SourceError: every tile was skipped; no store is left.
        SatDiFuserError: bad settings or input; whatever was committed stays.
    """
    source = open_source(job.source_settings)
    records = list_tiles(source)
    info = find_backbone(job.backbone_settings)
    job = fix_automatic(job, out, overwrite)
    image_size, layers = plan_layers(job, info, tile_size(records))
    metadata = collect_metadata(records, image_size) if job.backbone_settings.metadata else {}
    torch.set_num_threads(int(job.settings.threads))
    backbone = load_backbone(info, job.backbone_settings)
    attributes = new_attributes(job, source, records, backbone, image_size, layers)
    with open_or_create(out, attributes, overwrite) as writer:
        refuse_changed(FeatureStore(out), records, lambda record: read_row(job, source, record)[0])
        extractor = FeatureExtractor(backbone, job.settings, layers)
        _fill(Work(job, source, extractor, image_size, metadata), records, writer)
        store = FeatureStore(out)
        _report_skipped(store)
    return store


@dataclass(frozen=True)
class Work:
    """What turns tiles into features."""

    job: Job
    source: Source
    extractor: FeatureExtractor
    image_size: tuple[int, int]  # (H, W) px
    metadata: Mapping[str, Tensor]  # by tile id (7,) normalised; empty for a backbone that reads none


def _fill(work: Work, records: Sequence[TileRecord], writer: StoreWriter) -> None:
    missing = writer.missing_shards()
    if there := writer.attributes.shards - len(missing):
        print(f"going on: {there} of {writer.attributes.shards} shards are there", file=sys.stderr)
    ranges = {shard: writer.attributes.shard_range(shard) for shard in missing}
    todo = sum(stop - start for start, stop in ranges.values())
    values, warning, written = ValueRange(work.job.images), "", 0
    with tqdm(
        total=len(records), initial=len(records) - todo, unit="tile", desc="extract", disable=None
    ) as bar:
        for shard, (start, stop) in ranges.items():
            began = time.monotonic()
            rows, batches = _compute_shard(work, records[start:stop], values)
            if not warning and (warning := values.warning()):
                tqdm.write(warning, file=sys.stderr)
            seconds = round(time.monotonic() - began, 3)
            note = {"seconds": seconds, "batch_size": work.job.settings.batch_size}
            written += writer.write_shard(shard, rows, batches, note)
            bar.set_postfix_str(f"{written / 1e6:.1f} MB")
            bar.update(stop - start)


def _compute_shard(
    work: Work, records: Sequence[TileRecord], values: ValueRange
) -> tuple[list[TileRow], list[Encoded]]:
    """Read and extract one shard's tiles, always in the same batches."""
    rows: list[TileRow] = []
    batches: list[Encoded] = []
    waiting: list[tuple[str, Floats]] = []
    for record in records:
        row, prepared = read_row(work.job, work.source, record)
        rows.append(row)
        if prepared is None:
            continue
        values.add(prepared)
        waiting.append((record.tile_id, prepared.rgb))
        if len(waiting) == work.job.settings.batch_size:
            batches.append(_compute_batch(work, waiting))
            waiting = []
    if waiting:
        batches.append(_compute_batch(work, waiting))
    return rows, batches


def read_row(job: Job, source: Source, record: TileRecord) -> tuple[TileRow, Prepared | None]:
    """Read one tile: what the store keeps of it, and its image, or None where it is skipped.

    Raises:
        ImageError: it cannot be used, and ``on_error`` is not skip.
    """
    state = file_state(record)  # before the read
    row = TileRow(record.tile_id, record.split, record.path, file_state=state, partitions=record.partitions)
    try:
        tile = source.read(record)
        prepared = to_rgb(tile, job.images)
    except ImageError as error:
        if job.images.on_error == "fail":
            raise
        return replace(row, skip_reason=str(error)), None
    target: Any = tile.mask
    if record.label is not None and source.task in LABEL_TYPES:
        target = np.array(record.label, LABEL_TYPES[source.task])
    row = replace(
        row,
        date=record.date,
        image_digest=prepared.digest,
        valid_share=float(tile.valid.mean()),
        padded=record.padded,
        colour=colour_statistics(prepared.rgb),
        target=target,
        preview=preview(prepared.rgb) if job.store.previews else None,
        **_place(record),
    )
    return row, prepared


def _place(record: TileRecord) -> dict[str, Any]:
    place = record.georeference
    if place is None:
        return {}
    return {"crs": place.crs, "transform": place.transform, "bounds": place.bounds(*record.size)}


def _compute_batch(work: Work, tiles: Sequence[tuple[str, Floats]]) -> Encoded:
    ids = [tile_id for tile_id, _ in tiles]
    rgb = resize(torch.from_numpy(np.stack([image for _, image in tiles])), work.image_size)
    metadata = torch.stack([work.metadata[tile_id] for tile_id in ids]) if work.metadata else None
    extractor, encoding = work.extractor, work.job.store.encoding
    maps = [m.cpu().numpy() for m in extractor(rgb, ids, metadata)]
    check_finite(maps, ids, extractor.layers, extractor.timesteps, FORMS[encoding].largest)
    encoded = {}
    for name, positions in group_layers(extractor.layers).items():
        # L x (B, T, C, H, W) -> (B, T, L, C, H, W)
        pool = work.job.store.pool_of(extractor.layers[positions[0]].stride)
        encoded[name] = encode(np.stack([maps[p] for p in positions], axis=2), encoding, pool)
    return encoded


def check_finite(
    maps: Sequence[Floats],
    tile_ids: Sequence[str],
    layers: Sequence[LayerInfo],
    timesteps: Sequence[int],
    limit: float,
) -> None:
    """Refuse features that are not finite or that the encoding cannot hold.

    Args:
        maps: One (B, T, C, H, W) array per layer.
        tile_ids: The B tiles.
        layers: The layers.
        timesteps: The T timesteps.
        limit: Largest magnitude the encoding holds.

    Raises:
        FeatureError: naming tile, layer and timestep.
    """
    for layer, values in zip(layers, maps, strict=True):
        largest = np.abs(values).max(axis=(2, 3, 4))  # (B, T); NaN where any value is
        wrong = np.argwhere(~(largest <= limit))
        if len(wrong):
            tile, step = wrong[0]
            raise FeatureError(
                f"tile {tile_ids[tile]}, layer {layer.name}, timestep {timesteps[step]}: feature of "
                f"magnitude {largest[tile, step]:g}, expected a finite value of at most {limit:g}; use a "
                "wider backbone.dtype or store.encoding, or check the tile"
            )


def _report_skipped(store: FeatureStore) -> None:
    """List the skipped tiles on stderr; a store that holds no others is deleted and refused."""
    tiles = store.tiles
    skipped = tiles[tiles.skip_reason != ""]
    if not len(skipped):
        return
    lines = [f"  {name}: {why}" for name, why in zip(skipped.tile_id, skipped.skip_reason, strict=True)]
    if len(skipped) == len(tiles):
        discard(store.path)
        raise SourceError(
            f"all {len(tiles)} tiles were skipped, so there is nothing to extract and no store was kept; the "
            f"first:\n{lines[0]}\nmend the images or the source's settings, seen by `satdifuser tiles`"
        )
    shown = "\n".join(lines[:SHOWN_SKIPPED] + ["  …"] * (len(lines) > SHOWN_SKIPPED))
    print(
        f"{len(skipped)} of {len(tiles)} tiles were skipped:\n{shown}\n"
        f"`satdifuser store info {store.path}` lists all",
        file=sys.stderr,
    )
