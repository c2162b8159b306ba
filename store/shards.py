"""Which shards of a store are committed and whole, and reads that refuse all others.

Zarr reads a file that is not there as fill values, without an error; so every read of a store goes through
`ShardedStore`, which asks the commit records first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from satdifuser.errors import StoreError, UnreachableError
from satdifuser.store.digest import file_digest
from satdifuser.store.files import CARD
from satdifuser.store.layout import create_arrays
from satdifuser.store.location import Location, is_remote
from satdifuser.store.metadata import MAX_METADATA_BYTES, ROOT, read_attributes
from satdifuser.store.remote import Mirror, Recorded
from satdifuser.store.sharded_array import Indices
from satdifuser.store.zstd_frame import HEAD_BYTES, content_size

WORTHWHILE_GAP = 3  # tiles read in vain rather than with another request
DAMAGE = (ValueError, RuntimeError, OSError)  # what Zarr raises where a checksum or a file is wrong
MOST_TEXT_BYTES = 2**26  # of ids, paths or digests of a shard
DECLARED = ("shape", "chunk_grid", "data_type", "codecs")  # of an array


class ShardedStore:
    """A store on disk as its commit records describe it."""

    def __init__(self, path: Location) -> None:
        self.path = path
        self._mirror = Mirror(path) if is_remote(path) else None
        self.folder = self._mirror.folder if self._mirror else Path(path)
        self._opened_as = _stamp(self.folder)
        self.attributes = read_attributes(self.folder)
        self._root_digest = file_digest(self.folder / ROOT)
        self._root = zarr.open_group(self.folder, mode="r")
        self._real = os.path.realpath(self.folder)
        self._opened: dict[str, Any] = {}

    def locate(self, key: str) -> Path:
        """The local file of a committed key; that of a remote store is fetched first."""
        if not self._mirror:
            return self.folder / key
        size, digest = self.recorded_files()[key]
        return self._mirror.fetch(key, Recorded(size, digest, self.attributes.digest_algorithm))

    def card(self) -> str | None:
        """The text of its README.md, which people may have edited; None where it has none."""
        if self._mirror:
            return self._mirror.read_text(CARD)
        file = self.card_file()
        if file is None or file.stat().st_size > MAX_METADATA_BYTES:
            return None
        return file.read_text(errors="replace")

    def card_file(self) -> Path | None:
        """The README.md of a local store; None where it has none, or a link out of the store."""
        return None if self._local_size(CARD) is None else self.folder / CARD

    def digest_of(self, key: str) -> str:
        """Digest of a file where the store is, not of a local copy."""
        algorithm = self.attributes.digest_algorithm
        if self._mirror:
            return self._mirror.digest_of(key, algorithm)
        return file_digest(self.folder / key, algorithm)

    # --- completeness

    @cached_property
    def commits(self) -> list[dict[str, Any]]:
        """Commit records by shard; an empty one where the shard is missing."""
        if self._mirror:
            keys = [f"commits/c/{shard}" for shard in range(self.attributes.shards)]
            self._mirror.fetch_all(keys, self._mirror.fetch)
        folder = self.folder / "commits/c"
        there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        shards = range(self.attributes.shards)
        return [self.commit(shard) if str(shard) in there else {} for shard in shards]

    def commit(self, shard: int) -> dict[str, Any]:
        """The commit record of one shard; empty where the shard is missing.

        Raises:
            StoreError: the record is damaged.
        """
        commits = self._array("commits")
        try:
            if self._mirror:
                self._mirror.fetch(f"commits/c/{shard}")
            self._check_chunks("commits", [shard])
            text = str(commits[shard])
            record: dict[str, Any] = json.loads(text) if text else {}
            if text:
                _check_record(record, shard, self._array_names)
        except UnreachableError:
            raise
        except DAMAGE as error:
            self.require_unchanged()
            raise StoreError(
                f"{self.path}: the commit record of shard {shard} is damaged ({error}); {self.redo()}"
            ) from error
        return record

    def missing_shards(self) -> list[int]:
        """Shards without a commit record."""
        return [shard for shard, record in enumerate(self.commits) if not record]

    @cached_property
    def file_problems(self) -> dict[int, list[str]]:
        """Committed files that are missing or of another size, by shard; shards without problems left out.

        Those of a remote store are looked at when they are fetched, and by `check_files`.
        """
        return {} if self._mirror else self._compare_sizes(self._local_size)

    def check_files(self) -> dict[int, list[str]]:
        """The same, with a remote store's files too."""
        if not self._mirror:
            return self.file_problems
        return self._compare_sizes(self._mirror.place.sizes(self.recorded_files()).get)

    def _compare_sizes(self, size_of: Callable[[str], int | None]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for shard, record in enumerate(self.commits):
            for key, (size, _) in sorted(record.get("files", {}).items()):
                there = size_of(key)
                if there is None:
                    found.setdefault(shard, []).append(f"{key} is missing")
                elif there != size:
                    found.setdefault(shard, []).append(f"{key} has {there} bytes, committed were {size}")
        return found

    def _local_size(self, key: str) -> int | None:
        path = os.path.realpath(self.folder / key)
        inside = path.startswith(self._real + os.sep)  # no link out of the store is followed
        return Path(path).stat().st_size if inside and Path(path).is_file() else None

    def recorded_files(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and digest of all committed files."""
        return self._recorded

    @cached_property
    def _recorded(self) -> dict[str, tuple[int, str]]:
        files = (record.get("files", {}) for record in self.commits)
        return {key: (size, digest) for each in files for key, (size, digest) in each.items()}

    def require_complete(self) -> None:
        """Raise StoreError unless every shard is committed and its files are there."""
        self.require_shards(range(self.attributes.shards))

    def require_shards(self, shards: Iterable[int]) -> None:
        """Raise StoreError unless these shards are committed and their files are there."""
        asked = set(shards)
        for shard in sorted(asked & self.file_problems.keys()):
            problems, files = self.file_problems[shard], self.commits[shard]["files"]
            raise StoreError(
                f"{self.path}: shard {shard}: {problems[0]} ({len(problems)} of its {len(files)} files); "
                f"{self.redo()}"
            )
        if not asked.isdisjoint(self.missing_shards()):
            raise StoreError(f"{self.path}: {self.missing_text()}; {self.again()} to complete it")

    def missing_text(self) -> str:
        """How many shards and tiles are missing, in words."""
        missing = self.missing_shards()
        tiles = sum(np.diff(self.attributes.shard_range(shard))[0] for shard in missing)
        named = ", ".join(map(str, missing[:5])) + ("…" if len(missing) > 5 else "")
        return (
            f"{len(missing)} of {self.attributes.shards} shards are missing ({tiles} tiles; shards {named})"
        )

    def again(self) -> str:
        """How missing shards are made, in words."""
        if self._mirror:
            return "put the store there anew, complete"
        return f"run the same {self.attributes.made_by} command again"

    def redo(self, deep: bool = False) -> str:
        """How damaged shards are mended, in words."""
        if self._mirror:
            return "put the store there anew"
        command = f"satdifuser store repair {self.path}{' --deep' if deep else ''}"
        return (
            f"`{command}` drops what is damaged, and the same {self.attributes.made_by} command again redoes "
            "it; or copy the store anew"
        )

    def size_bytes(self) -> int:
        """Bytes of all committed files."""
        return sum(size for record in self.commits for size, _ in record.get("files", {}).values())

    # --- reads

    def table(self, name: str) -> Any:
        """One array over all tiles; fill values where shards are not yet committed."""
        self.require_shards(shard for shard, record in enumerate(self.commits) if record)
        return self._slice(name, 0, self.attributes.tiles)

    def gather(self, name: str, rows: Indices) -> Any:
        """Read rows in ascending stretches, so that neighbours cost one request, and restore their order."""
        per_shard = self.attributes.tiles_per_shard
        self.require_shards((rows // per_shard).tolist())
        array = self._array(name)
        order = np.argsort(rows, kind="stable")
        out = np.empty((len(rows), *array.shape[1:]), array.dtype)
        for places in np.split(order, _stretches(rows[order], per_shard)):
            if len(places):
                first, last = int(rows[places[0]]), int(rows[places[-1]])
                out[places] = self._slice(name, first, last + 1)[rows[places] - first]
        return out

    def _slice(self, name: str, start: int, stop: int) -> Any:
        if self._mirror:
            self._fetch_chunks(name, start, stop)
        array, per_shard = self._array(name), self.attributes.tiles_per_shard
        try:
            self._check_chunks(name, range(start // per_shard, -(-stop // per_shard)))
            found = array[start:stop]
        except DAMAGE as error:
            self.require_unchanged()
            raise StoreError(
                f"{self.path}: {name}, tiles {start} to {stop - 1}: cannot be read ({error}); "
                f"`satdifuser store verify --deep {self.path}` names the damaged files and how to mend them"
            ) from error
        self.require_unchanged()
        return found

    def require_unchanged(self) -> None:
        """Raise StoreError if another store has taken this one's place; to be asked after each access."""
        stamp = _stamp(self.folder)
        if stamp == self._opened_as:
            return
        if stamp is None or file_digest(self.folder / ROOT) != self._root_digest:  # which names the store
            raise StoreError(
                f"{self.path}: was replaced while it was read, so that old and new values could mix; run "
                "the same command again"
            )
        self._opened_as = stamp

    def _check_chunks(self, name: str, chunks: Iterable[int]) -> None:
        """Raise ValueError where a chunk is not there, or says that it inflates to more than it may hold."""
        array = self._array(name)
        size = int(np.prod(array.chunks)) * array.dtype.itemsize
        limit = size if array.dtype.kind in "biuf" else MOST_TEXT_BYTES
        for chunk in chunks:
            key = "/".join([name, "c", str(chunk), *"0" * (array.ndim - 1)])
            path = self.folder / key
            if not os.path.lexists(path):
                if name in self._array_names and self.commits[chunk]:
                    raise ValueError(f"{key} is missing")  # which Zarr would read as fill values
                continue
            if self._local_size(key) is None:
                raise ValueError(f"{key} is no plain file in the store")
            with path.open("rb") as file:
                claimed = content_size(file.read(HEAD_BYTES))
            if claimed > limit:
                raise ValueError(f"chunk {chunk} claims to hold {claimed} bytes, expected at most {limit}")

    def _fetch_chunks(self, name: str, start: int, stop: int) -> None:
        per_shard = self.attributes.tiles_per_shard
        for shard in range(start // per_shard, -(-stop // per_shard)):
            chunk = f"{name}/c/{shard}"
            for key in self.commits[shard].get("files", {}):
                if key == chunk or key.startswith(f"{chunk}/"):
                    self.locate(key)

    def _array(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = self._checked_array(name)
        return self._opened[name]

    def _checked_array(self, name: str) -> Any:
        """Open an array; one that is not what the attributes call for could cost any memory."""
        try:
            array = self._root[name]
        except KeyError as error:
            writer = self.attributes.software.get("satdifuser")
            raise StoreError(
                f"{self.path}: holds no array {name}; it was written by another satdifuser ({writer}): use "
                "that one, or extract anew"
            ) from error
        except DAMAGE as error:
            raise StoreError(f"{self.path}: the metadata of {name} cannot be read ({error})") from error
        found, expected = (getattr(a, "metadata", None) for a in (array, self._expected[name]))
        wrong = [part for part in DECLARED if getattr(found, part, None) != getattr(expected, part)]
        if wrong:
            raise StoreError(
                f"{self.path}: {name} has {wrong[0]} {getattr(found, wrong[0], None)}, but by the store's "
                f"attributes {getattr(expected, wrong[0])}; do not use this store, or copy it anew"
            )
        return array

    @cached_property
    def _expected(self) -> zarr.Group:
        """The same arrays as the attributes call for, empty and in memory."""
        root = zarr.create_group(MemoryStore(), zarr_format=3)
        create_arrays(root, self.attributes)
        return root

    @cached_property
    def _array_names(self) -> set[str]:
        """The arrays of which a commit record names files: all but its own, and those without a value."""
        members = self._expected.members(max_depth=None)
        held = {name for name, member in members if isinstance(member, zarr.Array) and member.size}
        return held - {"commits"}


def _stamp(folder: Path) -> tuple[int, int, int] | None:
    """What tells one store from another in the same place; None where there is none."""
    try:
        root = (folder / ROOT).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return root.st_dev, root.st_ino, root.st_mtime_ns


def _check_record(record: Any, shard: int, arrays: Set[str]) -> None:
    """Raise ValueError unless this is the commit record of that shard, with files of all these arrays."""
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it is no commit record")
    if record.get("shard") != shard:
        raise ValueError(f"it is that of shard {record.get('shard')}")
    named = set()
    for key, entry in files.items():
        array, here, place = key.partition(f"/c/{shard}")
        plain = isinstance(entry, list) and [type(part) for part in entry] == [int, str] and entry[0] >= 0
        if not plain or not here or array not in arrays or not re.fullmatch("(/[0-9]+)*", place):
            raise ValueError(f"unexpected entry {key!r}")
        named.add(array)
    if named != arrays:
        raise ValueError(f"it names no file of {min(arrays - named)}")


def _stretches(ascending: Indices, longest: int) -> Indices:
    """Where to cut ascending rows: at shard borders, and at gaps that would cost more than a request."""
    if not len(ascending):
        return np.empty(0, np.intp)
    far = np.diff(ascending) > WORTHWHILE_GAP
    other_shard = np.diff(ascending // longest) > 0
    cuts: Indices = np.flatnonzero(far | other_shard) + 1
    return cuts
