"""Reads tiles ahead of the backbone in threads of its own, in order.

What the store keeps of an image beside its features (colours, digest, preview, target) is made here too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from satdifuser.errors import ImageError
from satdifuser.extract.changes import file_state
from satdifuser.extract.images import Prepared, colour_statistics, preview, resize, to_rgb
from satdifuser.extract.job import Job
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.store.device import cores
from satdifuser.store.writer import TileRow

MOST_THREADS = 4  # of local files; more of them wait for the interpreter and for each other
TILES_AT_ONCE = 4  # of one task: neighbours are often cut from one image
LABEL_TYPES = {"classification": np.int32, "multilabel": np.uint8}


@dataclass(frozen=True)
class ReadTile:
    """A tile as it comes from its source."""

    row: TileRow
    prepared: Prepared | None  # None where it is skipped
    rgb: Tensor | None  # (3, H, W) float32 in [0, 1], of the size at which the backbone sees it


def read_ahead(
    job: Job, source: Source, image_size: tuple[int, int], records: Sequence[TileRecord], batches: int = 2
) -> Generator[ReadTile]:
    """Yield tiles in order while threads read those of the next batches.

    Args:
        job: Says how images are prepared, and in how many threads.
        source: Reads them.
        image_size: (H, W) px at which the backbone sees them.
        records: The tiles.
        batches: How many batches may wait in memory.

    Raises:
        ImageError: when its turn comes, a tile that cannot be used, where ``on_error`` is not skip.
    """
    threads = read_threads(job, source)
    most = max(threads, -(-batches * int(job.settings.batch_size) // TILES_AT_ONCE))
    parts = iter([records[i : i + TILES_AT_ONCE] for i in range(0, len(records), TILES_AT_ONCE)])
    waiting: deque[Future[list[ReadTile | Exception]]] = deque()

    def read(part: Sequence[TileRecord]) -> list[ReadTile | Exception]:
        return [_read(job, source, image_size, record) for record in part]

    with ThreadPoolExecutor(threads, "read", initializer=_one_core) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(read, part))
                if len(waiting) > most:
                    yield from _checked(waiting.popleft().result())
            while waiting:
                yield from _checked(waiting.popleft().result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _checked(found: Sequence[ReadTile | Exception]) -> Iterator[ReadTile]:
    """The tiles, up to one that could not be read."""
    for tile in found:
        if isinstance(tile, Exception):
            raise tile
        yield tile


def read_threads(job: Job, source: Source) -> int:
    """How many threads read; one where the source is the user's own code, which may not expect several."""
    if not source.thread_safe:
        return 1
    asked = job.settings.read_threads
    return min(MOST_THREADS, cores()) if asked == "auto" else asked


def _one_core() -> None:
    """Let a thread that reads use one core: the others belong to the backbone."""
    torch.get_num_threads()  # otherwise torch sets its own number at the thread's first operation
    threadpool_limits(1, user_api="openmp")


def _read(job: Job, source: Source, image_size: tuple[int, int], record: TileRecord) -> ReadTile | Exception:
    try:
        row, prepared = read_row(job, source, record)
        rgb = None if prepared is None else resize(torch.from_numpy(prepared.rgb)[None], image_size)[0]
        return ReadTile(row, prepared, rgb)
    except Exception as error:  # raised when its turn comes
        return error


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
