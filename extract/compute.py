"""Turns tiles into encoded features, batch by batch.

A batch is sent through the backbone, reduced to what the store keeps on the backbone's device, and fetched by
another thread while the next one runs. One that does not fit into the device's memory is split. On a CPU,
other threads do all of it, for two batches at once.

Legend: B tiles, T timesteps, L layers, C channels, h and w latent pixels, H and W feature pixels.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from satdifuser.errors import DeviceError, FeatureError
from satdifuser.extract.background import Background
from satdifuser.extract.device import Fetcher, Stopwatch, set_threads, stack_for
from satdifuser.extract.features import FeatureExtractor
from satdifuser.extract.images import Floats
from satdifuser.extract.job import Job
from satdifuser.extract.lanes import Lanes
from satdifuser.extract.read_tile import ReadTile
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.device import device_name, first_sentence, is_out_of_memory
from satdifuser.store.encoding import FORMS, encode
from satdifuser.store.schema import LayerInfo, group_layers
from satdifuser.store.writer import Encoded, StoreWriter, TileRow


@dataclass(frozen=True)
class Work:
    """What turns tiles into features."""

    job: Job
    extractor: FeatureExtractor
    image_size: tuple[int, int]  # (H, W) px
    metadata: Mapping[str, Tensor]  # by tile id (7,) normalised; empty for a backbone that reads none
    lanes: Lanes | None = None  # for several batches at once

    @cached_property
    def fetcher(self) -> Fetcher:
        """What brings results from the device."""
        return Fetcher(self.extractor.backbone.device)

    @property
    def batch_size(self) -> int:
        """Tiles of a batch."""
        return int(self.job.settings.batch_size)

    def metadata_of(self, ids: Sequence[str]) -> Tensor | None:
        """The metadata (B, 7) of some tiles, for a backbone that reads any."""
        return torch.stack([self.metadata[tile_id] for tile_id in ids]) if self.metadata else None


@contextmanager
def background_of(work: Work) -> Iterator[Background]:
    """The threads that end batches, for the length of a `with` block: one that fetches, or one a lane."""
    if work.lanes is None:
        with Background("encode") as background:
            yield background
        return
    job, part = work.job, partial(set_threads, work.job.batch_threads)
    part()  # of this thread, too, which may compute meanwhile
    try:
        with Background("compute", waiting=1, threads=job.lanes, begin=part) as background:
            yield background
    finally:
        set_threads(int(job.settings.threads))


@dataclass(frozen=True)
class Features:
    """A batch as the store keeps it."""

    latents: Floats  # (B, c, h, w)
    encoded: Encoded
    seconds: float  # of the device; of a lane those of its part


@dataclass
class Shard:
    """A shard's tiles on their way from the backbone, and what befell them."""

    rows: list[TileRow] = field(default_factory=list)
    batches: list[Future[Features]] = field(default_factory=list)
    splits: int = 0  # of batches that did not fit into the device's memory
    widened: Counter[str] = field(default_factory=Counter)  # tiles by layer and timestep, computed in float32

    def finish(self) -> tuple[list[TileRow], list[Encoded], dict[str, Any]]:
        """Wait for the features: rows, encoded batches, and facts for the commit record."""
        found = [batch.result() for batch in self.batches]
        latents = iter([one for batch in found for one in batch.latents])
        rows = [row if row.skip_reason else replace(row, latents=next(latents)) for row in self.rows]
        note: dict[str, Any] = {"device_seconds": round(sum(batch.seconds for batch in found), 3)}
        note |= {"batches_split": self.splits} if self.splits else {}
        note |= {"widened": dict(sorted(self.widened.items()))} if self.widened else {}
        return rows, [batch.encoded for batch in found], note


def write_shard(writer: StoreWriter, index: int, shard: Shard, note: Callable[[], Mapping[str, Any]]) -> int:
    """Wait for a shard's features and commit them.

    Args:
        writer: Of the store.
        index: Of the shard.
        shard: Its tiles.
        note: Gives further facts for the commit record, once the features are there.

    Returns:
        Bytes written.
    """
    rows, batches, facts = shard.finish()
    if writer.attributes.labelled:
        rows = without_labels(rows)
    return writer.write_shard(index, rows, batches, {**note(), **facts})


def without_labels(rows: Sequence[TileRow]) -> list[TileRow]:
    """The rows for a store that has other labels than its source by now."""
    return [replace(row, target=None, split="none", partitions={}) for row in rows]


