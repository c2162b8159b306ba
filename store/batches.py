"""Batches of stored arrays for training: from memory where the selection fits, else read one batch ahead.

Legend: B tiles of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

from satdifuser.store.reader import FeatureStore, Indices, Selection, Stored

RING = 3  # batches in memory: one in use, one waiting, one being read
POLL_SECONDS = 0.1
T = TypeVar("T")


class BatchReader:
    """Reads batches of some tiles, in any order; the same batches whether they come from memory or from disk.

    Args:
        store: The store.
        rows: The rows of the tiles to read from.
        selection: Which timesteps and layers; None for all.
        budget_bytes: Keep the stored bytes of all tiles in memory where they take no more than this.

    Raises:
        StoreError: their shards are missing or damaged.
    """

    def __init__(
        self, store: FeatureStore, rows: Indices, selection: Selection | None = None, budget_bytes: float = 0
    ) -> None:
        self.store, self.rows, self.selection = store, rows, selection
        fits = store.stored_bytes_per_tile(selection) * len(rows) <= budget_bytes
        self._resident = store.stored(rows, selection) if fits else None

    def read(self, chosen: Indices) -> Stored:
        """The stored arrays of some positions 0 … N-1 of `rows`: group to name to (B, T, L, …)."""
        if self._resident is None:
            return self.store.stored(self.rows[chosen], self.selection)
        return {
            group: {name: array[chosen] for name, array in arrays.items()}
            for group, arrays in self._resident.items()
        }

    def batches(self, parts: Sequence[Indices]) -> Iterator[Stored]:
        """Yield the stored arrays of one list of positions after the other.

        What is yielded may be overwritten as soon as the next is asked for.
        """
        if self._resident is not None:
            return map(self.read, parts)
        return read_ahead(self._streamed(parts))

    def _streamed(self, parts: Sequence[Indices]) -> Iterator[Stored]:
        largest = max((len(part) for part in parts), default=0)
        ring = [self.store.buffers(largest, self.selection) for _ in range(min(RING, len(parts)))]
        for number, part in enumerate(parts):
            yield self.store.stored(self.rows[part], into=ring[number % RING])


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Draw items in a background thread: one waits while the next is made.

    An exception of the thread is raised here; the thread ends with this generator.
    """
    queue: Queue[Future[T]] = Queue(maxsize=1)
    stopped = Event()
    thread = Thread(target=_draw, args=(items, queue, stopped), daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = queue.get().result()
            except StopIteration:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def _draw(items: Iterator[T], queue: Queue[Future[T]], stopped: Event) -> None:
    """Put each item into the queue, and last the exception that ended them: StopIteration if nothing else."""
    ended = False
    while not ended:
        future: Future[T] = Future()
        try:
            future.set_result(next(items))
        except BaseException as error:
            future.set_exception(error)
            ended = True
        while not stopped.is_set() and not _put(queue, future):
            pass
        ended = ended or stopped.is_set()


def _put(queue: Queue[Future[T]], future: Future[T]) -> bool:
    try:
        queue.put(future, timeout=POLL_SECONDS)
    except Full:
        return False
    return True
