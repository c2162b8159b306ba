"""Threads that work beside the one that hands them tasks: what encodes, what writes, what computes on a CPU.

Whoever hands over the next task waits where others still wait: what waits in memory stays bounded, tasks are
begun in their order, and none after one that failed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


class Background:
    """Some threads, for the length of a `with` block; leaving the block waits for the tasks handed to them.

    ``stopped`` is set once the block is left by an error. ``after`` may name another one, whose tasks count
    as handed over before those of this one.

    Args:
        name: Of the threads.
        waiting: How many tasks may wait behind those under way.
        threads: How many tasks may be under way.
        begin: What each thread does first.
    """

    def __init__(
        self, name: str, waiting: int = 0, threads: int = 1, begin: Callable[[], None] | None = None
    ) -> None:
        self.stopped = Event()
        self.after: Background | None = None
        self._pool = ThreadPoolExecutor(threads, name, begin)
        self._most = threads + waiting
        self._handed: deque[Future[Any]] = deque()
        self._error: BaseException | None = None

    def hand(self, task: Callable[[], Result]) -> Future[Result]:
        """Begin a task as soon as those before are done; return where its result will be.

        Raises:
            BaseException: whatever a task before raised; this one is not begun.
        """
        self._settle_before()
        while len(self._handed) >= self._most:
            self._handed[0].result()
            self._handed.popleft()
        self.check()
        future = self._pool.submit(self._run, task)
        self._handed.append(future)
        return future

    def _run(self, task: Callable[[], Result]) -> Result:
        if self._error is not None:  # of a task before, since this one was handed over
            raise self._error
        try:
            return task()
        except BaseException as error:
            self._error = error
            raise

    def check(self) -> None:
        """Raise at once what the last tasks raised; wait for nothing."""
        for future in self._handed:
            if future.done():
                future.result()

    def settle(self) -> None:
        """Wait for the tasks that were handed over, and those before them, whatever becomes of them."""
        self._settle_before()
        wait(self._handed)

    def _settle_before(self) -> None:
        if before := self.after:
            before.settle()
            self.after = None

    def wait(self) -> None:
        """Wait for the last tasks, and raise what they raised."""
        self._settle_before()
        for future in self._handed:
            future.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = False
        try:
            if kind is None:
                self.wait()  # before the threads: one whose end was not waited for cannot be again
                whole = True
        finally:
            if not whole:
                self.stopped.set()
            self._pool.shutdown()  # an interrupted run still commits the shards that were handed over