def compute_shard(
    work: Work,
    tiles: Iterator[ReadTile],
    count: int,
    values: ValueRange,
    background: Background,
    before_batch: Callable[[], None],
) -> Shard:
    """Extract one shard's tiles, always in the same batches.

    Args:
        work: What turns tiles into features.
        tiles: The tiles, as they are read.
        count: How many of them make up the shard.
        values: Takes note of their values.
        background: The `background_of` the work.
        before_batch: Called before each batch; what it raises ends the work.

    Returns:
        The shard, its last batch perhaps under way.
    """
    shard, waiting = Shard(), list[ReadTile]()
    for position, tile in enumerate(islice(tiles, count), start=1):
        shard.rows.append(tile.row)
        if tile.picture is not None:
            values.add(tile.picture)
            waiting.append(tile)
        if waiting and (len(waiting) == work.batch_size or position == count):
            before_batch()
            compute_batch(work, waiting, shard, background)
            waiting = []
    return shard


def compute_batch(
    work: Work, tiles: Sequence[ReadTile], shard: Shard, background: Background, first: int = 0
) -> None:
    """Compute a batch, in halves where the device's memory cannot hold it.

    Args:
        work: What turns tiles into features.
        tiles: The B tiles.
        shard: Takes the results.
        background: The `background_of` the work.
        first: The place of the first tile in the whole batch, where each place has a prompt of its own.

    Raises:
        DeviceError: there is no memory for a single tile.
    """
    try:
        task = task_of(work, background, lambda lane: launch_images(lane, tiles, first, shard.widened))
    except RuntimeError as error:  # which holds the batch's memory as long as it is held
        if not is_out_of_memory(error):
            raise
        reason = first_sentence(error)
    else:
        shard.batches.append(background.hand(task))
        return
    if len(tiles) == 1:
        raise DeviceError(memory_message(work, tiles[0].row.tile_id, reason))
    background.wait()
    torch.cuda.empty_cache()
    shard.splits += 1
    half = len(tiles) // 2
    compute_batch(work, tiles[:half], shard, background, first)
    compute_batch(work, tiles[half:], shard, background, first + half)


def task_of(
    work: Work, background: Background, launch: Callable[[Work], Callable[[], Features]]
) -> Callable[[], Features]:
    """What is left of a batch for a thread of the background.

    Args:
        work: What turns tiles into features.
        background: The `background_of` the work.
        launch: Begins the batch with the work that it is given; what it returns ends it. Without lanes it is
            called here and now.
    """
    lanes = work.lanes
    if lanes is None:
        return launch(work)

    def compute() -> Features:
        with lanes.one(background.stopped) as extractor:
            found = launch(replace(work, extractor=extractor))()
        return replace(found, seconds=found.seconds / work.job.lanes)

    return compute


def memory_message(work: Work, tile_id: str, reason: str) -> str:
    """Say what would fit where a single tile does not."""
    settings, size = work.job.backbone_settings, work.image_size
    device = device_name(work.extractor.backbone.device)
    narrower = "backbone.dtype float16 or bfloat16, " if settings.dtype == "float32" else ""
    return (
        f"tile {tile_id}: {device} has no memory for even one tile ({reason}): {size[0]} x {size[1]} px, "
        f"{len(work.extractor.layers)} layers, {len(work.extractor.timesteps)} timesteps, "
        f"{settings.dtype}; what takes less: {narrower}a smaller extract.image_size or source.tile_size, "
        "fewer extract.layers or extract.timesteps; or fewer --workers on one GPU; or end what else uses it"
    )


def launch_images(
    work: Work, tiles: Sequence[ReadTile], first: int = 0, widened: Counter[str] | None = None
) -> Callable[[], Features]:
    """Send a batch of images through the backbone.

    Args:
        work: What turns tiles into features.
        tiles: The B tiles.
        first: The place of the first one in its batch, where each place has a prompt of its own.
        widened: Takes note of what is computed in float32.

    Returns:
        What waits for the features and returns them.
    """
    pictures = stack_for(
        work.extractor.backbone.device, [tile.picture.rgb for tile in tiles if tile.picture is not None]
    )
    ids = [tile.row.tile_id for tile in tiles]
    return _launch(work, lambda extractor: extractor.latents(pictures, ids), ids, first, widened)


def launch_latents(work: Work, latents: Floats, ids: Sequence[str]) -> Callable[[], Features]:
    """The same for tiles whose clean latents (B, c, h, w) are known."""
    return _launch(work, lambda extractor: extractor.to_backbone(torch.from_numpy(latents)), ids, 0, None)


