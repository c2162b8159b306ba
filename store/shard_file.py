"""One file of feature arrays: the chunks of a shard, a CRC32C behind each, and an index of them at the end.

This is Zarr's own sharding format (``sharding_indexed`` over ``bytes``, ``blosc`` where the encoding
compresses, and ``crc32c``), which any Zarr v3 reader opens. It is written and read here without zarr-python,
for speed alone. Chunks lie in C order, so that neighbouring layers of a tile are one request.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from awscrt.checksums import crc32c  # twice as fast as the one that zarr-python uses
from numcodecs import blosc
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
CHECKSUM_BYTES = 4
ENTRY_BYTES = 16  # offset and size of a chunk, uint64 each
ABSENT = np.iinfo(np.uint64).max  # both numbers of a chunk that is not there
CACHED_BYTES = 1024 * 1024  # of one request: what stays in the cache until its checksum is taken
MOST_AT_ONCE = 1024  # chunks of one request
WITHOUT_WAITING: int = getattr(os, "RWF_NOWAIT", 0)  # on Linux; elsewhere every read waits
BLOSC_LEVEL = 1
BLOSC_OVERHEAD = 16  # bytes at most, and at least


class NotInMemoryError(Exception):
    """What was asked for without waiting must be waited for."""


class DamagedShardError(ValueError):
    """A shard file is not what its index or its checksums say."""


def pack_shard(chunks: Iterable[Bytes], places: int, itemsize: int = 0) -> list[bytes | memoryview]:
    """Lay out a shard.

    Args:
        chunks: The raw bytes of the first chunks, in C order.
        places: How many chunks a whole shard has; those beyond `chunks` are marked absent.
        itemsize: Bytes per value where chunks are to be compressed; 0 where not.

    Returns:
        The file's content, in parts that follow each other.
    """
    parts: list[bytes | memoryview] = []
    index = np.full((places, 2), ABSENT, "<u8")
    offset = 0
    for i, chunk in enumerate(chunks):
        body = compress(chunk, itemsize) if itemsize else chunk
        parts += [body if isinstance(body, bytes) else body.data, checksum(body)]
        size = len(body) + CHECKSUM_BYTES
        index[i] = offset, size
        offset += size
    table = index.tobytes()
    return [*parts, table, checksum(table)]


def compress(chunk: Bytes, itemsize: int) -> bytes:
    """Compress a chunk's raw bytes as the blosc codec of the arrays says."""
    typed = chunk.view(f"u{itemsize}")
    packed: bytes = blosc.compress(typed, b"zstd", BLOSC_LEVEL, blosc.BITSHUFFLE)
    return packed


def checksum(data: bytes | Bytes) -> bytes:
    """CRC32C as it stands behind what it covers."""
    return struct.pack("<I", crc32c(data))


