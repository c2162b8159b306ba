"""Finds the batch of a GPU: the largest that fits into its memory, in equal parts of a shard.

Before the first shard: the batch is part of what gives a feature its last bits, so it is fixed in the store.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from satdifuser.errors import DeviceError
from satdifuser.extract.compute import Work, launch_images, memory_message
from satdifuser.extract.images import Prepared
from satdifuser.extract.read_tile import ReadTile
from satdifuser.store.device import is_out_of_memory
from satdifuser.store.writer import TileRow


def choose_batch(work: Work, tile_id: str, per_shard: int) -> int:
    """Find the batch size for shards of so many tiles.

    Args:
        work: What turns tiles into features.
        tile_id: A tile whose metadata the trials may use.
        per_shard: Tiles of a shard: no batch is larger.

    Raises:
        DeviceError: there is no memory for a single tile.
    """
    found = largest_fitting(lambda batch: fits_on_device(work, tile_id, batch), per_shard)
    if not found:
        raise DeviceError(memory_message(work, tile_id, "found by a trial"))
    return equal_parts(found, per_shard)


def largest_fitting(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` that fits, 0 if none does: doubled, then narrowed down."""
    if fits(most):  # on large GPUs a whole shard does
        return most
    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, 2 * high
    high = min(high, most)  # the smallest that is known not to fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def equal_parts(batch: int, per_shard: int) -> int:
    """The smallest batch that cuts a shard into no more batches: 64 tiles by up to 40 are 32 and 32."""
    return -(-per_shard // -(-per_shard // batch))


def fits_on_device(work: Work, tile_id: str, batch: int) -> bool:
    """Whether the device can hold two batches of this size: one is fetched while the next is computed."""
    picture = Prepared(np.zeros((3, *work.image_size), np.float32), (0, 0), 0, 0)
    blank = ReadTile(TileRow(tile_id, "none"), picture)
    try:
        under_way = [launch_images(work, [blank] * batch) for _ in range(2)]
        torch.cuda.synchronize(work.extractor.backbone.device)
        return len(under_way) == 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
