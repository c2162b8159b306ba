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

    def read(
        self,
        rows: Indices,
        steps: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Read some tiles.

        Args:
            rows: Which tiles, in the order wanted.
            steps: Which timesteps, by position; None for all.
            layers: Which layers of the group, by position; None for all.
            out: An array to fill, at least B tiles long and else of the result's shape; None makes one.

        Returns:
            (B, T, L, …) of the stored dtype.

        Raises:
            StoreError: a file is damaged or cannot be read.
        """
        steps = range(self.shape[1]) if steps is None else steps
        layers = range(self.shape[2]) if layers is None else layers
        shape = (len(rows), len(steps), len(layers), *self.shape[3:])
        out = np.empty(shape, self.dtype) if out is None else out[: len(rows)]
        if not len(rows):
            return out
        stretches, room = runs(layers), Checksums(max(1, len(layers)))
        tiles = out.reshape(*shape[:3], -1).view(np.uint8)
        shards, places = (part.tolist() for part in np.divmod(rows, self.tiles_per_shard))
        for number, step in enumerate(steps):
            for i in np.argsort(rows, kind="stable").tolist():
                self._read_tile(shards[i], step, places[i], layers, stretches, tiles[i, number], room)
        return out

    def _read_tile(
        self,
        shard: int,
        step: int,
        place: int,
        layers: Sequence[int],
        stretches: Sequence[tuple[int, int]],
        out: Bytes,
        room: Checksums,
    ) -> None:
        first = place * self.chunks_per_tile
        try:
            file = self.files.get((self.key, shard, step), lambda: self._open(shard, step))
            if self.layers_per_chunk > 1:
                self._read_whole(file, first, layers, out, room)
                return
            for start, stop in stretches:
                file.read(first + layers[start], list(out[start:stop]), room)
        except (DamagedShardError, OSError, RuntimeError) as error:  # blosc raises RuntimeError
            tile, path = shard * self.tiles_per_shard + place, self.store.path
            raise StoreError(
                f"{path}: {self.key}, tile {tile}: cannot be read ({error}); `satdifuser store verify --deep "
                f"{path}` names the damaged files and how to mend it"
            ) from error

    def _open(self, shard: int, step: int) -> ShardFile:
        places = self.tiles_per_shard * self.chunks_per_tile
        path = self.store.locate(f"{self.key}/c/{shard}/{step}/{self.last_key}")
        return ShardFile(path, places, self.chunk_bytes, self.compressed)

    def _read_whole(
        self, file: ShardFile, first: int, layers: Sequence[int], out: Bytes, room: Checksums
    ) -> None:
        """Read the one chunk that holds all layers of a tile, and keep those wanted."""
        if len(layers) == self.layers_per_chunk and runs(layers) == [(0, len(layers))]:
            file.read(first, [out.reshape(-1)], room)
            return
        whole = np.empty(self.chunk_bytes, np.uint8)
        file.read(first, [whole], room)
        out[:] = whole.reshape(self.layers_per_chunk, -1)[list(layers)]


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Where a sequence of whole numbers can be cut into stretches that count up by one: (start, stop)."""
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return list(zip([0, *cuts], [*cuts, len(numbers)], strict=True))
