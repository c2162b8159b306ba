"""What one extraction consists of: its settings resolved, its layers planned, its identity written down.

What could change a feature's last bits (batch, threads, dtype, device kind) is fixed when a store is
created and taken from it afterwards.
"""

from __future__ import annotations

import platform
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from satdifuser.errors import SettingsError, SourceError
from satdifuser.extract.backbone import BackboneInfo, LoadedModel
from satdifuser.extract.images import COLOUR_STATISTICS
from satdifuser.extract.layers import select_layers
from satdifuser.extract.metadata import count_missing
from satdifuser.extract.noising import SEED_RULE, check_timesteps, resolve_timesteps
from satdifuser.extract.read_tile import Preparation
from satdifuser.extract.settings import (
    BackboneSettings,
    ExtractSettings,
    ImageSettings,
    SourceSettings,
    image_settings,
)
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.store.device import choose_device, cores
from satdifuser.store.digest import CURRENT, DigestAlgorithm
from satdifuser.store.encoding import decode_formula
from satdifuser.store.reader import FeatureStore, is_store
from satdifuser.store.schema import (
    DEFAULT_PARTITION,
    Attributes,
    Hashes,
    LayerInfo,
    auto_tiles_per_shard,
    canonical_hash,
    contents_hash,
    kept_layers,
)
from satdifuser.store.settings import PARTITION_NAME, StoreSettings

CPU_BATCH = 8
LANES = 2  # batches that a CPU computes at once, see satdifuser.extract.lanes


@dataclass(frozen=True)
class Job:
    """Everything that one extraction needs, resolved and checked."""

    source_settings: SourceSettings
    backbone_settings: BackboneSettings
    settings: ExtractSettings
    store: StoreSettings
    digest_algorithm: DigestAlgorithm = CURRENT  # of the store
    lanes: int = 1  # batches that are computed at once, each with an equal part of the threads

    @property
    def images(self) -> ImageSettings:
        """How raw values become RGB."""
        return image_settings(self.source_settings)

    @property
    def batch_threads(self) -> int:
        """CPU threads that share a batch, which shapes its last bits."""
        return int(self.settings.threads) // self.lanes

    def preparation(self, image_size: tuple[int, int]) -> Preparation:
        """How tiles are prepared for a backbone that sees them at a size (H, W) px."""
        return Preparation(self.images, self.store.previews, image_size, self.digest_algorithm)

    def with_batch(self, tiles: int) -> Job:
        """The same job in batches of so many tiles."""
        return replace(self, settings=self.settings.model_copy(update={"batch_size": tiles}))


def fix_automatic(job: Job, out: Path, overwrite: bool, own_cores: int | None = None) -> Job:
    """Replace ``auto`` by what the store at `out` was begun with, or by this machine's values.

    Args:
        job: The job.
        out: The store's folder.
        overwrite: Whether a store that is there will be replaced.
        own_cores: How many CPU cores it has; None for all that this process may use.

    Raises:
        SettingsError: the device is not there, or prompts do not match the tiles of a batch.
    """
    attributes = FeatureStore(out).attributes if is_store(out) and not overwrite else None
    begun = attributes.feature_identity if attributes else {}
    device = job.backbone_settings.device
    if device == "auto":
        device = str(begun.get("device") or choose_device("auto", "backbone.device"))
    batch = job.settings.batch_size
    if batch == "auto":
        batch = begun.get("batch_size") or default_batch(job.backbone_settings.prompt, device)
    check_prompts(job.backbone_settings.prompt, batch)
    backbone = job.backbone_settings.model_copy(update={"device": device})
    placed = replace(job, backbone_settings=backbone)
    threads, lanes = share_threads(placed, begun.get("threads"), own_cores or cores())
    settings = job.settings.model_copy(update={"batch_size": batch, "threads": threads})
    algorithm = attributes.digest_algorithm if attributes else CURRENT
    return replace(placed, settings=settings, digest_algorithm=algorithm, lanes=lanes)


