"""What an extraction will hold and cost, known before its backbone is loaded and anything is written.

Sizes are those before compression: what the disk must be able to take.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from satdifuser.errors import StoreError
from satdifuser.extract.backbone import BackboneInfo, find_backbone
from satdifuser.extract.job import Job, fix_automatic, plan_layers, tile_size, tiles_per_shard
from satdifuser.extract.noising import inversion_grid, resolve_timesteps
from satdifuser.extract.read_tile import Preparation
from satdifuser.extract.sources import list_tiles, open_source
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.store.layout import packed_width
from satdifuser.store.reader import FeatureStore, is_store
from satdifuser.store.schema import LayerInfo, bytes_per_tile, contents_hash, kept_layers
from satdifuser.store.settings import Encoding

ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
ROW_BYTES = 1000  # a tile's row: id, path, place, digests, colour statistics, its share of the commit record
MARGIN_SHARE = 0.05  # indices of shards, blocks that files do not fill, the file system's own records
MARGIN_BYTES = 100 * 10**6  # what other programs write meanwhile: a disk full to the last byte stops them too
UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Plan:
    """An extraction resolved as far as it can be without its backbone's weights."""

    job: Job
    out: Path
    source: Source
    records: list[TileRecord]
    info: BackboneInfo
    image_size: tuple[int, int]  # (H, W) px at which the backbone sees tiles
    layers: list[LayerInfo]  # as the backbone yields them
    begun: FeatureStore | None  # the store that will be gone on with
    replaced: bool  # whether a store is there that will be deleted first
    other: bool  # whether a store of other tiles, timesteps, layers or encoding is in the way

    @property
    def timesteps(self) -> list[int]:
        """The timesteps, ascending."""
        return resolve_timesteps(self.job.settings.timesteps)

    @property
    def preparation(self) -> Preparation:
        """How tiles are prepared."""
        return self.job.preparation(self.image_size)

    @property
    def kept(self) -> list[LayerInfo]:
        """The layers as the store will hold them."""
        return kept_layers(self.layers, self.job.store)

    @cached_property
    def left(self) -> list[TileRecord]:
        """The tiles that are still to be extracted."""
        if self.begun is None:
            return self.records
        ranges = [self.begun.attributes.shard_range(shard) for shard in self.begun.missing_shards()]
        return [record for start, stop in ranges for record in self.records[start:stop]]

    @property
    def tiles_per_shard(self) -> int:
        """Tiles of a shard, for a store that is yet to be made."""
        return tiles_per_shard(self.job, self.kept, len(self.records))

    @property
    def passes_per_tile(self) -> int:
        """How often a tile goes through the U-Net."""
        settings = self.job.settings
        if settings.noising == "forward":
            return len(self.timesteps) * settings.draws
        grid = inversion_grid(self.info.train_steps, settings.steps, self.info.steps_offset)
        steps = grid.index(self.timesteps[-1]) + 1
        return steps if settings.guidance is False else 2 * steps - 1  # nothing comes after the last one

    def feature_bytes(self, encoding: Encoding) -> int:
        """Bytes of one tile's features."""
        settings = self.job.store.model_copy(update={"encoding": encoding})
        return bytes_per_tile(kept_layers(self.layers, settings), len(self.timesteps), encoding)

    @property
    def preview_bytes(self) -> int:
        """Bytes of one tile's preview."""
        return 3 * math.prod(tile_size(self.records)) if self.job.store.previews else 0

    @property
    def latent_bytes(self) -> int:
        """Bytes of one tile's latents."""
        return 4 * math.prod(self.info.latent_shape(self.image_size)) if self.job.store.latents else 0

    @property
    def table_bytes(self) -> int:
        """Bytes of one tile's row in all tables, with its mask or labels, and which pixels hold data."""
        height, width = tile_size(self.records)
        mask = height * width if self.source.task == "segmentation" else 0
        return ROW_BYTES + mask + height * packed_width(width) + len(self.source.classes)

    def total_bytes(self, encoding: Encoding, tiles: int) -> int:
        """Bytes that so many tiles take."""
        others = self.preview_bytes + self.latent_bytes + self.table_bytes
        return tiles * (self.feature_bytes(encoding) + others)

    @property
    def needed_bytes(self) -> int:
        """Free space that the tiles still to be extracted call for, with a margin."""
        size = self.total_bytes(self.job.store.encoding, len(self.left))
        return with_margin(size) if self.left else 0

    @property
    def free_bytes(self) -> int:
        """Free space for the store; one that it replaces is deleted first."""
        places = (self.out.absolute(), *self.out.absolute().parents)
        free = shutil.disk_usage(next(place for place in places if place.exists())).free
        if not self.replaced:
            return free
        return free + sum(file.stat().st_size for file in self.out.rglob("*") if file.is_file())

    @property
    def fits(self) -> bool:
        """Whether the disk can hold the result."""
        return self.needed_bytes <= self.free_bytes


