"""Reads tiles ahead of the backbone in threads of its own, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from threadpoolctl import threadpool_limits

from satdifuser.extract.job import Job
from satdifuser.extract.read_tile import ReadTile, read_tiles
from satdifuser.extract.readers import Readers
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.store.device import cores

MOST_THREADS = 4  # that prepare images; more of them wait for the interpreter and for each other
TILES_AT_ONCE = 4  # of one task: neighbours are often cut from one image


def read_ahead(
    job: Job,
    source: Source,
    image_size: tuple[int, int],
    records: Sequence[TileRecord],
    readers: Readers | None = None,
) -> Generator[ReadTile]:
    """Yield tiles in order while threads read those of the next two batches.

    Args:
        job: Says how images are prepared, and in how many threads.
        source: Reads them.
        image_size: (H, W) px at which the backbone sees them.
        records: The tiles.
        readers: Processes that read them in place of this one.

    Raises:
        ImageError: when its turn comes, a tile that cannot be used, where ``on_error`` is not skip.
        SourceError: a process that reads ended.
    """
    threads = readers.count if readers else read_threads(job, source)
    most = max(threads, -(-2 * int(job.settings.batch_size) // TILES_AT_ONCE))
    parts = iter([records[i : i + TILES_AT_ONCE] for i in range(0, len(records), TILES_AT_ONCE)])
    waiting: deque[Future[list[ReadTile | Exception]]] = deque()
    preparation = job.preparation(image_size)

    def read(part: Sequence[TileRecord]) -> list[ReadTile | Exception]:
        return readers.read(part) if readers else read_tiles(preparation, source, part)

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
