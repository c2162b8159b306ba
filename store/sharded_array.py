"""Reads random tiles of one feature array, with just the timesteps and layers that are asked for.

Legend: B tiles of a request, T timesteps, L layers of the group, … the rest of an array's shape.
"""

from __future__ import annotations

import resource
import weakref
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import StoreError
from satdifuser.store.shard_file import CHECKSUM_BYTES, Bytes, DamagedShardError, ShardFile, chunks_at_once

if TYPE_CHECKING:
    from satdifuser.store.shards import ShardedStore

Indices = NDArray[np.intp]
SHARE_OF_DESCRIPTORS = 4  # open at most this part of the files a process may have open
MOST_DESCRIPTORS = 4096
FileKey = tuple[str, int, int]  # array, shard, timestep
Stored = dict[str, dict[str, NDArray[Any]]]
"""Group name to array name (values; scale, offset) to (B, T, L, …), as kept."""
Part = tuple[int, int, int, int]  # shard, timestep, place in the shard, which row of the buffer to fill


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
            self.store.require_unchanged()
            self.files.add(key, file)
        return file


class Buffer:
    """Memory for some tiles of an array, laid out as their chunks lie in the files, a checksum behind each.

    ``values`` is the array in it, (B, T, L, …) of the stored dtype; between its layers lie the checksums.

    Args:
        array: The array.
        tiles: How many tiles.
        steps: Which timesteps, by position.
        layers: Which layers of the group, by position.
    """

    def __init__(self, array: ShardedArray, tiles: int, steps: Sequence[int], layers: Sequence[int]) -> None:
        self.array, self.steps, self.layers = array, steps, layers
        shape = (tiles, len(steps), len(layers), *array.shape[3:])
        self.picks = array.layers_per_chunk > 1 and list(layers) != list(range(array.shape[2]))
        """Whether chunks hold more layers than wanted, so that they are read elsewhere first."""
        layer = array.bytes_per_layer
        if array.layers_per_chunk == 1:  # each layer is a chunk
            layer += CHECKSUM_BYTES
        row = layer * len(layers)
        if array.layers_per_chunk > 1 and not self.picks:  # all are one
            row += CHECKSUM_BYTES
        memory = np.empty((tiles * len(steps), row), np.uint8)
        inner = np.empty((1, *array.shape[3:]), array.dtype).strides[1:]
        strides = (len(steps) * row, row, layer, *inner)
        self.values: NDArray[Any] = np.ndarray(shape, array.dtype, memory, strides=strides)
        self.rows: list[Bytes] = list(memory)
        """The bytes of each tile and timestep."""
        self.stretches = self._stretches()

    def _stretches(self) -> list[tuple[int, int, slice]]:
        """What a tile and timestep is read as: the first chunk, how many, and which bytes of its row."""
        if self.array.layers_per_chunk > 1:
            return [(0, 1, slice(None))]
        unit = self.array.chunk_bytes + CHECKSUM_BYTES
        cuts = runs(self.layers, chunks_at_once(self.array.chunk_bytes))
        return [(self.layers[a], b - a, slice(a * unit, b * unit)) for a, b in cuts]


class Buffers:
    """Memory for the feature arrays of some tiles.

    Args:
        held: Group name to array name to the array's memory.
        bytes_per_tile: Of all arrays.
    """

    def __init__(self, held: Mapping[str, Mapping[str, Buffer]], bytes_per_tile: int) -> None:
        self._held, self.bytes_per_tile = held, bytes_per_tile
        self.all = [buffer for arrays in held.values() for buffer in arrays.values()]

    def first(self, tiles: int) -> Stored:
        """The arrays of the first tiles."""
        return {
            group: {name: buffer.values[:tiles] for name, buffer in arrays.items()}
            for group, arrays in self._held.items()
        }


class Request:
    """Some tiles to read into a buffer, first what the system holds in memory, then the rest; for one thread.

    Args:
        buffer: What to fill.
        rows: Which tiles, in the order wanted.
        first: Which tile of the buffer the first of them is.
    """

    def __init__(self, buffer: Buffer, rows: Indices, first: int) -> None:
        self.buffer, self.array = buffer, buffer.array
        self._pending = self._parts(rows.tolist(), first)

    def _parts(self, rows: list[int], first: int) -> list[Part]:
        """What to read, in the order in which it lies in the files."""
        each, steps = self.array.tiles_per_shard, self.buffer.steps
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return [
            (rows[i] // each, step, rows[i] % each, (first + i) * len(steps) + number)
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
        read = self._read_and_pick if self.buffer.picks else self._read
        part: Part = (0, 0, 0, 0)
        try:
            for part in self._pending:
                if not read(array.file(part[0], part[1]), part[2], part[3], wait):
                    left.append(part)
        except (DamagedShardError, OSError, RuntimeError) as error:  # blosc raises RuntimeError
            array.store.require_unchanged()
            tile, path = part[0] * array.tiles_per_shard + part[2], array.store.path
            raise StoreError(
                f"{path}: {array.key}, tile {tile}: cannot be read ({error}); `satdifuser store verify "
                f"--deep {path}` names the damaged files and how to mend it"
            ) from error
        return left

    def _read(self, file: ShardFile, place: int, row: int, wait: bool) -> bool:
        """Read a tile and timestep into its row."""
        first, out, done = place * self.array.chunks_per_tile, self.buffer.rows[row], True
        for chunk, count, where in self.buffer.stretches:
            done &= file.read(first + chunk, count, out[where], wait)
        return done

    def _read_and_pick(self, file: ShardFile, place: int, row: int, wait: bool) -> bool:
        """Read the one chunk that holds all layers of a tile, and keep those wanted."""
        size = self.array.bytes_per_layer
        whole = np.empty(self.array.chunk_bytes + CHECKSUM_BYTES, np.uint8)
        done = file.read(place, 1, whole, wait)
        if done:
            by_layer = whole[:-CHECKSUM_BYTES].reshape(-1, size)
            self.buffer.rows[row].reshape(-1, size)[:] = by_layer[list(self.buffer.layers)]
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