def share_threads(job: Job, held: int | None, own_cores: int) -> tuple[int, int]:
    """How many threads a job computes with, and how many batches share them.

    Args:
        job: The job; its device is known.
        held: Threads of each batch in a store that was begun; None for a new one.
        own_cores: What ``auto`` stands for.
    """
    settings, backbone = job.settings, job.backbone_settings
    alone = settings.compile or backbone.widens  # these change what several batches would share
    most = 1 if alone or not backbone.device.startswith("cpu") else LANES
    threads = own_cores if settings.threads == "auto" else settings.threads
    if held is None:
        return threads, most if threads % most == 0 else 1
    if settings.threads != "auto" and threads % held:
        return threads, 1  # the store will be refused, as it was begun with others
    lanes = max(1, min(most, threads // held))
    return lanes * held, lanes


def default_batch(prompt: str | list[str], device: str) -> int | Literal["auto"]:
    """Tiles of a batch: as many as there are prompts, if there are several; on a GPU to be found by trial."""
    if isinstance(prompt, list):
        return len(prompt)
    return "auto" if device.startswith("cuda") else CPU_BATCH


def check_prompts(prompt: str | list[str], batch: int | Literal["auto"]) -> None:
    """Refuse several prompts that are not one for each tile of a batch."""
    if isinstance(prompt, list) and len(prompt) != batch:
        raise SettingsError(
            f"backbone.prompt: {len(prompt)} texts, but extract.batch_size is {batch}; name one text for "
            "each tile of a batch, or a single one for all"
        )


def tile_size(records: Sequence[TileRecord]) -> tuple[int, int]:
    """The one (H, W) size in pixels of all tiles.

    Raises:
        SourceError: sizes differ.
    """
    first = records[0]
    for record in records:
        if record.size != first.size:
            raise SourceError(
                f"tile {record.tile_id}: is {record.size[0]} x {record.size[1]} px, but {first.tile_id} is "
                f"{first.size[0]} x {first.size[1]}; all tiles of a store have one size: set source.tile_size"
            )
    return first.size


def partition_names(records: Sequence[TileRecord]) -> list[str]:
    """Names of the partitions that a source's tiles are in; one of a source without any is the default one.

    Raises:
        SourceError: a name cannot be that of an array.
    """
    names = list(records[0].partitions) or [DEFAULT_PARTITION]
    for name in names:
        if not re.fullmatch(PARTITION_NAME, name):
            raise SourceError(
                f"partition {name!r}: a store keeps each partition under its name, which must begin with a "
                "letter or digit and hold letters, digits, '.', '_' and '-' only; rename the partition's file"
            )
    return names


def chosen_partition(job: Job, records: Sequence[TileRecord]) -> str:
    """The partition that the source is asked for, or else the first that it has."""
    return str(getattr(job.source_settings, "partition", partition_names(records)[0]))


def plan_layers(
    job: Job, info: BackboneInfo, size: tuple[int, int]
) -> tuple[tuple[int, int], list[LayerInfo]]:
    """Image size and tapped layers of a job, from the backbone's configuration alone."""
    image_size = info.image_size(job.settings.image_size, size)
    layers = select_layers(info.layers(image_size), job.settings.layers)
    timesteps = resolve_timesteps(job.settings.timesteps)
    check_timesteps(timesteps, job.settings.noising, info.train_steps, job.settings.steps, info.steps_offset)
    return image_size, layers


def tiles_per_shard(job: Job, kept: Sequence[LayerInfo], tiles: int) -> int:
    """Tiles of a shard, for a store that keeps these layers of so many tiles."""
    asked = job.store.tiles_per_shard
    if asked == "auto":
        steps = len(resolve_timesteps(job.settings.timesteps))
        asked = auto_tiles_per_shard(kept, steps, job.store.encoding, tiles)
    return min(asked, tiles)


def new_attributes(
    job: Job,
    source: Source,
    records: Sequence[TileRecord],
    info: BackboneInfo,
    loaded: LoadedModel,
    image_size: tuple[int, int],
    layers: list[LayerInfo],
) -> Attributes:
    """What a new store will declare about itself."""
    timesteps = resolve_timesteps(job.settings.timesteps)
    layers = kept_layers(layers, job.store)
    per_shard = tiles_per_shard(job, layers, len(records))
    size = tile_size(records)
    identity = feature_identity(job, info, loaded, image_size, size)
    ids = [record.tile_id for record in records]
    planned = Hashes(
        feature=canonical_hash(identity),
        contents=contents_hash(ids, timesteps, layers),
        labels=planned_labels(source, records),
    )
    return Attributes(
        store_id=uuid.uuid4().hex,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        software=_software(),
        task=source.task,
        classes=list(source.classes),
        ignore_value=source.ignore_value,
        partition=chosen_partition(job, records),
        partitions=partition_names(records),
        tiles=len(records),
        left_out=source.left_out,
        tile_size=size,
        tiles_per_shard=per_shard,
        timesteps=timesteps,
        layers=layers,
        encoding=job.store.encoding,
        decode=decode_formula(job.store.encoding),
        digest_algorithm=job.digest_algorithm,
        previews=job.store.previews,
        latents=info.latent_shape(image_size) if job.store.latents else None,
        valid=True,
        cloud_cover=True,
        colour_statistics=COLOUR_STATISTICS,
        backbone=_describe_backbone(job, info, loaded, records, image_size),
        feature_identity=identity,
        planned=planned,
        settings=resolved_settings(job, size, image_size, timesteps, per_shard),
    )


def planned_labels(source: Source, records: Sequence[TileRecord]) -> str:
    """Hash of the labels and splits as a source lists them, masks unread."""
    listed = [[r.tile_id, dict(r.partitions) or r.split, r.label] for r in records]
    return canonical_hash([list(source.classes), listed])


def _describe_backbone(
    job: Job,
    info: BackboneInfo,
    loaded: LoadedModel,
    records: Sequence[TileRecord],
    image_size: tuple[int, int],
) -> dict[str, Any]:
    """Name and weights of the backbone, and how many tiles lack each metadata field that it reads."""
    named = {"model": info.name, "weights_sha256": loaded.weights_digest}
    if not job.backbone_settings.metadata:
        return named
    return named | {"metadata_missing": count_missing(records, image_size)}


def resolved_settings(
    job: Job,
    size: tuple[int, int],
    image_size: tuple[int, int],
    timesteps: list[int],
    per_shard: int,
) -> dict[str, Any]:
    """The settings of a job as plain JSON values by section, with what their presets and autos became."""
    source = job.source_settings.model_dump(mode="json") | {"tile_size": list(size)}
    settings = job.settings.model_dump(mode="json")
    return {
        "source": source,
        "backbone": job.backbone_settings.model_dump(mode="json"),
        "extract": settings | {"image_size": list(image_size), "timesteps": timesteps},
        "store": job.store.model_dump(mode="json") | {"tiles_per_shard": per_shard},
    }


def feature_identity(
    job: Job, info: BackboneInfo, loaded: LoadedModel, image_size: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """Everything that shapes one feature value; its hash is the store's `feature` hash."""
    settings = job.settings
    names = ("noising", "steps", "draws", "seed", "latent", "prediction", "guidance", "batch_size")
    scheduler = info.scheduler.config
    betas = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "steps_offset",
        "prediction_type",
    )
    return {
        "weights": loaded.weights_digest,
        "prompt_embedding": loaded.prompt_digest,
        "negative_prompt": job.backbone_settings.negative_prompt if settings.guidance is not False else None,
        "metadata": job.backbone_settings.metadata,
        "scheduler": {name: scheduler[name] for name in betas},
        **{name: getattr(settings, name) for name in names},
        "threads": job.batch_threads,
        "seed_rule": SEED_RULE,
        "images": {
            **job.images.model_dump(include={"bands", "scale", "offset"}),
            "tile_size": list(size),
            "image_size": list(image_size),
            "resize": "bilinear, antialiased",
        },
        "dtype": job.backbone_settings.dtype,
        "device": loaded.device,
        "encoding": job.store.encoding,
        "pool": job.store.model_dump(mode="json")["pool"] if job.store.encoding == "reduced" else None,
        **_unusual(job),
    }


def _unusual(job: Job) -> dict[str, Any]:
    """Settings that older stores do not know, where they differ from what those were made with."""
    found = {"compile": job.settings.compile, "overflow": job.backbone_settings.overflow}
    return {name: value for name, value in found.items() if value not in (False, "stop")}


def _software() -> dict[str, str]:
    names = ("satdifuser", "torch", "diffusers", "zarr", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
