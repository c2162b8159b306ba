"""One writer per store: a lock beside the store, which vanishes with the process that holds it.

The kernel keeps the lock (flock), so that of a killed process is free at once, whatever the clock or a
recycled process id say; the text in the file only names the holder. It lies beside the store, as
``.NAME.lock``, so it is no part of the store and stays while the store is replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from satdifuser.errors import LockedError

POLL_SECONDS = 0.2


class StoreLock:
    """Holds a store for writing until `release`, the end of a ``with`` block or of the process.

    Several processes that each write other shards of it share the lock, and keep away all others.
    """

    def __init__(self, path: Path, shared: bool = False, patience: float = 0.0) -> None:
        """Take the lock of the store at `path`, be the store there or not.

        Args:
            path: The store.
            shared: Whether others may hold it too, if they share it.
            patience: Seconds to wait for it.

        Raises:
            LockedError: somebody else writes to the store.
            OSError: the folder of the store cannot be written, or its file system has no locks.
        """
        file = lock_file(path)
        descriptor = _lock(path, file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, patience)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        self.release = weakref.finalize(self, _release, file, descriptor)
        self.release.atexit = False

    def __enter__(self) -> StoreLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lock_file(path: Path) -> Path:
    """Where the lock of a store is; the same under all names that a store has by links."""
    real = path.resolve()
    return real.with_name(f".{real.name}.lock")


def _lock(path: Path, file: Path, kind: int, patience: float) -> int:
    """Open and lock the file; return its descriptor."""
    end = time.monotonic() + patience
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if _still_there(file, descriptor):
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            if time.monotonic() < end:
                os.close(descriptor)
                time.sleep(POLL_SECONDS)
                continue
            os.close(descriptor)
            raise LockedError(
                f"{path}: is being written by {holder}; wait until that ends, or end it, and run the same "
                "command again"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise OSError(error.errno, f"{error.strerror} (locking a file)", str(file)) from error
        os.close(descriptor)


def _still_there(file: Path, descriptor: int) -> bool:
    """False where the holder before us removed the file between our opening and locking it."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(file: Path, descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError):  # others share it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)  # before it is unlocked, when it is still ours
    os.close(descriptor)


def _this_process() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
    }


def _holder(descriptor: int) -> str:
    """Who holds the lock, in words; its text may not be written yet."""
    try:
        told = json.loads(os.pread(descriptor, 1 << 16, 0))
        return f"process {told['pid']} on {told['host']} since {told['since']} (`{told['command']}`)"
    except (ValueError, KeyError, TypeError):
        return "another process"
