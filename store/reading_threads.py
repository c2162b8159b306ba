"""Two threads that share a request, where its tiles are large enough to be worth it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

SMALL_TILE_BYTES = 2**17  # up to here a second thread waits for Python's lock most of the time
PART_BYTES = 2**26  # that a thread asks the disk for at once


@cache
def _second_reader(process: int) -> ThreadPoolExecutor:
    """The thread that reads beside the caller's; one per process, since a forked one has no threads."""
    return ThreadPoolExecutor(1, thread_name_prefix="store_read")


def read_in_parts(read: Callable[[slice], None], tiles: int, tile_bytes: int) -> None:
    """Call a function for parts of a request, in two threads where tiles are large.

    Args:
        read: Reads some of the tiles.
        tiles: How many there are.
        tile_bytes: Of each.
    """
    alone = tile_bytes <= SMALL_TILE_BYTES
    size = max(1, min(tiles if alone else -(-tiles // 2), PART_BYTES // max(1, tile_bytes)))
    if alone:
        for start in range(0, tiles, size):
            read(slice(start, start + size))
        return
    parts = deque(slice(start, start + size) for start in range(0, tiles, size))

    def read_on() -> None:
        while True:
            try:
                part = parts.popleft()
            except IndexError:  # none is left
                return
            read(part)

    beside = _second_reader(os.getpid()).submit(read_on)
    try:
        read_on()
    finally:
        parts.clear()
        wait([beside])  # it fills the caller's buffers
    beside.result()