def chunks_at_once(chunk_bytes: int) -> int:
    """How many successive chunks are read by one request, and checked while the cache holds them."""
    return max(1, min(MOST_AT_ONCE, CACHED_BYTES // (chunk_bytes + CHECKSUM_BYTES)))


@cache
def checksums_of_whole(chunk_bytes: int) -> list[int]:
    """The CRC32C of successive chunks with the checksum behind each, where they are whole.

    It is the same whatever the chunks hold: a message and its own CRC leave a CRC at one residue, from which
    the next message goes on.

    Args:
        chunk_bytes: Raw bytes of a chunk.

    Returns:
        At place k that of k chunks, up to `chunks_at_once`.
    """
    empty = bytes(chunk_bytes)
    unit, found = empty + struct.pack("<I", crc32c(empty)), [0]
    for _ in range(chunks_at_once(chunk_bytes)):
        found.append(crc32c(unit, found[-1]))
    return found


class ShardFile:
    """An open shard file.

    Args:
        path: The file.
        places: How many chunks a whole shard has.
        chunk_bytes: Raw bytes of a chunk.
        compressed: Whether chunks are compressed.

    Raises:
        DamagedShardError: the index is damaged or points out of the file.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, places: int, chunk_bytes: int, compressed: bool) -> None:
        self.path, self.chunk_bytes, self.compressed = path, chunk_bytes, compressed
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)  # once nobody reads any more
        self._offsets, self._sizes = self._read_index(places)
        self._unit = unit = chunk_bytes + CHECKSUM_BYTES
        present = self._sizes.count(unit)
        in_order = list(range(0, present * unit, unit))
        self._ordered = present if not compressed and self._offsets[:present] == in_order else 0
        self._whole = checksums_of_whole(chunk_bytes) if self._ordered else []

    def _read_index(self, places: int) -> tuple[list[int], list[int]]:
        """Offset and size of every chunk; 0 and 0 of one that is absent."""
        size, length = os.fstat(self._descriptor).st_size, places * ENTRY_BYTES
        start = size - length - CHECKSUM_BYTES
        if start < 0:
            raise DamagedShardError(f"{size} bytes, too few for its index")
        tail = os.pread(self._descriptor, length + CHECKSUM_BYTES, start)
        if len(tail) != length + CHECKSUM_BYTES or checksum(tail[:length]) != tail[length:]:
            raise DamagedShardError("the checksum of its index is wrong")
        index = np.frombuffer(tail, "<u8", 2 * places).reshape(places, 2)
        present = index[:, 0] != ABSENT
        offsets, sizes = index[present].T
        inside = (offsets <= start) & (sizes <= start) & (offsets + sizes <= start)
        limit = self.chunk_bytes + CHECKSUM_BYTES
        fitting = sizes <= limit + blosc.MAX_OVERHEAD if self.compressed else sizes == limit
        if not (inside & fitting & (sizes > CHECKSUM_BYTES)).all():
            raise DamagedShardError("its index points out of the file, or to a chunk of another size")
        offsets, sizes = np.where(present[:, None], index, 0).T
        return offsets.tolist(), sizes.tolist()

    def read(self, first: int, count: int, out: Bytes, wait: bool = True) -> bool:
        """Read successive chunks and check them.

        Args:
            first: Number of the first chunk.
            count: How many, at most `chunks_at_once`.
            out: What to fill, (count * (chunk_bytes + 4),) uint8: raw bytes of each chunk and room for its
                checksum.
            wait: Whether to wait for the disk; if not, and they are not all in memory, let it begin.

        Returns:
            Whether they were read.

        Raises:
            DamagedShardError: a chunk is absent or differs from its checksum, or the file ends early.
        """
        flags = 0 if wait else WITHOUT_WAITING
        try:
            if first + count <= self._ordered:  # as this package writes them
                self._fill(first * self._unit, out, flags)
                if crc32c(out) != self._whole[count]:
                    raise DamagedShardError("the checksum of a chunk is wrong")
            else:
                self._read_each(first, out.reshape(count, self._unit), flags)
        except NotInMemoryError:
            self._announce(first, count)
            return False
        return True

    def _announce(self, first: int, count: int) -> None:
        """Let the system begin to fetch successive chunks."""
        start, last = self._offsets[first], first + count - 1
        length = self._offsets[last] + self._sizes[last] - start
        os.posix_fadvise(self._descriptor, start, max(0, length), os.POSIX_FADV_WILLNEED)

    def _read_each(self, first: int, chunks: Bytes, flags: int) -> None:
        """Read and check successive chunks, (chunk, byte), wherever each lies."""
        for number, chunk in enumerate(chunks, first):
            offset, size = self._offsets[number], self._sizes[number] - CHECKSUM_BYTES
            if size < 0:
                raise DamagedShardError(f"chunk {number} is absent")
            body = self._room_for_packed(offset, size) if self.compressed else chunk
            self._fill(offset, body, flags)
            if checksum(body[:size]) != body[size:].tobytes():
                raise DamagedShardError(f"the checksum of the chunk at byte {offset} is wrong")
            if self.compressed:
                self._inflate(offset, body[:size], chunk[: self.chunk_bytes])

    def _room_for_packed(self, offset: int, size: int) -> Bytes:
        if not BLOSC_OVERHEAD <= size <= self.chunk_bytes + BLOSC_OVERHEAD:
            raise DamagedShardError(f"the chunk at byte {offset} cannot be of {size + CHECKSUM_BYTES} bytes")
        return np.empty(size + CHECKSUM_BYTES, np.uint8)

    def _inflate(self, offset: int, packed: Bytes, chunk: Bytes) -> None:
        if int(packed[4:8].view("<u4")[0]) != self.chunk_bytes:
            raise DamagedShardError(
                f"the chunk at byte {offset} does not inflate to {self.chunk_bytes} bytes"
            )
        blosc.decompress(packed, chunk)

    def _fill(self, offset: int, out: Bytes, flags: int) -> None:
        """Fill a buffer from the file."""
        try:
            got = os.preadv(self._descriptor, [out.data], offset, flags)
        except OSError as error:
            if flags:  # EAGAIN, or a file system that cannot tell
                raise NotInMemoryError from error
            raise
        if got < len(out):
            self._fill_rest(offset, out, got, flags)

    def _fill_rest(self, offset: int, out: Bytes, got: int, flags: int) -> None:
        """Go on after a signal, or where one request could not carry all."""
        if flags:
            raise NotInMemoryError
        while got < len(out):
            more = os.preadv(self._descriptor, [out.data[got:]], offset + got)
            if not more:
                raise DamagedShardError("it ends early")
            got += more
