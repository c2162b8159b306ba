"""A local Zarr store whose every write survives a power cut, and which remembers what it wrote.

zarr-python's own local store renames into place but never syncs, so a commit record could reach the disk
before the data it vouches for.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import uuid
from pathlib import Path

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from satdifuser.errors import StoreError
from satdifuser.store.digest import DigestAlgorithm, new_hasher

PARTIAL_SUFFIX = ".partial"
CARD = "README.md"  # of a store, for people
BUFFER_BYTES = 1024 * 1024
ASIDE_SUFFIX = ".creating"  # beside a store: becoming one, or no longer one
Part = bytes | memoryview


class DurableStore(LocalStore):
    """A `LocalStore` that syncs each file before renaming it into place.

    ``written`` maps every key set since the last `forget` to its (size in bytes, digest). After a write
    has failed, none is taken any more.

    Args:
        root: The store's folder.
        algorithm: Of the digests.
    """

    def __init__(
        self, root: Path | str, *, read_only: bool = False, algorithm: DigestAlgorithm = "sha256"
    ) -> None:
        super().__init__(root, read_only=read_only)
        self._algorithm = algorithm
        self.written: dict[str, tuple[int, str]] = {}
        self._failure: OSError | None = None

    async def set(self, key: str, value: Buffer) -> None:
        """Write one file, in the event loop itself: none is left under way when zarr returns or raises."""
        self._check_writable()
        self.write(key, value.to_bytes())

    def write(self, key: str, *parts: Part) -> None:
        """Write one file of some parts, and remember it; threads may write several at once."""
        if self._failure is not None:
            raise self._failure
        try:
            digest = write_durably(self.root / key, *parts, algorithm=self._algorithm)
        except OSError as error:
            self._failure = error
            raise
        self.written[key] = (sum(len(part) for part in parts), digest)

    def adopt(self, key: str, file: Path, size: int, digest: str) -> None:
        """Take a file of another store over as it is, and remember it.

        A store's files are replaced and never changed, so that two stores can share one.
        """
        place = self.root / key
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.hardlink_to(file)
        except OSError:  # another disk, or a file system without links
            write_durably(place, file.read_bytes(), algorithm=self._algorithm)
        self.written[key] = (size, digest)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Zarr makes the groups above an array in this way."""
        if not (self.root / key).exists():
            await self.set(key, value)

    def forget(self) -> None:
        """Start a new list of written keys."""
        self.written = {}

    def sync_folders(self) -> None:
        """Make the directory entries of all written keys durable."""
        folders = {""}
        for key in self.written:
            while (key := key.rpartition("/")[0]) not in folders:
                folders.add(key)
        for folder in folders:
            sync_folder(self.root / folder)


def write_durably(path: Path, *parts: Part, algorithm: DigestAlgorithm = "sha256") -> str:
    """Write a file of some parts so that its name only ever shows the whole content; its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hasher = new_hasher(algorithm)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb", buffering=BUFFER_BYTES) as file:
            for part in parts:
                file.write(part)
                hasher.update(part)  # while the part is in the processor's cache
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return hasher.hexdigest()
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


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_folder(place.parent)


def discard(folder: Path) -> None:
    """Delete a folder: its name goes at once and durably, so that it never names half of it."""
    aside = aside_name(folder)
    folder.rename(aside)
    sync_folder(folder.parent)
    shutil.rmtree(aside)


def take_place(new: Path, path: Path) -> None:
    """Let a store that was built beside another one take its place, before the other one is deleted."""
    aside = aside_name(path)
    path.rename(aside)
    new.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)  # what is left of it goes with the next write to the store


def aside_name(path: Path) -> Path:
    """A name beside a store for what is not yet, or no longer, that store."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{ASIDE_SUFFIX}")


def remove_aside(path: Path) -> None:
    """Delete what interrupted creations and deletions of a store left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{ASIDE_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)


def write_error(path: Path, error: OSError, shard: int | None = None) -> StoreError:
    """Explain a write that failed."""
    where = f"{path}" if shard is None else f"{path}: shard {shard}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"{where}: the disk is full; committed shards are kept: free some space and run the same "
            "command again"
        )
    return StoreError(
        f"{where}: cannot write: {error}; committed shards are kept: mend the cause and run the same command "
        "again"
    )


def remove_orphans(root: Path) -> int:
    """Delete what interrupted writes left behind; return how many files went."""
    orphans = [path for pattern in ("*.partial", "*.__lock") for path in root.rglob(pattern)]
    for path in orphans:
        path.unlink(missing_ok=True)
    return len(orphans)
