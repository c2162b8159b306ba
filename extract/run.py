"""The extraction run: every tile of a source through the backbone once, into a feature store.

Shards are the unit of work and of restart. Four things run side by side, each in its own order: the reading
of the next tiles, the backbone on a batch, the fetching of the batch before, the writing of the shard before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from satdifuser.errors import SourceError
from satdifuser.extract.backbone import BackboneInfo, load_backbone
from satdifuser.extract.background import Background
from satdifuser.extract.batch_size import choose_batch
from satdifuser.extract.changes import refuse_changed
from satdifuser.extract.compute import Shard, Work, compute_shard
from satdifuser.extract.device import fix_arithmetic
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.job import Job, new_attributes
from satdifuser.extract.metadata import collect_metadata
from satdifuser.extract.plan import Plan, make_plan, require_space
from satdifuser.extract.reading import read_ahead, read_row
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.files import discard
from satdifuser.store.reader import FeatureStore, is_store
from satdifuser.store.schema import Attributes, LayerInfo
from satdifuser.store.writer import StoreWriter, open_or_create

SHOWN_SKIPPED = 10


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
        work.job, plan.source, plan.records, work.extractor.backbone, plan.image_size, plan.layers
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


def load_work(plan: Plan) -> Work:
    """Load what computes a planned extraction, see `prepare_work`."""
    return prepare_work(plan.job, plan.info, plan.image_size, plan.layers, plan.records, plan.tiles_per_shard)


def prepare_work(
    job: Job,
    info: BackboneInfo,
    image_size: tuple[int, int],
    layers: Sequence[LayerInfo],
    records: Sequence[TileRecord],
    per_shard: int,
) -> Work:
    """Load a backbone, set up its arithmetic, and find the batch if that is open.

    Args:
        job: The settings.
        info: The backbone.
        image_size: (H, W) px at which it sees tiles.
        layers: Those to tap.
        records: The tiles, whose metadata it may read.
        per_shard: No batch is larger.

    Raises:
        BackboneError: the weights cannot be read, or the U-Net cannot be compiled as asked.
        DeviceError: the device has no memory for a single tile.
    """
    first = records[0].tile_id
    fix_arithmetic(int(job.settings.threads))
    backbone = load_backbone(info, job.backbone_settings)
    metadata = collect_metadata(records, image_size) if job.backbone_settings.metadata else {}
    if job.settings.batch_size == "auto":
        plain = job.settings.model_copy(update={"compile": False})
        trial = Work(job, FeatureExtractor(backbone, plain, layers), image_size, metadata)
        job = job.with_batch(choose_batch(trial, first, per_shard))
    work = Work(job, FeatureExtractor(backbone, job.settings, layers), image_size, metadata)
    work.extractor.check(work.batch_size, image_size, work.metadata_of([first] * work.batch_size))
    return work


def _fill(work: Work, source: Source, records: Sequence[TileRecord], writer: StoreWriter) -> None:
    """Compute the missing shards; each is written while the next one is computed."""
    missing = writer.missing_shards()
    if there := writer.attributes.shards - len(missing):
        print(f"going on: {there} of {writer.attributes.shards} shards are there", file=sys.stderr)
    ranges = {shard: writer.attributes.shard_range(shard) for shard in missing}
    todo = [record for start, stop in ranges.values() for record in records[start:stop]]
    values, warning = ValueRange(work.job.images), ""
    with (
        tqdm(
            total=len(records), initial=len(records) - len(todo), unit="tile", desc="extract", disable=None
        ) as bar,
        Background("encode") as encoding,
        Background("write") as writing,
        closing(read_ahead(work.job, source, work.image_size, todo)) as tiles,
    ):
        for shard, (start, stop) in ranges.items():
            began = time.monotonic()
            computed = compute_shard(work, tiles, stop - start, values, encoding, writing.check)
            if not warning and (warning := values.warning()):
                tqdm.write(warning, file=sys.stderr)
            note = {"seconds": round(time.monotonic() - began, 3), "batch_size": work.batch_size}
            writing.hand(partial(_write, writer, bar, shard, computed, note))
    if missing and (labelled := writer.attributes.labelled):
        print(
            f"{len(todo)} tiles that were extracted now have no label; give the store its labels again: "
            f"`satdifuser label STORE {labelled['file']}`",
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
    writer: StoreWriter, bar: tqdm[NoReturn], shard: int, computed: Shard, note: Mapping[str, Any]
) -> None:
    rows, batches, facts = computed.finish()
    if writer.attributes.labelled:
        rows = [replace(row, target=None, split="none", partitions={}) for row in rows]
    written = writer.write_shard(shard, rows, batches, {**note, **facts})
    bar.set_postfix_str(f"{written / 1e6:.1f} MB a shard")
    bar.update(len(rows))


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