def _launch(
    work: Work,
    latents_by: Callable[[FeatureExtractor], Tensor],
    ids: Sequence[str],
    first: int,
    widened: Counter[str] | None,
) -> Callable[[], Features]:
    extractor, metadata = work.extractor, work.metadata_of(ids)
    watch = Stopwatch(extractor.backbone.device)
    latents = latents_by(extractor)
    maps = extractor.features(latents, ids, metadata, first)
    if work.job.backbone_settings.widens and not all_finite([latents, *maps]):
        with extractor.in_float32() as wide:
            wide_latents = latents_by(wide)
            wide_maps = wide.features(wide_latents, ids, metadata, first)
        _note_widened(maps, ids, extractor, Counter() if widened is None else widened)
        latents = mend(latents.float(), wide_latents, 1)
        maps = [mend(*pair, 2) for pair in zip(maps, wide_maps, strict=True)]
    return _send(work, latents, maps, ids, watch)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value is infinite or NaN; waits for the device."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def finite(values: Tensor, axes: int) -> Tensor:
    """Whether all values are finite of each place along the first axes."""
    return values.isfinite().flatten(axes).all(axes)


def mend(values: Tensor, wide: Tensor, axes: int) -> Tensor:
    """Take from `wide` what is not finite, whole along the axes behind the first ones."""
    kept = finite(values, axes)
    return torch.where(kept.view(*kept.shape, *[1] * (values.ndim - axes)), values, wide)


def _note_widened(
    maps: Sequence[Tensor], ids: Sequence[str], extractor: FeatureExtractor, widened: Counter[str]
) -> None:
    dtype = str(extractor.backbone.dtype).removeprefix("torch.")
    for layer, values in zip(extractor.layers, maps, strict=True):
        for tile, step in (~finite(values, 2)).nonzero().tolist():
            place = f"layer {layer.name}, timestep {extractor.timesteps[step]}"
            if not widened:
                said = f"warning: tile {ids[tile]}, {place}: overflow in {dtype}; computed in float32"
                tqdm.write(said, file=sys.stderr)
            widened[place] += 1


def _send(
    work: Work, latents: Tensor, maps: Sequence[Tensor], ids: Sequence[str], watch: Stopwatch
) -> Callable[[], Features]:
    """Encode a batch on its device and begin to fetch it."""
    extractor, store = work.extractor, work.job.store
    groups = group_layers(extractor.layers)
    tensors = {"latents": latents.float()}
    for name, positions in groups.items():
        # L x (B, T, C, H, W) -> (B, T, L, C, H, W)
        together = torch.stack([maps[position] for position in positions], dim=2).float()
        if FORMS[store.encoding].limited:
            tensors[f"{name}/largest"] = largest(together)
        encoded = encode(together, store.encoding, store.pool_of(extractor.layers[positions[0]].stride))
        tensors |= {f"{name}/{key}": tensor for key, tensor in encoded.items()}
    seconds, fetched = watch.stop(), work.fetcher.fetch(tensors)

    def finish() -> Features:
        arrays, limit = fetched(), FORMS[store.encoding].largest
        for name, positions in groups.items():
            layers = [extractor.layers[position] for position in positions]
            means = np.abs(arrays[f"{name}/pooled"]).max(-1)  # not finite where any value is not
            check_finite(arrays.pop(f"{name}/largest", means), ids, layers, extractor.timesteps, limit)
        clean: Any = arrays.pop("latents")
        encoded: Encoded = {name: {} for name in groups}
        for key, array in arrays.items():
            group, _, name = key.partition("/")
            encoded[group][name] = array
        return Features(clean, encoded, seconds())

    return finish


def largest(maps: Tensor) -> Tensor:
    """Largest magnitude of each tile, timestep and layer: (B, T, L, C, H, W) to (B, T, L); NaN if any is."""
    axes = (3, 4, 5)
    return torch.maximum(-maps.amin(axes), maps.amax(axes))


def check_finite(
    magnitudes: NDArray[Any],
    tile_ids: Sequence[str],
    layers: Sequence[LayerInfo],
    timesteps: Sequence[int],
    limit: float,
) -> None:
    """Refuse features that are not finite or that the encoding cannot hold.

    Args:
        magnitudes: Largest of each tile, timestep and layer, (B, T, L).
        tile_ids: The B tiles.
        layers: The L layers.
        timesteps: The T timesteps.
        limit: Largest magnitude the encoding holds.

    Raises:
        FeatureError: naming tile, layer and timestep.
    """
    wrong = np.argwhere(~(magnitudes <= limit))
    if len(wrong):
        tile, step, layer = wrong[0]
        raise FeatureError(
            f"tile {tile_ids[tile]}, layer {layers[layer].name}, timestep {timesteps[step]}: feature of "
            f"magnitude {magnitudes[tile, step, layer]:g}, expected a finite value of at most {limit:g}; use "
            "a wider backbone.dtype or store.encoding (where float16 overflows, backbone.overflow: widen "
            "computes it in float32), or check the tile"
        )
