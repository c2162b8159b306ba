"""The extraction run: every tile of a source through the backbone once, into a feature store.

Shards are the unit of work and of restart. Three things run side by side, each in its own order: the backbone
on a batch, the encoding of the batch before, the writing of the shard before.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from satdifuser.errors import FeatureError, ImageError, SourceError
from satdifuser.extract.backbone import load_backbone
from satdifuser.extract.background import Background
from satdifuser.extract.changes import file_state, refuse_changed
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.images import Floats, Prepared, colour_statistics, preview, resize, to_rgb
from satdifuser.extract.job import Job, new_attributes
from satdifuser.extract.metadata import collect_metadata
from satdifuser.extract.plan import Plan, make_plan, require_space
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.encoding import FORMS, encode
from satdifuser.store.files import discard
from satdifuser.store.reader import FeatureStore, is_store
from satdifuser.store.schema import Attributes, LayerInfo, group_layers
from satdifuser.store.writer import Encoded, StoreWriter, TileRow, open_or_create

SHOWN_SKIPPED = 10
LABEL_TYPES = {"classification": np.int32, "multilabel": np.uint8}


def extract(job: Job, out: Path, overwrite: bool = False, ignore_free_space: bool = False) -> FeatureStore:
    """Write the features of all of a source's tiles to a store, or go on where an earlier run stopped.

    What people should know besides goes to stderr: a scale that looks wrong, and the tiles that were skipped.

    Args:
        job: The settings of source, backbone, extraction and store.
        out: The store's folder.
        overwrite: Replace a store that is there.
        ignore_free_space: Start even if the disk looks too small.

    Returns:
        The complete store.

    Raises:
        StoreError: the store at `out` was made with other settings, or of images that are others now; or the
            disk cannot hold it; or another process is writing to it.
        SourceError: every tile was skipped; no store is left.
        SatDiFuserError: bad settings or input; whatever was committed stays.
    """
    plan = make_plan(job, out, overwrite)
    if not ignore_free_space:
        require_space(plan)
    work = load_work(plan)
    attributes = new_attributes(
        plan.job, plan.source, plan.records, work.extractor.backbone, plan.image_size, plan.layers
    )
    if not overwrite and is_store(out):
        attributes = keep_labels(attributes, FeatureStore(out).attributes)
    with open_or_create(out, attributes, overwrite) as writer:
        refuse_changed(
            FeatureStore(out), plan.records, lambda record: read_row(plan.job, plan.source, record)[0]
        )
        _fill(work, plan.source, plan.records, writer)
        store = FeatureStore(out)
        _report_skipped(store)
    return store


@dataclass(frozen=True)
class Work:
    """What turns tiles into features."""

    job: Job
    extractor: FeatureExtractor
    image_size: tuple[int, int]  # (H, W) px
    metadata: Mapping[str, Tensor]  # by tile id (7,) normalised; empty for a backbone that reads none


def load_work(plan: Plan) -> Work:
    """Load the backbone of a planned extraction, and let torch use the planned threads."""
    job = plan.job
    metadata = collect_metadata(plan.records, plan.image_size) if job.backbone_settings.metadata else {}
    torch.set_num_threads(int(job.settings.threads))
    backbone = load_backbone(plan.info, job.backbone_settings)
    extractor = FeatureExtractor(backbone, job.settings, plan.layers)
    return Work(job, extractor, plan.image_size, metadata)


def _fill(work: Work, source: Source, records: Sequence[TileRecord], writer: StoreWriter) -> None:
    """Compute the missing shards; each is written while the next one is computed."""
    missing = writer.missing_shards()
    if there := writer.attributes.shards - len(missing):
        print(f"going on: {there} of {writer.attributes.shards} shards are there", file=sys.stderr)
    ranges = {shard: writer.attributes.shard_range(shard) for shard in missing}
    todo = sum(stop - start for start, stop in ranges.values())
    values, warning = ValueRange(work.job.images), ""
    with (
        tqdm(
            total=len(records), initial=len(records) - todo, unit="tile", desc="extract", disable=None
        ) as bar,
        Background("encode") as encoding,
        Background("write") as writing,
    ):
        for shard, (start, stop) in ranges.items():
            began = time.monotonic()
            rows, batches = compute_shard(work, source, records[start:stop], values, encoding, writing.check)
            if not warning and (warning := values.warning()):
                tqdm.write(warning, file=sys.stderr)
            if writer.attributes.labelled:
                rows = [replace(row, target=None, split="none", partitions={}) for row in rows]
            seconds = round(time.monotonic() - began, 3)
            note = {"seconds": seconds, "batch_size": work.job.settings.batch_size}
            writing.hand(partial(_write, writer, bar, shard, rows, batches, note))
    if missing and (labelled := writer.attributes.labelled):
        print(
            f"{todo} tiles that were extracted now have no label; give the store its labels again: "
            "`satdifuser label "
            f"STORE {labelled['file']}`",
            file=sys.stderr,
        )


def keep_labels(asked: Attributes, held: Attributes) -> Attributes:
    """What an extraction asks of a store that was labelled since: the same, but for the labels."""
    if not held.labelled:
        return asked
    names = ("task", "classes", "ignore_value", "partition", "partitions", "labelled")
    planned = asked.planned.model_copy(update={"labels": held.planned.labels})
    return asked.model_copy(update={name: getattr(held, name) for name in names} | {"planned": planned})


def _write(
    writer: StoreWriter,
    bar: tqdm[NoReturn],
    shard: int,
    rows: Sequence[TileRow],
    batches: Sequence[Future[Encoded]],
    note: Mapping[str, Any],
) -> None:
    written = writer.write_shard(shard, rows, [batch.result() for batch in batches], note)
    bar.set_postfix_str(f"{written / 1e6:.1f} MB a shard")
    bar.update(len(rows))


def compute_shard(
    work: Work,
    source: Source,
    records: Sequence[TileRecord],
    values: ValueRange,
    encoding: Background,
    before_batch: Callable[[], None],
) -> tuple[list[TileRow], list[Future[Encoded]]]:
    """Read and extract one shard's tiles, always in the same batches.

    Args:
        work: What turns tiles into features.
        source: Reads them.
        records: The tiles.
        values: Takes note of their values.
        encoding: Encodes each batch while the next one is computed.
        before_batch: Called before each batch; what it raises ends the work.

    Returns:
        One row per tile, and the encoded features of those that are not skipped, the last perhaps under way.
    """
    rows: list[TileRow] = []
    batches: list[Future[Encoded]] = []
    waiting: list[tuple[str, Floats]] = []
    latents: dict[str, Floats] = {}
    for position, record in enumerate(records, start=1):
        row, prepared = read_row(work.job, source, record)
        rows.append(row)
        if prepared is not None:
            values.add(prepared)
            waiting.append((record.tile_id, prepared.rgb))
        if waiting and (len(waiting) == work.job.settings.batch_size or position == len(records)):
            before_batch()
            ids = [tile_id for tile_id, _ in waiting]
            clean, maps = compute_batch(work, waiting)
            latents |= zip(ids, clean, strict=True)
            batches.append(encoding.hand(partial(encode_batch, work, ids, maps)))
            waiting = []
    return [replace(row, latents=latents.get(row.tile_id)) for row in rows], batches


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
        cloud_cover=math.nan if record.cloud_cover is None else record.cloud_cover,
        colour=colour_statistics(prepared.rgb),
        target=target,
        valid=tile.valid,
        preview=preview(prepared.rgb) if job.store.previews else None,
        **_place(record),
    )
    return row, prepared


def _place(record: TileRecord) -> dict[str, Any]:
    place = record.georeference
    if place is None:
        return {}
    return {"crs": place.crs, "transform": place.transform, "bounds": place.bounds(*record.size)}


def compute_batch(work: Work, tiles: Sequence[tuple[str, Floats]]) -> tuple[Floats, list[Floats]]:
    """The latents (B, c, h, w) and the maps of a batch, one (B, T, C, H, W) array per layer."""
    ids = [tile_id for tile_id, _ in tiles]
    rgb = resize(torch.from_numpy(np.stack([image for _, image in tiles])), work.image_size)
    latents = work.extractor.latents(rgb, ids)
    return latents.float().cpu().numpy(), compute_maps(work, latents, ids)


def compute_maps(work: Work, latents: Tensor, ids: Sequence[str]) -> list[Floats]:
    """The maps of a batch from its clean latents (B, c, h, w), one (B, T, C, H, W) array per layer."""
    metadata = torch.stack([work.metadata[tile_id] for tile_id in ids]) if work.metadata else None
    return [m.cpu().numpy() for m in work.extractor.features(latents, ids, metadata)]


def encode_batch(work: Work, ids: Sequence[str], maps: Sequence[Floats]) -> Encoded:
    """Check and encode the maps of a batch."""
    extractor, encoding = work.extractor, work.job.store.encoding
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
        discard(store.folder)
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
