"""Reads random tiles of one feature array, with just the timesteps and layers that are asked for.

Legend: B tiles of a request, T timesteps, L layers of the group, … the rest of an array's shape.
"""

from __future__ import annotations

import resource
import weakref
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import StoreError
from satdifuser.store.shard_file import DamagedShardError, ShardFile, Unchecked

if TYPE_CHECKING:
    from satdifuser.store.shards import ShardedStore

Indices = NDArray[np.intp]
SHARE_OF_DESCRIPTORS = 4  # open at most this part of the files a process may have open
MOST_DESCRIPTORS = 4096
FileKey = tuple[str, int, int]  # array, shard, timestep
Part = tuple[int, int, int, int]  # shard, timestep, place in the shard, which row to fill


class OpenFiles:
    """Shard files that stay open, the first opened closed first; shared by a store's arrays."""

    def __init__(self) -> None:
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = max(1, min(allowed, MOST_DESCRIPTORS) // SHARE_OF_DESCRIPTORS)
        self._files: dict[FileKey, ShardFile] = {}
        self._lock = Lock()
        self.get = self._files.get
        """The file of a key, if it is open."""

    def add(self, key: FileKey, file: ShardFile) -> None:
        """Keep a file open."""
        with self._lock:
            self._files[key] = file
            if len(self._files) > self._limit:
                del self._files[next(iter(self._files))]


class ShardedArray:
    """An array (tile, timestep, layer, …) whose shards hold some tiles and one timestep each.

    Args:
        store: The store.
        key: The array's path in it.
        array: The same as a Zarr array, for its shape, chunks and dtype.
        compressed: Whether chunks are compressed.
        files: The store's open files.
    """

    def __init__(self, store: ShardedStore, key: str, array: Any, compressed: bool, files: OpenFiles) -> None:
        self.store = weakref.proxy(store)  # which holds this array: in a circle files would stay open
        self.key, self.compressed, self.files = key, compressed, files
        self.dtype: np.dtype[Any] = array.dtype
        self.shape: tuple[int, ...] = array.shape
        self.tiles_per_shard: int = array.shards[0]
        self.layers_per_chunk: int = array.chunks[2]
        self.chunks_per_tile = self.shape[2] // self.layers_per_chunk
        self.chunk_bytes = int(np.prod(array.chunks)) * self.dtype.itemsize
        self.bytes_per_layer = int(np.prod(self.shape[3:])) * self.dtype.itemsize
        self.last_key = "/".join("0" * (len(self.shape) - 2))

    def shape_of(self, tiles: int, steps: Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
        """The shape (B, T, L, …) of some tiles, timesteps and layers."""
        return (tiles, len(steps), len(layers), *self.shape[3:])

    def file(self, shard: int, step: int) -> ShardFile:
        """The open file of a shard and timestep.

        Raises:
            DamagedShardError: its index is damaged.
            OSError: it cannot be read.
        """
        key = (self.key, shard, step)
        file = self.files.get(key)
        if file is None:
            places = self.tiles_per_shard * self.chunks_per_tile
            path = self.store.locate(f"{self.key}/c/{shard}/{step}/{self.last_key}")
            file = ShardFile(path, places, self.chunk_bytes, self.compressed)
            self.files.add(key, file)
        return file


class Request:
    """Some tiles of an array to read, first what the system holds in memory, then the rest; for one thread.

    Args:
        array: The array.
        rows: Which tiles, in the order wanted.
        steps: Which timesteps, by position.
        layers: Which layers of the group, by position.
        out: What to fill, (B, T, L, …) of the stored dtype.
    """

    def __init__(
        self,
        array: ShardedArray,
        rows: Indices,
        steps: Sequence[int],
        layers: Sequence[int],
        out: NDArray[Any],
    ) -> None:
        self.array, self.layers = array, layers
        self.unchecked = Unchecked(array.chunk_bytes, len(rows) * len(steps) * len(layers))
        self._whole = array.layers_per_chunk > 1
        if self._whole:
            self._everything = list(layers) == list(range(array.shape[2]))
        else:
            self._stretches = [(layers[a], a, b) for a, b in runs(layers, self.unchecked.at_once)]
        size = array.bytes_per_layer * (len(layers) if self._whole else 1)
        self._chunks = list(out.view(np.uint8).reshape(-1, size))
        self._pending = self._parts(rows.tolist(), steps)

    def _parts(self, rows: list[int], steps: Sequence[int]) -> list[Part]:
        """What to read, in the order in which it lies in the files."""
        each = self.array.tiles_per_shard
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return [
            (rows[i] // each, step, rows[i] % each, i * len(steps) + number)
            for number, step in enumerate(steps)
            for i in order
        ]

    def begin(self) -> None:
        """Read what is in memory, and let the system begin to fetch the rest, all of it at once.

        Raises:
            StoreError: a file is damaged or cannot be read.
        """
        self._pending = self._read_pending(wait=False)

    def finish(self) -> None:
        """Read what `begin` did not, and wait for it.

        Raises:
            StoreError: a file is damaged or cannot be read.
        """
        if self._pending:
            self._pending = self._read_pending(wait=True)

    def _read_pending(self, wait: bool) -> list[Part]:
        """Read timesteps of tiles; return those that are not in memory, and not to be waited for."""
        array, left = self.array, []
        read = self._read_whole if self._whole else self._read_layers
        part: Part = (0, 0, 0, 0)
        try:
            for part in self._pending:
                if not read(array.file(part[0], part[1]), part, wait):
                    left.append(part)
            self.unchecked.check()
        except (DamagedShardError, OSError, RuntimeError) as error:  # blosc raises RuntimeError
            shard, _, place, _ = getattr(error, "origin", None) or part  # the check is of several
            tile, path = shard * array.tiles_per_shard + place, array.store.path
            raise StoreError(
                f"{path}: {array.key}, tile {tile}: cannot be read ({error}); `satdifuser store verify "
                f"--deep {path}` names the damaged files and how to mend it"
            ) from error
        return left

    def _read_layers(self, file: ShardFile, part: Part, wait: bool) -> bool:
        """Read the chunks of the layers wanted."""
        first, out, done = part[2] * self.array.chunks_per_tile, part[3] * len(self.layers), True
        for layer, start, stop in self._stretches:
            chunks = self._chunks[out + start : out + stop]
            done &= file.read(first + layer, chunks, self.unchecked, part, wait)
        return done

    def _read_whole(self, file: ShardFile, part: Part, wait: bool) -> bool:
        """Read the one chunk that holds all layers of a tile, and keep those wanted."""
        _, _, place, row = part
        if self._everything:
            return file.read(place, [self._chunks[row]], self.unchecked, part, wait)
        whole = np.empty(self.array.chunk_bytes, np.uint8)
        done = file.read(place, [whole], self.unchecked, part, wait)
        if done:
            by_layer = whole.reshape(-1, self.array.bytes_per_layer)
            self._chunks[row].reshape(-1, self.array.bytes_per_layer)[:] = by_layer[list(self.layers)]
        return done


def runs(numbers: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Where a sequence of whole numbers can be cut into stretches that count up by one: (start, stop).

    Args:
        numbers: The sequence.
        most: How many numbers a stretch holds at most.
    """
    found = []
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1 or i - start == most:
            found.append((start, i))
            start = i
    return found
