"""Loads the backbone of an extraction and sets up all that shapes its last bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from satdifuser.extract.backbone import BackboneInfo, load_backbone
from satdifuser.extract.batch_size import choose_batch
from satdifuser.extract.compute import Work
from satdifuser.extract.device import fix_arithmetic
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.job import Job
from satdifuser.extract.lanes import Lanes
from satdifuser.extract.metadata import collect_metadata
from satdifuser.extract.plan import Plan
from satdifuser.extract.sources.tile import TileRecord
from satdifuser.store.schema import LayerInfo


def load_work(plan: Plan) -> Work:
    """Load the backbone of a planned extraction, see `prepare_work`."""
    return prepare_work(plan.job, plan.info, plan.image_size, plan.layers, plan.records, plan.tiles_per_shard)


def prepare_work(
    job: Job,
    info: BackboneInfo,
    image_size: tuple[int, int],
    layers: list[LayerInfo],
    records: Sequence[TileRecord],
    per_shard: int,
) -> Work:
    """Load the backbone, set up its arithmetic, find the batch if that is open, check the compiled network.

    Args:
        job: What is to be done; its device and threads are known.
        info: The backbone.
        image_size: (H, W) px at which it sees tiles.
        layers: Those to tap.
        records: The tiles, or at least the first one.
        per_shard: Tiles of a shard.

    Raises:
        BackboneError: the weights cannot be read, or the U-Net cannot be compiled as asked.
        DeviceError: the device has no memory for a single tile.
    """
    fix_arithmetic(int(job.settings.threads))
    backbone = load_backbone(info, job.backbone_settings)
    metadata = collect_metadata(records, image_size) if job.backbone_settings.metadata else {}
    tile_id = records[0].tile_id
    if job.settings.batch_size == "auto":
        plain = job.settings.model_copy(update={"compile": False})
        trial = Work(job, FeatureExtractor(backbone, plain, layers), image_size, metadata)
        job = job.with_batch(choose_batch(trial, tile_id, per_shard))
    work = Work(job, FeatureExtractor(backbone, job.settings, layers), image_size, metadata)
    work.extractor.check(work.batch_size, image_size, work.metadata_of([tile_id] * work.batch_size))
    return with_lanes(work)


def with_lanes(work: Work) -> Work:
    """The same work with a lane for each batch that is to be computed at once, if those are several."""
    return work if work.job.lanes == 1 else replace(work, lanes=Lanes(work.extractor, work.job.lanes))
