"""Reads random tiles of one feature array, with just the timesteps and layers that are asked for.

Legend: B tiles of a request, T timesteps, L layers of the group, … the rest of an array's shape.
"""

from __future__ import annotations

import resource
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import StoreError
from satdifuser.store.shard_file import Bytes, Checksums, DamagedShardError, ShardFile

if TYPE_CHECKING:
    from satdifuser.store.shards import ShardedStore

Indices = NDArray[np.intp]
SHARE_OF_DESCRIPTORS = 4  # open at most this part of the files a process may have open
MOST_DESCRIPTORS = 4096
FileKey = tuple[str, int, int]  # array, shard, timestep
Part = tuple[int, int, int, Bytes]  # shard, timestep, place in the shard, what to fill


class OpenFiles:
    """Shard files that stay open, the least recently used ones closed first; shared by a store's arrays."""

    def __init__(self) -> None:
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = max(1, min(allowed, MOST_DESCRIPTORS) // SHARE_OF_DESCRIPTORS)
        self._files: OrderedDict[FileKey, ShardFile] = OrderedDict()
        self._lock = Lock()

    def get(self, key: FileKey, opened: Callable[[], ShardFile]) -> ShardFile:
        """The file of a key, opened where it is not yet."""
        with self._lock:
            file = self._files.pop(key, None) or opened()
            self._files[key] = file
            if len(self._files) > self._limit:
                self._files.popitem(last=False)
        return file


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
        return self.files.get((self.key, shard, step), lambda: self._open(shard, step))

    def _open(self, shard: int, step: int) -> ShardFile:
        places = self.tiles_per_shard * self.chunks_per_tile
        path = self.store.locate(f"{self.key}/c/{shard}/{step}/{self.last_key}")
        return ShardFile(path, places, self.chunk_bytes, self.compressed)


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
        self.array, self.layers, self.stretches = array, layers, runs(layers)
        self.everything = list(layers) == list(range(array.shape[2]))
        size = array.bytes_per_layer
        self.places = [slice(start, start + size) for start in range(0, len(layers) * size, size)]
        self.checksums = Checksums(max(1, len(layers)))
        self._pending = self._parts(rows, steps, out.view(np.uint8).reshape(-1))

    def _parts(self, rows: Indices, steps: Sequence[int], out: Bytes) -> list[Part]:
        shards, places = (part.tolist() for part in np.divmod(rows, self.array.tiles_per_shard))
        order, size = np.argsort(rows, kind="stable").tolist(), len(self.places) * self.array.bytes_per_layer
        starts = [(i * len(steps) + number) * size for number in range(len(steps)) for i in order]
        where = [(shards[i], step, places[i]) for step in steps for i in order]
        return [(*part, out[start : start + size]) for part, start in zip(where, starts, strict=True)]

    def begin(self) -> None:
        """Read what is in memory, and let the system begin to fetch the rest, all of it at once.

        Raises:
            StoreError: a file is damaged or cannot be read.
        """
        self._pending = [part for part in self._pending if not self._read(part, wait=False)]

    def finish(self) -> None:
        """Read what `begin` did not, and wait for it.

        Raises:
            StoreError: a file is damaged or cannot be read.
        """
        for part in self._pending:
            self._read(part, wait=True)

    def _read(self, part: Part, wait: bool) -> bool:
        """Read one timestep of a tile; False if it is not in memory, and not to be waited for."""
        shard, step, place, out = part
        first = place * self.array.chunks_per_tile
        try:
            file = self.array.file(shard, step)
            if self.array.layers_per_chunk > 1:
                return self._read_whole(file, first, out, wait)
            done = True
            for start, stop in self.stretches:
                chunks = [out[place] for place in self.places[start:stop]]
                done &= file.read(first + self.layers[start], chunks, self.checksums, wait)
            return done
        except (DamagedShardError, OSError, RuntimeError) as error:  # blosc raises RuntimeError
            tile, path = shard * self.array.tiles_per_shard + place, self.array.store.path
            raise StoreError(
                f"{path}: {self.array.key}, tile {tile}: cannot be read ({error}); `satdifuser store verify "
                f"--deep {path}` names the damaged files and how to mend it"
            ) from error

    def _read_whole(self, file: ShardFile, first: int, out: Bytes, wait: bool) -> bool:
        """Read the one chunk that holds all layers of a tile, and keep those wanted."""
        if self.everything:
            return file.read(first, [out], self.checksums, wait)
        whole = np.empty(self.array.chunk_bytes, np.uint8)
        done = file.read(first, [whole], self.checksums, wait)
        if done:
            size = self.array.bytes_per_layer
            for place, layer in zip(self.places, self.layers, strict=True):
                out[place] = whole[layer * size : (layer + 1) * size]
        return done


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Where a sequence of whole numbers can be cut into stretches that count up by one: (start, stop)."""
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return list(zip([0, *cuts], [*cuts, len(numbers)], strict=True))
