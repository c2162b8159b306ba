"""A local Zarr store whose every write survives a power cut, and which remembers what it wrote.

zarr-python's own local store renames into place but never syncs, so a commit record could reach the disk
before the data it vouches for.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

PARTIAL_SUFFIX = ".partial"


class DurableStore(LocalStore):
    """A `LocalStore` that syncs each file before renaming it into place.

    ``written`` maps every key set since the last `forget` to its (size in bytes, SHA-256). After a write
    has failed, none is taken any more.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.written: dict[str, tuple[int, str]] = {}
        self._failure: OSError | None = None

    async def set(self, key: str, value: Buffer) -> None:
        """Write one file, in the event loop itself: so no write is under way when another one fails."""
        self._check_writable()
        self.write(key, value.to_bytes())

    def write(self, key: str, data: bytes) -> None:
        """Write one file, and remember it."""
        if self._failure is not None:
            raise self._failure
        try:
            write_durably(self.root / key, data)
        except OSError as error:
            self._failure = error
            raise
        self.written[key] = (len(data), hashlib.sha256(data).hexdigest())

    def forget(self) -> None:
        """Start a new list of written keys."""
        self.written = {}

    def sync_folders(self) -> None:
        """Make the directory entries of all written keys durable."""
        folders = {self.root}
        for key in self.written:
            folders.update(self.root / parent for parent in Path(key).parents)
        for folder in folders:
            sync_folder(folder)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that its name only ever shows the whole content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # Python names no file where a write fails
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_orphans(root: Path) -> int:
    """Delete what interrupted writes left behind; return how many files went."""
    orphans = [path for pattern in ("*.partial", "*.__lock") for path in root.rglob(pattern)]
    for path in orphans:
        path.unlink(missing_ok=True)
    return len(orphans)