def make_plan(job: Job, out: Path, overwrite: bool = False, own_cores: int | None = None) -> Plan:
    """List the tiles and resolve the settings of an extraction; nothing is written.

    Args:
        job: Its settings.
        out: The store's folder.
        overwrite: Whether a store that is there will be replaced.
        own_cores: How many CPU cores it has; None for all that this process may use.

    Raises:
        SatDiFuserError: bad settings or input, or a damaged store at `out`.
    """
    source = open_source(job.source_settings)
    records = list_tiles(source)
    info = find_backbone(job.backbone_settings)
    job = fix_automatic(job, out, overwrite, own_cores)
    image_size, layers = plan_layers(job, info, tile_size(records))
    store = FeatureStore(out) if is_store(out) and not overwrite else None  # a damaged one can be replaced
    replaced = is_store(out) if store is None else not any(store.commits)
    same = store is not None and not replaced and _is_same(store, job, records, layers)
    return Plan(
        job=job,
        out=out,
        source=source,
        records=records,
        info=info,
        image_size=image_size,
        layers=layers,
        begun=store if same else None,
        replaced=replaced,
        other=store is not None and not replaced and not same,
    )


def _is_same(store: FeatureStore, job: Job, records: list[TileRecord], layers: list[LayerInfo]) -> bool:
    """Whether a store holds what the job asks for, as far as sizes go; the writer compares the rest."""
    ids = [record.tile_id for record in records]
    layers = kept_layers(layers, job.store)
    contents = contents_hash(ids, resolve_timesteps(job.settings.timesteps), layers)
    held = store.attributes
    return (held.planned.contents, held.layers, held.encoding) == (contents, layers, job.store.encoding)


def with_margin(size: int) -> int:
    """What must be free for files of this size."""
    return size + int(MARGIN_SHARE * size) + MARGIN_BYTES


def require_space(plan: Plan) -> None:
    """Refuse a plan whose result the disk cannot hold.

    Raises:
        StoreError: naming what is needed, what is free, and the ways out.
    """
    if plan.other or plan.fits:  # the writer will say why it refuses another store
        return
    chosen, tiles = plan.job.store.encoding, len(plan.left)
    sizes = {name: with_margin(plan.total_bytes(name, tiles)) for name in ENCODINGS}
    smaller = [f"{name} {format_bytes(size)}" for name, size in sizes.items() if size < sizes[chosen]]
    ways = ["free some space", "write to another disk (-o)"]
    ways += [f"choose another store.encoding ({', '.join(smaller)})"] if smaller and not plan.begun else []
    ways += [] if plan.begun else ["take fewer extract.timesteps or extract.layers"]
    raise StoreError(
        f"{plan.out}: the disk cannot hold the result: {tiles} tiles in {chosen} need "
        f"{format_bytes(plan.needed_bytes)} with a margin, {format_bytes(plan.free_bytes)} are free; "
        f"{', '.join(ways)}, or start anyway with --ignore-free-space (`satdifuser plan` tells more)"
    )


def format_bytes(size: int) -> str:
    """A size for reading: ``1.5 GB``."""
    power = next((i for i in range(len(UNITS) - 1) if size < 1000 ** (i + 1)), len(UNITS) - 1)
    return f"{size / 1000**power:.{int(power > 0)}f} {UNITS[power]}"
