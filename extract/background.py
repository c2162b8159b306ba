"""A thread that does one thing at a time, so that encoding and writing run beside the backbone.

Whoever hands it the next task waits for the one before: what waits in memory stays bounded, tasks are done
in their order, and none is begun after one that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


class Background:
    """One thread, for the length of a `with` block; leaving the block waits for the task under way."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._last: Future[Any] | None = None

    def hand(self, task: Callable[[], Result]) -> Future[Result]:
        """Begin a task as soon as the one before is done; return where its result will be.

        Raises:
            BaseException: whatever the task before raised; this one is not begun.
        """
        self.wait()
        future = self._pool.submit(task)
        self._last = future
        return future

    def check(self) -> None:
        """Raise at once what the last task raised; wait for nothing."""
        if self._last is not None and self._last.done():
            self._last.result()

    def wait(self) -> None:
        """Wait for the last task, and raise what it raised."""
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()  # an interrupted run still commits the shard under way
        if kind is None:
            self.wait()
