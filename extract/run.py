"""The extraction run: every tile of a source through the backbone once, into a feature store.

Shards are the unit of work and of restart.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from satdifuser.errors import FeatureError, ImageError, SourceError
from satdifuser.extract.backbone import find_backbone, load_backbone
from satdifuser.extract.changes import file_state, refuse_changed
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.images import Floats, Prepared, colour_statistics, preview, resize, to_rgb
from satdifuser.extract.job import Job, fix_automatic, new_attributes, plan_layers, tile_size
from satdifuser.extract.sources import list_tiles, open_source
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.encoding import encode, largest_value
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo, group_layers
from satdifuser.store.writer import Encoded, StoreWriter, TileRow, open_or_create

SHOWN_SKIPPED = 10


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
        StoreError: the store at `out` was made with other settings, or of images that are others now.
        SourceError: every tile was skipped; no store is left.
        SatDiFuserError: bad settings or input; whatever was committed stays.
    """
    source = open_source(job.source_settings)
    records = list_tiles(source)
    job = fix_automatic(job, out, overwrite)
    info = find_backbone(job.backbone_settings)
    image_size, layers = plan_layers(job, info, tile_size(records))
    torch.set_num_threads(int(job.settings.threads))
    backbone = load_backbone(info, job.backbone_settings)
    attributes = new_attributes(job, source, records, backbone, image_size, layers)
    writer = open_or_create(out, attributes, overwrite)
    refuse_changed(FeatureStore(out), records, lambda record: read_row(job, source, record)[0])
    extractor = FeatureExtractor(backbone, job.settings, layers)
    _fill(job, source, records, extractor, writer, image_size)
    store = FeatureStore(out)
    _report_skipped(store)
    return store


def _fill(
    job: Job,
    source: Source,
    records: Sequence[TileRecord],
    extractor: FeatureExtractor,
    writer: StoreWriter,
    image_size: tuple[int, int],
) -> None:
    missing = writer.missing_shards()
    ranges = {shard: writer.attributes.shard_range(shard) for shard in missing}
    todo = sum(stop - start for start, stop in ranges.values())
    values, warning, written = ValueRange(job.images), "", 0
    with tqdm(
        total=len(records), initial=len(records) - todo, unit="tile", desc="extract", disable=None
    ) as bar:
        for shard, (start, stop) in ranges.items():
            began = time.monotonic()
            rows, batches = _compute_shard(job, source, records[start:stop], extractor, image_size, values)
            if not warning and (warning := values.warning()):
                tqdm.write(warning, file=sys.stderr)
            note = {"seconds": round(time.monotonic() - began, 3), "batch_size": job.settings.batch_size}
            written += writer.write_shard(shard, rows, batches, note)
            bar.set_postfix_str(f"{written / 1e6:.1f} MB")
            bar.update(stop - start)


def _compute_shard(
    job: Job,
    source: Source,
    records: Sequence[TileRecord],
    extractor: FeatureExtractor,
    image_size: tuple[int, int],
    values: ValueRange,
) -> tuple[list[TileRow], list[Encoded]]:
    """Read and extract one shard's tiles, always in the same batches."""
    rows: list[TileRow] = []
    batches: list[Encoded] = []
    waiting: list[tuple[str, Floats]] = []
    for record in records:
        row, prepared = read_row(job, source, record)
        rows.append(row)
        if prepared is None:
            continue
        values.add(prepared)
        waiting.append((record.tile_id, prepared.rgb))
        if len(waiting) == job.settings.batch_size:
            batches.append(_compute_batch(job, waiting, extractor, image_size))
            waiting = []
    if waiting:
        batches.append(_compute_batch(job, waiting, extractor, image_size))
    return rows, batches


def read_row(job: Job, source: Source, record: TileRecord) -> tuple[TileRow, Prepared | None]:
    """Read one tile: what the store keeps of it, and its image, or None where it is skipped.

    Raises:
        ImageError: it cannot be used, and ``on_error`` is not skip.
    """
    row = TileRow(record.tile_id, record.split, record.path, file_state=file_state(record))  # before the read
    try:
        tile = source.read(record)
        prepared = to_rgb(tile, job.images)
    except ImageError as error:
        if job.images.on_error == "fail":
            raise
        return replace(row, skip_reason=str(error)), None
    target: Any = tile.mask
    if source.task == "classification" and record.label is not None:
        target = np.array(record.label, np.int32)
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


def _compute_batch(
    job: Job,
    tiles: Sequence[tuple[str, Floats]],
    extractor: FeatureExtractor,
    image_size: tuple[int, int],
) -> Encoded:
    ids = [tile_id for tile_id, _ in tiles]
    rgb = resize(torch.from_numpy(np.stack([image for _, image in tiles])), image_size)
    maps = [m.cpu().numpy() for m in extractor(rgb, ids)]
    check_finite(maps, ids, extractor.layers, extractor.timesteps, largest_value(job.store.encoding))
    encoded = {}
    for name, positions in group_layers(extractor.layers).items():
        # L x (B, T, C, H, W) -> (B, T, L, C, H, W)
        encoded[name] = encode(np.stack([maps[p] for p in positions], axis=2), job.store.encoding)
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
        shutil.rmtree(store.path)
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
